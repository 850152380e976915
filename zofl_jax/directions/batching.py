"""How many clients of a vmap are evaluated at once.

All at once is best for models made of matrix products. A client at a time, convolutions take
about as long on CPU and a fraction of the memory; and large models need it to bound the
activations. What does not depend on the client, such as a direction, is still computed once
for all.
"""

from collections.abc import Callable
from typing import Any

import jax


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
