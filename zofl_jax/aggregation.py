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
    shares = weights / jnp.sum(weights)
    return jax.tree.map(lambda u: jnp.tensordot(shares.astype(u.dtype), u, axes=1), uploads)
