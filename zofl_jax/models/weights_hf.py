"""Hugging Face folders: `config.json`, tensor names, safetensors.

Torch's own checkpoints (`pytorch_model.bin`) are pickles and are not read.
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from zofl_jax.models import safetensors_files
from zofl_jax.models.architectures import FAMILIES, Config, RopeScaling, check_family

FILES: tuple[str, ...] = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""What `download` fetches."""

_CLASSES = dict(zip(FAMILIES, ("OPT", "Llama", "Qwen2", "Qwen3", "SmolLM3"), strict=True))

_OPT_MODULES = {
    "embed/tokens": "model.decoder.embed_tokens",
    "embed/positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "layers/attention_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "layers/attention/q": "model.decoder.layers.{}.self_attn.q_proj",
    "layers/attention/k": "model.decoder.layers.{}.self_attn.k_proj",
    "layers/attention/v": "model.decoder.layers.{}.self_attn.v_proj",
    "layers/attention/o": "model.decoder.layers.{}.self_attn.out_proj",
    "layers/mlp_norm": "model.decoder.layers.{}.final_layer_norm",
    "layers/mlp/up": "model.decoder.layers.{}.fc1",
    "layers/mlp/down": "model.decoder.layers.{}.fc2",
    "final_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}
_LLAMA_MODULES = {
    "embed/tokens": "model.embed_tokens",
    "layers/attention_norm": "model.layers.{}.input_layernorm",
    "layers/attention/q": "model.layers.{}.self_attn.q_proj",
    "layers/attention/k": "model.layers.{}.self_attn.k_proj",
    "layers/attention/v": "model.layers.{}.self_attn.v_proj",
    "layers/attention/o": "model.layers.{}.self_attn.o_proj",
    "layers/attention/q_norm": "model.layers.{}.self_attn.q_norm",
    "layers/attention/k_norm": "model.layers.{}.self_attn.k_norm",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "layers/mlp/up": "model.layers.{}.mlp.up_proj",
    "layers/mlp/down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}


def module_names(config: Config) -> Mapping[str, str]:
    """Returns the module that each of our paths has in transformers; "{}" is the layer."""
    return _OPT_MODULES if config.family == "opt" else _LLAMA_MODULES


def open_folder(folder: str) -> tuple[Config, dict[str, safetensors_files.Tensor]]:
    """Returns the configuration and the tensors, by name, of a Hugging Face folder.

    Raises:
      ValueError: if there is no `config.json` or no safetensors, or a shard is missing.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise ValueError(f"{folder} holds no config.json: pass a Hugging Face model folder")
    with open(path) as file:
        config = config_from_fields(json.load(file))
    found: dict[str, safetensors_files.Tensor] = {}
    for shard in _shards(folder):
        found |= safetensors_files.tensors(os.path.join(folder, shard))
    if not any(name.startswith("model.") for name in found):  # saved without the head
        found = {
            name if name == "lm_head.weight" else f"model.{name}": found[name] for name in found
        }
    if config.tied:
        found.pop("lm_head.weight", None)  # some files repeat the embedding table
    # rotary frequencies that old files keep beside the weights
    return config, {name: t for name, t in found.items() if not name.endswith("inv_freq")}


def save_folder(
    folder: str,
    config: Config,
    specs: Mapping[str, tuple[tuple[int, ...], Any]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes `config.json` and `model.safetensors`.

    Args:
      folder: made if it doesn't exist.
      config: the model.
      specs: name -> (shape, dtype) of each tensor.
      read: name -> tensor; called once for each, in order.
    """
    os.makedirs(folder, exist_ok=True)
    safetensors_files.write(os.path.join(folder, "model.safetensors"), specs, read)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config_to_fields(config), file, indent=2)


def download(name: str) -> str:
    """Returns the local folder of the model `name` ("owner/model" or "owner/model@revision").

    Files that are in the cache of huggingface_hub are not fetched again.

    Raises:
      ValueError: if it is neither in the cache nor to be had, or huggingface_hub is missing.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"downloading {name!r} needs huggingface_hub: pip install zofl-jax[language]"
        ) from error
    repository, _, revision = name.partition("@")
    try:
        return huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(FILES)
        )
    except (OSError, ValueError) as error:  # offline, unknown, gated, or not a valid name
        raise ValueError(
            f"{name!r} is not a folder here and could not be downloaded "
            f"({type(error).__name__}): check the name, or pass hf:FOLDER when offline"
        ) from error


def config_from_fields(fields: Mapping[str, Any]) -> Config:
    """Returns the configuration described by a Hugging Face `config.json`.

    Raises:
      ValueError: for an unknown architecture, a missing field, or a variant that is not
        implemented (sliding windows, other rotary scalings than Llama 3's).
    """
    family = fields.get("model_type", "missing")
    check_family(family)
    try:
        parts = _opt_parts(fields) if family == "opt" else _llama_parts(family, fields)
        eos = fields.get("eos_token_id")
        return Config(
            family=family,
            vocab_size=fields["vocab_size"],
            width=fields["hidden_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=fields["num_attention_heads"],
            max_positions=fields["max_position_embeddings"],
            tied=fields.get("tie_word_embeddings", family in ("opt", "smollm3")),
            bos_id=fields.get("bos_token_id"),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            pad_id=fields.get("pad_token_id"),
            **parts,
        )
    except KeyError as error:
        raise ValueError(f"config.json of a {family} model lacks {error}: complete it") from error


def config_to_fields(config: Config) -> dict[str, Any]:
    """Returns the fields of a Hugging Face `config.json`; the inverse of `config_from_fields`."""
    eos: Any = list(config.eos_ids) if len(config.eos_ids) > 1 else None
    fields: dict[str, Any] = {
        "model_type": config.family,
        "architectures": [f"{_CLASSES[config.family]}ForCausalLM"],
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


def _shards(folder: str) -> list[str]:
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.isfile(index):
        with open(index) as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
        missing = [s for s in shards if not os.path.isfile(os.path.join(folder, s))]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}: fetch all shards")
        return shards
    if os.path.isfile(os.path.join(folder, "model.safetensors")):
        return ["model.safetensors"]
    if any(name.endswith(".bin") for name in os.listdir(folder)):
        raise ValueError(
            f"{folder} holds torch .bin weights only, which are not read: save it once more with "
            "transformers' save_pretrained, or download a revision with safetensors"
        )
    raise ValueError(f"{folder} holds no model.safetensors: pass a Hugging Face model folder")


def _opt_parts(fields: Mapping[str, Any]) -> dict[str, Any]:
    if not fields.get("layer_norm_elementwise_affine", True):
        raise ValueError("layer_norm_elementwise_affine=false is not supported: norms need weights")
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    embed_width = fields.get("word_embed_proj_dim") or width
    pre_norm = fields.get("do_layer_norm_before", True)
    bias = fields.get("enable_bias", True)
    return {
        "mlp_width": fields["ffn_dim"],
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "embed_width": None if embed_width == width else embed_width,
        "activation": fields.get("activation_function", "relu"),
        "pre_norm": pre_norm,
        "final_norm": pre_norm and not fields.get("_remove_final_layer_norm", False),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
    }


def _llama_parts(family: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields.get("use_sliding_window"):
        raise ValueError("use_sliding_window=true is not supported: load a model without it")
    width, heads, layers = (
        fields[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    attention_bias = fields.get("attention_bias", False)
    theta, scaling = _rope(fields)
    rope_layers = None
    if family == "smollm3":
        interval = fields.get("no_rope_layer_interval", 4)
        rope = fields.get("no_rope_layers") or [(i + 1) % interval for i in range(layers)]
        rope_layers = tuple(bool(r) for r in rope[:layers])
    return {
        "mlp_width": fields["intermediate_size"],
        "num_kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or (128 if family == "qwen3" else width // heads),
        "activation": fields.get("hidden_act", "silu"),
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "qkv_bias": family == "qwen2" or attention_bias,
        "out_bias": family != "qwen2" and attention_bias,
        "mlp_bias": fields.get("mlp_bias", False),
        "qk_norm": family == "qwen3",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_layers": rope_layers,
    }


def _rope(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rotary scaling {kind!r} is not supported: use default or llama3")
    return theta, RopeScaling(
        rope["factor"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
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
