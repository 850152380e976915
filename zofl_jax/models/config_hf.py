"""`config.json` of Hugging Face folders, read as transformers 5 reads it.

`config_keys` says which keys are used; one that may change what the model computes and isn't
used is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from zofl_jax.models import config_keys
from zofl_jax.models.architectures import FAMILIES, Config, RopeScaling, check_family
from zofl_jax.models.config_keys import listed

CLASSES = dict(zip(FAMILIES, ("OPT", "Llama", "Qwen2", "Qwen3", "SmolLM3"), strict=True))
"""What the classes of transformers are called, by `model_type`."""

_ACTIVATIONS = {"swish": "silu", "gelu_python": "gelu"}  # other names of the same


def config_from_fields(fields: Mapping[str, Any]) -> Config:
    """Returns the configuration described by a Hugging Face `config.json`.

    Raises:
      ValueError: for an unknown architecture, a missing field or one of another type, and for
        every key that may change what the model computes and isn't used here: sliding windows,
        rotary scalings other than Llama 3's, quantisation, code of the model's own.
    """
    family = fields.get("model_type", "missing")
    check_family(family)
    fields = dict(fields)
    del fields["model_type"]
    _check_architectures(family, fields.pop("architectures", None))
    used = config_keys.USED[family]
    values = config_keys.read(f"config.json of a {family} model", fields, used)
    known = config_keys.HARMLESS.union(used)
    config_keys.check_rest("config.json", fields, known, config_keys.NEUTRAL[family])
    eos = values["eos_token_id"]
    ends = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return Config(
        family=family,
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        max_positions=values["max_position_embeddings"],
        tied=values["tie_word_embeddings"],
        bos_id=values["bos_token_id"],
        eos_ids=ends,
        pad_id=values["pad_token_id"],
        **(_opt_parts(values) if family == "opt" else _llama_parts(family, values)),
    )


def config_to_fields(config: Config) -> dict[str, Any]:
    """Returns the fields of a Hugging Face `config.json`; the inverse of `config_from_fields`.

    Raises:
      ValueError: for a model that the family's `config.json` cannot describe, such as a Qwen2
        without biases.
    """
    fields = _fields(config)
    again = config_from_fields(fields)
    if all(config.rope_layers or ()):
        config = dataclasses.replace(config, rope_layers=None)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    lost = {name: value for name, value in values.items() if getattr(again, name) != value}
    lost = {name: value for name, value in lost.items() if not name.endswith("_dtype")}
    if lost:
        raise ValueError(
            f"the config.json of a {config.family} model cannot say that {listed(lost)}: change "
            "the configuration, or its family"
        )
    return fields


def _fields(config: Config) -> dict[str, Any]:
    eos: Any = list(config.eos_ids) if len(config.eos_ids) > 1 else None
    fields: dict[str, Any] = {
        "model_type": config.family,
        "architectures": [f"{CLASSES[config.family]}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos or next(iter(config.eos_ids), None),
        "pad_token_id": config.pad_id,
        "torch_dtype": config.param_dtype,
    }
    if config.family == "opt":
        return fields | {
            "ffn_dim": config.mlp_width,
            "word_embed_proj_dim": config.embed_width or config.width,
            "do_layer_norm_before": config.pre_norm,
            "_remove_final_layer_norm": config.pre_norm and not config.final_norm,
            "activation_function": config.activation,
            "enable_bias": config.mlp_bias,
        }
    fields |= {
        "intermediate_size": config.mlp_width,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_fields(config.rope_scaling),
    }
    if config.family in ("llama", "qwen3", "smollm3"):
        fields["attention_bias"] = config.qkv_bias
    if config.family in ("llama", "smollm3"):
        fields["mlp_bias"] = config.mlp_bias
    if config.family == "smollm3":
        fields["no_rope_layers"] = [int(r) for r in config.rope_layers or [1] * config.num_layers]
    return fields


def _check_architectures(family: str, names: Any) -> None:
    """A model of another class may compute something else with tensors of the same names."""
    known = {f"{CLASSES[family]}{end}".lower() for end in ("ForCausalLM", "Model")}
    if names and {str(name).lower() for name in names} - known:
        raise ValueError(
            f"config.json has {listed({'architectures': names})}, which is not supported: only "
            f"{CLASSES[family]}ForCausalLM is"
        )


def _opt_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    if not values["layer_norm_elementwise_affine"]:
        raise ValueError("layer_norm_elementwise_affine=false is not supported: norms need weights")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    embed_width, pre_norm = values["word_embed_proj_dim"], values["do_layer_norm_before"]
    bias = values["enable_bias"]
    return {
        "mlp_width": values["ffn_dim"],
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "embed_width": None if embed_width == width else embed_width,
        "activation": _activation(values["activation_function"]),
        "pre_norm": pre_norm,
        "final_norm": pre_norm and not values["_remove_final_layer_norm"],
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
    }


def _llama_parts(family: str, values: Mapping[str, Any]) -> dict[str, Any]:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads, head_dim = values["num_key_value_heads"], values["head_dim"]
    attention_bias = values.get("attention_bias", False)
    theta, scaling = _rope(values)
    rope_layers = _rope_layers(values) if family == "smollm3" else None
    if family != "llama":
        _check_windows(values, rope_layers)
    return {
        "mlp_width": values["intermediate_size"],
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": width // heads if head_dim is None else head_dim,
        "activation": _activation(values["hidden_act"]),
        "norm_eps": values["rms_norm_eps"],
        "qkv_bias": family == "qwen2" or attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": values.get("mlp_bias", False),
        "qk_norm": family == "qwen3",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_layers": None if all(rope_layers or ()) else rope_layers,
    }


def _activation(name: str) -> str:
    return _ACTIVATIONS.get(name, name)


def _rope_layers(values: Mapping[str, Any]) -> tuple[bool, ...]:
    """Returns whether each layer of SmolLM3 rotates; the list wins over the interval."""
    layers, interval = values["num_hidden_layers"], values["no_rope_layer_interval"]
    rope = values["no_rope_layers"]
    if rope is None:
        if interval < 1:
            raise ValueError(f"no_rope_layer_interval must be >= 1, got {interval}")
        rope = [(i + 1) % interval for i in range(layers)]
    if len(rope) < layers:
        raise ValueError(f"no_rope_layers must have {layers} entries, one a layer, got {len(rope)}")
    return tuple(bool(r) for r in rope[:layers])


def _check_windows(values: Mapping[str, Any], rope_layers: tuple[bool, ...] | None) -> None:
    """Raises ValueError if a layer looks at a window of tokens only."""
    layers, types = values["num_hidden_layers"], values["layer_types"]
    if types is not None and (len(types) != layers or set(types) - {"full_attention"}):
        raise ValueError(
            f"config.json has {listed({'layer_types': types})}, which is not supported: all "
            f"{layers} layers must be 'full_attention'"
        )
    windows = values["use_sliding_window"] and values["sliding_window"] is not None
    if rope_layers is None:
        somewhere = values["max_window_layers"] < layers
    else:
        somewhere = not all(rope_layers)
    if types is None and windows and somewhere:
        raise ValueError("use_sliding_window=true is not supported: load a model without it")


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Reads `rope_scaling` and `rope_theta`, or what transformers 5 writes: `rope_parameters`."""
    rope = values["rope_scaling"] or values["rope_parameters"] or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3") or (
        kind == "linear" and rope.get("factor") != 1
    ):
        raise ValueError(f"rotary scaling {kind!r} is not supported: use default or llama3")
    where = "the rotary scaling in config.json"
    used = config_keys.LLAMA3_USED if kind == "llama3" else config_keys.ROPE_USED
    read = config_keys.read(where, rope, used)
    config_keys.check_rest(where, rope, used, config_keys.ROPE_NEUTRAL)
    theta = float(values["rope_theta"] if read["rope_theta"] is None else read["rope_theta"])
    if kind != "llama3":
        return theta, None
    return theta, RopeScaling(
        float(read["factor"]),
        float(read["low_freq_factor"]),
        float(read["high_freq_factor"]),
        read["original_max_position_embeddings"] or values["max_position_embeddings"],
    )


def _rope_scaling_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
