"""GGUF files of the Llama family: metadata, tensor names, dequantised tensors.

Read through PyPI's `gguf`. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
A key of the architecture that may change what the model computes and isn't used is refused.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from zofl_jax.models import blocks, config_keys
from zofl_jax.models.architectures import Config, RopeScaling

try:
    import gguf
except ImportError as error:
    raise ImportError("GGUF files need gguf: pip install zofl-jax[language]") from error

FAMILIES = ("llama", "qwen2", "qwen3", "smollm3")
"""Supported values of general.architecture."""

MODULES = {
    "embed/tokens": "token_embd",
    "layers/attention_norm": "blk.{}.attn_norm",
    "layers/attention/q": "blk.{}.attn_q",
    "layers/attention/k": "blk.{}.attn_k",
    "layers/attention/v": "blk.{}.attn_v",
    "layers/attention/o": "blk.{}.attn_output",
    "layers/attention/q_norm": "blk.{}.attn_q_norm",
    "layers/attention/k_norm": "blk.{}.attn_k_norm",
    "layers/mlp_norm": "blk.{}.ffn_norm",
    "layers/mlp/gate": "blk.{}.ffn_gate",
    "layers/mlp/up": "blk.{}.ffn_up",
    "layers/mlp/down": "blk.{}.ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}
"""The module that each of our paths has in GGUF; "{}" is the layer."""

_USED = (
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "context_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
)
_HARMLESS = (
    "vocab_size",  # the embedding table says
    "tensor_data_layout",
    "pooling_type",  # of embeddings
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",  # of scalings that are refused
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0,),  # 1 / √head_dim
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "rope.scale": (1,),
    "rope.scaling.attn_factor": (1,),
}

_ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message; llama.cpp stops at each
_FREQUENCY_DIVISORS = "rope_freqs.weight"
_NOPE_INTERVAL = 4  # SmolLM3's; the format has no key for it

# llama.cpp turns neighbouring features of these families and reorders q and k to suit
_INTERLEAVED = ("llama", "smollm3")


class Tensor(NamedTuple):
    """Where a tensor lies and how to read it."""

    name: str
    path: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # rows first, as everywhere but in GGUF
    stored_shape: tuple[int, ...]
    stored_dtype: np.dtype
    offset: int
    interleaved_heads: int  # 0 if the rows are in order

    def read(self) -> np.ndarray:
        """Returns the tensor as float32, rows in order.

        Raises:
          ValueError: for a quantisation that the gguf package doesn't read.
        """
        count = int(np.prod(self.stored_shape))
        stored = np.fromfile(self.path, self.stored_dtype, count, offset=self.offset)
        stored = stored.reshape(self.stored_shape)
        if self.interleaved_heads:
            pairs = stored.reshape(self.interleaved_heads, -1, 2, *self.stored_shape[1:])
            stored = pairs.swapaxes(1, 2).reshape(self.stored_shape)
        try:
            return gguf.dequantize(stored, self.kind)
        except NotImplementedError as error:
            raise ValueError(
                f"tensor {self.name} is stored as {self.kind.name}, which gguf can't dequantise: "
                "quantise the model in another way"
            ) from error


def open_file(path: str) -> tuple[Config, dict[str, Tensor], dict[str, Any]]:
    """Returns the configuration, the tensors by name and the tokenizer's metadata of a file.

    Raises:
      ValueError: if it isn't a GGUF file or is one part of several; for an architecture or a
        rotary scaling that isn't supported; for keys of the architecture that may change what
        the model computes.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file: pass gguf:PATH of a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a GGUF file, or is cut short: {error}") from error
    family = _value(reader, "general.architecture")
    if family not in FAMILIES:
        raise ValueError(
            f"GGUF architecture {family!r} is not supported: use one of {', '.join(FAMILIES)}"
        )
    _check_whole(path, reader)
    shapes = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors}
    config = _config(family, lambda key: _value(reader, key), shapes)
    _check_keys(reader, config)
    tensors = {t.name: _tensor(path, config, t) for t in reader.tensors}
    # other families turn without them in llama.cpp too
    divisors = tensors.pop(_FREQUENCY_DIVISORS, None) if family == "llama" else None
    if divisors is not None:
        scaling = _llama3_scaling(config, divisors.read())
        config = dataclasses.replace(config, rope_scaling=scaling)
    vocabulary = {key: _value(reader, key) for key in reader.fields if key.startswith("tokenizer.")}
    return config, tensors, vocabulary


def _config(family: str, get: Any, shapes: Mapping[str, tuple[int, ...]]) -> Config:
    def value(name: str, default: Any = None) -> Any:
        found = get(f"{family}.{name}")
        if found is None and default is None:
            raise ValueError(f"the GGUF metadata lack {family}.{name}: convert the model again")
        if isinstance(found, list) and found:  # one number for each layer
            if len(set(found)) > 1:
                raise ValueError(f"{family}.{name} = {found} is not supported: layers differ")
            found = found[0]
        return default if found is None else found

    width, heads, layers = (
        value(name) for name in ("embedding_length", "attention.head_count", "block_count")
    )
    scaling = value("rope.scaling.type", "linear")
    factor = value("rope.scaling.factor", value("rope.scale_linear", 1.0))
    if scaling not in ("none", "linear") or (scaling == "linear" and factor not in (0.0, 1.0)):
        raise ValueError(
            f"GGUF rotary scaling {scaling!r} by {factor} is not supported: use a model without"
        )
    if "token_embd.weight" not in shapes:
        raise ValueError("the GGUF file lacks the tensor token_embd.weight: convert it again")
    ends = [get(f"tokenizer.ggml.{end}_token_id") for end in _ENDS]
    return Config(
        family=family,
        vocab_size=shapes["token_embd.weight"][0],
        width=width,
        mlp_width=value("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv", heads),
        head_dim=value("attention.key_length", width // heads),
        max_positions=value("context_length"),
        tied="output.weight" not in shapes,
        norm_eps=value("attention.layer_norm_rms_epsilon"),
        qkv_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        rope_theta=value("rope.freq_base", 10000.0),
        rope_layers=(
            tuple((i + 1) % _NOPE_INTERVAL != 0 for i in range(layers))
            if family == "smollm3"
            else None
        ),
        bos_id=get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        pad_id=get("tokenizer.ggml.padding_token_id"),
    )


def _check_whole(path: str, reader: gguf.GGUFReader) -> None:
    kind, parts = _value(reader, "general.type"), _value(reader, "split.count")
    if kind not in (None, "model"):
        raise ValueError(f"{path} holds no model (general.type = {kind!r}): pass the model's file")
    if parts is not None and parts > 1:
        raise ValueError(
            f"{path} is one of {parts} parts of a model: join them with llama.cpp's "
            "llama-gguf-split --merge, and pass the whole"
        )


def _check_keys(reader: gguf.GGUFReader, config: Config) -> None:
    prefix = f"{config.family}."
    fields = {
        key.removeprefix(prefix): _value(reader, key)
        for key in reader.fields
        if key.startswith(prefix)
    }
    sizes = {
        "attention.value_length": (config.head_dim,),
        "rope.dimension_count": (config.head_dim,),
        "embedding_length_out": (config.width,),
    }
    where = f"the metadata of this {config.family} GGUF"
    config_keys.check_rest(where, fields, {*_USED, *_HARMLESS}, _NEUTRAL | sizes)


def _tensor(path: str, config: Config, tensor: gguf.ReaderTensor) -> Tensor:
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    module = tensor.name.split(".")[-2]
    return Tensor(
        name=tensor.name,
        path=path,
        kind=tensor.tensor_type,
        shape=tuple(int(n) for n in tensor.shape[::-1]),
        stored_shape=tensor.data.shape,
        stored_dtype=tensor.data.dtype,
        offset=tensor.data_offset,
        interleaved_heads=heads.get(module, 0) if config.family in _INTERLEAVED else 0,
    )


def _llama3_scaling(config: Config, divisors: np.ndarray) -> RopeScaling:
    """Returns Llama 3's scaling, of which the file keeps only what each frequency is divided by."""
    scaling = RopeScaling(float(divisors.max()))
    plain = blocks.rotary_frequencies(config)
    scaled = blocks.rotary_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    if not np.allclose(plain / scaled, divisors, rtol=1e-3):
        raise ValueError(
            f"{_FREQUENCY_DIVISORS} is not Llama 3's rotary scaling, which is all that is supported"
        )
    return scaling


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()
