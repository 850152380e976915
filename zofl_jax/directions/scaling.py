"""Directions stretched leaf by leaf, z = s ⊙ u, and the masks that make them sparse.

With u of unit covariance E[z zᵀ] = diag(s²): a mask s ∈ {0, 1} confines a method to some of
the params, s = H^(−1/2) fits its directions to a curvature H.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys
from zofl_jax.core import Array, Batch, LossFn, Params, PRNGKey
from zofl_jax.directions import sums
from zofl_jax.directions.perturbations import Perturbation


def scaled(perturbation: Perturbation, factors: Params) -> Perturbation:
    """Returns the directions s ⊙ u with u of `perturbation`.

    Args:
      perturbation: how u is drawn.
      factors: s, a tree like the params; booleans are a mask.

    >>> from zofl_jax.directions.perturbations import rademacher
    >>> only_first = scaled(rademacher(), jnp.array([True, False]))
    >>> jnp.abs(only_first.sample(jax.random.key(0), jnp.zeros(2))).tolist()
    [1.0, 0.0]
    """

    def stretch(direction: Params) -> Params:
        return jax.tree.map(lambda z, s: z * s.astype(z.dtype), direction, factors)

    def sample(key: PRNGKey, params: Params) -> Params:
        return stretch(sums.arrays(perturbation.sample(key, params)))

    def add(params: Params, direction: Params, scale: Array | float) -> Params:
        return jax.tree.map(lambda x, z: x + jnp.asarray(scale, x.dtype) * z, params, direction)

    def accumulate(direction_keys: PRNGKey, params: Params, scalars: Array) -> Params:
        return stretch(perturbation.accumulate(direction_keys, params, scalars))

    return Perturbation(sample, add, accumulate)


def masked(optimizer: optax.GradientTransformation, mask: Params) -> optax.GradientTransformation:
    """Returns the optimiser that moves the params of a mask alone, a tree of booleans.

    Directions of zero don't hold the others still: weight decay would shrink them.

    >>> still = masked(optax.add_decayed_weights(-0.5), jnp.array([True, False]))
    >>> x = jnp.array([4.0, 4.0])
    >>> still.update(jnp.zeros(2), still.init(x), x)[0].tolist()
    [-2.0, 0.0]
    """

    def update(direction: Params, state: Any, params: Any = None) -> tuple[Params, Any]:
        updates, state = optimizer.update(direction, state, params)
        return jax.tree.map(lambda u, m: jnp.where(m, u, 0), updates, mask), state

    return optax.GradientTransformation(optimizer.init, update)


def random_mask(key: PRNGKey, params: Params, density: float) -> Params:
    """Returns a mask that keeps each param with probability `density`, a tree of booleans.

    Raises:
      ValueError: unless 0 < density <= 1.
    """
    _check_density(density)
    leaf_keys = keys.leaf_keys(key, params)
    return jax.tree.map(lambda k, x: jax.random.bernoulli(k, density, x.shape), leaf_keys, params)


def magnitude_mask(params: Params, density: float) -> Params:
    """Returns a mask that keeps the share `density` of the smallest params of each leaf.

    Small weights take the noise of a zeroth-order estimate best (Liu et al. 2024, "Sparse
    MeZO", arXiv 2402.15751). Every client derives it from the initial params.

    Raises:
      ValueError: unless 0 < density <= 1.

    >>> magnitude_mask(jnp.array([3.0, -1.0, 0.5, -4.0]), 0.5).tolist()
    [False, True, True, False]
    """
    _check_density(density)
    return jax.tree.map(lambda x: _largest(-jnp.abs(x), density), params)


def sensitivity_mask(loss_fn: LossFn, params: Params, batch: Batch, density: float) -> Params:
    """Returns a mask that keeps the share `density` of the params the loss reacts to most.

    The measure is (∂f/∂x_i)² on a calibration batch (Guo et al. 2024, "Zeroth-order
    fine-tuning of LLMs with extreme sparsity", arXiv 2406.02913), the largest of each leaf.

    Args:
      loss_fn: (params, batch) -> mean loss, differentiable.
      params: where the gradient is taken.
      batch: of the server's own data, or of public data.
      density: in (0, 1].

    Raises:
      ValueError: unless 0 < density <= 1.

    >>> f = lambda x, batch: jnp.sum(batch * x)
    >>> sensitivity_mask(f, jnp.ones(3), jnp.array([1.0, -3.0, 2.0]), 0.34).tolist()
    [False, True, False]
    """
    _check_density(density)
    gradient = jax.grad(loss_fn)(params, batch)
    return jax.tree.map(lambda g: _largest(jnp.abs(g), density), gradient)


def _largest(scores: Array, density: float) -> Array:
    """Returns where the largest round(density · size) scores are, at least one; like scores."""
    count = max(1, round(density * scores.size))
    _, indices = jax.lax.top_k(scores.reshape(-1), count)
    return jnp.zeros(scores.size, bool).at[indices].set(True).reshape(scores.shape)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
