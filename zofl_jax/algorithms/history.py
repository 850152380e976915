"""Directions that lean towards the span of the last updates, which everyone has.

With q_1, ..., q_m the last m <= H changes of the params by a round, each of length 1, d params and
a share ρ,

    z = √(1 − ρ) u + √(ρ d / m) Σ_h ε_h q_h,    u isotropic, ε ~ N(0, I_m)

    E[z zᵀ] = (1 − ρ) I + ρ (d / m) Σ_h q_h q_hᵀ

so the mean estimate of a gradient g is (1 − ρ) g + ρ (d / m) Σ_h ⟨q_h, g⟩ q_h: not g, but an
ascent direction, in which what lies in the span is up to ρ d / m times as long. P directions tell
m dimensions far better than d. Before the first update z = u.

Everybody rebuilds the changes from the broadcasts, so nothing more is sent; they are part of the
`ServerState`, H times as many numbers as there are params.
Ref: arXiv 2409.15955 (the historical trajectory); guided evolution strategies (Maheswaranathan et
al. 2019, 1806.10230) for the covariance.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys
from zofl_jax.core import (
    Algorithm,
    Array,
    Batches,
    Broadcast,
    ClientResult,
    Params,
    PRNGKey,
    ServerState,
)
from zofl_jax.directions import sums
from zofl_jax.directions.perturbations import Perturbation


class WithHistory(NamedTuple):
    """What is kept beside the params: the `opt_state` of the `ServerState`."""

    inner: optax.OptState
    updates: Params  # a tree like params of arrays [H, ...], each update of length 1, or 0
    rounds: Array  # int32 [], updates so far


def leaning(
    perturbation: Perturbation, updates: Params, count: Array, share: float, size: int
) -> Perturbation:
    """Returns directions that lean towards the span of `updates`, see above.

    Args:
      perturbation: of u.
      updates: a tree like params of arrays [H, ...], each of length 1, or 0 where there is none.
      count: m, of those that are not zero, [].
      share: ρ in [0, 1).
      size: d, the params that are perturbed.

    >>> from zofl_jax.directions.perturbations import gaussian
    >>> along = jnp.array([[1.0, 0.0, 0.0]])
    >>> leant = leaning(gaussian(), along, jnp.asarray(1), 0.9, 3)
    >>> z = jax.vmap(lambda key: leant.sample(key, jnp.zeros(3)))(
    ...     jax.random.split(jax.random.key(0), 10_000))
    >>> [round(x, 1) for x in jnp.square(z).mean(0).tolist()]  # 0.1 + 0.9 · 3, 0.1, 0.1
    [2.8, 0.1, 0.1]
    """
    length = jax.tree.leaves(updates)[0].shape[0]
    rest = jnp.where(count > 0, math.sqrt(1 - share), 1.0)
    along = jnp.sqrt(share * size / jnp.maximum(count, 1))

    def weights(key: PRNGKey) -> Array:
        own = jax.random.fold_in(key, keys.name_id("history"))
        return along * jax.random.normal(own, (length,))

    def sample(key: PRNGKey, params: Params) -> Params:
        own = weights(key)

        def leaf(u: Array, q: Array) -> Array:
            return rest.astype(u.dtype) * u + jnp.tensordot(own.astype(u.dtype), q, 1)

        return jax.tree.map(leaf, sums.arrays(perturbation.sample(key, params)), updates)

    def add(params: Params, direction: Params, scale: Array | float) -> Params:
        return jax.tree.map(lambda x, z: x + jnp.asarray(scale, x.dtype) * z, params, direction)

    def accumulate(direction_keys: PRNGKey, params: Params, scalars: Array) -> Params:
        total = jnp.tensordot(scalars, jax.lax.map(weights, direction_keys), 1)

        def leaf(u: Array, q: Array) -> Array:
            return rest.astype(u.dtype) * u + jnp.tensordot(total.astype(u.dtype), q, 1)

        return jax.tree.map(leaf, perturbation.accumulate(direction_keys, params, scalars), updates)

    return Perturbation(sample, add, accumulate)


def with_history(
    make: Callable[[Perturbation], Algorithm],
    perturbation: Perturbation,
    length: int,
    share: float,
    size: int | None = None,
) -> Algorithm:
    """Returns the algorithm that `make` makes, with directions that lean towards its last updates.

    Args:
      make: directions -> an algorithm that measures along them in the rounds they are drawn in, as
        DeComFL does.
      perturbation: of the isotropic part.
      length: H >= 1, updates that are kept.
      share: ρ in [0, 1).
      size: d, the params that are perturbed; all unless given.

    Raises:
      ValueError: for arguments out of range, or an algorithm with a message for late clients
        (`core.Sync`), which would not have the updates.

    >>> from zofl_jax.algorithms import decomfl
    >>> from zofl_jax.directions import estimators, perturbations
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> def make(z):
    ...     return decomfl(f, estimators.central_difference(4, 1e-3, z), optax.sgd(0.1))
    >>> algorithm = with_history(make, perturbations.gaussian(), 2, 0.5)
    >>> state = algorithm.server(jax.random.key(0), algorithm.init(jnp.zeros(3)), jnp.ones((1, 4)))
    >>> jnp.linalg.norm(state.opt_state.updates, axis=1).round(4).tolist()
    [1.0, 0.0]
    """
    if length < 1:
        raise ValueError(f"the length of the history must be >= 1, got {length}")
    if not 0 <= share < 1:
        raise ValueError(f"the share of the history must be in [0, 1), got {share}")
    plain = make(perturbation)
    if plain.sync is not None:
        raise ValueError(
            "directions from the history need an algorithm whose late clients replay what they "
            "missed, and this one sends them a message that has no updates: use decomfl"
        )

    def of_state(state: ServerState) -> tuple[Algorithm, ServerState]:
        inner, updates, rounds = state.opt_state
        d = size or sum(leaf.size for leaf in jax.tree.leaves(state.params))
        leant = leaning(perturbation, updates, jnp.minimum(rounds, length), share, d)
        return make(leant), state._replace(opt_state=inner)

    def init(params: Params) -> ServerState:
        state = plain.init(params)
        none = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), state.params)
        kept = WithHistory(state.opt_state, none, jnp.zeros((), jnp.int32))
        return state._replace(opt_state=kept)

    def client(
        shared_key: PRNGKey, state: ServerState, memory: Any, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        algorithm, inside = of_state(state)
        return algorithm.client(shared_key, inside, memory, batches, own_key)

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        algorithm, inside = of_state(state)
        after = algorithm.server(key, inside, broadcast)
        kept = state.opt_state
        change = jax.tree.map(jnp.subtract, after.params, state.params)
        norm = optax.tree_utils.tree_norm(change)
        # A round without a step, such as one that nobody uploaded in, is none to lean towards.
        moved = norm > 0
        at = kept.rounds % length

        def leaf(q: Array, c: Array) -> Array:
            unit = (c / jnp.where(moved, norm, 1)).astype(q.dtype)
            return q.at[at].set(jnp.where(moved, unit, q[at]))

        updates = jax.tree.map(leaf, kept.updates, change)
        return after._replace(opt_state=WithHistory(after.opt_state, updates, kept.rounds + moved))

    return plain._replace(init=init, client=client, server=server)
