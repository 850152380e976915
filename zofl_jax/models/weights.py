"""Pretrained weights, from Hugging Face folders or GGUF files into stacked params, and back.

    config, params, tokenizer = load("gguf:SmolLM2-135M-Instruct.Q4_1.gguf")
    config, params, tokenizer = load("hf:HuggingFaceTB/SmolLM2-135M", dtype="bfloat16")
    save_hf("tuned", config, params, tokenizer)

Each tensor is copied once, into its slot of the stacked leaf; beyond the params themselves
there is never more in memory than one leaf and one tensor.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax import keys
from zofl_jax.core import Params
from zofl_jax.models import transformer, weights_hf
from zofl_jax.models.architectures import Config
from zofl_jax.models.config_keys import some
from zofl_jax.models.tokenizers import Tokenizer, fitted, from_folder, from_gguf

_SUFFIXES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class StoredTensor(Protocol):
    """A tensor in a file; matrices are [out, in] there and [in, out] here."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape it will be read in."""

    def read(self) -> np.ndarray:
        """Returns the tensor."""


class Slot(NamedTuple):
    """Where one tensor of a file goes in the params."""

    name: str  # in the file
    path: str  # of the leaf, such as "layers/mlp/up/kernel"
    layer: int | None  # index on the leaf's leading axis, None if the leaf isn't stacked
    transposed: bool
    shape: tuple[int, ...]  # in the file


def load(
    spec: str, dtype: str = "float32", compute_dtype: str | None = None
) -> tuple[Config, Params, Tokenizer | None]:
    """Returns the configuration, the params and the tokenizer (None if it has none) of a model.

    Args:
      spec: "gguf:PATH", "hf:FOLDER" or "hf:NAME", a model to download ("owner/model", with
        "@revision" behind it if need be).
      dtype: of the params: "float32", "bfloat16" or "float16".
      compute_dtype: of the activations, by default the same.

    Raises:
      ValueError: if there is no such model; for an architecture that isn't supported; for
        missing, unexpected or wrongly shaped tensors, and those that don't fit the dtype, by
        name; for vocabularies that differ.
    """
    kind, _, place = spec.partition(":")
    tensors: Mapping[str, StoredTensor]
    if kind == "gguf":
        from zofl_jax.models import weights_gguf  # so that hf: doesn't need the gguf package

        config, tensors, vocabulary = weights_gguf.open_file(place)
        modules: Mapping[str, str] = weights_gguf.MODULES
        tokenizer = from_gguf(vocabulary)
    elif kind == "hf":
        folder = place if os.path.isdir(place) else weights_hf.download(place)
        config, tensors = weights_hf.open_folder(folder)
        modules = weights_hf.module_names(config)
        tokenizer = from_folder(folder)
    else:
        raise ValueError(f"model {spec!r} is not understood: use gguf:PATH or hf:PATH_OR_NAME")
    config = dataclasses.replace(config, param_dtype=dtype, compute_dtype=compute_dtype or dtype)
    if tokenizer is not None:
        tokenizer = fitted(tokenizer, config.vocab_size)
    return config, _fill(config, modules, tensors), tokenizer


def save_hf(
    folder: str, config: Config, params: Params, tokenizer: Tokenizer | None = None
) -> None:
    """Writes a Hugging Face folder, which `load` and transformers read.

    What an older model in the folder leaves is replaced; see `weights_hf.save_folder`.

    Raises:
      ValueError: if the params aren't those of `config`, such as adapters that aren't merged;
        for a configuration that the family's `config.json` cannot describe.
    """
    leaves = _flatten(params)
    expected = _flatten(transformer.shapes(config))
    odd = sorted(set(leaves) ^ set(expected))
    odd += [p for p in leaves if p in expected and leaves[p].shape != expected[p].shape]
    if odd:
        raise ValueError(
            f"params do not fit the configuration at {some(odd)}: merge adapters first, "
            "and pass the configuration the params were made with"
        )

    def stored(slot: Slot) -> np.ndarray:
        leaf = leaves[slot.path]
        value = np.asarray(leaf if slot.layer is None else leaf[slot.layer])
        return value.T if slot.transposed else value

    slots = {slot.name: slot for slot in _slots(config, weights_hf.module_names(config))}
    specs = {name: (slot.shape, leaves[slot.path].dtype) for name, slot in slots.items()}
    # What was trained may be wider than what was not.
    widest = jnp.result_type(*jax.tree.leaves(params)).name
    config = dataclasses.replace(config, param_dtype=widest)
    save_tokenizer = None if tokenizer is None else tokenizer.save
    weights_hf.save_folder(folder, config, specs, lambda name: stored(slots[name]), save_tokenizer)


def _fill(
    config: Config, modules: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> Params:
    spec = transformer.shapes(config)
    slots: dict[str, list[Slot]] = {}
    for slot in _slots(config, modules):
        slots.setdefault(slot.path, []).append(slot)
    _check_names({slot.name for group in slots.values() for slot in group}, set(tensors))
    flat = _flatten(spec)
    filled = {}
    # the largest leaf first, while there is little beside it
    for path in sorted(flat, key=lambda path: -math.prod(flat[path].shape)):
        leaf = np.empty(flat[path].shape, flat[path].dtype)
        for slot in slots[path]:
            _copy(tensors[slot.name], slot, leaf)
        filled[path] = jnp.asarray(leaf).block_until_ready()  # a copy: frees the leaf
    return jax.tree.map_with_path(lambda path, _: filled[keys.path_name(path)], spec)


def _copy(tensor: StoredTensor, slot: Slot, leaf: np.ndarray) -> None:
    if tensor.shape != slot.shape:
        raise ValueError(
            f"tensor {slot.name} has shape {tensor.shape}, but the configuration asks for "
            f"{slot.shape}: pass the configuration that belongs to the weights"
        )
    value = tensor.read()
    _check_fits(slot.name, value, leaf.dtype)
    leaf[... if slot.layer is None else slot.layer] = value.T if slot.transposed else value


def _check_fits(name: str, value: np.ndarray, dtype: np.dtype) -> None:
    """Raises ValueError if the numbers of a tensor are beyond a dtype, or all too small for it."""
    if value.dtype == dtype or not value.size:
        return
    largest = max(abs(float(value.max())), abs(float(value.min())))
    limits = jnp.finfo(dtype)
    if float(limits.max) < largest < math.inf:
        problem = f"numbers up to {largest:.3g}, above the largest of {dtype.name}"
    elif 0 < largest <= float(limits.smallest_subnormal) / 2:
        problem = f"no number above {largest:.3g}, all of which are 0 in {dtype.name}"
    else:
        return
    wider = "bfloat16 or float32" if dtype == np.float16 else "float32"
    raise ValueError(f"tensor {name} holds {problem}: load the weights in {wider} (--dtype)")


def _slots(config: Config, modules: Mapping[str, str]) -> Iterator[Slot]:
    """Yields where each tensor of a file goes."""
    for path, spec in _flatten(transformer.shapes(config)).items():
        module, _, leaf = path.rpartition("/")
        name = f"{modules[module]}.{_SUFFIXES[leaf]}"
        transposed = leaf == "kernel"
        if path.startswith("layers/"):
            shape = spec.shape[:0:-1] if transposed else spec.shape[1:]
            for layer in range(config.num_layers):
                yield Slot(name.format(layer), path, layer, transposed, shape)
        else:
            shape = spec.shape[::-1] if transposed else spec.shape
            yield Slot(name, path, None, transposed, shape)


def _check_names(expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    problems = [f"lack {some(missing)}"] if missing else []
    problems += [f"hold the unexpected {some(unexpected)}"] if unexpected else []
    if problems:
        raise ValueError(
            f"the weights {' and '.join(problems)}: they are not those of this architecture"
        )


def _flatten(tree: Params) -> dict[str, Any]:
    return {
        keys.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
