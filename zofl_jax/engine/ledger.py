"""The bytes that server and clients exchange, counted message by message.

In round r, a client that last took part in round l receives and sends, in this order:

    first_sync   down  the initial params, once in a client's life (l = never)
    catch_up     down  for each round it missed, l < t < r: the seed and the broadcast
    seed         down  the shared key of round r
    upload       up    its scalars (and its number of examples, where means are weighted)
    broadcast    down  the cohort's mean

after which its copy of the server's state is that of round r + 1. Where the algorithm has a
`core.Sync`, as those with dense broadcasts do, no broadcast is sent at a round's end. Instead
`catch_up` is the smaller of the sync message and of what was missed, l <= t < r; and of a new
client too, or where the message stands alone, `first_sync` is that message. Sizes are payloads; a
transport adds its framing. `tests/oracle.py` serialises these messages for real.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax import keys
from zofl_jax.conditions import participation
from zofl_jax.core import Algorithm, Batches, Params, PRNGKey

WEIGHT_BYTES = 4
"""A client's number of examples as uint32, part of its upload where means are weighted."""


class MessageSizes(NamedTuple):
    """Sizes of one client's messages in one round, in bytes."""

    seed: int
    upload: int
    broadcast: int
    params: int  # the first synchronisation; also one dense exchange, one way
    sync: int | None = None  # the message of a `core.Sync`, if the algorithm has one
    sync_alone: bool = False  # whether a new client needs nothing else
    sync_since: int = 0  # the round whose state it adds to, where it does not stand alone


class MessageShapes(NamedTuple):
    """The messages of an algorithm, as trees of `jax.ShapeDtypeStruct`."""

    upload: Any
    broadcast: Any
    sync: Any  # None without a `core.Sync`
    sync_alone: bool
    sync_since: int = 0


class RoundBytes(NamedTuple):
    """Bytes of one round, summed over its cohort."""

    upload: int
    seed: int
    broadcast: int
    catch_up: int
    first_sync: int

    @property
    def up(self) -> int:
        """Everything clients sent."""
        return self.upload

    @property
    def down(self) -> int:
        """Everything clients received."""
        return self.seed + self.broadcast + self.catch_up + self.first_sync


def message_shapes(
    algorithm: Algorithm, key: PRNGKey, params: Params, batches: Batches, cohort: int = 1
) -> MessageShapes:
    """Returns the shapes of an algorithm's messages, without running anything.

    Args:
      algorithm: whose messages.
      key: a round key.
      params: arrays or `jax.ShapeDtypeStruct`s.
      batches: one client's batches, likewise, [K, B, ...].
      cohort: how many clients upload in a round.
    """
    sync = algorithm.sync

    def exchange(key: PRNGKey, params: Params, batches: Batches) -> tuple[Any, Any, Any]:
        state, memory = algorithm.init(params), algorithm.init_memory(params)
        upload = algorithm.client(key, state, memory, batches, jax.random.key(0)).upload
        uploads = jax.tree.map(lambda x: jnp.broadcast_to(x, (cohort, *x.shape)), upload)
        message = None if sync is None else sync.message(state)
        return upload, algorithm.aggregate(uploads, jnp.ones(cohort)), message

    shapes = jax.eval_shape(exchange, key, params, batches)
    if sync is None:
        return MessageShapes(shapes[0], shapes[1], None, False)
    return MessageShapes(shapes[0], shapes[1], shapes[2], sync.alone, sync.since)


def message_sizes(
    shapes: MessageShapes, key: PRNGKey, params: Params, weighted: bool = False
) -> MessageSizes:
    """Returns the sizes of messages with the shapes that `message_shapes` returns.

    `weighted` says that uploads carry the client's number of examples.
    """
    return MessageSizes(
        seed=keys.key_bytes(key),
        upload=tree_bytes(shapes.upload) + (WEIGHT_BYTES if weighted else 0),
        broadcast=tree_bytes(shapes.broadcast),
        params=tree_bytes(params),
        sync=None if shapes.sync is None else tree_bytes(shapes.sync),
        sync_alone=shapes.sync_alone,
        sync_since=shapes.sync_since,
    )


def tree_bytes(tree: Any) -> int:
    """Returns the size of all leaves in bytes, from their shapes.

    >>> tree_bytes({"w": np.zeros((2, 3), np.float32)})
    24
    """
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


class _SyncPoint(NamedTuple):
    """A message that brings a client to the state of a round."""

    round: int
    size: int
    alone: bool
    since: int


class Ledger:
    """Counts the bytes of rounds in their order.

    It keeps each client's last round, each round's size and running totals; all are functions of
    the cohorts so far, so a resumed run recounts them from the cohorts.
    """

    def __init__(self, num_clients: int):
        self.num_clients = num_clients
        self.last_round = participation.first_last_round(num_clients)
        self.totals = RoundBytes(0, 0, 0, 0, 0)
        self.participations = 0
        self.attended: list[int] = []  # of each round, how many clients were there
        self.first_syncs: list[int] = []  # of each round, the bytes of first synchronisation
        self.rejected = 0
        # Of each client, and how many rounds had how many uploads that counted.
        self.times = np.zeros(num_clients, np.int64)
        self.contributors: Counter[int] = Counter()
        self.dense_bytes = 0
        # replay_bytes[t]: the seeds and broadcasts of the rounds before t.
        self._replay_bytes = [0]
        # Of each client, the round whose state it holds; and the last messages of earlier phases.
        self._held = np.zeros(num_clients, np.int64)
        self._sync_points: list[_SyncPoint] = []
        self._sizes: MessageSizes | None = None

    @property
    def num_rounds(self) -> int:
        """How many rounds have been counted."""
        return len(self._replay_bytes) - 1

    def record_attendance(
        self, attendance: participation.Attendance, sizes: MessageSizes, rejected: int = 0
    ) -> RoundBytes:
        """Counts the next round: who was there received, and what was not lost was sent.

        A late upload was sent, and so was one of the `rejected`.
        """
        there, uploaded = np.asarray(attendance.there), np.asarray(attendance.uploaded)
        in_time = int(np.sum(attendance.in_time))
        self.rejected += rejected
        # Some of the rejected may have been late; then fewer are counted than there were.
        self.contributors[max(in_time - rejected, 0)] += 1
        return self.record(np.asarray(attendance.cohort)[there], sizes, int(uploaded.sum()))

    def record(
        self,
        cohort: Sequence[int] | np.ndarray,
        sizes: MessageSizes,
        num_uploads: int | None = None,
    ) -> RoundBytes:
        """Counts the next round; `cohort` holds distinct clients. Returns its bytes.

        All of them upload unless `num_uploads` says how many did.
        """
        members = np.asarray(cohort, np.int64)
        now = self.num_rounds
        self._begin(sizes)
        sent_until_now = self._replay_bytes[now]
        starts = [self._bring_up_to_date(client, sizes) for client in members.tolist()]
        counted = RoundBytes(
            upload=(members.size if num_uploads is None else num_uploads) * sizes.upload,
            seed=members.size * sizes.seed,
            broadcast=members.size * sizes.broadcast if sizes.sync is None else 0,
            catch_up=sum(catch_up for catch_up, _ in starts),
            first_sync=sum(first for _, first in starts),
        )
        self.last_round[members] = now
        # With a sync message the broadcast of a client's last round was not sent to it.
        self._held[members] = now + (sizes.sync is None)
        self._replay_bytes.append(sent_until_now + sizes.seed + sizes.broadcast)
        self.totals = RoundBytes(*(a + b for a, b in zip(self.totals, counted, strict=True)))
        self.participations += members.size
        self.attended.append(members.size)
        self.first_syncs.append(counted.first_sync)
        self.times[members] += 1
        self.dense_bytes += 2 * members.size * sizes.params
        return counted

    def _begin(self, sizes: MessageSizes) -> None:
        """Takes note of the messages that a phase leaves behind, if these sizes begin another."""
        if self._sizes not in (None, sizes):
            self._sync_points += _sync_points(self.num_rounds, self._sizes)
        self._sizes = sizes

    def _bring_up_to_date(self, client: int, sizes: MessageSizes) -> tuple[int, int]:
        """Returns the bytes of catch-up and of first synchronisation of one client."""
        now, held = self.num_rounds, int(self._held[client])
        new = self.last_round[client] == participation.NEVER
        points = [*self._sync_points, *_sync_points(now, sizes)]
        catch_up, first = self._cheapest(held, now, sizes.params if new else 0, points)
        if new and sizes.sync is not None and sizes.sync_alone:
            return 0, catch_up + first
        return catch_up, first

    def _cheapest(
        self, held: int, until: int, params: int, points: Sequence[_SyncPoint]
    ) -> tuple[int, int]:
        """Returns the least bytes of catch-up and of first synchronisation.

        Args:
          held: the round whose state the client has, once it has the initial params.
          until: the round whose state it needs.
          params: the size of the initial params that it has not, 0 of one that has them.
          points: the messages that there are.
        """
        sent = self._replay_bytes
        ways = [(sent[until] - sent[held], params)]
        for point in points:
            adds = point.alone or point.since < point.round
            if not (adds and held < point.round <= until):
                continue
            after = sent[until] - sent[point.round]
            if point.alone:
                ways.append((after, point.size) if params else (after + point.size, 0))
            else:
                # It adds to a state that the client has had, or is brought to first.
                base = (0, params)
                if held < point.since:
                    base = self._cheapest(held, point.since, params, points)
                ways.append((base[0] + point.size + after, base[1]))
        return min(ways, key=sum)

    def per_client(self, total: int) -> float:
        """Returns a total as a mean over the population, in bytes."""
        return total / self.num_clients


def _sync_points(round_index: int, sizes: MessageSizes | None) -> list[_SyncPoint]:
    if sizes is None or sizes.sync is None:
        return []
    return [_SyncPoint(round_index, sizes.sync, sizes.sync_alone, sizes.sync_since)]
