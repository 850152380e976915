"""The vocabulary of the library: what an algorithm, a task and a client's data are.

A federated algorithm is three pure functions and an initialiser (`Algorithm`);
everything else (simulation, replay, checkpoints, the count of bytes) is derived
from them once, for every algorithm. This module holds types only, no logic.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

Array = jax.Array
PRNGKey = jax.Array  # a typed key (`jax.random.key`), shape []
Params = Any  # a tree of arrays
Batch = Any  # a tree of arrays that share their leading axis, [B, ...]
Batches = Any  # the same with one more axis in front: local steps, [K, B, ...]
Upload = Any  # a tree of arrays: the message of one client
Broadcast = Any  # a tree of arrays: the message of the server

LossFn = Callable[[Params, Batch], Array]  # -> mean loss over the batch, []
MetricsFn = Callable[[Params, Batch], dict[str, Array]]  # -> one value an example, [B]


class ServerState(NamedTuple):
    """All that the server and the clients share: a function of the initial params
    and of the broadcasts alone.
    """

    params: Params
    opt_state: optax.OptState
    round: Array  # int32 [], the number of rounds done


class ClientResult(NamedTuple):
    """What one client's part of a round returns."""

    upload: Upload  # the message: what the ledger counts
    memory: Any  # what a stateful client keeps between rounds, () if it keeps nothing
    stats: dict[str, Array]  # for people, never sent; scalars, "loss" among them


class Passes(NamedTuple):
    """What a client computes: evaluations of the loss of one batch.

    A backward pass comes with a forward pass, counted as such. Forward mode (`jax.jvp`) carries
    the tangent along: two forward passes.
    """

    forward: int
    backward: int

    def times(self, count: int) -> "Passes":
        """Returns `count` times as many."""
        return Passes(count * self.forward, count * self.backward)


class Sync(NamedTuple):
    """A message that brings a client which fell behind to the present, in place of a replay.

    Clients of an algorithm that has one are not sent a round's broadcast at its end: when they
    next take part they get this message, or all they missed where that is smaller.

    Attributes:
      message: state -> a tree of arrays.
      restore: (initial state with the present round number, message) -> a state in which
        `Algorithm.client` does what it does in the present one. What only the server uses,
        such as its optimiser's moments, may be missing from it.
      alone: whether the message is all a new client needs, or adds to the initial params.
    """

    message: Callable[[ServerState], Any]
    restore: Callable[[ServerState, Any], ServerState]
    alone: bool


class Wire(NamedTuple):
    """How uploads that are not plain numbers, but codes or bits, are read and written.

    Attributes:
      numbers: upload -> a tree of floating point arrays, what the server makes of it.
      written: (key, numbers, upload) -> the upload with these numbers in place of its own.
    """

    numbers: Callable[[Upload], Any]
    written: Callable[[PRNGKey, Any, Upload], Upload]


class Algorithm(NamedTuple):
    """A federated algorithm. All functions are pure and traceable.

    Attributes:
      init: params -> ServerState. It keeps params narrower than float32 in float32
        (`precision.wide`), so `client` gives those to the loss.
      client: (shared_key, state, memory, batches, own_key) -> ClientResult. One client; it never
        sees a clients axis. `batches` has the leading axis [local_steps]; `own_key` is the
        client's own of this round, for what no one else may rebuild: stochastic rounding,
        noise, directions that are not shared.
      aggregate: (uploads [C, ...], weights [C]) -> Broadcast.
      server: (key, state, broadcast) -> ServerState: what *everyone* replays.
      local_steps: K, how many batches `client` takes.
      init_memory: params -> the memory of a client that has not taken part yet, () for
        stateless clients.
      sync: how a client that fell behind is brought up to date, by replaying the broadcasts it
        missed unless given.
      passes: what one client computes in a round, by the algorithm's own account.
      wire: how malicious clients read and write uploads, which are plain numbers unless given.
    """

    init: Callable[[Params], ServerState]
    client: Callable[[PRNGKey, ServerState, Any, Batches, PRNGKey], ClientResult]
    aggregate: Callable[[Upload, Array], Broadcast]
    server: Callable[[PRNGKey, ServerState, Broadcast], ServerState]
    local_steps: int
    init_memory: Callable[[Params], Any] = lambda params: ()
    sync: Sync | None = None
    passes: Passes = Passes(0, 0)
    wire: Wire | None = None


class Phase(NamedTuple):
    """An algorithm and the first round it is used in.

    Phases change what can't change inside one compiled round, such as the number of
    perturbations; they share one type of `ServerState`.
    """

    first_round: int
    algorithm: Algorithm


class ClientData(NamedTuple):
    """Examples of all clients, stored once, and an index that says whose is which.

    Client c owns the examples `order[offsets[c]:offsets[c + 1]]`. Memory beyond the
    examples is one int32 an example and one a client.
    """

    examples: Batch  # a tree of arrays [n, ...]
    order: Array | np.ndarray  # int32 [n]
    offsets: Array | np.ndarray  # int32 [num_clients + 1], offsets[0] = 0, offsets[-1] = n

    @property
    def num_clients(self) -> int:
        """The size of the population."""
        return self.offsets.shape[0] - 1


class Task(NamedTuple):
    """A model with the data and the loss it is trained on.

    Attributes:
      name: for people.
      init: key -> params, in the precision that they are stored and sent in at first.
      loss: (params, batch) -> mean loss over the batch, [].
      metrics: (params, batch) -> {"loss": [B], "accuracy": [B], ...}, one value an
        example; the evaluation averages them over `test`.
      train: the clients' data.
      test: the central test set, a tree of arrays [n, ...].
    """

    name: str
    init: Callable[[PRNGKey], Params]
    loss: LossFn
    metrics: MetricsFn
    train: ClientData
    test: Batch
