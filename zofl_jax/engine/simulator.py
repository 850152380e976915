"""The compiled functions of one simulation: what `simulation.run` and others call.

    simulator = make_simulator(algorithm, task, clients_per_round=5, batch_size=32)
    progress = simulator.start(None)
    state, memory, trace = simulator.advance(progress.state, progress.memory, 10)

Each function of `rounds.py` is compiled once, at its first use.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from zofl_jax import keys, precision
from zofl_jax.conditions import participation
from zofl_jax.core import (
    Algorithm,
    Array,
    Broadcast,
    ClientData,
    Params,
    Phase,
    PRNGKey,
    ServerState,
    Task,
    Weighting,
)
from zofl_jax.data import batches as data_batches
from zofl_jax.data import partition
from zofl_jax.directions import jaxprs
from zofl_jax.engine import carried, compilation, exhaustion, fitting, ledger, placement
from zofl_jax.engine import rounds as traced
from zofl_jax.engine.placement import Placement
from zofl_jax.engine.progress import Progress, Trace


class Flight(NamedTuple):
    """Rounds that the device was given to do, and may be doing still."""

    first_round: int
    loop: traced.Loop  # arrays that are not waited for


class Shapes(NamedTuple):
    """What rounds start from: shapes with shardings, and the data as they lie on the devices."""

    state: ServerState
    memory: Any
    train: ClientData


def make_simulator(
    algorithm: Algorithm | Sequence[Phase],
    task: Task,
    *,
    clients_per_round: int,
    batch_size: int,
    seed: int = 0,
    prng_impl: str = "threefry2x32",
    weighting: Weighting = "uniform",
    eval_batch_size: int = 512,
    mesh: Mesh | AbstractMesh | None = None,
    conditions: traced.Conditions = traced.IDEAL,
    smaller: Callable[[], Algorithm | Sequence[Phase]] | None = None,
) -> "Simulator":
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
      mesh: devices that clients are shared out over and params split over, see `placement`;
        one unless given.
      conditions: who is there, who is malicious, which messages are rejected.
      smaller: makes the same algorithm, or phases, in a form that needs less memory. It is taken
        once, where the memory doesn't suffice for the first rounds.

    Raises:
      ValueError: for a cohort larger than the population, phases out of order, clients with fewer
        examples than a batch, or an algorithm made for another simulation (`Algorithm.expects`).
      ImportError: without the package that accounts for the privacy of the algorithm.
    """
    phases = as_phases(algorithm)
    root = keys.root(seed, prng_impl)
    num_clients, offsets = task.train.num_clients, np.asarray(task.train.offsets)
    participation.check_cohort_size(num_clients, clients_per_round)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if weighting not in ("uniform", "examples"):
        raise ValueError(f"weighting must be 'uniform' or 'examples', got {weighting!r}")
    partition.check_batch_size(offsets, batch_size)
    setting = fitting.Setting(
        clients_per_round, num_clients, batch_size, weighting, int(np.diff(offsets).min())
    )
    fitting.check(phases, setting)
    _warn_of_narrow_params(phases, task, root)
    where = Placement(mesh, task.layout)
    return Simulator(phases, task, root, setting, eval_batch_size, where, conditions, smaller)


class Simulator:
    """The compiled functions of one simulation, made by `make_simulator`.

    Attributes:
      task, root, phases: what it was made from.
      setting: its cohort, population, batch size and weighting.
      sizes: the ledger's message sizes in each phase.
      broadcasts: the shapes and dtypes of a broadcast in each phase.
      capacities: the most rounds in one dispatch in each phase, `rounds.CAPACITY` or fewer.
      placement: the devices that rounds run on, and what lies where.
      conditions: under which rounds run.
      epsilon: ledger -> ε spent so far; None where no algorithm accounts for it.
      fell_back: whether the memory didn't suffice and the smaller form was taken.
    """

    task: Task
    root: keys.RootKeys
    phases: tuple[Phase, ...]
    setting: fitting.Setting
    sizes: tuple[ledger.MessageSizes, ...]
    broadcasts: tuple[Any, ...]
    capacities: tuple[int, ...]
    placement: Placement
    conditions: traced.Conditions
    epsilon: Callable[[ledger.Ledger], float] | None
    fell_back: bool

    def __init__(
        self,
        phases: tuple[Phase, ...],
        task: Task,
        root: keys.RootKeys,
        setting: fitting.Setting,
        eval_batch_size: int,
        where: Placement,
        conditions: traced.Conditions,
        smaller: Callable[[], Algorithm | Sequence[Phase]] | None = None,
    ):
        """Takes what `make_simulator` has checked."""
        # One of several processes can't run another program than the others.
        self._smaller = None if where.spans_processes else smaller
        self.fell_back = False
        self.task, self.root, self.phases, self.conditions = task, root, phases, conditions
        self.epsilon = fitting.epsilon(phases, setting)
        # All but the rounds is each process's own business.
        self.setting, self.placement, self._own_part = setting, where, where.own_part()
        self._compiler = compilation.Compiler()
        self._carried = carried.of(phases[0].algorithm)

        params = jax.eval_shape(task.init, root.init)
        traced_once = functools.cache(
            lambda first: _message_shapes(phases[first].algorithm, task, root, setting, params)
        )
        shapes = [traced_once(_first_alike(phases, i)) for i in range(len(phases))]
        _check_late_uploads(phases, shapes)
        weighted = setting.weighting == "examples"
        self.sizes = tuple(ledger.message_sizes(s, root.shared, params, weighted) for s in shapes)
        self.broadcasts = tuple(shape.broadcast for shape in shapes)
        self.capacities = tuple(traced.capacity(shape.broadcast) for shape in shapes)
        self._upload = shapes[0].upload

        self._params = jax.eval_shape(precision.wide, params)
        self._train = where.client_data(task.train)
        self._placed_root = where.replicated(root)
        test = data_batches.evaluation_batches(task.test, eval_batch_size)
        # And its mask.
        self._test = self._own_part.replicated(jax.device_put(test) if where.is_there else test)

        attend = conditions.attend or participation.everyone(
            setting.num_clients, setting.clients_per_round
        )
        self._attend = jax.jit(jax.vmap(functools.partial(attend, root)))

    def start(self, params: Params | None = None) -> Progress:
        """Returns the progress at round 0, from these params, or those that `Task.init` draws."""
        first, num_clients = self.phases[0].algorithm, self.setting.num_clients
        with self.placement.starting():
            if params is None:
                params = self.task.init(self.root.init)
            clients = _clients_memory(first, params, num_clients)
            # A copy, since `advance` consumes the state it is given.
            state = jax.tree.map(jnp.copy, first.init(params))
        if not self.placement.splits_processes:
            state = self._own(state)
        memory = self._carried.start(clients, self._upload, self.setting.clients_per_round)
        return Progress(state, memory, ledger.Ledger(num_clients), [], [])

    def launch(self, state: ServerState, memory: Any, n: int) -> Flight:
        """Gives the device n rounds to do and doesn't wait; consumes the state and the memory.

        Raises:
          ValueError: unless 1 <= n <= the capacity, and all rounds lie in one phase.
          OutOfMemoryError: if the device has too little, and there is nothing to fall back on.
        """
        first_round = int(state.round)
        phase = self._phase_of(first_round, n)
        state = self.placement.placed(state, self._params)
        memory = self.placement.placed(memory, self._params)
        try:
            with exhaustion.told():
                return Flight(first_round, self._launched(phase, state, memory, n))
        except exhaustion.OutOfMemoryError:
            if self._smaller is None or exhaustion.consumed((state, memory)):
                raise
        self.phases, self._smaller = as_phases(self._smaller()), None
        self.fell_back = True
        self._compiler.forget("advance")
        with exhaustion.told():
            return Flight(first_round, self._launched(phase, state, memory, n))

    def land(self, flight: Flight) -> tuple[ServerState, Any, Trace]:
        """Returns the state, the memory and the trace after a flight, and waits for them.

        Raises:
          OutOfMemoryError: if the device turns out to have too little.
        """
        first_round, loop = flight
        with exhaustion.told():
            done = int(loop.done)
        kept: traced.RoundRecord = jax.tree.map(lambda x: np.asarray(x)[:done], loop.records)
        trace = Trace(
            first_round,
            seeds=self.seeds(np.arange(first_round, first_round + done)),
            broadcasts=kept.broadcast,
            losses=np.asarray(kept.loss),
            failed_loss=None if loop.healthy else float(loop.last_loss),
            attendance=kept.attendance,
            rejected=np.asarray(kept.rejected),
        )
        return loop.state, loop.memory, trace

    def advance(self, state: ServerState, memory: Any, n: int) -> tuple[ServerState, Any, Trace]:
        """Does n rounds: `launch`, then `land`."""
        return self.land(self.launch(state, memory, n))

    def wrapped(
        self,
        *,
        launch: Callable[[ServerState, Any, int], Flight] | None = None,
        land: Callable[[Flight], tuple[ServerState, Any, Trace]] | None = None,
        measure: Callable[[Params], dict[str, Array]] | None = None,
        fingerprint: Callable[[Params], Array] | None = None,
        readable: Callable[[Any], Any] | None = None,
    ) -> "Simulator":
        """Returns the simulator with others in place of some of its methods, which may call these.

        Both share what is compiled.
        """
        other = copy.copy(self)
        given = {
            "launch": launch,
            "land": land,
            "measure": measure,
            "fingerprint": fingerprint,
            "readable": readable,
        }
        for name, function in given.items():
            if function is not None:
                setattr(other, name, function)
        return other

    def measure(self, params: Params) -> dict[str, Array]:
        """Returns {"loss": ..., "accuracy": ...}, means over the test set: arrays [].

        They are not waited for.
        """
        made = traced.make_evaluate(self.task)
        args = (self._own(params), *self._test)
        return self._compiler.call("evaluate", made, args, where=self._own_part)

    def fingerprint(self, params: Params) -> Array:
        """Returns `rounds.fingerprint` of params after rounds, which is not waited for."""
        together = self.placement.splits_processes
        return traced.fingerprint(params if together else placement.own_copy(params))

    def readable(self, tree: Any) -> Any:
        """Returns a tree of a state or a memory as this process can read it.

        Where params are split over processes, all of these must call it together.
        """
        return placement.gathered(placement.own_copy(tree))

    def evaluate(self, params: Params) -> dict[str, float]:
        """Returns {"loss": ..., "accuracy": ...}, means over the test set."""
        return {name: float(value) for name, value in self.measure(params).items()}

    def replay(self, state: ServerState, seeds: np.ndarray, broadcasts: Broadcast) -> ServerState:
        """Returns the state after n rounds, of which the server's part alone is done.

        It is bit-identical to that of `advance` on the same machine.

        Args:
          state: before them.
          seeds: uint32 [n, words], the raw words of the shared keys.
          broadcasts: a tree of arrays [n, ...]; all rounds must lie in one phase.

        Raises:
          ValueError: for a broadcast that is not finite, or rounds of two phases.
        """
        state = self._own(jax.tree.map(jnp.copy, placement.own_copy(state)))
        at = 0
        while at < len(seeds):
            most = self.capacities[phase_at(self.phases, int(state.round))]
            piece = slice(at, at + most)
            broadcast = jax.tree.map(lambda b, piece=piece: b[piece], broadcasts)
            state = self._replay_piece(state, seeds[piece], broadcast, most)
            at += most
        return state

    def attendance(self, rounds: np.ndarray) -> participation.Attendance:
        """Returns who is there in rounds [n], NumPy arrays [n, clients_per_round]."""
        return jax.tree.map(np.asarray, self._attend(jnp.asarray(rounds, jnp.int32)))

    def cohorts(self, rounds: np.ndarray) -> np.ndarray:
        """Returns who is asked in rounds [n], int32 [n, clients_per_round]."""
        return np.asarray(self.attendance(rounds).cohort)

    def seeds(self, rounds: np.ndarray) -> np.ndarray:
        """Returns the words of the shared keys of rounds [n], as they are sent, uint32 [n, words].

        n is at most `rounds.CAPACITY`.
        """
        padded = _pad(np.asarray(rounds, np.int32), traced.CAPACITY)
        return np.asarray(_key_words(self.root.shared, padded))[: len(rounds)]

    def compile_seconds(self) -> float:
        """Returns the seconds spent on compilation so far."""
        return sum(self._compiler.seconds)

    def memory_bytes(self) -> int:
        """Returns the device memory that the rounds compiled so far need.

        Data and the buffers of a dispatch are included, see `compilation.memory_bytes`.
        """
        return self._compiler.memory_bytes("advance")

    def devices(self) -> list[Any]:
        """Returns the devices that rounds run on."""
        return self.placement.devices()

    def lowered(self, phase: int = 0) -> compilation.Lowered:
        """Returns the rounds of a phase as they go to the compiler, from shapes alone.

        It is the program of `launch`. Neither params nor memory are made, and the devices need not
        be there (`Placement.is_there`). Its arguments are those that the program closes over, and
        (state, memory, train, root, limit).
        """
        args = self._round_shapes(phase)
        return compilation.lower(self._make_advance(phase), args, (0, 1), self.placement)

    def program(self, phase: int = 0) -> tuple[jaxprs.Program, Any]:
        """Returns the rounds of a phase as JAX traces them for their devices, and what goes in.

        It is the program of `lowered`, for which no compiler is needed, and a tree of the shapes of
        its arguments.
        """
        args = self._round_shapes(phase)
        with self.placement.tracing():
            return jaxprs.trace(self._make_advance(phase), *args)[0], args

    def shapes(self, phase: int = 0) -> "Shapes":
        """Returns what the rounds of a phase start from, as shapes on the devices."""
        algorithm, setting = self.phases[phase].algorithm, self.setting

        def started(key: PRNGKey) -> tuple[ServerState, Any]:
            params = self.task.init(key)
            clients = _clients_memory(algorithm, params, setting.num_clients)
            kept = self._carried.start(clients, self._upload, setting.clients_per_round)
            return algorithm.init(params), kept

        found = jax.eval_shape(started, self.root.init)
        state, memory = self.placement.shapes(found, self._params)
        return Shapes(state, memory, self._train)

    def _round_shapes(self, phase: int) -> tuple[Any, ...]:
        made = self.shapes(phase)
        return (made.state, made.memory, self._train, self._placed_root, np.int32(1))

    def _launched(self, phase: int, state: ServerState, memory: Any, n: int) -> traced.Loop:
        return self._compiler.call(
            ("advance", _first_alike(self.phases, phase)),
            self._make_advance(phase),
            (state, memory, self._train, self._placed_root, np.int32(n)),
            donate=(0, 1),
            where=self.placement,
        )

    def _make_advance(self, phase: int) -> Callable[..., traced.Loop]:
        return traced.make_advance(
            self.phases[phase].algorithm,
            self.task,
            self.setting.clients_per_round,
            self.setting.batch_size,
            self.setting.weighting,
            self.placement,
            self.capacities[phase],
            self.conditions,
        )

    def _replay_piece(
        self, state: ServerState, seeds: np.ndarray, broadcasts: Broadcast, most: int
    ) -> ServerState:
        """Returns the state after the rounds of one dispatch, `most` or fewer."""
        first_round, n = int(state.round), len(seeds)
        phase = self._phase_of(first_round, n)
        impl = str(jax.random.key_impl(self.root.shared))
        buffers = jax.tree.map(lambda x: _pad(x, most), (seeds, broadcasts))
        state = self._compiler.call(
            ("replay", _first_alike(self.phases, phase)),
            traced.make_replay(self.phases[phase].algorithm, impl),
            (state, *buffers, np.int32(n)),
            donate=(0,),
            where=self._own_part,
        )
        if int(state.round) != first_round + n:
            raise ValueError(
                f"the broadcast of round {int(state.round)} is not finite and can't be "
                "replayed; replay up to an earlier round"
            )
        return state

    def _phase_of(self, first_round: int, n: int) -> int:
        phase = phase_at(self.phases, first_round)
        last = first_round + n - 1
        if not 1 <= n <= self.capacities[phase]:
            raise ValueError(f"a dispatch takes 1 to {self.capacities[phase]} rounds, got {n}")
        if phase != phase_at(self.phases, last):
            raise ValueError(f"rounds {first_round} to {last} cross into a new phase")
        return phase

    def _own(self, tree: Any) -> Any:
        """Returns a tree of params or a state on this process's devices, all if it needs them."""
        return self._own_part.placed(placement.own_copy(tree), self._params)


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


def _first_alike(phases: Sequence[Phase], i: int) -> int:
    """Returns the first phase with the algorithm of phase i, whose programs serve both."""
    return next(j for j, phase in enumerate(phases) if phase.algorithm is phases[i].algorithm)


def _message_shapes(
    algorithm: Algorithm,
    task: Task,
    root: keys.RootKeys,
    setting: fitting.Setting,
    params: Params,
) -> ledger.MessageShapes:
    batches = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (algorithm.local_steps, setting.batch_size, *x.shape[1:]), x.dtype
        ),
        task.train.examples,
    )
    return ledger.message_shapes(algorithm, root.shared, params, batches, setting.clients_per_round)


def _check_late_uploads(phases: Sequence[Phase], shapes: Sequence[ledger.MessageShapes]) -> None:
    if phases[0].algorithm.late_uploads and any(s.upload != shapes[0].upload for s in shapes):
        raise ValueError(
            "late uploads can't be used where phases differ in the size of uploads: keep the "
            "number of perturbations, or discard late uploads"
        )


def _warn_of_narrow_params(phases: Sequence[Phase], task: Task, root: keys.RootKeys) -> None:
    """Warns if an algorithm keeps params in which updates of fine-tuning round away."""
    params = jax.eval_shape(task.init, root.init)
    state = jax.eval_shape(phases[0].algorithm.init, params)
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


def _clients_memory(algorithm: Algorithm, params: Params, num_clients: int) -> Any:
    """Returns what all clients remember at first, a tree of arrays [num_clients, ...]."""
    return jax.tree.map(
        lambda m: jnp.repeat(m[None], num_clients, axis=0), algorithm.init_memory(params)
    )


@jax.jit
def _key_words(shared: PRNGKey, rounds: Array) -> Array:
    """Returns the raw words of the shared keys of rounds [n], uint32 [n, words]."""
    return jax.vmap(lambda r: jax.random.key_data(keys.round_key(shared, r)))(rounds)


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((max(size - len(x), 0), *x.shape[1:]), x.dtype)])
