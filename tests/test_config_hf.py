"""Every key of a config.json is used as transformers uses it, harmless, or refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from zofl_jax.models import architectures, config_hf, config_keys, transformer, weights

apply = jax.jit(transformer.apply, static_argnums=0)
MODELS = {"opt": "opt-125m", "llama": "llama-3.2-1b", "qwen2": "qwen2.5-0.5b"}
MODELS |= {"qwen3": "qwen3-0.6b", "smollm3": "smollm3-3b"}
FAMILIES = list(MODELS)
TOKENS = np.arange(7)[None] * 5 + 3
MASK = np.ones(TOKENS.shape, bool)

PUBLISHED_KEYS = {  # what the published files hold beside what config_to_fields writes
    "opt": {
        "_name_or_path": "facebook/opt-125m",
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "dropout": 0.1,
        "init_std": 0.02,
        "layer_norm_elementwise_affine": True,
        "layerdrop": 0.0,
        "prefix": "</s>",
        "transformers_version": "4.21.0.dev0",
        "use_cache": True,
    },
    "llama": {
        "attention_dropout": 0.0,
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "use_cache": True,
    },
    "qwen2": {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_window_layers": 21,
        "sliding_window": 32768,
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "qwen3": {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_window_layers": 28,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    },
    "smollm3": {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_types": ["full_attention"] * 36,
        "max_window_layers": 28,
        "no_rope_layer_interval": 4,
        "pretraining_tp": 2,
        "sliding_window": None,
        "use_cache": False,
        "use_sliding_window": False,
    },
}


def fields_of(family):
    return config_hf.config_to_fields(architectures.named(MODELS[family]))


@pytest.fixture(scope="module")
def tiny():
    return pytest.importorskip("tiny_language_models")


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """The folder and the config.json of a random model of each family, made when asked for."""
    made = {}
    smollm3 = {"no_rope_layers": [0, 1]}
    smollm3["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}

    def folder(name):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            changes = {"num_hidden_layers": 2} | (smollm3 if name == "smollm3" else {})
            tiny.random_model(name, **changes).save_pretrained(path)
            made[name] = path, json.loads((path / "config.json").read_text())
        return made[name]

    return folder


def logits(tiny, folder, fields):
    """Returns what transformers and we compute of a folder with another config.json."""
    (folder / "config.json").write_text(json.dumps(fields))
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    config, params, _ = weights.load(f"hf:{folder}")
    return tiny.scores(model, TOKENS, MASK), np.asarray(apply(config, params, TOKENS, MASK))


@pytest.mark.parametrize("name", architectures.PUBLISHED)
def test_configurations_survive_the_translation(name, tiny):
    config = architectures.named(name)
    fields = config_hf.config_to_fields(config)
    assert config_hf.config_from_fields(fields) == config
    assert config_hf.config_from_fields(fields | PUBLISHED_KEYS[config.family]) == config
    model_type = fields.pop("model_type")
    theirs = tiny.transformers.AutoConfig.for_model(model_type, **fields).to_dict()
    assert config_hf.config_from_fields(theirs) == config  # both spellings of rotary settings


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_transformers_is_known_and_has_its_default(family, tiny):
    theirs = tiny.transformers.AutoConfig.for_model(family)
    used = config_keys.USED[family]
    known = config_keys.HARMLESS | {"architectures", *used, *config_keys.NEUTRAL[family]}
    defaults = {field.name: field.default for field in dataclasses.fields(theirs)}
    assert {*theirs.to_dict(), *defaults} - {"model_type"} <= known
    for name, key in used.items():
        if key.default is not config_keys.REQUIRED and name in defaults:
            assert key.default == defaults[name], name
    theta = used["rope_theta"].default if "rope_theta" in used else theirs.default_theta
    assert theta == theirs.default_theta


@pytest.mark.parametrize("family", FAMILIES)
def test_harmless_keys_change_no_logits_of_transformers(family, tiny, folders):
    folder, fields = folders(family)
    odd = dict.fromkeys(config_keys.HARMLESS, 1) | {"use_cache": True, "transformers_weights": None}
    odd |= {key: "float32" for key in odd if key.endswith("dtype")}
    odd |= {key: "eager" for key in odd if key.endswith("attn_implementation")}
    odd |= {key: True for key in odd if key.startswith(("output_", "return_"))}
    odd |= {key: "1.0" for key in odd if key.endswith(("name_or_path", "version"))}
    odd |= {key: 0.5 for key in odd if key.startswith("init")}
    odd |= {key: {} for key in odd if key.startswith("base_model_")}
    odd |= {"id2label": {"0": "no"}, "label2id": {"no": 0}, "problem_type": "regression"}
    assert config_hf.config_from_fields(fields | odd) == config_hf.config_from_fields(fields)
    load = tiny.transformers.AutoModelForCausalLM.from_pretrained
    before = tiny.scores(load(folder).eval(), TOKENS, MASK)
    (folder / "config.json").write_text(json.dumps(fields | odd))
    after = tiny.scores(load(folder).eval(), TOKENS, MASK)
    (folder / "config.json").write_text(json.dumps(fields))
    np.testing.assert_allclose(after, before, atol=1e-5)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # theta beside the scaling, which wins over rope_parameters; its context is the model's
        ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500, "hidden_act": "swish"}),
        # missing keys: transformers' own theta, every second layer rotates
        ("smollm3", dict.fromkeys(("rope_parameters", "no_rope_layers", "rms_norm_eps"))
         | {"no_rope_layer_interval": 2}),
        # windows that no layer uses
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2,
                   "rms_norm_eps": 0.01}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 2,
                   "layer_types": None, "rope_parameters": None, "rope_theta": 300.0}),
        ("opt", {"activation_function": "gelu_python"}),
    ],
)  # fmt: skip
def test_keys_that_are_used_give_the_logits_of_transformers(name, changes, tiny, folders):
    folder, fields = folders(name)
    missing = {key for key, value in changes.items() if value is None}
    changed = {key: value for key, value in (fields | changes).items() if key not in missing}
    assert config_hf.config_from_fields(changed) != config_hf.config_from_fields(fields)
    theirs, ours = logits(tiny, folder, changed)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    (folder / "config.json").write_text(json.dumps(fields))


REFUSED = {
    "logit_scale": 0.5,
    "attn_logit_softcapping": 50.0,
    "embedding_multiplier": 12.0,
    "clip_qkv": 8.0,
    "num_local_experts": 4,
    "a_key_of_next_year": False,
    "is_causal": False,
    "is_encoder_decoder": True,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 16,
    "per_layer_config": {"1": {"rms_norm_eps": 0.1}},
    "auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"},
    "quantization_config": {"quant_method": "gptq", "bits": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_may_change_the_function_are_refused_by_name(family):
    fields = fields_of(family)
    for key, value in REFUSED.items():
        message = rf"config\.json has {key} = .*, which may change what the model computes"
        with pytest.raises(ValueError, match=message):
            config_hf.config_from_fields(fields | {key: value})
        config_hf.config_from_fields(fields | {key: None})
    with pytest.raises(ValueError, match=r"has a = 1, b = 1, c = 1, d = 1, e = 1 and 1 more, wh"):
        config_hf.config_from_fields(fields | dict.fromkeys("abcdef", 1))
    with pytest.raises(ValueError, match=r"has architectures = .*ForSequenceClassification"):
        name = f"{config_hf.CLASSES[family]}ForSequenceClassification"
        config_hf.config_from_fields(fields | {"architectures": [name]})
    for key, value in {
        "hidden_size": 32.0,
        "vocab_size": True,
        "tie_word_embeddings": None,
    }.items():
        with pytest.raises(ValueError, match=f"has {key} = {value}, which is of the wrong type"):
            config_hf.config_from_fields(fields | {key: value})


WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("llama", {"sliding_window": 8}, "sliding_window = 8"),
        ("qwen2", WINDOWS, "use_sliding_window=true is not supported"),
        ("qwen3", WINDOWS, "use_sliding_window=true is not supported"),
        ("smollm3", WINDOWS, "use_sliding_window=true is not supported"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 28}, "must be 'full_attention'"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias = True"),
        ("smollm3", {"no_rope_layers": [1]}, "36 entries, one a layer, got 1"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "must be >= 1, got 0"),
        ("opt", {"layer_norm_elementwise_affine": False}, "norms need weights"),
        ("opt", {"layer_norm_eps": 1e-3}, "layer_norm_eps = 0.001"),
        ("opt", {"activation_function": "gelu_new"}, "activation 'gelu_new' is not supported"),
        ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "scaling 'yarn' is not supp"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported"),
        ("llama", {"rope_scaling": {"mrope_section": [16, 24, 24]}}, "mrope_section = "),
        ("llama", {"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "factor = 0.5"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_fac"),
    ],
)
def test_variants_that_are_not_implemented_are_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        config_hf.config_from_fields(fields_of(family) | changes)


def test_configurations_that_no_config_json_can_say_are_refused():
    config = architectures.named("qwen2.5-0.5b", qkv_bias=False)
    with pytest.raises(ValueError, match=r"of a qwen2 model cannot say that qkv_bias = False: ch"):
        config_hf.config_to_fields(config)
    plain = architectures.named("llama-3.2-1b", rope_layers=(True,) * 16)
    assert config_hf.config_from_fields(config_hf.config_to_fields(plain)).rope_layers is None
