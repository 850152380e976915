"""The traced functions of a simulation: many rounds, their replay, an evaluation.

A round is

    cohort    = participation.uniform(key, r)
    batches   = each client's own draw from its data
    uploads   = vmap(client)
    broadcast = aggregate(uploads)
    state     = server(broadcast)

and a loop advances any number of rounds up to a capacity, so that one compilation serves
every dispatch. A round whose loss or broadcast is not finite is not applied: the loop
ends before it.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from zofl_jax import keys, participation, placement
from zofl_jax.core import (
    Algorithm,
    Array,
    Broadcast,
    ClientData,
    ClientResult,
    Params,
    PRNGKey,
    ServerState,
    Task,
)
from zofl_jax.data import batches as data_batches

Weighting = Literal["uniform", "examples"]

CAPACITY = 128
"""The most rounds in one dispatch, of algorithms whose broadcasts are a few scalars."""

BUFFER_BYTES = 64 * 2**20
"""What the broadcasts of one dispatch may take."""


class RoundRecord(NamedTuple):
    """What is kept of a round; in buffers each leaf is [capacity, ...]."""

    cohort: Array  # int32 [clients_per_round]
    broadcast: Broadcast
    loss: Array  # [], the cohort's mean training loss


class Loop(NamedTuple):
    """What a dispatch carries from round to round."""

    done: Array  # int32 [], rounds applied
    state: ServerState
    memory: Any
    records: RoundRecord
    healthy: Array  # bool [], whether the last round was applied
    last_loss: Array  # [], of the last round, applied or not


def make_advance(
    algorithm: Algorithm,
    task: Task,
    clients_per_round: int,
    batch_size: int,
    weighting: Weighting,
    mesh: Mesh | None = None,
    rounds_at_most: int = CAPACITY,
) -> Callable[..., Loop]:
    """Returns (state, memory, train, root, limit) -> Loop: up to `limit` rounds.

    The clients are shared out over the devices of `mesh`; buffers hold `rounds_at_most` rounds.
    """
    num_clients = task.train.num_clients

    def clients(shared: tuple, each: tuple) -> ClientResult:
        return jax.vmap(algorithm.client, in_axes=(None, None, 0, 0, 0))(*shared, *each)

    def exchange(
        state: ServerState, memory: Any, train: ClientData, root: keys.RootKeys
    ) -> tuple[RoundRecord, Any]:
        """Returns the record of a round, not yet applied, and the cohort's new memory."""
        r = state.round
        cohort = participation.uniform(root.cohort, r, num_clients, clients_per_round)
        batch_keys = jax.vmap(lambda c: keys.batch_key(root.batches, r, c))(cohort)
        rows = jax.vmap(
            lambda key, c: data_batches.rows(key, train, c, batch_size, algorithm.local_steps)
        )(batch_keys, cohort)
        batches = placement.take(train.examples, rows, mesh)
        own_keys = jax.vmap(lambda c: keys.own_key(root.own, r, c))(cohort)
        results = placement.over_devices(clients, mesh)(
            (keys.round_key(root.shared, r), state), (_rows(memory, cohort), batches, own_keys)
        )
        weights = jnp.ones(clients_per_round, jnp.float32)
        if weighting == "examples":
            counts = train.offsets[cohort + 1] - train.offsets[cohort]
            weights = counts.astype(jnp.float32)
        broadcast = algorithm.aggregate(results.upload, weights)
        loss = jnp.average(results.stats["loss"], weights=weights)
        return RoundRecord(cohort, broadcast, loss), results.memory

    def advance(
        state: ServerState, memory: Any, train: ClientData, root: keys.RootKeys, limit: Array
    ) -> Loop:
        def body(loop: Loop) -> Loop:
            record, cohort_memory = exchange(loop.state, loop.memory, train, root)
            healthy = _all_finite((record.broadcast, record.loss))
            key = keys.round_key(root.shared, loop.state.round)
            kept = jax.tree.map(
                lambda new, old: jnp.where(healthy, new, old),
                cohort_memory,
                _rows(loop.memory, record.cohort),
            )
            return Loop(
                loop.done + healthy,
                _server_if(healthy, algorithm, key, loop.state, record.broadcast),
                jax.tree.map(lambda m, new: m.at[record.cohort].set(new), loop.memory, kept),
                jax.tree.map(lambda b, x: b.at[loop.done].set(x), loop.records, record),
                healthy,
                record.loss,
            )

        record, _ = jax.eval_shape(exchange, state, memory, train, root)
        buffers = jax.tree.map(lambda x: jnp.zeros((rounds_at_most, *x.shape), x.dtype), record)
        loss = jnp.zeros((), record.loss.dtype)
        start = Loop(jnp.zeros((), jnp.int32), state, memory, buffers, jnp.ones((), bool), loss)
        return jax.lax.while_loop(lambda c: (c.done < limit) & c.healthy, body, start)

    return advance


def capacity(broadcast: Any) -> int:
    """Returns the most rounds in one dispatch, from the shapes of a broadcast.

    >>> capacity(jax.ShapeDtypeStruct((4, 20), jnp.float32))
    128
    >>> capacity(jax.ShapeDtypeStruct((2**22,), jnp.float32))
    4
    """
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(broadcast))
    return max(1, min(CAPACITY, BUFFER_BYTES // max(size, 1)))


def make_replay(algorithm: Algorithm, impl: str) -> Callable[..., ServerState]:
    """Returns (state, seeds, broadcasts, limit) -> state: the server's part of rounds.

    `seeds` [n, words] are the raw round keys; the loop ends before a broadcast that is
    not finite.
    """

    def replay(
        state: ServerState, seeds: Array, broadcasts: Broadcast, limit: Array
    ) -> ServerState:
        def body(loop: tuple) -> tuple:
            done, state, _ = loop
            key = jax.random.wrap_key_data(seeds[done], impl=impl)
            broadcast = jax.tree.map(lambda b: b[done], broadcasts)
            healthy = _all_finite(broadcast)
            return done + 1, _server_if(healthy, algorithm, key, state, broadcast), healthy

        start = (jnp.zeros((), jnp.int32), state, jnp.ones((), bool))
        return jax.lax.while_loop(lambda c: (c[0] < limit) & c[2], body, start)[1]

    return replay


def make_evaluate(task: Task) -> Callable[..., dict[str, Array]]:
    """Returns (params, batches [n, B, ...], mask [n, B]) -> mean of each metric, []."""

    def evaluate(params: Params, test: Any, mask: Array) -> dict[str, Array]:
        values = jax.lax.map(lambda batch: task.metrics(params, batch), test)
        return {name: jnp.mean(v, where=mask) for name, v in values.items()}

    return evaluate


def fingerprint(params: Params) -> Array:
    """Returns a uint32 checksum of the params' bits, []: any one changed bit changes it."""
    return _fingerprint(placement.own_copy(params))


@jax.jit
def _fingerprint(params: Params) -> Array:
    total = jnp.zeros((), jnp.uint32)
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in paths_and_leaves:
        width = min(leaf.dtype.itemsize, 4) * 8
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}"))
        words = bits.astype(jnp.uint32).reshape(-1)
        # MurmurHash3's finaliser, a bijection that spreads each bit over the word; the sum
        # of the plain words would not see two signs exchanged.
        mixed = words ^ (jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B9))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        mixed = mixed ^ (mixed >> 16)
        total = total * jnp.uint32(16777619) + jnp.sum(mixed, dtype=jnp.uint32)
        total = total ^ jnp.uint32(keys.name_id(keys.path_name(path)))
    return total


def _server_if(
    healthy: Array, algorithm: Algorithm, key: PRNGKey, state: ServerState, broadcast: Broadcast
) -> ServerState:
    # As the branch of a conditional, the server's part is compiled on its own, whatever
    # stands around it: so a replay does the same floating point operations as the round.
    return jax.lax.cond(
        healthy, algorithm.server, lambda key, state, b: state, key, state, broadcast
    )


def _rows(memory: Any, cohort: Array) -> Any:
    return jax.tree.map(lambda m: m[cohort], memory)


def _all_finite(tree: Any) -> Array:
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))
