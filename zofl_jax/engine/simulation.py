"""Runs an algorithm on a task: what the host does around the compiled rounds.

    simulator = make_simulator(algorithm, task, clients_per_round=5, batch_size=32)
    progress = run(simulator, rounds=400, eval_every=50)

`make_simulator` compiles each function of `rounds.py` once, at its first use. `run` adds
an evaluation schedule, the count of bytes, and hooks for logs and progress bars, which do
their work while the device does the next rounds; a run may be taken up again from any
`Progress`.
"""

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from zofl_jax import keys, precision
from zofl_jax.conditions import participation
from zofl_jax.core import Algorithm, Array, Broadcast, Params, Phase, ServerState, Task
from zofl_jax.data import batches as data_batches
from zofl_jax.data import partition
from zofl_jax.engine import compilation, ledger, placement
from zofl_jax.engine import rounds as traced

DISPATCH_SECONDS = 0.5
"""Dispatches grow until one takes this long, so that a person sees progress."""


class Trace(NamedTuple):
    """What the host learns of the n rounds of one dispatch; NumPy arrays."""

    first_round: int
    seeds: np.ndarray  # uint32 [n, words], the raw words of the shared keys
    broadcasts: Broadcast  # a tree of arrays [n, ...]
    losses: np.ndarray  # [n], the cohort's mean training loss
    failed_loss: float | None  # the loss of the round after these, if it was not healthy
    attendance: participation.Attendance  # [n, clients_per_round] each
    rejected: np.ndarray  # int32 [n], messages the server rejected

    @property
    def cohorts(self) -> np.ndarray:
        """Who was asked, int32 [n, clients_per_round]."""
        return np.asarray(self.attendance.cohort)


class Flight(NamedTuple):
    """Rounds that the device was given to do, and may be doing still."""

    first_round: int
    loop: traced.Loop  # arrays that are not waited for


class Record(NamedTuple):
    """One evaluation: a row of the history. Bytes are totals since round 0."""

    round: int  # rounds done
    train_loss: float  # mean over the rounds since the last record
    metrics: dict[str, float]  # means over the test set
    bytes_up: int
    bytes_down: int
    rejected: int = 0  # messages, since round 0
    epsilon: float | None = None  # of differential privacy, where it is accounted for

    def row(self) -> dict[str, Any]:
        """Returns the record as figures and summaries take it; None for metrics it lacks."""
        return {
            "round": self.round,
            "train_loss": self.train_loss,
            "test_loss": self.metrics.get("loss"),
            "test_accuracy": self.metrics.get("accuracy"),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "rejected": self.rejected,
            "epsilon": self.epsilon,
        }


class Progress(NamedTuple):
    """How far a run is: all that is needed to go on.

    It is not a snapshot: going on consumes `state` and `memory` and counts in `ledger`.
    """

    state: ServerState
    memory: Any  # of the population's stateful clients, (), or arrays [num_clients, ...]
    ledger: ledger.Ledger
    history: list[Record]
    losses: list[float]  # training losses since the last record
    run_seconds: float = 0.0  # rounds alone, without compilation and evaluation
    fingerprint: Array | None = None  # of the params, see `rounds.fingerprint`; for `on_rounds`


class Simulator(NamedTuple):
    """The compiled functions of one simulation.

    Attributes:
      task, root, phases: what it was made from.
      sizes: the ledger's message sizes in each phase.
      broadcasts: the shapes and dtypes of a broadcast in each phase.
      capacities: the most rounds in one dispatch in each phase, `rounds.CAPACITY` or fewer.
      start: params or None -> Progress at round 0; None draws them by `task.init`.
      launch: (state, memory, n) -> Flight; n <= the capacity, all in one phase. The device is
        given the rounds and not waited for; the state and memory given are consumed.
      land: Flight -> (state, memory, Trace); waits until its rounds are done.
      measure: params -> {"loss": ..., "accuracy": ...}, means over the test set: arrays [],
        which are not waited for.
      replay: (state, seeds uint32 [n, words], broadcasts [n, ...]) -> state: the server's
        part of n rounds, bit-identical to `advance` on the same machine. The rounds
        must lie in one phase.
      attendance: int [n] rounds -> who is there, NumPy arrays [n, clients_per_round].
      cohorts: round indices [n] -> int32 [n, clients_per_round].
      seeds: round indices [n], n <= `rounds.CAPACITY` -> the raw words of the shared keys
        as they are sent, uint32 [n, words].
      compile_seconds: () -> seconds spent on compilation so far.
      memory_bytes: () -> the device memory that the rounds compiled so far need, data and the
        buffers of a dispatch included, see `compilation.memory_bytes`.
      num_devices: that the cohort is shared out over.
      conditions: under which rounds run.
      epsilon: ledger -> ε spent so far, if it is accounted for.
    """

    task: Task
    root: keys.RootKeys
    phases: tuple[Phase, ...]
    sizes: tuple[ledger.MessageSizes, ...]
    broadcasts: tuple[Any, ...]
    capacities: tuple[int, ...]
    start: Callable[[Params | None], Progress]
    launch: Callable[[ServerState, Any, int], Flight]
    land: Callable[[Flight], tuple[ServerState, Any, Trace]]
    measure: Callable[[Params], dict[str, Array]]
    replay: Callable[[ServerState, np.ndarray, Broadcast], ServerState]
    attendance: Callable[[np.ndarray], participation.Attendance]
    cohorts: Callable[[np.ndarray], np.ndarray]
    seeds: Callable[[np.ndarray], np.ndarray]
    compile_seconds: Callable[[], float]
    memory_bytes: Callable[[], int]
    num_devices: int = 1
    conditions: traced.Conditions = traced.IDEAL
    epsilon: Callable[[ledger.Ledger], float] | None = None

    def advance(self, state: ServerState, memory: Any, n: int) -> tuple[ServerState, Any, Trace]:
        """Does n rounds: `launch`, then `land`."""
        return self.land(self.launch(state, memory, n))

    def evaluate(self, params: Params) -> dict[str, float]:
        """Returns {"loss": ..., "accuracy": ...}, means over the test set."""
        return {name: float(value) for name, value in self.measure(params).items()}


class Diverged(ArithmeticError):  # noqa: N818 (the name says what happened)
    """A round's broadcast or all its losses were not finite, or every message of it was rejected;
    the round was not applied.

    Attributes:
      round: the one that was not applied.
      loss: the mean training loss of its clients.
      progress: up to there.
      finding: what happened, a sentence without full stop; the message goes on to a remedy.
    """

    def __init__(self, round_index: int, loss: float, progress: Progress):
        self.finding = (
            f"round {round_index} diverged (training loss {loss}); the model after "
            f"{round_index} rounds is kept"
        )
        super().__init__(
            f"{self.finding}. Lower the learning rate to a tenth, raise the number of "
            "perturbations, or clip the scalars"
        )
        self.round = round_index
        self.loss = loss
        self.progress = progress


def make_simulator(
    algorithm: Algorithm | Sequence[Phase],
    task: Task,
    *,
    clients_per_round: int,
    batch_size: int,
    seed: int = 0,
    prng_impl: str = "threefry2x32",
    weighting: traced.Weighting = "uniform",
    eval_batch_size: int = 512,
    mesh: Mesh | None = None,
    conditions: traced.Conditions = traced.IDEAL,
    epsilon: Callable[[ledger.Ledger], float] | None = None,
) -> Simulator:
    """Returns the compiled functions that simulate `algorithm` on `task`.

    Args:
      algorithm: one algorithm, or phases in the order of their first rounds from 0 on.
      task: model, data and loss.
      clients_per_round: M, the cohort's size.
      batch_size: examples a client uses in a local step.
      seed: of everything random in the run, in [0, 2**32).
      prng_impl: generator of the shared directions, see `keys.root`.
      weighting: the cohort's mean is uniform, or weighted by the clients' examples.
      eval_batch_size: test examples evaluated at once.
      mesh: devices that the cohort is shared out over, see `placement`; one unless given.
      conditions: who is there, who is malicious, which messages are rejected.
      epsilon: ledger -> ε spent so far, see `privacy`; it goes into the records.

    Raises:
      ValueError: for a cohort larger than the population, phases out of order or clients
        with fewer examples than a batch.
    """
    phases = as_phases(algorithm)
    root = keys.root(seed, prng_impl)
    num_clients = task.train.num_clients
    participation.check_cohort_size(num_clients, clients_per_round)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if weighting not in ("uniform", "examples"):
        raise ValueError(f"weighting must be 'uniform' or 'examples', got {weighting!r}")
    partition.check_batch_size(np.asarray(task.train.offsets), batch_size)

    place = functools.partial(placement.replicated, mesh=mesh)
    own_mesh = placement.own_part(mesh)  # all but the rounds is each process's own business

    def own(tree: Any) -> Any:
        return placement.replicated(placement.own_copy(tree), own_mesh)

    train, placed_root = placement.place_client_data(task.train, mesh), place(root)
    test, mask = own(jax.device_put(data_batches.evaluation_batches(task.test, eval_batch_size)))
    compiler = _Compiler()

    def start(params: Params | None = None) -> Progress:
        if params is None:
            params = task.init(root.init)
        first = phases[0].algorithm
        memory = jax.tree.map(
            lambda m: jnp.repeat(m[None], num_clients, axis=0), first.init_memory(params)
        )
        # A copy, since `advance` consumes the state it is given.
        state = own(jax.tree.map(jnp.copy, first.init(params)))
        if conditions.late_uploads:
            zeros = jax.tree.map(
                lambda x: jnp.zeros((clients_per_round, *x.shape), x.dtype), shapes[0].upload
            )
            memory = traced.Memory(memory, traced.Late(zeros, jnp.zeros(clients_per_round)))
        return Progress(state, memory, ledger.Ledger(num_clients), [], [])

    def launch(state: ServerState, memory: Any, n: int) -> Flight:
        first_round = int(state.round)
        phase = phase_of(first_round, n)
        chosen = phases[phase].algorithm
        loop = compiler.call(
            ("advance", phase),
            traced.make_advance(
                chosen,
                task,
                clients_per_round,
                batch_size,
                weighting,
                mesh,
                capacities[phase],
                conditions,
            ),
            (place(state), place(memory), train, placed_root, np.int32(n)),
            donate=(0, 1),
        )
        return Flight(first_round, loop)

    def land(flight: Flight) -> tuple[ServerState, Any, Trace]:
        first_round, loop = flight
        done = int(loop.done)
        kept: traced.RoundRecord = jax.tree.map(lambda x: np.asarray(x)[:done], loop.records)
        failed_loss = None if loop.healthy else float(loop.last_loss)
        trace = Trace(
            first_round,
            seeds(np.arange(first_round, first_round + done)),
            kept.broadcast,
            np.asarray(kept.loss),
            failed_loss,
            kept.attendance,
            np.asarray(kept.rejected),
        )
        return loop.state, loop.memory, trace

    def measure(params: Params) -> dict[str, Array]:
        return compiler.call("evaluate", traced.make_evaluate(task), (own(params), test, mask))

    def replay(state: ServerState, words: np.ndarray, broadcasts: Broadcast) -> ServerState:
        state = own(jax.tree.map(jnp.copy, placement.own_copy(state)))
        at = 0
        while at < len(words):
            first_round = int(state.round)
            most = capacities[phase_at(phases, first_round)]
            n = min(len(words) - at, most)
            phase = phase_of(first_round, n)
            buffers = jax.tree.map(
                lambda x, at=at, most=most: _pad(x[at : at + most], most), (words, broadcasts)
            )
            state = compiler.call(
                ("replay", phase),
                traced.make_replay(phases[phase].algorithm, str(jax.random.key_impl(root.shared))),
                (state, *buffers, np.int32(n)),
                donate=(0,),
            )
            if int(state.round) != first_round + n:
                raise ValueError(
                    f"the broadcast of round {int(state.round)} is not finite and can't be "
                    "replayed; replay up to an earlier round"
                )
            at += n
        return state

    def phase_of(first_round: int, n: int) -> int:
        return _phase_of(phases, capacities, first_round, n)

    attend = conditions.attend or participation.everyone(num_clients, clients_per_round)

    @jax.jit
    def traced_attendance(rounds: Array) -> participation.Attendance:
        return jax.vmap(attend, in_axes=(None, 0))(root, rounds)

    def attendance(rounds: np.ndarray) -> participation.Attendance:
        return jax.tree.map(np.asarray, traced_attendance(jnp.asarray(rounds, jnp.int32)))

    def cohorts(rounds: np.ndarray) -> np.ndarray:
        return np.asarray(attendance(rounds).cohort)

    @jax.jit
    def traced_seeds(rounds: Array) -> Array:
        return jax.vmap(lambda r: jax.random.key_data(keys.round_key(root.shared, r)))(rounds)

    def seeds(rounds: np.ndarray) -> np.ndarray:
        padded = _pad(np.asarray(rounds, np.int32), traced.CAPACITY)
        return np.asarray(traced_seeds(padded))[: len(rounds)]

    params = jax.eval_shape(task.init, root.init)
    _warn_of_narrow_params(jax.eval_shape(phases[0].algorithm.init, params))
    shapes = [
        ledger.message_shapes(
            phase.algorithm,
            root.shared,
            params,
            _batches_shape(task, batch_size, phase.algorithm.local_steps),
            clients_per_round,
        )
        for phase in phases
    ]
    if conditions.late_uploads and any(s.upload != shapes[0].upload for s in shapes):
        raise ValueError(
            "late uploads can't be used where phases differ in the size of uploads: keep the "
            "number of perturbations, or discard late uploads"
        )
    capacities = tuple(traced.capacity(shape.broadcast) for shape in shapes)
    weighted = weighting == "examples"
    return Simulator(
        task,
        root,
        phases,
        tuple(ledger.message_sizes(shape, root.shared, params, weighted) for shape in shapes),
        tuple(shape.broadcast for shape in shapes),
        capacities,
        start,
        launch,
        land,
        measure,
        replay,
        attendance,
        cohorts,
        seeds,
        lambda: sum(compiler.seconds),
        functools.partial(compiler.memory_bytes, "advance"),
        1 if mesh is None else mesh.size,
        conditions,
        epsilon,
    )


def run(
    simulator: Simulator,
    *,
    rounds: int,
    eval_every: int = 0,
    progress: Progress | None = None,
    on_rounds: Callable[[Trace, list[ledger.RoundBytes], Progress], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    reads_state: Callable[[int], bool] = lambda done: True,
) -> Progress:
    """Runs until `rounds` rounds are done; evaluates every `eval_every` and at the end.

    The device never waits for `on_record`, nor for an `on_rounds` that doesn't read the state:
    they are called while it does the next rounds.

    Args:
      simulator: see `make_simulator`.
      rounds: rounds in all, those already done included; >= 1.
      eval_every: 0 evaluates at the end only.
      progress: where to start, round 0 unless given; its state is consumed.
      on_rounds: called after each dispatch with its trace, the bytes of each round and
        the progress, whose state the next dispatch consumes.
      on_record: called after each evaluation.
      reads_state: rounds done -> whether `on_rounds` reads the progress's state or memory then.
        Where it does not, it may find them consumed.

    Returns:
      The progress after the last round.

    Raises:
      Diverged: at the first round that can't be applied; it carries the progress up to there.
      ValueError: for arguments out of range.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    if eval_every < 0:
        raise ValueError(f"eval_every must be >= 0, got {eval_every}")
    state, memory, book, history, losses, seconds, _ = progress or simulator.start(None)
    history, losses = list(history), list(losses)
    done, dispatch = int(state.round), 1

    def count(trace: Trace, now: Progress, sizes: ledger.MessageSizes) -> None:
        counted = [
            book.record_attendance(one, sizes, rejected)
            for one, rejected in zip(
                participation.each_round(trace.attendance), trace.rejected.tolist(), strict=True
            )
        ]
        losses.extend(trace.losses.tolist())
        if on_rounds and counted:
            on_rounds(trace, counted, now)

    def record(rounds_done: int, metrics: dict[str, Array]) -> None:
        found = Record(
            rounds_done,
            float(np.mean(losses or [np.nan])),
            {name: float(value) for name, value in metrics.items()},
            book.totals.up,
            book.totals.down,
            book.rejected,
            simulator.epsilon(book) if simulator.epsilon else None,
        )
        history.append(found)
        losses.clear()
        if on_record:
            on_record(found)

    # What the host does once the device has its next task, or can't be given one.
    later = contextlib.ExitStack()
    while True:
        evaluated = history[-1].round if history else 0
        if done != evaluated and (done == rounds or (eval_every and done % eval_every == 0)):
            with later:
                metrics = simulator.measure(state.params)
            later.callback(record, done, jax.block_until_ready(metrics))
        if done >= rounds:
            later.close()
            return Progress(state, memory, book, history, losses, seconds)

        phase = phase_at(simulator.phases, done)
        until = min([rounds, *(p.first_round for p in simulator.phases[phase + 1 :])])
        if eval_every:
            until = min(until, done - done % eval_every + eval_every)
        dispatch = min(dispatch, simulator.capacities[phase])
        n = min(dispatch, until - done)
        compiled_before = simulator.compile_seconds()
        began = time.perf_counter()
        with later:
            flight = simulator.launch(state, memory, n)
        state, memory, trace = simulator.land(flight)
        took = time.perf_counter() - began - (simulator.compile_seconds() - compiled_before)
        seconds += took
        if n == dispatch and took < DISPATCH_SECONDS / 2:
            dispatch *= 2

        done += len(trace.losses)
        mark = traced.fingerprint(placement.own_copy(state.params)) if on_rounds else None
        now = Progress(state, memory, book, history, losses, seconds, mark)
        later.callback(count, trace, now, simulator.sizes[phase])
        if trace.failed_loss is not None:
            later.close()
            raise Diverged(done, trace.failed_loss, now)
        if on_rounds and reads_state(done):
            later.close()


def as_phases(algorithm: Algorithm | Sequence[Phase]) -> tuple[Phase, ...]:
    """Returns the phases of a run.

    Raises:
      ValueError: unless they start at round 0 and their first rounds increase.
    """
    phases = (Phase(0, algorithm),) if isinstance(algorithm, Algorithm) else tuple(algorithm)
    starts = [phase.first_round for phase in phases]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise ValueError(f"phases must start at round 0 and increase, got first rounds {starts}")
    return phases


def phase_at(phases: Sequence[Phase], round_index: int) -> int:
    """Returns the index of the phase that round `round_index` belongs to."""
    return sum(phase.first_round <= round_index for phase in phases) - 1


def _phase_of(phases: Sequence[Phase], capacities: Sequence[int], first_round: int, n: int) -> int:
    phase = phase_at(phases, first_round)
    if not 1 <= n <= capacities[phase]:
        raise ValueError(f"a dispatch takes 1 to {capacities[phase]} rounds, got {n}")
    if phase != phase_at(phases, first_round + n - 1):
        raise ValueError(f"rounds {first_round} to {first_round + n - 1} cross into a new phase")
    return phase


def _warn_of_narrow_params(state: ServerState) -> None:
    """Warns if an algorithm keeps params in which updates of fine-tuning round away."""
    narrow = precision.narrow_leaves(state.params)
    if narrow:
        name, dtype = next(iter(narrow.items()))
        more = f" and {len(narrow) - 1} more" if len(narrow) > 1 else ""
        warnings.warn(
            f"this algorithm keeps its params in {dtype} ({name}{more}), where updates far smaller "
            "than a number round away; let its init start from precision.wide(params), as those "
            "of the library do",
            stacklevel=3,
        )


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((max(size - len(x), 0), *x.shape[1:]), x.dtype)])


def _batches_shape(task: Task, batch_size: int, local_steps: int) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((local_steps, batch_size, *x.shape[1:]), x.dtype),
        task.train.examples,
    )


class _Compiler:
    """Compiles each function once, ahead of its first call, and times that."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._compiled: dict[Any, Callable] = {}

    def call(self, name: Any, fn: Callable, args: tuple, donate: tuple[int, ...] = ()) -> Any:
        """Returns fn(*args); `name` stands for `fn` and for the shapes of `args`."""
        if name not in self._compiled:
            began = time.perf_counter()
            self._compiled[name] = compilation.compiled(fn, args, donate)
            self.seconds.append(time.perf_counter() - began)
        return self._compiled[name](*args)

    def memory_bytes(self, kind: str) -> int:
        """Returns the most that a function named (kind, ...) needs, 0 before its compilation."""
        needed = [compilation.memory_bytes(f) for name, f in self._compiled.items() if kind in name]
        return max(needed, default=0)
