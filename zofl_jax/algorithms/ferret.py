"""Ferret: first-order local training whose change travels as P scalars (Shu et al. 2025).

Round r, shared key s_r, P directions V drawn from s_r, by block of the params:

    client i:  y_i = K local steps from x on f_i,  Δ_i = x − y_i
               uploads γ_i = Vᵀ Δ_i / √P, P scalars
    server:    broadcasts γ̄ = mean_i γ_i
    everyone:  x ← x − η_g f V γ̄ / √P,   f = P / (P + r)

With r = 0 the mean step is FedAvg's, and its noise d / P times as large in square; with r = d it is
the multiple closest to FedAvg's step; with the effective rank of the loss's Hessian the one that
lowers the loss most, see `directions.sketches`. The paper's
γ is c Vᵀ Δ with truncated normals and c = 1 / (ρ K): the same step, its factors shared out
otherwise. There every client has seeds of its own and everyone is sent the pairs of all; here they
share the round's, so the mean of the cohort is as long as one upload. With a remainder (error
feedback, Karimireddy et al. 2019, arXiv 1901.09847) clients keep what their scalars don't say,
e_i = Δ_i − f V γ_i / √P, and add it to their next Δ_i.

With a pool of n seeds the round's key draws V from n fixed ones, V_1 ... V_n, so every model there
will be is x_0 − Σ_j f V_j A_j / √P, and the n P accumulators A bring any client up to date, however
long it was away, as those of FedKSeed do; the model stays in a space of n P dimensions at most.
Ref: arXiv 2409.06277, Algorithm 1.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from zofl_jax import keys, precision
from zofl_jax.algorithms.fedavg import whole_model
from zofl_jax.algorithms.fedopt import ServerRate
from zofl_jax.algorithms.local_training import ClientOptimizer, Trained, difference, exact, train
from zofl_jax.algorithms.method import Method, Parts, Refusal
from zofl_jax.conditions import aggregation
from zofl_jax.core import (
    Algorithm,
    Array,
    Batches,
    Broadcast,
    ClientResult,
    LossFn,
    Params,
    Passes,
    PRNGKey,
    ServerState,
    Sync,
    Upload,
)
from zofl_jax.directions.batching import at_once
from zofl_jax.directions.perturbations import Perturbation, gaussian
from zofl_jax.directions.sketches import sketch
from zofl_jax.settings import setting


def ferret(
    loss_fn: LossFn,
    optimizer: ClientOptimizer,
    num_directions: int,
    perturbation: Perturbation | None = None,
    *,
    local_steps: int = 1,
    server_rate: float = 1.0,
    by_block: bool = True,
    effective_rank: float = 100.0,
    remainder: bool = False,
    pool_key: PRNGKey | None = None,
    pool_size: int = 0,
    aggregate: Callable[[Upload, Array], Broadcast] = aggregation.mean,
    clients_at_once: int | None = None,
) -> Algorithm:
    """Returns Ferret as an `Algorithm`; the upload and the broadcast are [P].

    A client that was away is sent the model, with a pool its accumulators, or the scalars it missed
    where they are fewer.

    Args:
      loss_fn: (params, batch) -> mean loss, differentiable.
      optimizer: of the clients, or round -> that round's; its state starts anew in every round.
      num_directions: P >= 1; by block about P, see `sketches.sketch`.
      perturbation: the distribution of the directions, Gaussian unless given.
      local_steps: K >= 1.
      server_rate: η_g > 0.
      by_block: whether each leaf and layer has directions of its own.
      effective_rank: r >= 0, the trace of the loss's Hessian over its curvature along the way.
      remainder: whether clients keep what their scalars don't say for their next upload. It needs
        the step of the least error, r = d, or it would grow from round to round.
      pool_key: from which the directions of a pool are drawn, such as `keys.pool_key(root.shared)`.
      pool_size: n >= 1 with a pool, else 0.
      aggregate: (uploads [C, P], weights [C]) -> broadcast [P].
      clients_at_once: how many clients of a vmap are trained at once, see `batching.at_once`.

    Raises:
      ValueError: for arguments out of range.

    >>> import optax
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> algorithm = ferret(f, optax.sgd(0.5), 8, local_steps=2)
    >>> state, key = algorithm.init(jnp.zeros(3)), jax.random.key(0)
    >>> upload = algorithm.client(key, state, (), jnp.ones((2, 3)), key).upload
    >>> upload.shape, algorithm.server(key, state, upload).params.shape
    ((8,), (3,))
    """
    if local_steps < 1:
        raise ValueError(f"local_steps must be >= 1, got {local_steps}")
    if not 0 < server_rate < float("inf"):
        raise ValueError(f"server_rate must be positive and finite, got {server_rate}")
    if pool_size < 0 or (pool_size > 0) != (pool_key is not None):
        raise ValueError(f"a pool needs a pool_key and pool_size >= 1, got pool_size={pool_size}")
    rank = math.inf if remainder else effective_rank
    directions = sketch(num_directions, perturbation or gaussian(), by_block=by_block, rank=rank)
    gradient = exact(loss_fn)

    def descend(key: PRNGKey, round_index: Array, params: Params, batches: Batches) -> Trained:
        return train(gradient, optimizer, key, round_index, params, batches)

    def seed_key(seed: Array) -> PRNGKey:
        assert pool_key is not None
        return keys.step_key(pool_key, seed)

    def drawn(shared_key: PRNGKey) -> tuple[PRNGKey, Array]:
        """Returns what a round's directions are drawn from, and its place in the pool."""
        if not pool_size:
            return shared_key, jnp.zeros((), jnp.int32)
        seed = jax.random.randint(shared_key, (), 0, pool_size, jnp.int32)
        return seed_key(seed), seed

    def init(params: Params) -> ServerState:
        params = precision.wide(params)
        accumulators: Any = ()
        if pool_size:
            sent = jax.eval_shape(directions.measure, jax.random.key(0), params)
            accumulators = jnp.zeros((pool_size, *sent.shape), sent.dtype)
        return ServerState(params, accumulators, jnp.zeros((), jnp.int32))

    def init_memory(params: Params) -> Any:
        return jax.tree.map(jnp.zeros_like, precision.wide(params)) if remainder else ()

    def client(
        shared_key: PRNGKey, state: ServerState, memory: Any, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        trained = at_once(descend, clients_at_once)(own_key, state.round, state.params, batches)
        change = difference(state.params, trained.params)
        if remainder:
            change = jax.tree.map(jnp.add, change, memory)
        key, _ = drawn(shared_key)
        upload = directions.measure(key, change)
        if remainder:
            memory = difference(change, directions.expand(key, state.params, upload))
        return ClientResult(upload, memory, {"loss": trained.loss})

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        own_key, seed = drawn(key)
        scalars = server_rate * broadcast
        params = difference(state.params, directions.expand(own_key, state.params, scalars))
        accumulators = state.opt_state
        if pool_size:
            accumulators = accumulators.at[seed].add(scalars)
        return ServerState(params, accumulators, state.round + 1)

    def restore(state: ServerState, accumulators: Array) -> ServerState:
        def step(params: Params, part: tuple[Array, Array]) -> tuple[Params, None]:
            seed, scalars = part
            return difference(params, directions.expand(seed_key(seed), params, scalars)), None

        every = jnp.arange(pool_size), accumulators
        params, _ = jax.lax.scan(step, state.params, every)
        return ServerState(params, accumulators, state.round)

    accumulated = Sync(message=lambda state: state.opt_state, restore=restore, alone=False)

    return Algorithm(
        init=init,
        client=client,
        aggregate=aggregate,
        server=server,
        local_steps=local_steps,
        init_memory=init_memory,
        sync=accumulated if pool_size else whole_model(),
        passes=Passes(1, 1).times(local_steps),
    )


@dataclasses.dataclass(frozen=True)
class Options(ServerRate):
    """The settings of Ferret."""

    ferret_by_block: bool = setting(
        True, "Whether each leaf and layer has directions of its own in ferret, by its size."
    )
    ferret_rank: float = setting(
        100.0,
        "r of ferret, whose step is shrunk by P / (P + r): the effective rank of the loss's "
        "Hessian lowers the loss most, the number of params or more makes the error least.",
        least=0,
    )
    ferret_remainder: bool = setting(
        False, "Whether ferret's clients keep what their scalars don't say for the next upload."
    )
    ferret_pool: int = setting(
        0,
        "Seeds in the pool that ferret draws each round's directions from, whose accumulators late "
        "clients are sent in place of the model; 0 draws new directions in every round.",
        least=0,
    )


def build(parts: Parts, options: Options) -> Algorithm:
    """Returns the algorithm of `METHOD`."""
    return ferret(
        parts.loss_fn,
        parts.client_optimizer,
        parts.estimator.num_perturbations,
        parts.perturbation,
        local_steps=parts.local_steps,
        server_rate=options.server_learning_rate,
        by_block=options.ferret_by_block,
        effective_rank=options.ferret_rank,
        remainder=options.ferret_remainder,
        pool_key=parts.pool_key if options.ferret_pool else None,
        pool_size=options.ferret_pool,
        clients_at_once=parts.clients_at_once,
    )


def _noise(options: Options, num_directions: int, local_steps: int) -> float:
    """Returns that of K local steps, which are sent as one step and shrunk."""
    if options.ferret_remainder:
        return 0.0
    f = num_directions / (num_directions + options.ferret_rank)
    return local_steps * options.server_learning_rate * f


METHOD = Method(
    "ferret",
    build,
    order=1,
    summary="local descent; the change of the model as P scalars up and down (Shu et al. 2025)",
    options=Options,
    defaults={"momentum": 0.0, "num_perturbations": 320, "server_learning_rate": 1.0},
    reads=("perturbation", "rank", "num_perturbations"),
    refuses={
        "perturbation": Refusal(
            "whose blocks have as many directions as they need",
            ("subspace",),
            "use --perturbation=low_rank",
        )
    },
    noise=_noise,
)
