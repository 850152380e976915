"""From a loss to a few scalars, and from the scalars back to a direction.

An `Estimator` measures directional derivatives g_p ≈ ⟨∇f(x), z_p⟩ of a loss along P
directions drawn from a key, and expands scalars into (1/P) Σ_p g_p z_p, an estimate of
the gradient. The directions are drawn again from the key wherever they are needed.

Each direction may have examples of its own (`groups`): a batch of B is shared out to G groups of
m = B / G, and g_p is that of group p mod G. A pass over the batch then measures G scalars in place
of one, each noisier. Where ∇f has the noise σ² an example, the error of the estimate is about

    (d / P) (‖∇f‖² + σ² / m),   P m example-passes,

so for as many passes it is d (m ‖∇f‖² + σ²) over their number: smallest at m = 1, and as large as
without groups where the noise scale σ² / ‖∇f‖² (McCandlish et al. 2018, arXiv 1812.06162) is far
above B.
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
      groups: G, of a batch's examples, each with directions of its own.
    """

    num_perturbations: int
    measure: Callable[[LossFn, PRNGKey, Array, Params, Batch], Estimate]
    expand: Callable[[PRNGKey, Params, Array], Params]
    perturbation: Perturbation
    passes: Passes = Passes(0, 0)
    groups: int = 1


def forward_difference(
    num_perturbations: int,
    smoothing: float | optax.Schedule,
    perturbation: Perturbation | None = None,
    clients_at_once: int | None = None,
    perturbations_at_once: int | None = None,
    groups: int = 1,
) -> Estimator:
    """Measures g_p = (f(x + μ z_p) − f(x)) / μ with P / G + 1 evaluations of the batch.

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
      groups: G >= 1, of which P is a multiple; so must the batch be, or tracing fails. The loss
        must be a mean over examples.

    Raises:
      ValueError: if P, μ or one of the last three is out of range.

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
        parts = _parts(batch, groups)
        evaluate = _evaluation(loss_fn, chosen, clients_at_once, together, groups)
        direction_keys = keys.direction_keys(key, num_perturbations)
        if together > 1:
            # The params themselves are one more model a group, at no distance along a direction.
            order = jnp.arange(-groups, num_perturbations)
            scales = jnp.where(order < 0, 0.0, mu)[:, None]
            found = evaluate(params, direction_keys[jnp.maximum(order, 0)], scales, parts)[:, 0]
            base, losses = found[:groups], found[groups:]
        else:
            base = at_once(_of_groups(loss_fn, groups), clients_at_once)(params, parts)
            scales = jnp.full((num_perturbations, 1), mu)
            losses = evaluate(params, direction_keys, scales, parts)[:, 0]
        differences = losses.reshape(-1, groups) - base
        return Estimate(differences.reshape(-1) / mu, jnp.mean(base))

    passes = Passes(num_perturbations // groups + 1, 0)
    return _estimator(num_perturbations, measure, chosen, clients_at_once, passes, groups)


def central_difference(
    num_perturbations: int,
    smoothing: float | optax.Schedule,
    perturbation: Perturbation | None = None,
    clients_at_once: int | None = None,
    perturbations_at_once: int | None = None,
    groups: int = 1,
) -> Estimator:
    """Measures g_p = (f(x + μ z_p) − f(x − μ z_p)) / 2μ with 2 P / G evaluations of the batch.

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
        evaluate = _evaluation(loss_fn, chosen, clients_at_once, together, groups)
        direction_keys = keys.direction_keys(key, num_perturbations)
        scales = jnp.broadcast_to(jnp.stack([mu, -mu]), (num_perturbations, 2))
        plus, minus = evaluate(params, direction_keys, scales, _parts(batch, groups)).T
        return Estimate((plus - minus) / (2 * mu), jnp.mean((plus + minus) / 2))

    passes = Passes(2 * num_perturbations // groups, 0)
    return _estimator(num_perturbations, measure, chosen, clients_at_once, passes, groups)


def projection(
    num_perturbations: int,
    perturbation: Perturbation | None = None,
    clients_at_once: int | None = None,
    groups: int = 1,
) -> Estimator:
    """Measures g_p = ⟨∇f(x), z_p⟩ exactly, with one backward pass for all P directions.

    The limit μ → 0 of the differences: Algorithm 5 of Li et al. 2025 (arXiv 2405.15861).
    The loss must be differentiable. Arguments as `forward_difference`; with groups the gradient is
    taken of one after the other.
    """
    chosen = perturbation or gaussian()

    def measure(
        loss_fn: LossFn, key: PRNGKey, round_index: Array, params: Params, batch: Batch
    ) -> Estimate:
        del round_index
        evaluate = at_once(jax.value_and_grad(_scalar(loss_fn)), clients_at_once)
        direction_keys = keys.direction_keys(key, num_perturbations)

        def of_part(part: Batch, own_keys: PRNGKey) -> tuple[Array, Array]:
            loss, gradient = evaluate(sums.arrays(params), part)

            def along(direction_key: PRNGKey) -> Array:
                return inner(gradient, chosen.sample(direction_key, params)).astype(loss.dtype)

            return jax.lax.map(along, own_keys), loss

        if groups == 1:
            return Estimate(*of_part(batch, direction_keys))
        own_keys = direction_keys.reshape(-1, groups).T
        scalars, losses = jax.lax.map(lambda x: of_part(*x), (_parts(batch, groups), own_keys))
        return Estimate(scalars.T.reshape(-1), jnp.mean(losses))

    passes = Passes(1, 1)
    return _estimator(num_perturbations, measure, chosen, clients_at_once, passes, groups)


def forward_gradient(
    num_perturbations: int,
    perturbation: Perturbation | None = None,
    clients_at_once: int | None = None,
    groups: int = 1,
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
        parts = _parts(batch, groups)

        def along(indexed: tuple[Array, PRNGKey]) -> tuple[Array, Array]:
            z = sums.arrays(chosen.sample(indexed[1], params))
            return evaluate(sums.arrays(params), z, _part(parts, indexed[0], groups))

        directions = jnp.arange(num_perturbations), keys.direction_keys(key, num_perturbations)
        losses, scalars = jax.lax.map(along, directions)
        return Estimate(scalars, jnp.mean(losses[:groups]))

    passes = Passes(2 * num_perturbations // groups, 0)
    return _estimator(num_perturbations, measure, chosen, clients_at_once, passes, groups)


def _estimator(
    num_perturbations: int,
    measure: Callable[[LossFn, PRNGKey, Array, Params, Batch], Estimate],
    perturbation: Perturbation,
    clients_at_once: int | None,
    passes: Passes,
    groups: int,
) -> Estimator:
    if num_perturbations < 1:
        raise ValueError(f"num_perturbations must be >= 1, got {num_perturbations}")
    if groups < 1 or num_perturbations % groups:
        raise ValueError(
            f"num_perturbations must be a multiple of the groups of a batch, got "
            f"{num_perturbations} and {groups}"
        )
    if clients_at_once is not None and clients_at_once < 1:
        raise ValueError(f"clients_at_once must be >= 1, got {clients_at_once}")

    def expand(key: PRNGKey, params: Params, scalars: Array) -> Params:
        direction_keys = keys.direction_keys(key, num_perturbations)
        return perturbation.accumulate(direction_keys, params, scalars / num_perturbations)

    return Estimator(num_perturbations, measure, expand, perturbation, passes, groups)


def _together(num_perturbations: int, perturbation: Perturbation, at_once: int | None) -> int:
    """Returns how many perturbed models are evaluated at once."""
    if at_once is None:
        return 1 if perturbation.combine is None else num_perturbations
    if at_once < 1:
        raise ValueError(f"perturbations_at_once must be >= 1, got {at_once}")
    return min(at_once, num_perturbations)


def _parts(batch: Batch, groups: int) -> Batch:
    """Returns the groups of a batch, a tree of arrays [G, B / G, ...]; of one, the batch."""
    if groups == 1:
        return batch

    def split(x: Array) -> Array:
        if x.shape[0] % groups:
            raise ValueError(
                f"a batch of {x.shape[0]} examples can't be shared out to {groups} groups: take a "
                "multiple"
            )
        return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])

    return jax.tree.map(split, batch)


def _part(parts: Batch, direction: Array, groups: int) -> Batch:
    """Returns the examples of a direction, or of each of several."""
    return parts if groups == 1 else jax.tree.map(lambda x: x[direction % groups], parts)


def _of_groups(loss_fn: LossFn, groups: int) -> Callable[[Params, Batch], Array]:
    """Returns (params, parts) -> losses [G]."""
    if groups == 1:
        return lambda params, batch: _scalar(loss_fn)(params, batch)[None]
    return jax.vmap(_scalar(loss_fn), in_axes=(None, 0))


def _evaluation(
    loss_fn: LossFn,
    perturbation: Perturbation,
    clients_at_once: int | None,
    together: int,
    groups: int,
) -> Callable[[Params, PRNGKey, Array, Batch], Array]:
    """Returns (params, keys [P], scales [P, S], parts) -> losses [P, S].

    losses[p, s] = f(x + scales[p, s] z_p), of the examples of group p mod G; a direction is drawn
    once for all its scales.
    """
    add, loss = perturbation.add, _scalar(loss_fn)

    def one(params: Params, direction: Params, scale: Array, batch: Batch) -> Array:
        return loss(add(params, direction, scale), batch)

    def many(params: Params, directions: Params, scales: Array, batches: Batch) -> Array:
        along = jax.vmap(one, in_axes=(None, None, 0, None))
        own = None if groups == 1 else 0
        return jax.vmap(along, in_axes=(None, 0, 0, own))(params, directions, scales, batches)

    def evaluate(params: Params, direction_keys: PRNGKey, scales: Array, parts: Batch) -> Array:
        count = len(scales)
        if together == 1:
            singly = at_once(one, clients_at_once)

            def along(index: Array, direction: Params, own_scales: Array) -> Array:
                batch = _part(parts, index, groups)
                return jnp.stack([singly(params, direction, scale, batch) for scale in own_scales])

            order = jnp.arange(count)
            if perturbation.combine is None:
                return jax.lax.map(
                    lambda x: along(x[0], perturbation.sample(x[1], params), x[2]),
                    (order, direction_keys, scales),
                )
            directions = draw_all(perturbation.sample, direction_keys, params)
            return jax.lax.map(lambda x: along(*x), (order, directions, scales))
        directions = draw_all(perturbation.sample, direction_keys, params)
        evaluate_many = at_once(many, clients_at_once)
        if count <= together + groups:  # the params themselves cost no more with them than apart
            own = _part(parts, jnp.arange(count), groups)
            return evaluate_many(params, directions, scales, own)
        chunks = math.ceil(count / together)
        index = jnp.minimum(jnp.arange(chunks * together), count - 1).reshape(chunks, together)
        losses = jax.lax.map(
            lambda i: evaluate_many(
                params,
                jax.tree.map(lambda x: x[i], directions),
                scales[i],
                _part(parts, i, groups),
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
