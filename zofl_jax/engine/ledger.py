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


class MessageShapes(NamedTuple):
    """The messages of an algorithm, as trees of `jax.ShapeDtypeStruct`."""

    upload: Any
    broadcast: Any
    sync: Any  # None without a `core.Sync`
    sync_alone: bool


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
    return MessageShapes(shapes[0], shapes[1], shapes[2], sync is not None and sync.alone)


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
    )


def tree_bytes(tree: Any) -> int:
    """Returns the size of all leaves in bytes, from their shapes.

    >>> tree_bytes({"w": np.zeros((2, 3), np.float32)})
    24
    """
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


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
        last = self.last_round[members]
        sent_until_now = self._replay_bytes[now]
        starts = [self._bring_up_to_date(seen, sizes) for seen in last.tolist()]
        counted = RoundBytes(
            upload=(members.size if num_uploads is None else num_uploads) * sizes.upload,
            seed=members.size * sizes.seed,
            broadcast=members.size * sizes.broadcast if sizes.sync is None else 0,
            catch_up=sum(catch_up for catch_up, _ in starts),
            first_sync=sum(first for _, first in starts),
        )
        self.last_round[members] = now
        self._replay_bytes.append(sent_until_now + sizes.seed + sizes.broadcast)
        self.totals = RoundBytes(*(a + b for a, b in zip(self.totals, counted, strict=True)))
        self.participations += members.size
        self.attended.append(members.size)
        self.first_syncs.append(counted.first_sync)
        self.times[members] += 1
        self.dense_bytes += 2 * members.size * sizes.params
        return counted

    def _bring_up_to_date(self, last: int, sizes: MessageSizes) -> tuple[int, int]:
        """Returns the bytes of catch-up and of first synchronisation of one client."""
        new = last == participation.NEVER
        # With a sync message the broadcast of its last round was not sent to it either.
        held = 0 if new else last + (sizes.sync is None)
        missed = self._replay_bytes[-1] - self._replay_bytes[held]
        if new and sizes.sync is not None and sizes.sync_alone:
            return 0, min(sizes.sync, sizes.params + missed)
        catch_up = missed if sizes.sync is None else min(sizes.sync, missed)
        return catch_up, sizes.params if new else 0

    def per_client(self, total: int) -> float:
        """Returns a total as a mean over the population, in bytes."""
        return total / self.num_clients
