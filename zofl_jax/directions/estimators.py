"""From a loss to a few scalars, and from the scalars back to a direction.

An `Estimator` measures directional derivatives g_p ≈ ⟨∇f(x), z_p⟩ of a loss along P
directions drawn from a key, and expands scalars into (1/P) Σ_p g_p z_p, an estimate of
the gradient. The directions are drawn again from the key wherever they are needed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys
from zofl_jax.core import Array, Batch, LossFn, Params, Passes, PRNGKey
from zofl_jax.directions import structured, sums
from zofl_jax.directions.batching import at_once
from zofl_jax.directions.perturbations import Perturbation, draw_all, gaussian


class Estimate(NamedTuple):
    """What one local step measures."""

    scalars: Array  # [P], loss per unit length along each direction
    loss: Array  # [], the loss at (or, for central differences, around) the params


class Estimator(NamedTuple):
    """A way to measure P directional derivatives.

    Attributes:
      num_perturbations: P.
      measure: (loss_fn, key, round_index, params, batch) -> Estimate. Leaves of the params may
        stand for arrays (`sums.py`).
      expand: (key, params, scalars [P]) -> (1/P) Σ_p scalars[p] z_p, a tree like params.
      perturbation: the distribution of z.
      passes: what a measurement computes.
    """

    num_perturbations: int
    measure: Callable[[LossFn, PRNGKey, Array, Params, Batch], Estimate]
    expand: Callable[[PRNGKey, Params, Array], Params]
    perturbation: Perturbation
    passes: Passes = Passes(0, 0)


def forward_difference(
    num_perturbations: int,
    smoothing: float | optax.Schedule,
    perturbation: Perturbation | None = None,
    clients_at_once: int | None = None,
    perturbations_at_once: int | None = None,
) -> Estimator:
    """Measures g_p = (f(x + μ z_p) − f(x)) / μ with P + 1 evaluations.

    Its mean is the gradient of the smoothed loss, off by O(μ) (Nesterov & Spokoiny 2017,
    eq. 22); the base loss f(x) is evaluated once.

    Args:
      num_perturbations: P >= 1.
      smoothing: μ > 0 in units of params, or a function of the round.
      perturbation: the distribution of z, Gaussian unless given.
      clients_at_once: how many clients of a vmap are evaluated at once, see
        `batching.at_once`; all of them unless given.
      perturbations_at_once: how many perturbed models are evaluated at once. Unless given, all
        where they share the products with the params (low-rank directions), else one.

    Raises:
      ValueError: if P, μ or one of the last two is out of range.

    >>> estimator = forward_difference(2, 1e-3)
    >>> f = lambda x, batch: 0.5 * jnp.sum(x**2)
    >>> estimator.measure(f, jax.random.key(0), 0, jnp.ones(3), ()).scalars.shape
    (2,)
    """
    smoothing_at = _smoothing_schedule(smoothing)
    chosen = perturbation or gaussian()
    together = _together(num_perturbations, chosen, perturbations_at_once)

    def measure(
        loss_fn: LossFn, key: PRNGKey, round_index: Array, params: Params, batch: Batch
    ) -> Estimate:
        mu = smoothing_at(round_index)
        evaluate = _evaluation(loss_fn, chosen, clients_at_once, together)
        direction_keys = keys.direction_keys(key, num_perturbations)
        if together > 1:
            # The params themselves are one more model, at no distance along a direction.
            index = jnp.maximum(jnp.arange(-1, num_perturbations), 0)
            scales = jnp.where(jnp.arange(-1, num_perturbations) < 0, 0.0, mu)[:, None]
            base, *rest = evaluate(params, direction_keys[index], scales, batch)[:, 0]
            return Estimate((jnp.stack(rest) - base) / mu, base)
        base = at_once(_scalar(loss_fn), clients_at_once)(params, batch)
        scales = jnp.full((num_perturbations, 1), mu)
        losses = evaluate(params, direction_keys, scales, batch)[:, 0]
        return Estimate((losses - base) / mu, base)

    passes = Passes(num_perturbations + 1, 0)
    return _estimator(num_perturbations, measure, chosen, clients_at_once, passes)


def central_difference(
    num_perturbations: int,
    smoothing: float | optax.Schedule,
    perturbation: Perturbation | None = None,
    clients_at_once: int | None = None,
    perturbations_at_once: int | None = None,
) -> Estimator:
    """Measures g_p = (f(x + μ z_p) − f(x − μ z_p)) / 2μ with 2 P evaluations.

    Off by O(μ²); exact for quadratics (Nesterov & Spokoiny 2017, eq. 23). The reported
    loss is the mean over all evaluations. Arguments and errors as `forward_difference`.
    """
    smoothing_at = _smoothing_schedule(smoothing)
    chosen = perturbation or gaussian()
    together = _together(num_perturbations, chosen, perturbations_at_once)

    def measure(
        loss_fn: LossFn, key: PRNGKey, round_index: Array, params: Params, batch: Batch
    ) -> Estimate:
        mu = smoothing_at(round_index)
        evaluate = _evaluation(loss_fn, chosen, clients_at_once, together)
        direction_keys = keys.direction_keys(key, num_perturbations)
        scales = jnp.broadcast_to(jnp.stack([mu, -mu]), (num_perturbations, 2))
        plus, minus = evaluate(params, direction_keys, scales, batch).T
        return Estimate((plus - minus) / (2 * mu), jnp.mean((plus + minus) / 2))

    passes = Passes(2 * num_perturbations, 0)
    return _estimator(num_perturbations, measure, chosen, clients_at_once, passes)


def projection(
    num_perturbations: int,
    perturbation: Perturbation | None = None,
    clients_at_once: int | None = None,
) -> Estimator:
    """Measures g_p = ⟨∇f(x), z_p⟩ exactly, with one backward pass for all P directions.

    The limit μ → 0 of the differences: Algorithm 5 of Li et al. 2025 (arXiv 2405.15861).
    The loss must be differentiable. Arguments as `forward_difference`.
    """
    chosen = perturbation or gaussian()

    def measure(
        loss_fn: LossFn, key: PRNGKey, round_index: Array, params: Params, batch: Batch
    ) -> Estimate:
        del round_index
        evaluate = at_once(jax.value_and_grad(_scalar(loss_fn)), clients_at_once)
        loss, gradient = evaluate(sums.arrays(params), batch)

        def along(direction_key: PRNGKey) -> Array:
            return inner(gradient, chosen.sample(direction_key, params)).astype(loss.dtype)

        return Estimate(jax.lax.map(along, keys.direction_keys(key, num_perturbations)), loss)

    passes = Passes(1, 1)
    return _estimator(num_perturbations, measure, chosen, clients_at_once, passes)


def forward_gradient(
    num_perturbations: int,
    perturbation: Perturbation | None = None,
    clients_at_once: int | None = None,
) -> Estimator:
    """Measures g_p = ⟨∇f(x), z_p⟩ exactly, with one `jax.jvp` a direction.

    The same scalars as `projection` without storing activations (forward gradients,
    Baydin et al. 2022). The loss must be differentiable. Arguments as `forward_difference`.
    """
    chosen = perturbation or gaussian()

    def measure(
        loss_fn: LossFn, key: PRNGKey, round_index: Array, params: Params, batch: Batch
    ) -> Estimate:
        del round_index

        def derivative(params: Params, z: Params, batch: Batch) -> tuple[Array, Array]:
            return jax.jvp(lambda x: _scalar(loss_fn)(x, batch), (params,), (z,))

        evaluate = at_once(derivative, clients_at_once)

        def along(direction_key: PRNGKey) -> tuple[Array, Array]:
            z = sums.arrays(chosen.sample(direction_key, params))
            return evaluate(sums.arrays(params), z, batch)

        losses, scalars = jax.lax.map(along, keys.direction_keys(key, num_perturbations))
        return Estimate(scalars, losses[0])

    passes = Passes(2 * num_perturbations, 0)
    return _estimator(num_perturbations, measure, chosen, clients_at_once, passes)


def _estimator(
    num_perturbations: int,
    measure: Callable[[LossFn, PRNGKey, Array, Params, Batch], Estimate],
    perturbation: Perturbation,
    clients_at_once: int | None,
    passes: Passes,
) -> Estimator:
    if num_perturbations < 1:
        raise ValueError(f"num_perturbations must be >= 1, got {num_perturbations}")
    if clients_at_once is not None and clients_at_once < 1:
        raise ValueError(f"clients_at_once must be >= 1, got {clients_at_once}")

    def expand(key: PRNGKey, params: Params, scalars: Array) -> Params:
        direction_keys = keys.direction_keys(key, num_perturbations)
        return perturbation.accumulate(direction_keys, params, scalars / num_perturbations)

    return Estimator(num_perturbations, measure, expand, perturbation, passes)


def _together(num_perturbations: int, perturbation: Perturbation, at_once: int | None) -> int:
    """Returns how many perturbed models are evaluated at once."""
    if at_once is None:
        return 1 if perturbation.combine is None else num_perturbations
    if at_once < 1:
        raise ValueError(f"perturbations_at_once must be >= 1, got {at_once}")
    return min(at_once, num_perturbations)


def _evaluation(
    loss_fn: LossFn, perturbation: Perturbation, clients_at_once: int | None, together: int
) -> Callable[[Params, PRNGKey, Array, Batch], Array]:
    """Returns (params, keys [P], scales [P, S], batch) -> losses [P, S].

    losses[p, s] = f(x + scales[p, s] z_p); a direction is drawn once for all its scales.
    """
    add, loss = perturbation.add, _scalar(loss_fn)

    def one(params: Params, direction: Params, scale: Array, batch: Batch) -> Array:
        return loss(add(params, direction, scale), batch)

    def many(params: Params, directions: Params, scales: Array, batch: Batch) -> Array:
        along = jax.vmap(one, in_axes=(None, None, 0, None))
        return jax.vmap(along, in_axes=(None, 0, 0, None))(params, directions, scales, batch)

    def evaluate(params: Params, direction_keys: PRNGKey, scales: Array, batch: Batch) -> Array:
        if together == 1:
            singly = at_once(one, clients_at_once)

            def along(direction: Params, own_scales: Array) -> Array:
                return jnp.stack([singly(params, direction, scale, batch) for scale in own_scales])

            if perturbation.combine is None:
                return jax.lax.map(
                    lambda part: along(perturbation.sample(part[0], params), part[1]),
                    (direction_keys, scales),
                )
            directions = draw_all(perturbation.sample, direction_keys, params)
            return jax.lax.map(lambda part: along(*part), (directions, scales))
        directions = draw_all(perturbation.sample, direction_keys, params)
        evaluate_many = at_once(many, clients_at_once)
        count = len(scales)
        if count <= together + 1:  # the params themselves cost no more with them than apart
            return evaluate_many(params, directions, scales, batch)
        chunks = math.ceil(count / together)
        index = jnp.minimum(jnp.arange(chunks * together), count - 1).reshape(chunks, together)
        losses = jax.lax.map(
            lambda i: evaluate_many(
                params, jax.tree.map(lambda x: x[i], directions), scales[i], batch
            ),
            index,
        )
        return losses.reshape(-1, *losses.shape[2:])[:count]

    return evaluate


def _smoothing_schedule(smoothing: float | optax.Schedule) -> optax.Schedule:
    if callable(smoothing):
        return smoothing
    if not 0 < smoothing < float("inf"):
        raise ValueError(f"smoothing must be positive and finite, got {smoothing}")
    return optax.constant_schedule(smoothing)


def _scalar(loss_fn: LossFn) -> LossFn:
    """Returns the loss in at least float32, checked to be one number."""

    def evaluate(params: Params, batch: Batch) -> Array:
        loss = jnp.asarray(structured.evaluate(loss_fn, params, batch))
        if loss.shape:
            raise ValueError(
                f"the loss must be one number, the mean over the batch, got shape {loss.shape}"
            )
        # A difference of half-precision losses would be rounding noise.
        return loss.astype(jnp.promote_types(loss.dtype, jnp.float32))

    return evaluate


def inner(gradient: Params, direction: Params) -> Array:
    """Returns ⟨gradient, direction⟩, [], summed in at least float32."""

    def leaf(g: Array, z: Array | sums.Factors) -> Array:
        wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
        if isinstance(z, sums.Factors):
            return z.inner(wide)
        return jnp.sum(wide * sums.as_array(z))

    return sum(jax.tree.leaves(jax.tree.map(leaf, gradient, direction)), jnp.zeros(()))
