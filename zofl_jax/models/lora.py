"""Train some of the params: a split by path, and low-rank adapters.

    trainable, frozen = split(params, lambda path: "bias" in path)
    trainable, frozen = add(params, "attention/(q|v)", rank=8, alpha=16, key=key)
    logits = transformer.apply(config, combine(trainable, frozen), tokens, mask)
    whole = merge(combine(trainable, frozen))

Leaves keep their paths, so their random directions (`keys.leaf_keys`) don't depend on what
else is trained. Inside `jax.jit` pass `frozen` as an argument and don't close over it.

Ref: Hu et al. 2021, arXiv 2106.09685.
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zofl_jax import keys
from zofl_jax.core import Array, Params, PRNGKey
from zofl_jax.models import safetensors_files, weights_hf
from zofl_jax.models.architectures import Config

_MATRICES = ("kernel", "embedding")  # names of leaves whose last two axes are a matrix


def split(params: Params, predicate: Callable[[str], bool]) -> tuple[Params, Params]:
    """Returns (trainable, frozen): the leaves whose path satisfies the predicate, and the others.

    Args:
      params: nested dicts of arrays.
      predicate: path, such as "layers/mlp/up/kernel" -> whether that leaf is trained.

    Raises:
      ValueError: if no leaf is trained.

    >>> split({"a": {"kernel": 1, "bias": 2}}, lambda path: path.endswith("bias"))
    ({'a': {'bias': 2}}, {'a': {'kernel': 1}})
    """
    flat = flatten_dict(params, sep="/")
    trainable = {path: leaf for path, leaf in flat.items() if predicate(path)}
    if not trainable:
        raise ValueError(f"no leaf would be trained: choose from {', '.join(flat)}")
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def combine(trainable: Params, frozen: Params) -> Params:
    """Returns the tree with the leaves of both; the inverse of `split`.

    Raises:
      ValueError: if both hold the same path.

    >>> combine({"a": {"bias": 2}}, {"a": {"kernel": 1}})
    {'a': {'kernel': 1, 'bias': 2}}
    """
    ours, theirs = flatten_dict(trainable, sep="/"), flatten_dict(frozen, sep="/")
    if twice := ours.keys() & theirs.keys():
        raise ValueError(f"{', '.join(sorted(twice))} are both trained and frozen: drop one side")
    return unflatten_dict(theirs | ours, sep="/")


def add(
    params: Params, pattern: str, rank: int, alpha: float, key: PRNGKey, dtype: str = "float32"
) -> tuple[Params, Params]:
    """Returns (trainable, frozen): adapters A, B for some matrices, and the params themselves.

    W [in, out] becomes W + (alpha / rank) A B with A [in, rank] and B [rank, out]; stacked
    matrices get stacked adapters. At first the sum is W: B is 0 and A uniform in ±1/√in, and
    for an embedding table, [vocabulary, features], the other way round.

    Args:
      params: nested dicts of arrays.
      pattern: regular expression searched in the paths of the leaves "kernel" and "embedding".
      rank: r, from 1 to the smaller side of the matrices.
      alpha: > 0.
      key: for the random half.
      dtype: of the adapters.

    Raises:
      ValueError: if no matrix matches, one has an adapter already, or a number is out of range.
    """
    frozen = flatten_dict(params, sep="/")
    paths = [p for p in frozen if p.split("/")[-1] in _MATRICES]
    matched = [path for path in paths if re.search(pattern, path)]
    if not matched:
        raise ValueError(f"{pattern!r} matches no matrix: choose from {', '.join(paths)}")
    if alpha <= 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    trainable: dict[str, Array] = {}
    for path in matched:
        parent, name = re.fullmatch(r"(.*?)(\w+)", path).groups()  # type: ignore[union-attr]
        *lead, fan_in, fan_out = frozen[path].shape
        if not 1 <= rank <= min(fan_in, fan_out):
            raise ValueError(f"rank must be in [1, {min(fan_in, fan_out)}] for {path}, got {rank}")
        if parent + "lora_scale" in frozen:
            raise ValueError(f"{path} has an adapter already: merge it first")
        a, b = (*lead, fan_in, rank), (*lead, rank, fan_out)
        drawn, features = (a, fan_in) if name == "kernel" else (b, fan_out)
        leaf_key = jax.random.fold_in(key, keys.name_id(path))
        values = jax.random.uniform(leaf_key, drawn, dtype, -1.0, 1.0) * features**-0.5
        trainable[parent + "lora_a"] = values if drawn is a else jnp.zeros(a, dtype)
        trainable[parent + "lora_b"] = values if drawn is b else jnp.zeros(b, dtype)
        frozen[parent + "lora_scale"] = jnp.full(lead, alpha / rank, dtype)
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def merge(params: Params) -> Params:
    """Returns the params with all adapters added into their matrices.

    A sum has the wider dtype of the two: in bfloat16 what was learnt would round away.
    """
    if not isinstance(params, dict):
        return params
    merged = {name: merge(leaf) for name, leaf in params.items() if not name.startswith("lora_")}
    if "lora_a" in params:
        name = next(name for name in _MATRICES if name in params)
        product = params["lora_a"] @ params["lora_b"]
        term = params["lora_scale"][..., None, None] * product
        merged[name] = params[name] + term
    return merged


def save_peft(folder: str, config: Config, params: Params, base_model: str | None = None) -> None:
    """Writes the adapters in params (from `combine`) as peft's `PeftModel.from_pretrained` reads.

    Args:
      folder: made if it doesn't exist.
      config: the model.
      params: with adapters.
      base_model: where peft finds the model itself.

    Raises:
      ValueError: if there are no adapters, their ranks or alphas differ, or one sits where
        peft's would compute something else (position tables; a table that is also the head).
    """
    flat = flatten_dict(params, sep="/")
    parents = [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]
    if not parents:
        raise ValueError("params hold no adapters: add them, and don't merge before saving")
    ranks = {flat[f"{p}/lora_a"].shape[-1] for p in parents}
    scales = {float(s) for p in parents for s in np.unique(flat[f"{p}/lora_scale"])}
    if len(ranks) > 1 or len(scales) > 1:
        raise ValueError(
            f"peft needs one rank and scale, got {ranks} and {scales}: save separately"
        )
    tensors: dict[str, np.ndarray] = {}
    targets = set()
    for parent in parents:
        module = weights_hf.module_names(config)[parent]
        targets.add(module.rpartition("{}.")[2] if "{}" in module else module.rpartition(".")[2])
        tensors |= _peft_tensors(config, parent, module, flat)
    rank = ranks.pop()
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scales.pop() * rank,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    os.makedirs(folder, exist_ok=True)
    specs = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    path = os.path.join(folder, "adapter_model.safetensors")
    safetensors_files.write(path, specs, tensors.__getitem__)
    with open(os.path.join(folder, "adapter_config.json"), "w") as file:
        json.dump(fields, file, indent=2)


def _peft_tensors(
    config: Config, parent: str, module: str, flat: dict[str, Array]
) -> dict[str, np.ndarray]:
    a, b = (np.asarray(flat[f"{parent}/{name}"]) for name in ("lora_a", "lora_b"))
    prefix = f"base_model.model.{module}"
    if parent == "embed/positions" or (parent == "embed/tokens" and config.tied):
        raise ValueError(f"peft has no adapter that computes the same for {parent}: merge it")
    if parent == "embed/tokens":
        return {f"{prefix}.lora_embedding_A": a.T, f"{prefix}.lora_embedding_B": b.T}
    if parent == "head":  # a table [out, in], so the factors change sides
        return {f"{prefix}.lora_A.weight": b, f"{prefix}.lora_B.weight": a}
    layers = [(prefix, a, b)]
    if "{}" in prefix:
        layers = [(prefix.format(i), *pair) for i, pair in enumerate(zip(a, b, strict=True))]
    return {
        f"{name}.lora_{side}.weight": matrix.T
        for name, *pair in layers
        for side, matrix in zip("AB", pair, strict=True)
    }
