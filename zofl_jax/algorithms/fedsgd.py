"""FedSGD: the mean gradient of the cohort, one step a round (McMahan et al. 2017).

    client i: uploads ∇f_i(x; ξ);   server: x ← optimiser(x, mean of the gradients)

Ref: arXiv 1602.05629.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from zofl_jax import precision
from zofl_jax.algorithms.fedavg import descend_by, whole_model
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
    Upload,
)
from zofl_jax.directions.batching import at_once


def fedsgd(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    aggregate: Callable[[Upload, Array], Broadcast] = aggregation.mean,
    clients_at_once: int | None = None,
) -> Algorithm:
    """Returns FedSGD as an `Algorithm`; its messages are gradients, trees like the params.

    Args:
      loss_fn: (params, batch) -> mean loss, differentiable.
      optimizer: of the server.
      aggregate: (uploads [C, ...], weights [C]) -> broadcast.
      clients_at_once: how many clients of a vmap are evaluated at once, see `batching.at_once`.

    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> algorithm = fedsgd(f, optax.sgd(0.5))
    >>> state, key = algorithm.init(jnp.zeros(3)), jax.random.key(0)
    >>> algorithm.client(key, state, (), jnp.ones((1, 3)), key).upload.tolist()
    [-1.0, -1.0, -1.0]
    """

    def client(
        shared_key: PRNGKey, state: ServerState, memory: tuple, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        del shared_key, own_key
        slope = at_once(jax.value_and_grad(loss_fn), clients_at_once)
        loss, gradient = slope(state.params, jax.tree.map(lambda b: b[0], batches))
        return ClientResult(gradient, memory, {"loss": loss})

    def init(params: Params) -> ServerState:
        params = precision.wide(params)
        return ServerState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return Algorithm(
        init=init,
        client=client,
        aggregate=aggregate,
        server=descend_by(optimizer),
        local_steps=1,
        sync=whole_model(),
        passes=Passes(1, 1),
    )


def build(parts: Parts, options: NoOptions) -> Algorithm:
    """Returns the algorithm of `METHOD`."""
    return fedsgd(parts.loss_fn, parts.optimizer, clients_at_once=parts.clients_at_once)


METHOD = Method(
    "fedsgd",
    build,
    order=1,
    summary="one gradient up, the model down (McMahan et al. 2017)",
    defaults={"momentum": 0.0},
    fixed={"local_steps": 1},
)
