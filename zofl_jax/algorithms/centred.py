"""Directions at right angles to mean activations, which clients measure and everyone is sent.

    rounds of measuring    each client sends the means of what the model's matrices are multiplied
                           with; the server broadcasts their mean
    all other rounds       a method along directions z = Π u, which leave the outputs for the means
                           as they are, see `directions/activations.py`

Both are phases of one run (`core.Phase`), with one kind of state: what the method keeps, and the
means. So uploads and broadcasts of both are counted, and who replays the broadcasts has the means.
A round of measuring takes no step, and a forward pass of each batch. Before the first one the means
are 0, and directions are those of the method.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofl_jax.conditions import aggregation
from zofl_jax.core import (
    Algorithm,
    Array,
    Batch,
    Batches,
    Broadcast,
    ClientResult,
    LossFn,
    Params,
    Passes,
    PRNGKey,
    ServerState,
)
from zofl_jax.directions import activations
from zofl_jax.directions.activations import Means
from zofl_jax.directions.batching import at_once
from zofl_jax.directions.perturbations import Perturbation


class Centred(NamedTuple):
    """What is kept beside the params: the `opt_state` of the `ServerState`."""

    inner: optax.OptState
    means: Means


class Both(NamedTuple):
    """The two algorithms, for the phases of a run."""

    measuring: Algorithm
    method: Algorithm


def centred(
    make: Callable[[Perturbation], Algorithm],
    perturbation: Perturbation,
    loss_fn: LossFn,
    batch: Batch,
    clients_at_once: int | None = None,
) -> Both:
    """Returns the algorithm that measures means, and that of `make` with directions away from them.

    Args:
      make: directions -> an algorithm that measures along them in the rounds they are drawn in, as
        DeComFL does.
      perturbation: of the directions u.
      loss_fn: (params, batch) -> mean loss.
      batch: a client's, arrays or their shapes: it tells which matrices have inputs.
      clients_at_once: how many clients of a vmap are measured at once, see `batching.at_once`.

    Raises:
      ValueError: for an algorithm with a message for late clients (`core.Sync`), which would not
        have the means, or with an ε, which doesn't count them; by `init`, for a loss without a
        product X W.

    >>> from zofl_jax.algorithms import decomfl
    >>> from zofl_jax.directions import estimators, perturbations
    >>> f = lambda x, batch: jnp.mean(jnp.square(batch @ x["w"]))
    >>> def make(z):
    ...     return decomfl(f, estimators.central_difference(4, 1e-3, z), optax.sgd(0.1))
    >>> batch = jnp.array([[1.0, 2.0], [3.0, 2.0]])
    >>> measuring, method = centred(make, perturbations.gaussian(), f, batch)
    >>> key, state = jax.random.key(0), measuring.init({"w": jnp.ones((2, 3))})
    >>> upload = measuring.client(key, state, (), batch[None], key).upload
    >>> upload["w"].tolist()
    [2.0, 2.0]
    >>> moved = method.server(key, measuring.server(key, state, upload), jnp.ones((1, 4)))
    >>> abs((moved.params["w"] - 1).sum(0)).round(5).tolist()
    [0.0, 0.0, 0.0]
    """
    plain = make(perturbation)
    if plain.sync is not None:
        raise ValueError(
            "directions away from the mean activations need an algorithm whose late clients replay "
            "what they missed, and this one sends them a message that has no means: use decomfl"
        )
    if plain.accountant is not None:
        raise ValueError(
            "the means of clients' activations are sent as they are, which the algorithm's ε does "
            "not count: use an algorithm that is not private, or no means"
        )

    def of_state(state: ServerState) -> tuple[Algorithm, ServerState]:
        inner, means = state.opt_state
        along = activations.orthogonal(perturbation, means)
        return make(along), state._replace(opt_state=inner)

    def init(params: Params) -> ServerState:
        state = plain.init(params)
        _, found = jax.eval_shape(
            lambda x, batch: activations.means(loss_fn, x, batch), state.params, batch
        )
        if not found:
            raise ValueError(
                "the loss has no product X W with a matrix W of the params, so there are no mean "
                "activations to keep away from: use the method as it is"
            )
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)
        return state._replace(opt_state=Centred(state.opt_state, none))

    def measured(params: Params, batches: Batches) -> tuple[Array, Means]:
        found = jax.lax.map(lambda batch: activations.means(loss_fn, params, batch), batches)
        return jax.tree.map(lambda x: x.mean(0), found)

    def measure(
        shared_key: PRNGKey, state: ServerState, memory: Any, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        loss, upload = at_once(measured, clients_at_once)(state.params, batches)
        return ClientResult(upload, memory, {"loss": loss})

    def take(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        # Where nobody uploaded, all are 0, and the means stay.
        means = jax.tree.map(
            lambda old, new: jnp.where(jnp.any(new != 0), new, old),
            state.opt_state.means,
            broadcast,
        )
        kept = state.opt_state._replace(means=means)
        return state._replace(opt_state=kept, round=state.round + 1)

    def client(
        shared_key: PRNGKey, state: ServerState, memory: Any, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        algorithm, inside = of_state(state)
        return algorithm.client(shared_key, inside, memory, batches, own_key)

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        algorithm, inside = of_state(state)
        after = algorithm.server(key, inside, broadcast)
        return after._replace(opt_state=state.opt_state._replace(inner=after.opt_state))

    measuring = plain._replace(
        init=init,
        client=measure,
        aggregate=aggregation.mean,
        server=take,
        passes=Passes(plain.local_steps, 0),
        wire=None,
    )
    return Both(measuring, plain._replace(init=init, client=client, server=server))
