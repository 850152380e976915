"""FedAvg and FedProx: local training, and the mean of what it changed.

    client i:  y_i = K local steps from x on f_i(y) + (λ/2) ‖y − x‖²
               uploads Δ_i = x − y_i, as many numbers as there are params
    server:    x ← server optimiser(x, Σ_i w_i Δ_i / Σ_i w_i)

With the server optimiser x ← x − Δ the new x is the mean of the clients' models. Clients
receive the model itself, not the broadcasts they missed, which would be as large each.
Ref: McMahan et al. 2017 (arXiv 1602.05629); λ > 0: Li et al. 2020 (FedProx, arXiv 1812.06127).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from zofl_jax import precision
from zofl_jax.algorithms.local_training import (
    ClientOptimizer,
    Gradient,
    Trained,
    difference,
    exact,
    train,
)
from zofl_jax.algorithms.method import Method, NoOptions, Parts
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
from zofl_jax.settings import setting


def fedavg(
    loss_fn: LossFn,
    optimizer: ClientOptimizer,
    *,
    local_steps: int = 1,
    proximal: float = 0.0,
    server_optimizer: optax.GradientTransformation | None = None,
    aggregate: Callable[[Upload, Array], Broadcast] = aggregation.mean,
    clients_at_once: int | None = None,
) -> Algorithm:
    """Returns FedAvg as an `Algorithm`; its messages are trees like the params.

    Args:
      loss_fn: (params, batch) -> mean loss, differentiable.
      optimizer: of the clients; its state, and with it any schedule of its own, starts anew in
        every round. A function of the round [] gives that round's, as in
        `lambda r: optax.sgd(schedule(r))`.
      local_steps: K >= 1.
      proximal: λ >= 0 of FedProx.
      server_optimizer: applied to the mean Δ as if it were a gradient; x − Δ unless given.
      aggregate: (uploads [C, ...], weights [C]) -> broadcast.
      clients_at_once: how many clients of a vmap are trained at once, see `batching.at_once`.

    Raises:
      ValueError: for arguments out of range.

    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> algorithm = fedavg(f, optax.sgd(0.5), local_steps=2)
    >>> state, key = algorithm.init(jnp.zeros(3)), jax.random.key(0)
    >>> algorithm.client(key, state, (), jnp.ones((2, 3)), key).upload.tolist()
    [-0.75, -0.75, -0.75]
    """
    if not 0 <= proximal < float("inf"):
        raise ValueError(f"proximal must be >= 0 and finite, got {proximal}")
    return dense(
        exact(loss_fn),
        optimizer,
        local_steps=local_steps,
        proximal=proximal,
        server_optimizer=server_optimizer,
        aggregate=aggregate,
        clients_at_once=clients_at_once,
    )


def dense(
    gradient: Gradient,
    optimizer: ClientOptimizer,
    *,
    local_steps: int,
    proximal: float = 0.0,
    server_optimizer: optax.GradientTransformation | None = None,
    aggregate: Callable[[Upload, Array], Broadcast] = aggregation.mean,
    clients_at_once: int | None = None,
    shared_directions: bool = False,
    passes: Passes = Passes(1, 1),  # noqa: B008 (a constant)
) -> Algorithm:
    """Returns FedAvg on any gradient; one that draws directions draws them from a client's own
    key, or from the round's if they are shared. `passes` is what the gradient computes.

    Raises:
      ValueError: if `local_steps` < 1.
    """
    if local_steps < 1:
        raise ValueError(f"local_steps must be >= 1, got {local_steps}")
    applied = optax.sgd(1.0) if server_optimizer is None else server_optimizer

    def descend(key: PRNGKey, round_index: Array, params: Params, batches: Batches) -> Trained:
        def towards_start(slope: Params, y: Params) -> Params:
            return jax.tree.map(lambda g, a, b: g + proximal * (a - b), slope, y, params)

        correction = {"correction": towards_start} if proximal else {}
        return train(gradient, optimizer, key, round_index, params, batches, **correction)

    def client(
        shared_key: PRNGKey, state: ServerState, memory: tuple, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        chosen = shared_key if shared_directions else own_key
        trained = at_once(descend, clients_at_once)(chosen, state.round, state.params, batches)
        upload = difference(state.params, trained.params)
        return ClientResult(upload, memory, {"loss": trained.loss})

    def init(params: Params) -> ServerState:
        params = precision.wide(params)
        return ServerState(params, applied.init(params), jnp.zeros((), jnp.int32))

    return Algorithm(
        init=init,
        client=client,
        aggregate=aggregate,
        server=descend_by(applied),
        local_steps=local_steps,
        sync=whole_model(),
        passes=passes.times(local_steps),
    )


def descend_by(
    optimizer: optax.GradientTransformation,
) -> Callable[[PRNGKey, ServerState, Broadcast], ServerState]:
    """Returns the server's part that gives the broadcast to an optimiser as a gradient."""

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        del key
        updates, opt_state = optimizer.update(broadcast, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return ServerState(params, opt_state, state.round + 1)

    return server


def whole_model() -> Sync:
    """Returns the message that brings clients up to date which need the params alone."""
    return Sync(
        message=lambda state: state.params,
        restore=lambda state, message: state._replace(params=message),
        alone=True,
    )


def whole_state() -> Sync:
    """Returns the message that brings clients up to date which need the optimiser's state too."""
    return Sync(
        message=lambda state: (state.params, state.opt_state),
        restore=lambda state, message: state._replace(params=message[0], opt_state=message[1]),
        alone=True,
    )


def build(parts: Parts, options: NoOptions) -> Algorithm:
    """Returns the algorithm of `METHOD`."""
    return fedavg(
        parts.loss_fn,
        parts.client_optimizer,
        local_steps=parts.local_steps,
        clients_at_once=parts.clients_at_once,
    )


METHOD = Method(
    "fedavg",
    build,
    order=1,
    summary="local descent; the change of the model up, the model down (McMahan et al. 2017)",
    defaults={"momentum": 0.0},
    warms_up=True,
)


@dataclasses.dataclass(frozen=True)
class ProximalOptions:
    """The settings of FedProx."""

    proximal: float = setting(0.01, "λ of fedprox.", least=0)


def build_proximal(parts: Parts, options: ProximalOptions) -> Algorithm:
    """Returns the algorithm of `METHOD_PROXIMAL`."""
    return fedavg(
        parts.loss_fn,
        parts.client_optimizer,
        proximal=options.proximal,
        local_steps=parts.local_steps,
        clients_at_once=parts.clients_at_once,
    )


METHOD_PROXIMAL = dataclasses.replace(
    METHOD,
    name="fedprox",
    build=build_proximal,
    summary="fedavg whose clients are held near the round's model (Li et al. 2020)",
    options=ProximalOptions,
)
