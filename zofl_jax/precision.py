"""Params that are trained are kept in float32, whatever precision they come in.

A sum x + u of bfloat16 is x again where |u| < 2⁻⁹ |x|, and of float16 where |u| < 2⁻¹² |x|. The
updates of fine-tuning are far smaller, so of params kept so most would stay where they are. An
`Algorithm.init` therefore starts from `wide(params)`: updates, optimiser states, local models and
messages are float32, and a loss that computes in less rounds the params where it uses them, as
`models/transformer.py` does.

Rounding at random, up or down with the right mean (Gupta et al. 2015, arXiv 1502.02551), would need
no memory, but adds to the path of each param a random walk of variance |u| times its spacing a
step: more than the path's own noise, u², wherever it is needed. `benchmarks/precision.py`
measures both.
"""

from typing import Any

import jax
import jax.numpy as jnp

from zofl_jax import keys
from zofl_jax.core import Params


def wide(params: Params) -> Params:
    """Returns the params with floats narrower than float32 in float32, and others as they are.

    >>> half = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    >>> bool((half["w"] - 1e-3 == half["w"]).all()), bool((wide(half)["w"] - 1e-3 < 1).all())
    (True, True)
    """
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_narrow(x) else x, params)


def narrow_leaves(params: Params) -> dict[str, str]:
    """Returns the dtypes of leaves that are floats narrower than float32, by path.

    >>> narrow_leaves({"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)})
    {'w': 'bfloat16'}
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {keys.path_name(path): x.dtype.name for path, x in leaves if _is_narrow(x)}


def _is_narrow(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
