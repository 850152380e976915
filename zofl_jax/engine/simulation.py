"""Runs an algorithm on a task: what the host does around the compiled rounds.

    simulator = make_simulator(algorithm, task, clients_per_round=5, batch_size=32)
    progress = run(simulator, rounds=400, eval_every=50)

`make_simulator` compiles each function of `rounds.py` once, at its first use. `run` adds
an evaluation schedule, the count of bytes, and hooks for logs and progress bars, which do
their work while the device does the next rounds; a run may be taken up again from any
`Progress`.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from zofl_jax.conditions import participation
from zofl_jax.core import Array, Phase, ServerState
from zofl_jax.engine import ledger
from zofl_jax.engine.progress import Diverged, Progress, Record, Trace
from zofl_jax.engine.simulator import Flight, Simulator, as_phases, make_simulator, phase_at

__all__ = [
    "Diverged",
    "Flight",
    "Progress",
    "Record",
    "Simulator",
    "Trace",
    "as_phases",
    "make_simulator",
    "phase_at",
    "run",
]

DISPATCH_SECONDS = 0.5
"""Dispatches grow until one takes this long, so that a person sees progress."""


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
    start = progress or simulator.start(None)
    state, memory, seconds = start.state, start.memory, start.run_seconds
    books = _Books(simulator, start, on_rounds, on_record)
    done, dispatch = int(state.round), 1
    # What the host does once the device has its next task, or can't be given one.
    later = contextlib.ExitStack()
    while True:
        if books.unevaluated(done) and (done == rounds or (eval_every and done % eval_every == 0)):
            with later:
                metrics = simulator.measure(state.params)
            later.callback(books.record, done, jax.block_until_ready(metrics))
        if done >= rounds:
            later.close()
            state, memory = simulator.readable((state, memory))
            return books.progress(state, memory, seconds)

        phase = phase_at(simulator.phases, done)
        dispatch = min(dispatch, simulator.capacities[phase])
        n = min(dispatch, _next_stop(simulator.phases, done, rounds, eval_every) - done)
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
        mark = simulator.fingerprint(state.params) if on_rounds else None
        lost = trace.failed_loss is not None  # whoever hears of it may keep the state
        read = on_rounds is not None and reads_state(done)
        seen, kept = simulator.readable((state, memory)) if read or lost else (state, memory)
        now = books.progress(seen, kept, seconds, mark)
        later.callback(books.count, trace, now, simulator.sizes[phase])
        if trace.failed_loss is not None:
            later.close()
            raise Diverged(done, trace.failed_loss, now)
        if read:
            later.close()


def _next_stop(phases: Sequence[Phase], done: int, rounds: int, eval_every: int) -> int:
    """Returns the first round that a dispatch after `done` rounds may not go beyond.

    That is the end of the run, the next phase or the next evaluation.
    """
    later_phases = phases[phase_at(phases, done) + 1 :]
    until = min([rounds, *(phase.first_round for phase in later_phases)])
    return min(until, done - done % eval_every + eval_every) if eval_every else until


class _Books:
    """What the host keeps of a run beside the device's arrays, and whom it tells."""

    def __init__(
        self,
        simulator: Simulator,
        start: Progress,
        on_rounds: Callable[[Trace, list[ledger.RoundBytes], Progress], None] | None,
        on_record: Callable[[Record], None] | None,
    ):
        self._epsilon = simulator.epsilon
        self._on_rounds, self._on_record = on_rounds, on_record
        self._ledger = start.ledger
        self._history, self._losses = list(start.history), list(start.losses)

    def unevaluated(self, done: int) -> bool:
        """Returns whether the model after so many rounds has no record yet."""
        return done != (self._history[-1].round if self._history else 0)

    def progress(
        self, state: ServerState, memory: Any, seconds: float, mark: Array | None = None
    ) -> Progress:
        """Returns how far the run is; it goes on to change with these books."""
        return Progress(state, memory, self._ledger, self._history, self._losses, seconds, mark)

    def count(self, trace: Trace, now: Progress, sizes: ledger.MessageSizes) -> None:
        """Enters the rounds of a dispatch."""
        counted = [
            self._ledger.record_attendance(one, sizes, rejected)
            for one, rejected in zip(
                participation.each_round(trace.attendance), trace.rejected.tolist(), strict=True
            )
        ]
        self._losses.extend(trace.losses.tolist())
        if self._on_rounds and counted:
            self._on_rounds(trace, counted, now)

    def record(self, rounds_done: int, metrics: dict[str, Array]) -> None:
        """Enters an evaluation."""
        found = Record(
            rounds_done,
            float(np.mean(self._losses or [np.nan])),
            {name: float(value) for name, value in metrics.items()},
            self._ledger.totals.up,
            self._ledger.totals.down,
            self._ledger.rejected,
            self._epsilon(self._ledger) if self._epsilon else None,
        )
        self._history.append(found)
        self._losses.clear()
        if self._on_record:
            self._on_record(found)
