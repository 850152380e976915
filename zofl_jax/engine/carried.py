"""What outlives a round beside the shared state: the clients' memory, and uploads that were late.

Where an algorithm takes late uploads (`Algorithm.late_uploads`) they are kept for the next round,
and otherwise they are lost. A `Carried` is one of these two, chosen once for a simulation.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from zofl_jax.conditions import aggregation
from zofl_jax.core import Algorithm, Array, Upload


class Late(NamedTuple):
    """Uploads that missed the deadline of the round before."""

    uploads: Upload  # a tree of arrays [clients_per_round, ...]
    weights: Array  # [clients_per_round], zero for those in time


class Memory(NamedTuple):
    """What outlives a round beside the shared state, where late uploads are used."""

    clients: Any  # of the population, (), or arrays [num_clients, ...]
    late: Late


class Received(NamedTuple):
    """The uploads of a round as the server has them, [clients_per_round] each."""

    uploads: Upload
    good: Array  # bool, whose upload arrived, in time or not, and was not rejected
    used: Array  # bool, the good ones in time
    weights: Array  # of a client whose upload is used


class Carried(Protocol):
    """How what outlives a round is kept; `memory` is all of it."""

    def start(self, clients: Any, upload: Any, cohort_size: int) -> Any:
        """Returns the memory at round 0, from the clients' and the shapes of one upload."""
        ...

    def clients(self, memory: Any) -> Any:
        """Returns the memory of the population's clients."""
        ...

    def to_aggregate(self, memory: Any, received: Received) -> tuple[Upload, Array]:
        """Returns the uploads and weights that `Algorithm.aggregate` is given."""
        ...

    def remembered(self, received: Received) -> Array:
        """Returns whose upload counts, now or later: others take back what they did for it."""
        ...

    def after(self, memory: Any, clients: Any, received: Received, healthy: Array) -> Any:
        """Returns the memory after a round, in which the late uploads of one not applied stay."""
        ...


class LateAreLost:
    """Late uploads are lost: the clients' memory is all that outlives a round."""

    def start(self, clients: Any, upload: Any, cohort_size: int) -> Any:
        """Returns the clients' memory."""
        del upload, cohort_size
        return clients

    def clients(self, memory: Any) -> Any:
        """Returns the memory."""
        return memory

    def to_aggregate(self, memory: Any, received: Received) -> tuple[Upload, Array]:
        """Returns the uploads in time, the others with weight zero."""
        del memory
        uploads = aggregation.present_only(received.uploads, received.good)
        return uploads, jnp.where(received.used, received.weights, 0.0)

    def remembered(self, received: Received) -> Array:
        """Returns whose upload is used."""
        return received.used

    def after(self, memory: Any, clients: Any, received: Received, healthy: Array) -> Any:
        """Returns the clients' memory."""
        del memory, received, healthy
        return clients


class LateAreKept:
    """Late uploads are used in the next round: what outlives a round is a `Memory`."""

    def start(self, clients: Any, upload: Any, cohort_size: int) -> Memory:
        """Returns the memory in which nothing was late."""
        zeros = jax.tree.map(lambda x: jnp.zeros((cohort_size, *x.shape), x.dtype), upload)
        return Memory(clients, Late(zeros, jnp.zeros(cohort_size)))

    def clients(self, memory: Memory) -> Any:
        """Returns the clients' part."""
        return memory.clients

    def to_aggregate(self, memory: Memory, received: Received) -> tuple[Upload, Array]:
        """Returns the uploads of this round and then those kept of the last one, [2C, ...]."""
        fresh, weights = LateAreLost().to_aggregate(memory, received)
        both = jax.tree.map(lambda u, v: jnp.concatenate([u, v]), fresh, memory.late.uploads)
        return both, jnp.concatenate([weights, memory.late.weights])

    def remembered(self, received: Received) -> Array:
        """Returns whose upload is good, late or not."""
        return received.good

    def after(self, memory: Memory, clients: Any, received: Received, healthy: Array) -> Memory:
        """Returns the clients' memory and what was late in this round."""
        late = received.good & ~received.used
        missed = Late(
            aggregation.present_only(received.uploads, late),
            jnp.where(late, received.weights, 0.0),
        )
        kept = jax.tree.map(lambda a, b: jnp.where(healthy, a, b), missed, memory.late)
        return Memory(clients, kept)


def of(algorithm: Algorithm) -> Carried:
    """Returns how the algorithm keeps what outlives a round."""
    return LateAreKept() if algorithm.late_uploads else LateAreLost()
