"""SCAFFOLD: control variates against client drift (Karimireddy et al. 2020).

The server keeps c, client i keeps c_i, estimates of ∇f and ∇f_i:

    client i:  y ← y − η (∇f_i(y; ξ_k) − c_i + c)   for K local steps from y = x
               c_i⁺ = c_i − c + (x − y) / (K η)      (option II)
               uploads x − y and c_i⁺ − c_i, twice as many numbers as there are params
    server:    x ← x − η_g mean(x − y),   c ← c + (1 / N) Σ (c_i⁺ − c_i)

The sum is over the clients of the cohort S that are heard, whatever they weigh in the mean, so
that c stays the mean of all c_i. It is broadcast as a share of |S|.
Ref: arXiv 1910.06378, Algorithm 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zofl_jax import precision
from zofl_jax.algorithms.fedavg import whole_state
from zofl_jax.algorithms.fedopt import ServerRate
from zofl_jax.algorithms.local_training import Trained, difference, exact, train
from zofl_jax.algorithms.method import Method, Parts, Refusal
from zofl_jax.conditions import aggregation
from zofl_jax.core import (
    Algorithm,
    Array,
    Batches,
    Broadcast,
    ClientResult,
    Expectations,
    LossFn,
    Params,
    Passes,
    PRNGKey,
    ServerState,
    Upload,
)
from zofl_jax.directions.batching import at_once


def scaffold(
    loss_fn: LossFn,
    learning_rate: float | Array | optax.Schedule,
    *,
    share: float,
    local_steps: int = 1,
    server_rate: float = 1.0,
    aggregate: Callable[[Upload, Array], Broadcast] = aggregation.mean,
    clients_at_once: int | None = None,
) -> Algorithm:
    """Returns SCAFFOLD as an `Algorithm`; clients remember c_i.

    Args:
      loss_fn: (params, batch) -> mean loss, differentiable.
      learning_rate: η > 0 of the clients, or round -> η.
      share: |S| / N in (0, 1], the cohort's share of the population; a simulation of another
        share is refused.
      local_steps: K >= 1.
      server_rate: η_g > 0.
      aggregate: (uploads [C, ...], weights [C]) -> broadcast; in place of Σ (c_i⁺ − c_i) stands
        what it makes of uniform weights, times the number of clients heard.
      clients_at_once: how many clients of a vmap are trained at once, see `batching.at_once`.

    Raises:
      ValueError: for arguments out of range.

    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> algorithm = scaffold(f, 0.5, share=0.1, local_steps=2)
    >>> state, key = algorithm.init(jnp.zeros(3)), jax.random.key(0)
    >>> result = algorithm.client(key, state, jnp.zeros(3), jnp.ones((2, 3)), key)
    >>> result.memory.tolist()
    [-0.75, -0.75, -0.75]
    """
    for name, value in (("learning_rate", learning_rate), ("server_rate", server_rate)):
        if not callable(value) and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if local_steps < 1:
        raise ValueError(f"local_steps must be >= 1, got {local_steps}")

    gradient = exact(loss_fn)

    def rate(round_index: Array) -> Any:
        return learning_rate(round_index) if callable(learning_rate) else learning_rate

    def descend(key: PRNGKey, state: ServerState, control: Params, batches: Batches) -> Trained:
        def towards_all(slope: Params, y: Params) -> Params:
            del y
            return jax.tree.map(lambda g, own, c: g - own + c, slope, control, state.opt_state)

        return train(
            gradient,
            lambda round_index: optax.sgd(rate(round_index)),
            key,
            state.round,
            state.params,
            batches,
            towards_all,
        )

    def client(
        shared_key: PRNGKey, state: ServerState, memory: Params, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        del own_key
        trained = at_once(descend, clients_at_once)(shared_key, state, memory, batches)
        moved = difference(state.params, trained.params)
        scale = 1 / (local_steps * rate(state.round))
        control = jax.tree.map(
            lambda own, c, m: own - c + scale * m, memory, state.opt_state, moved
        )
        upload = {"params": moved, "control": difference(control, memory)}
        return ClientResult(upload, control, {"loss": trained.loss})

    def aggregate_heard(uploads: Upload, weights: Array) -> Broadcast:
        heard = (weights > 0).astype(jnp.float32)
        control = aggregate(uploads, heard)["control"]
        return {
            "params": aggregate(uploads, weights)["params"],
            "control": jax.tree.map(lambda d: (jnp.mean(heard) * d).astype(d.dtype), control),
        }

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        del key
        params = jax.tree.map(lambda x, m: x - server_rate * m, state.params, broadcast["params"])
        control = jax.tree.map(lambda c, d: c + share * d, state.opt_state, broadcast["control"])
        return ServerState(params, control, state.round + 1)

    def init_memory(params: Params) -> Params:
        return jax.tree.map(jnp.zeros_like, precision.wide(params))

    def init(params: Params) -> ServerState:
        return ServerState(precision.wide(params), init_memory(params), jnp.zeros((), jnp.int32))

    return Algorithm(
        init=init,
        client=client,
        aggregate=aggregate_heard,
        server=server,
        local_steps=local_steps,
        init_memory=init_memory,
        sync=whole_state(),
        passes=Passes(1, 1).times(local_steps),
        expects=Expectations(share=share),
    )


def build(parts: Parts, options: ServerRate) -> Algorithm:
    """Returns the algorithm of `METHOD`."""
    return scaffold(
        parts.loss_fn,
        parts.scheduled_rate,
        share=parts.share,
        local_steps=parts.local_steps,
        server_rate=options.server_learning_rate,
        aggregate=parts.rule,
        clients_at_once=parts.clients_at_once,
    )


METHOD = Method(
    "scaffold",
    build,
    order=1,
    summary="local descent with the drift of clients taken out; two models up (Karimireddy et al. "
    "2020)",
    options=ServerRate,
    defaults={"server_learning_rate": 1.0},
    fixed={"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0},
    refuses={"late_weight": Refusal("whose c would no longer be the mean of the clients' c_i")},
    takes=("rule",),  # it also counts who is heard
)
