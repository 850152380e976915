"""From the uploads of a cohort to one broadcast."""

import jax
import jax.numpy as jnp

from zofl_jax.core import Array, Broadcast, Upload


def mean(uploads: Upload, weights: Array) -> Broadcast:
    """Returns the weighted mean Σ_i w_i u_i / Σ_i w_i over the cohort.

    Args:
      uploads: a tree of arrays [C, ...].
      weights: [C], non-negative, their sum positive.

    >>> mean(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])).item()
    2.0
    """

    def leaf(u: Array) -> Array:
        wide = jnp.promote_types(u.dtype, jnp.float32)
        shares = weights.astype(wide) / jnp.sum(weights.astype(wide))
        return jnp.tensordot(shares, u.astype(wide), axes=1).astype(u.dtype)

    return jax.tree.map(leaf, uploads)
