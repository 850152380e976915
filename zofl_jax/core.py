"""The vocabulary of the library: what an algorithm, a task and a client's data are.

A federated algorithm is three pure functions and an initialiser (`Algorithm`);
everything else (simulation, replay, checkpoints, the count of bytes) is derived
from them once, for every algorithm. This module holds types, and of logic only what joins two
values of one type.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

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
Layout = Callable[[Params, int], Any]
"""(params or their shapes, m) -> a tree like them: the axis that m devices split, or None."""

Weighting = Literal["uniform", "examples"]
"""The cohort's mean is uniform, or weighted by the clients' examples."""


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
      since: where it doesn't stand alone, the round whose state it adds to: `restore` is given that
        one, with the present round number, in place of the initial one.
    """

    message: Callable[[ServerState], Any]
    restore: Callable[[ServerState, Any], ServerState]
    alone: bool
    since: int = 0


class Wire(NamedTuple):
    """How uploads that are not plain numbers, but codes or bits, are read and written.

    Attributes:
      numbers: upload -> a tree of floating point arrays, what the server makes of it.
      written: (key, numbers, upload) -> the upload with these numbers in place of its own.
    """

    numbers: Callable[[Upload], Any]
    written: Callable[[PRNGKey, Any, Upload], Upload]


class Init(Protocol):
    """Makes the state at round 0."""

    def __call__(self, params: Params, /) -> ServerState:
        """Returns the state, params narrower than float32 in float32 (`precision.wide`)."""
        ...


class InitMemory(Protocol):
    """Makes the memory of a client that has not taken part yet."""

    def __call__(self, params: Params, /) -> Any:
        """Returns a tree of arrays, () for clients that remember nothing."""
        ...


class Client(Protocol):
    """One client's part of a round; it never sees a clients axis."""

    def __call__(
        self,
        shared_key: PRNGKey,
        state: ServerState,
        memory: Any,
        batches: Batches,
        own_key: PRNGKey,
        /,
    ) -> ClientResult:
        """Returns the upload, the new memory and figures for people.

        Args:
          shared_key: of this round, the same for all clients and the server.
          state: what all share.
          memory: what the client kept of its last round, at first that of `init_memory`.
          batches: its examples, a tree of arrays [local_steps, B, ...].
          own_key: of this round, the client's own, for what no one else may rebuild: stochastic
            rounding, noise, directions that are not shared.
        """
        ...


class Aggregate(Protocol):
    """Makes one message to all of the uploads of a cohort."""

    def __call__(self, uploads: Upload, weights: Array, /) -> Broadcast:
        """Returns the broadcast.

        Args:
          uploads: a tree of arrays [C, ...].
          weights: [C], non-negative; zero says that the client is absent.
        """
        ...


class Server(Protocol):
    """The server's part of a round, which *everyone* replays."""

    def __call__(self, key: PRNGKey, state: ServerState, broadcast: Broadcast, /) -> ServerState:
        """Returns the state after the round; `key` is the clients' `shared_key`."""
        ...


class Exposure(NamedTuple):
    """What of a run may tell of its clients and their examples: what an `Accountant` reads."""

    contributors: Mapping[int, int]  # how many rounds had how many clients in their mean
    participations: int  # rounds that the busiest client took part in
    clients_per_round: int
    num_clients: int
    batch_size: int
    fewest_examples: int  # of the smallest client
    local_steps: int


class Accountant(Protocol):
    """Tells the ε of differential privacy that rounds have spent, at its δ."""

    @property
    def delta(self) -> float:
        """Returns δ in (0, 1)."""
        ...

    def __call__(self, exposure: Exposure, /) -> float:
        """Returns ε, or raises ImportError where the package that knows it is missing."""
        ...


class Expectations(NamedTuple):
    """What an algorithm was made for, and `make_simulator` checks; None says that any will do."""

    clients_per_round: int | None = None
    num_clients: int | None = None
    share: float | None = None  # clients_per_round / num_clients
    batch_size: int | None = None
    weighting: Weighting | None = None

    def also(self, **others: Any) -> "Expectations":
        """Returns these and others, as a function around an algorithm has expectations of its own.

        Raises:
          ValueError: where they contradict each other.

        >>> Expectations(batch_size=8).also(weighting="uniform").batch_size
        8
        """
        for name, value in others.items():
            here = getattr(self, name)
            if here is not None and value != here:
                raise ValueError(
                    f"the algorithm was made for {name}={here!r} and what goes around it for "
                    f"{name}={value!r}: make both for the same"
                )
        return self._replace(**others)


class Algorithm(NamedTuple):
    """A federated algorithm. All functions are pure and traceable.

    A function around an algorithm, such as `compression.compressed`, replaces some fields
    (`_replace`) and so keeps the others.

    Attributes:
      init: params -> ServerState, see `Init`.
      client: (shared_key, state, memory, batches, own_key) -> ClientResult, see `Client`.
      aggregate: (uploads [C, ...], weights [C]) -> Broadcast, see `Aggregate`.
      server: (key, state, broadcast) -> ServerState: what *everyone* replays, see `Server`.
      local_steps: K, how many batches `client` takes.
      init_memory: params -> the memory of a client that has not taken part yet, () for
        stateless clients.
      sync: how a client that fell behind is brought up to date, by replaying the broadcasts it
        missed unless given.
      passes: what one client computes in a round, by the algorithm's own account.
      wire: how malicious clients read and write uploads, which are plain numbers unless given.
      late_uploads: whether `aggregate` is given [2C, ...], the cohort's uploads and then those
        that missed the deadline of the round before, see `staleness`; these are lost unless set.
      expects: the cohort, population, batch size and weighting that it was made for.
      accountant: what tells the ε that rounds have spent; None where nothing is private, or
        nobody counts.
    """

    init: Init
    client: Client
    aggregate: Aggregate
    server: Server
    local_steps: int
    init_memory: InitMemory = lambda params: ()
    sync: Sync | None = None
    passes: Passes = Passes(0, 0)
    wire: Wire | None = None
    late_uploads: bool = False
    expects: Expectations = Expectations()
    accountant: Accountant | None = None


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
      layout: how devices that hold the params together split them; None for any model, where
        each matrix is split along its largest axis.
    """

    name: str
    init: Callable[[PRNGKey], Params]
    loss: LossFn
    metrics: MetricsFn
    train: ClientData
    test: Batch
    layout: Layout | None = None
