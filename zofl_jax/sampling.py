"""Uniform random subsets in memory that doesn't depend on the population."""

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax.core import Array, PRNGKey


def subset(key: PRNGKey, n: Array | int, size: int) -> Array:
    """Returns `size` distinct integers of [0, n), int32 [size]: every such set is equally likely.

    Robert Floyd's algorithm: for j = n − size, …, n − 1 draw t uniformly from {0, …, j} and
    add t to the set, or j if t is in it already. This takes O(size²) comparisons and O(size)
    memory whatever `n` is. It is the set that is uniform, not its order: the last element is
    n − 1 more often than the first.

    Args:
      key: a key, [].
      n: the size of the population, an integer or a traced int32 []; size <= n < 2³¹ is the
        caller's duty when it is traced. A Python `n` equal to `size` gives arange(size).
      size: how many integers to draw, >= 1; static.

    Raises:
      ValueError: if `size` < 1, or a Python `n` is smaller than `size` or too large for int32.

    Ref: J. Bentley and B. Floyd, "Programming pearls: a sample of brilliance", CACM 30(9), 1987.

    >>> sorted(subset(jax.random.key(0), 3, 3).tolist())
    [0, 1, 2]
    """
    if size < 1:
        raise ValueError(f"the size of a subset must be >= 1, got {size}")
    positions = jnp.arange(size, dtype=jnp.int32)
    if isinstance(n, int | np.integer):
        if not size <= n < 2**31:
            raise ValueError(
                f"cannot draw {size} distinct integers below {n}: n must be at least {size} and "
                "less than 2**31"
            )
        if n == size:
            return positions
    last = jnp.asarray(n, jnp.int32) - size + positions
    drawn = jax.random.randint(key, (size,), 0, last + 1, dtype=jnp.int32)

    def add(chosen: Array, step: tuple[Array, Array, Array]) -> tuple[Array, None]:
        position, candidate, otherwise = step
        value = jnp.where(jnp.any(chosen == candidate), otherwise, candidate)
        # A select instead of an indexed update, which vmap would turn into a scatter.
        return jnp.where(positions == position, value, chosen), None

    chosen, _ = jax.lax.scan(add, jnp.full_like(positions, -1), (positions, drawn, last))
    return chosen
