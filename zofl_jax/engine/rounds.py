"""The traced functions of a simulation: many rounds, their replay, an evaluation.

A round is

    cohort    = attend(keys, r)                  who is there, whose upload arrives
    batches   = each client's own draw from its data
    uploads   = vmap(client)                     malicious clients change theirs
    broadcast = aggregate(uploads, weights)      zero weight: absent, late or rejected
    state     = server(broadcast)

and a loop advances any number of rounds up to a capacity, so that one compilation serves
every dispatch.

A message with a number that is not finite, or larger than `Conditions.max_message`, is
rejected: its client counts as absent and nothing else is lost. Where all messages of a round
are rejected the model itself has diverged. Then, or if the broadcast or every loss is not
finite, the round is not applied: the loop ends before it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zofl_jax import keys
from zofl_jax.conditions import aggregation, attacks, participation
from zofl_jax.core import (
    Algorithm,
    Array,
    Batches,
    Broadcast,
    ClientData,
    ClientResult,
    Params,
    PRNGKey,
    ServerState,
    Task,
    Upload,
    Weighting,
    Wire,
)
from zofl_jax.data import batches as data_batches
from zofl_jax.directions import jaxprs
from zofl_jax.engine import carried, ledger, placement

CAPACITY = 128
"""The most rounds in one dispatch, of algorithms whose broadcasts are a few scalars."""

BUFFER_BYTES = 64 * 2**20
"""What the broadcasts of one dispatch may take."""


class Conditions(NamedTuple):
    """What goes wrong around a method, and what the server does about it.

    Attributes:
      attend: who is there, see `participation`; a uniform cohort unless given.
      adversary: who is malicious and what they do; nobody unless given.
      max_message: messages with a number larger than this in size are rejected.

    Whether uploads after the deadline are used is the algorithm's: see `staleness`.
    """

    attend: participation.Attend | None = None
    adversary: attacks.Adversary | None = None
    max_message: float = math.inf


IDEAL = Conditions()
"""Everybody is there, honest and in time."""


class RoundRecord(NamedTuple):
    """What is kept of a round; in buffers each leaf is [capacity, ...]."""

    attendance: participation.Attendance
    broadcast: Broadcast
    loss: Array  # [], the mean training loss, where finite, of those whose uploads are used
    rejected: Array  # int32 [], messages


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
    where: placement.Placement = placement.ONE_DEVICE,
    rounds_at_most: int = CAPACITY,
    conditions: Conditions = IDEAL,
) -> Callable[..., Loop]:
    """Returns (state, memory, train, root, limit) -> Loop: up to `limit` rounds.

    The clients are shared out over the devices of `where`; buffers hold `rounds_at_most` rounds.
    `memory` is what `carried` makes of the algorithm: the clients' alone, or with late uploads.
    """
    everyone = participation.everyone(task.train.num_clients, clients_per_round)
    exchange = _make_exchange(
        algorithm, batch_size, weighting, where, conditions.attend or everyone, conditions
    )

    def advance(
        state: ServerState, memory: Any, train: ClientData, root: keys.RootKeys, limit: Array
    ) -> Loop:
        # Traced once, for the shapes of the buffers and for the body of the loop.
        program, out = jaxprs.trace(exchange, state, memory, train, root)

        def body(loop: Loop) -> Loop:
            given = jax.tree.leaves((loop.state, loop.memory, train, root))
            record, memory, healthy = jax.tree.unflatten(out, jaxprs.run(program, given))
            key = keys.round_key(root.shared, loop.state.round)
            done = loop.done + healthy
            after = _server_if(healthy, algorithm, key, loop.state, record.broadcast)
            records = jax.tree.map(lambda b, x: b.at[loop.done].set(x), loop.records, record)
            after, memory, records = where.settled((after, memory, records), after.params)
            return Loop(done, after, memory, records, healthy, record.loss)

        record, _, _ = jax.tree.unflatten(out, jaxprs.results(program))
        buffers = jax.tree.map(lambda x: jnp.zeros((rounds_at_most, *x.shape), x.dtype), record)
        loss = jnp.zeros((), record.loss.dtype)
        start = Loop(jnp.zeros((), jnp.int32), state, memory, buffers, jnp.ones((), bool), loss)
        end = jax.lax.while_loop(lambda c: (c.done < limit) & c.healthy, body, start)
        return where.settled(end, state.params)

    return advance


def _make_exchange(
    algorithm: Algorithm,
    batch_size: int,
    weighting: Weighting,
    where: placement.Placement,
    attend: participation.Attend,
    conditions: Conditions,
) -> Callable[..., tuple[RoundRecord, Any, Array]]:
    """Returns (state, memory, train, root) -> a round's record, new memory, whether it is sound.

    It is a round up to the broadcast, which is not applied yet.
    """
    keeps, adversary = carried.of(algorithm), conditions.adversary

    def clients(shared: tuple, each: tuple) -> ClientResult:
        return jax.vmap(algorithm.client, in_axes=(None, None, 0, 0, 0))(*shared, *each)

    def exchange(
        state: ServerState, memory: Any, train: ClientData, root: keys.RootKeys
    ) -> tuple[RoundRecord, Any, Array]:
        # Who is asked, and what each of them does.
        r = state.round
        attendance = attend(root, r)
        cohort = attendance.cohort
        batches = _batches_of(cohort, r, train, root, batch_size, algorithm.local_steps, where)
        batches = _tampered_batches(adversary, cohort, batches)
        own_keys = jax.vmap(lambda c: keys.own_key(root.own, r, c))(cohort)
        before = _of_cohort(keeps.clients(memory), cohort)
        results = where.over_devices(clients, state.params)(
            (keys.round_key(root.shared, r), state), (before, batches, own_keys)
        )
        # What is sent, and which of it is good.
        uploads = _tampered_uploads(adversary, algorithm.wire, attendance, r, root, results.upload)
        good = attendance.uploaded & _acceptable(uploads, conditions.max_message)
        used = good & attendance.in_time
        received = carried.Received(uploads, good, used, _weights_of(cohort, train, weighting))
        # What the server makes of it, and whether that may be applied.
        broadcast = _aggregate(algorithm, *keeps.to_aggregate(memory, received))
        loss = _training_loss(results.stats["loss"], received)
        rejected = attendance.uploaded & ~good
        lost = jnp.any(rejected) & ~jnp.any(good)
        record = RoundRecord(attendance, broadcast, loss, jnp.sum(rejected, dtype=jnp.int32))
        healthy = ~lost & _all_finite((broadcast, loss))
        # What is left of it beside the state.
        after = _where_clients(keeps.remembered(received) & healthy, results.memory, before)
        remembered = jax.tree.map(
            lambda m, new: m.at[cohort].set(new), keeps.clients(memory), after
        )
        return record, keeps.after(memory, remembered, received, healthy), healthy

    return exchange


def capacity(broadcast: Any) -> int:
    """Returns the most rounds in one dispatch, from the shapes of a broadcast.

    >>> capacity(jax.ShapeDtypeStruct((4, 20), jnp.float32))
    128
    >>> capacity(jax.ShapeDtypeStruct((2**22,), jnp.float32))
    4
    """
    return max(1, min(CAPACITY, BUFFER_BYTES // max(ledger.tree_bytes(broadcast), 1)))


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


@jax.jit
def fingerprint(params: Params) -> Array:
    """Returns a uint32 checksum of the params' bits, []: any one changed bit changes it."""
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


def _batches_of(
    cohort: Array,
    round_index: Array,
    train: ClientData,
    root: keys.RootKeys,
    batch_size: int,
    local_steps: int,
    where: placement.Placement,
) -> Batches:
    """Returns each client's own draw from its data, a tree of arrays [C, K, B, ...]."""
    batch_keys = jax.vmap(lambda c: keys.batch_key(root.batches, round_index, c))(cohort)
    chosen = jax.vmap(
        lambda key, c: data_batches.sampled_indices(key, train, c, batch_size, local_steps)
    )(batch_keys, cohort)
    return where.take(train.examples, chosen)


def _tampered_batches(
    adversary: attacks.Adversary | None, cohort: Array, batches: Batches
) -> Batches:
    """Returns the batches that are trained on, [C, K, B, ...]."""
    if adversary is None or adversary.data_attack is None:
        return batches
    malicious = adversary.malicious[cohort]
    return _where_clients(malicious, jax.vmap(adversary.data_attack)(batches), batches)


def _tampered_uploads(
    adversary: attacks.Adversary | None,
    wire: Wire | None,
    attendance: participation.Attendance,
    round_index: Array,
    root: keys.RootKeys,
    uploads: Upload,
) -> Upload:
    """Returns the uploads that are sent, [C, ...]."""
    if adversary is None or adversary.attack is None:
        return uploads
    key = keys.round_key(root.adversary, round_index)
    malicious = adversary.malicious[attendance.cohort]
    return attacks.on_wire(adversary.attack, wire)(key, uploads, malicious, attendance.uploaded)


def _weights_of(cohort: Array, train: ClientData, weighting: Weighting) -> Array:
    """Returns the weight of each client's upload, [C]."""
    if weighting == "examples":
        counts = train.offsets[cohort + 1] - train.offsets[cohort]
        return counts.astype(jnp.float32)
    return jnp.ones(len(cohort), jnp.float32)


def _training_loss(losses: Array, received: carried.Received) -> Array:
    """Returns the mean loss of those whose uploads are used, [].

    With nobody to listen to it is that of the work done in vain. No loss is sent: one that is not
    finite stops nothing while another is.
    """
    used = received.used
    heard = jnp.where(jnp.any(used), used, ~used) & jnp.isfinite(losses)
    losses = jnp.where(heard, losses, 0.0)
    return jnp.average(losses, weights=jnp.where(heard, received.weights, 0.0))


def _aggregate(algorithm: Algorithm, uploads: Upload, weights: Array) -> Broadcast:
    """Returns the broadcast, zero if no upload is used."""
    broadcast = algorithm.aggregate(uploads, weights)
    return jax.tree.map(lambda b: jnp.where(jnp.any(weights > 0), b, jnp.zeros_like(b)), broadcast)


def _acceptable(uploads: Upload, largest: float) -> Array:
    """Returns whose floating point numbers are all finite and in range, [C]."""

    def leaf(u: Array) -> Array:
        flat = u.reshape(len(u), -1)
        # Compared with the largest, NaN and infinity fail too.
        bound = min(largest, float(jnp.finfo(u.dtype).max))
        return jnp.all(jnp.abs(flat) <= jnp.asarray(bound, u.dtype), axis=1)

    leaves = [u for u in jax.tree.leaves(uploads) if jnp.issubdtype(u.dtype, jnp.floating)]
    size = len(jax.tree.leaves(uploads)[0])
    return jnp.all(jnp.stack([jnp.ones(size, bool), *map(leaf, leaves)]), axis=0)


def _where_clients(chosen: Array, new: Any, old: Any) -> Any:
    """Returns `new` of the chosen clients [C] and `old` of the others, trees of arrays [C, ...]."""
    return jax.tree.map(lambda a, b: jnp.where(aggregation.beside(chosen, a), a, b), new, old)


def _of_cohort(memory: Any, cohort: Array) -> Any:
    return jax.tree.map(lambda m: m[cohort], memory)


def _all_finite(tree: Any) -> Array:
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))
