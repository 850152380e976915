"""How many clients of a vmap are evaluated at once.

All at once is best for models made of matrix products. A client at a time, convolutions take
about as long on CPU and a fraction of the memory; and large models need it to bound the
activations. What does not depend on the client, such as a direction, is still computed once
for all.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from zofl_jax.core import Batch

FULL = {"gpu": 2**14, "tpu": 2**13}
"""Rows of a product (texts' tokens, pixels of a convolution) that fill an accelerator about as well
as more do. A TPU's is by the cycles that its compiler expects: beyond, activations of OPT-1.3B
leave the chip's fast memory."""

STORED = 2**26
"""Numbers of dense directions that may be stored at a time, for models evaluated at once."""


def models_at_once(platform: str, *, rows: int, params: int, count: int, shared: bool) -> int:
    """Returns how many perturbed models should be evaluated at once.

    On a CPU one: what it works on stays in cache, and its cores are busy. An accelerator wants
    large products. Models that share theirs (low-rank directions) are taken until one has `FULL`
    rows. Others are products in a batch: all where their directions can be stored and a pass alone
    would leave most of the device idle; else one.

    Args:
      platform: "cpu", "gpu" or "tpu".
      rows: of the products of one model's pass, all clients together: examples, their tokens, or
        the pixels that a convolution has an output for.
      params: of the model.
      count: of directions.
      shared: whether perturbed models share the products with the params.

    >>> models_at_once("gpu", rows=2 * 16 * 40, params=134_515_008, count=5, shared=True)
    5
    >>> models_at_once("gpu", rows=8 * 16 * 64, params=1_315_758_080, count=5, shared=True)
    2
    >>> models_at_once("gpu", rows=320, params=55_210, count=20, shared=False)
    20
    >>> models_at_once("gpu", rows=320 * 28 * 28, params=28_938, count=20, shared=False)
    1
    >>> models_at_once("cpu", rows=320, params=28_938, count=20, shared=False)
    1
    """
    if platform == "cpu":
        return 1
    full = FULL.get(platform, FULL["gpu"])
    if shared:
        return max(1, min(count, full // rows))
    return count if rows < full and count * params <= STORED else 1


def rows_of_an_example(examples: Batch, convolutional: bool) -> int:
    """Returns how many rows of a product an example takes, see `models_at_once`.

    Args:
      examples: "tokens" [n, T], or "image" [n, H, W, C], or others, of a row each.
      convolutional: whether images go through convolutions.

    >>> import numpy as np
    >>> rows_of_an_example({"tokens": np.zeros((5, 40))}, convolutional=False)
    40
    >>> rows_of_an_example({"image": np.zeros((5, 28, 28, 1))}, convolutional=True)
    784
    """
    if "tokens" in examples:
        return int(examples["tokens"].shape[1])
    if convolutional and "image" in examples:
        return math.prod(examples["image"].shape[1:3])
    return 1


def at_once(fn: Callable[..., Any], clients: int | None) -> Callable[..., Any]:
    """Returns `fn` such that a vmap of it takes `clients` elements at a time, in a loop.

    Arguments that are not batched stay so. `fn` must not be differentiated in reverse
    mode from outside; put `jax.grad` inside it.

    Args:
      fn: any traceable function of trees of arrays.
      clients: >= 1, or None for all at once.

    >>> import jax.numpy as jnp
    >>> square = at_once(lambda x: x * x, 1)
    >>> jax.vmap(square)(jnp.arange(3)).tolist()
    [0, 1, 4]
    """
    if clients is None:
        return fn
    chunked = jax.custom_batching.custom_vmap(fn)

    @chunked.def_vmap
    def rule(axis_size: int, in_batched: list[Any], *args: Any) -> tuple[Any, Any]:
        del axis_size
        leaves, treedef = jax.tree.flatten(args)
        batched = jax.tree.leaves(in_batched)
        mapped = [leaf for leaf, is_batched in zip(leaves, batched, strict=True) if is_batched]

        def one(parts: list[Any]) -> Any:
            remaining = iter(parts)
            full = [
                next(remaining) if is_batched else leaf
                for leaf, is_batched in zip(leaves, batched, strict=True)
            ]
            return fn(*jax.tree.unflatten(treedef, full))

        size = None if clients == 1 else clients
        out = jax.lax.map(one, mapped, batch_size=size)
        return out, jax.tree.map(lambda _: True, out)

    return chunked
