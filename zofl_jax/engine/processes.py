"""One simulation over several processes: the hosts of a TPU pod, the tasks of a GPU cluster.

    processes.join()                            # before JAX is used for the first time
    team = processes.Team()
    team.compare(flags)
    simulator = ...                             # the same in each, its mesh over all devices
    if team.leads:
        with team.leading():
            simulation.run(team.lead(simulator), rounds=400)
    else:
        team.follow(simulator)

Process 0 leads: it alone opens the run directory, counts bytes, evaluates and replays. Before
each dispatch the processes exchange a word: the leader says how many rounds to run, anyone may
ask to stop or tell what went wrong, and all go on or stop together. The first dispatch starts
with the leader's state, so the others need no run directory.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from zofl_jax.engine.simulation import Flight, Simulator, Trace

WORD_BYTES = 8192
"""Of the message that each process sends before each dispatch."""

_PROBLEM_CHARACTERS = 1000

_TOGETHER = ("measure", "fingerprint", "readable")
"""What processes do together where params are split over them, beside rounds."""


class ProcessError(RuntimeError):
    """The processes can't go on together; the message names the process and the remedy."""


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_seconds: int = 300,
) -> None:
    """Joins this process to the others; on TPU pods and under SLURM all is found out by JAX.

    Args:
      coordinator: "HOST:PORT" of process 0, the same in every process.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      wait_seconds: for the others; JAX aborts a process that waits for longer.

    Raises:
      ValueError: for arguments that don't fit each other, or if no cluster is found.
      ProcessError: if JAX was used already, or the processes don't come together.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"coordinator, num_processes and process_id belong together, {' and '.join(missing)} "
            "must be given too (or none of them on a TPU pod or under SLURM)"
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    if num_processes is not None and process_id is not None:
        if num_processes < 1:
            raise ValueError(f"num_processes must be >= 1, got {num_processes}")
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"process_id must be in [0, num_processes = {num_processes}), got {process_id}: "
                "the count must be that of the processes started"
            )
    # Otherwise JAX swallows SIGTERM, to tell it to programs that ask; this one doesn't.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=wait_seconds
        )
    except ValueError as error:
        raise ValueError(
            "no TPU pod or cluster was recognised: give coordinator=HOST:PORT, num_processes and "
            f"process_id ({error})"
        ) from error
    except RuntimeError as error:
        used = "must be called before" in str(error) or "only be called once" in str(error)
        raise ProcessError(
            "processes must be joined before JAX is used for the first time, and once: do it "
            "first in a fresh process"
            if used
            else f"the processes did not come together: {error}"
        ) from error
    _check_devices()


class Team:
    """The processes that run one simulation together.

    Attributes:
      index: of this process; 0 leads.
      size: how many there are.
      broken: whether they lost step with each other: then JAX can't end in peace, and a
        process should end by `os._exit`.
    """

    def __init__(self) -> None:
        self.index = jax.process_index()
        self.size = jax.process_count()
        self.broken = False
        self._stop = False
        self._ended = False

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    def request_stop(self) -> None:
        """Asks all processes to stop before the next dispatch; for a signal handler."""
        self._stop = True

    def compare(self, table: Mapping[str, Any]) -> None:
        """Checks that a table of plain values is the same in every process.

        Raises:
          ProcessError: in every process, naming the first entry that differs.
        """
        tables = self._exchange({name: _digest(value) for name, value in table.items()})
        for index, other in enumerate(tables[1:], 1):
            for name in {**tables[0], **other}:
                if tables[0].get(name) != other.get(name):
                    raise ProcessError(
                        f"{name} differs between process 0 and process {index}: give every "
                        "process the same"
                    )

    def lead(self, simulator: Simulator) -> Simulator:
        """Returns the simulator whose rounds the other processes take part in.

        Its `launch` raises ProcessError if another process failed, and KeyboardInterrupt if one
        was asked to stop, in all processes. Where params are split over processes, they evaluate
        and read the state together too.
        """
        sent = False

        def launch(state: Any, memory: Any, n: int) -> Flight:
            nonlocal sent
            self._agree(n)
            with self._in_step():
                if not sent:
                    _from_leader((state, memory))
                    sent = True
                return simulator.launch(state, memory, n)

        def land(flight: Flight) -> tuple[Any, Any, Trace]:
            with self._in_step():
                return simulator.land(flight)

        if not simulator.placement.splits_processes:
            return simulator.wrapped(launch=launch, land=land)

        def together(task: str) -> Callable[[Any], Any]:
            def do(tree: Any) -> Any:
                self._agree(0, task=task)
                with self._in_step():
                    return getattr(simulator, task)(tree if sent else _from_leader(tree))

            return do

        return simulator.wrapped(
            launch=launch, land=land, **{task: together(task) for task in _TOGETHER}
        )

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Ends the other processes when the block ends, with its error if there is one."""
        try:
            yield
        except BaseException as error:
            # A stop is no failure: it needs no sentence.
            interrupted = isinstance(error, KeyboardInterrupt)
            self._end(stop=interrupted, problem=None if interrupted else str(error) or repr(error))
            raise
        self._end()

    def follow(self, simulator: Simulator) -> None:
        """Runs the rounds that process 0 asks for, until it ends.

        Raises:
          ProcessError: if another process failed.
          KeyboardInterrupt: if one was asked to stop.
        """
        state, memory, *_ = simulator.start(None)
        started = False
        while n_or_task := self._agree(0):
            with self._in_step():
                if isinstance(n_or_task, str):
                    tree = (state, memory) if n_or_task == "readable" else state.params
                    getattr(simulator, n_or_task)(tree if started else _from_leader(tree))
                    continue
                if not started:
                    state, memory = _from_leader((state, memory))
                    started = True
                state, memory, _ = simulator.advance(state, memory, n_or_task)

    def fail(self, problem: str) -> None:
        """Tells the others, at their next exchange, why this process can't take part."""
        with contextlib.suppress(ProcessError, KeyboardInterrupt):
            self._agree(0, problem)

    def _agree(self, n: int, problem: str | None = None, task: str | None = None) -> int | str:
        """Returns the leader's number of rounds, or what else all do; 0 at the end."""
        problem = problem and problem[:_PROBLEM_CHARACTERS]
        word = {"rounds": n, "stop": self._stop, "problem": problem, "task": task}
        words = self._exchange(word)
        rounds = words[0]["rounds"] or words[0]["task"] or 0
        problems = [(i, said["problem"]) for i, said in enumerate(words) if said["problem"]]
        # Who asks to stop when all is done is late.
        stop = words[0]["stop"] or (words[0]["rounds"] and any(said["stop"] for said in words))
        self._ended = bool(rounds == 0 or problems or stop)
        if problems:
            raise ProcessError(f"process {problems[0][0]}: {problems[0][1]}")
        if stop:
            raise KeyboardInterrupt
        return rounds

    def _end(self, stop: bool = False, problem: str | None = None) -> None:
        if self._ended or self.broken:
            return
        self._stop = stop
        with contextlib.suppress(ProcessError, KeyboardInterrupt):
            self._agree(0, problem)

    def _exchange(self, word: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns what each process said."""
        raw = json.dumps(word).encode()
        if len(raw) > WORD_BYTES:
            raise ValueError(f"a word has {len(raw)} bytes, more than {WORD_BYTES}")
        padded = np.frombuffer(raw.ljust(WORD_BYTES), np.uint8)
        with self._in_step():
            said = np.asarray(multihost_utils.process_allgather(padded))
        return [json.loads(row.tobytes()) for row in said.reshape(self.size, WORD_BYTES)]

    @contextlib.contextmanager
    def _in_step(self) -> Iterator[None]:
        # What is raised inside the rounds is not raised in the other processes at the same place.
        try:
            yield
        except BaseException:
            self.broken = True
            raise


def _from_leader(tree: Any) -> Any:
    """Returns process 0's values of a tree of arrays, to the bit; NumPy arrays."""
    # As bytes: a sum of floats, which the exchange is, turns -0 into 0.
    host = jax.tree.map(np.array, tree)
    raw = jax.tree.map(lambda x: np.frombuffer(x.tobytes(), np.uint8), host)
    sent = multihost_utils.broadcast_one_to_all(raw)
    return jax.tree.map(
        lambda b, x: np.frombuffer(np.asarray(b).tobytes(), x.dtype).reshape(x.shape), sent, host
    )


def _check_devices() -> None:
    counts = [0] * jax.process_count()
    for device in jax.devices():
        counts[device.process_index] += 1
    odd = [index for index, count in enumerate(counts) if count != counts[0]]
    if odd:
        raise ProcessError(
            f"process {odd[0]} has {counts[odd[0]]} devices and process 0 has {counts[0]}: every "
            "process must have as many"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
