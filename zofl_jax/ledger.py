"""The bytes that server and clients exchange, counted message by message.

In round r, a client that last took part in round l receives and sends, in this order:

    first_sync   down  the initial params, once in a client's life (l = never)
    catch_up     down  for each round it missed, l < t < r: the seed and the broadcast
    seed         down  the shared key of round r
    upload       up    its scalars (and its number of examples, where means are weighted)
    broadcast    down  the cohort's mean

after which its copy of the server's state is that of round r + 1. Sizes are payloads; a
transport adds its framing. `tests/oracle.py` serialises these messages for real.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax import keys, participation
from zofl_jax.core import Algorithm, Batches, Params, PRNGKey

WEIGHT_BYTES = 4
"""A client's number of examples as uint32, part of its upload where means are weighted."""


class MessageSizes(NamedTuple):
    """Sizes of one client's messages in one round, in bytes."""

    seed: int
    upload: int
    broadcast: int
    params: int  # the first synchronisation; also one dense exchange, one way


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
    algorithm: Algorithm, key: PRNGKey, params: Params, batches: Batches
) -> tuple[Any, Any]:
    """Returns the shapes of an upload and of a broadcast, without running anything.

    Args:
      algorithm: whose messages.
      key: a round key.
      params: arrays or `jax.ShapeDtypeStruct`s.
      batches: one client's batches, likewise, [K, B, ...].
    """

    def exchange(key: PRNGKey, params: Params, batches: Batches) -> tuple[Any, Any]:
        state, memory = algorithm.init(params), algorithm.init_memory(params)
        upload = algorithm.client(key, state, memory, batches).upload
        cohort = jax.tree.map(lambda x: x[None], upload)
        return upload, algorithm.aggregate(cohort, jnp.ones(1))

    return jax.eval_shape(exchange, key, params, batches)


def message_sizes(
    shapes: tuple[Any, Any], key: PRNGKey, params: Params, weighted: bool = False
) -> MessageSizes:
    """Returns the sizes of messages with the shapes that `message_shapes` returns.

    `weighted` says that uploads carry the client's number of examples.
    """
    upload, broadcast = shapes
    return MessageSizes(
        seed=keys.key_bytes(key),
        upload=tree_bytes(upload) + (WEIGHT_BYTES if weighted else 0),
        broadcast=tree_bytes(broadcast),
        params=tree_bytes(params),
    )


def tree_bytes(tree: Any) -> int:
    """Returns the size of all leaves in bytes, from their shapes.

    >>> tree_bytes({"w": np.zeros((2, 3), np.float32)})
    24
    """
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Ledger:
    """Counts the bytes of rounds in their order.

    It keeps only each client's last round and running totals; both are functions of the
    cohorts so far, so a resumed run recounts them from the cohorts.
    """

    def __init__(self, num_clients: int):
        self.num_clients = num_clients
        self.last_round = participation.first_last_round(num_clients)
        self.totals = RoundBytes(0, 0, 0, 0, 0)
        self.participations = 0
        self.dense_bytes = 0
        # replay_bytes[t]: the seeds and broadcasts of the rounds before t.
        self._replay_bytes = [0]

    @property
    def num_rounds(self) -> int:
        """How many rounds have been counted."""
        return len(self._replay_bytes) - 1

    def record(self, cohort: Sequence[int] | np.ndarray, sizes: MessageSizes) -> RoundBytes:
        """Counts the next round; `cohort` holds distinct clients. Returns its bytes."""
        members = np.asarray(cohort)
        now = self.num_rounds
        last = self.last_round[members]
        sent_until_now = self._replay_bytes[now]
        catch_up = sum(sent_until_now - self._replay_bytes[seen + 1] for seen in last.tolist())
        counted = RoundBytes(
            upload=members.size * sizes.upload,
            seed=members.size * sizes.seed,
            broadcast=members.size * sizes.broadcast,
            catch_up=catch_up,
            first_sync=int(np.sum(last == participation.NEVER)) * sizes.params,
        )
        self.last_round[members] = now
        self._replay_bytes.append(sent_until_now + sizes.seed + sizes.broadcast)
        self.totals = RoundBytes(*(a + b for a, b in zip(self.totals, counted, strict=True)))
        self.participations += members.size
        self.dense_bytes += 2 * members.size * sizes.params
        return counted

    def per_client(self, total: int) -> float:
        """Returns a total as a mean over the population, in bytes."""
        return total / self.num_clients
