"""A client's own descent, which methods with dense uploads share.

    y_0 = x,   y_k = optimiser(y_{k−1}, g_k),   g_k ≈ ∇f(y_{k−1}; ξ_k),   k = 1..K

The gradient is exact, or a zeroth-order estimate of it.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys
from zofl_jax.core import Array, Batch, Batches, LossFn, Params, PRNGKey
from zofl_jax.directions.estimators import Estimator

Gradient = Callable[[PRNGKey, Array, Params, Batch], tuple[Params, Array]]
"""(key of the local step, round, params, batch) -> a gradient, and the loss []."""

ClientOptimizer: TypeAlias = (
    optax.GradientTransformation | Callable[[Array], optax.GradientTransformation]
)
"""An optimiser, or round [] -> the optimiser of that round."""


class Trained(NamedTuple):
    """What local training returns."""

    params: Params  # y_K
    loss: Array  # [], mean over the local steps


def exact(loss_fn: LossFn) -> Gradient:
    """Returns the gradient by one backward pass."""

    def gradient(
        key: PRNGKey, round_index: Array, params: Params, batch: Batch
    ) -> tuple[Params, Array]:
        del key, round_index
        loss, slope = jax.value_and_grad(loss_fn)(params, batch)
        return slope, loss

    return gradient


def estimated(loss_fn: LossFn, estimator: Estimator) -> Gradient:
    """Returns the zeroth-order estimate (1/P) Σ_p g_p z_p."""

    def gradient(
        key: PRNGKey, round_index: Array, params: Params, batch: Batch
    ) -> tuple[Params, Array]:
        scalars, loss = estimator.measure(loss_fn, key, round_index, params, batch)
        return estimator.expand(key, params, scalars), loss

    return gradient


def train(
    gradient: Gradient,
    optimizer: ClientOptimizer,
    key: PRNGKey,
    round_index: Array,
    params: Params,
    batches: Batches,
    correction: Callable[[Params, Params], Params] = lambda slope, params: slope,
) -> Trained:
    """Returns the params after one local step a batch.

    Args:
      gradient: of the client's loss.
      optimizer: of the client; its state starts anew.
      key: local step k draws from `keys.step_key(key, k)`.
      round_index: of the round, [].
      params: x.
      batches: [K, B, ...].
      correction: (gradient, y) -> the direction that the optimiser follows.
    """
    chosen = optimizer(round_index) if callable(optimizer) else optimizer

    def step(carry: tuple, inputs: tuple) -> tuple:
        y, opt_state = carry
        k, batch = inputs
        slope, loss = gradient(keys.step_key(key, k), round_index, y, batch)
        updates, opt_state = chosen.update(correction(slope, y), opt_state, y)
        return (optax.apply_updates(y, updates), opt_state), loss

    steps = jnp.arange(jax.tree.leaves(batches)[0].shape[0])
    start = (params, chosen.init(params))
    losses: Array
    (trained, _), losses = jax.lax.scan(step, start, (steps, batches))
    return Trained(trained, jnp.mean(losses))


def difference(x: Params, y: Params) -> Params:
    """Returns x − y, leaf by leaf."""
    return jax.tree.map(jnp.subtract, x, y)
