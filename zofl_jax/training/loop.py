"""Trains in a run directory: log, snapshots, resume to the same bits, a summary, observers.

    outcome = train(simulator, workdir="runs/mine", rounds=400)
    outcome.summary["test_accuracy"], outcome.progress.state.params

Stopped at any moment, by Ctrl-C, an error or the end of the process, the same call goes on where
the log ends. `train` does it all; who opens run directories by flags of their own calls `ended`
and `go_on`.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zofl_jax.engine import ledger, simulation
from zofl_jax.observation import divergence
from zofl_jax.runs import recording
from zofl_jax.runs.directory import Flag, Run, RunError, open_run, read_flags
from zofl_jax.runs.fingerprints import Fingerprints
from zofl_jax.training import identity, summaries
from zofl_jax.training.observers import (
    Advice,
    Context,
    Observer,
    Snapshots,
    remedied,
    to_stderr,
    usual,
)
from zofl_jax.training.summaries import About


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      summary: the contents of `summary.json`.
      failure: a sentence for the user if it diverged.
      progress: where it is; None where a complete run's summary was read and no more.
    """

    summary: dict[str, Any]
    failure: str | None
    progress: simulation.Progress | None = None


def train(
    simulator: simulation.Simulator,
    *,
    workdir: str | os.PathLike[str],
    rounds: int,
    eval_every: int = 50,
    observers: Sequence[Observer] | None = None,
    settings: Mapping[str, Flag] | None = None,
    inputs: Callable[[], Fingerprints] | None = None,
    about: About | None = None,
    advice: Advice | None = None,
    snapshots: Snapshots | None = None,
    tell: Callable[[str], None] = to_stderr,
) -> Outcome:
    """Runs until `rounds` rounds are done in a run directory; goes on with the run that is there.

    The directory holds the log, snapshots, `summary.json` and what the observers write; another
    simulator is refused there. An interrupted run keeps all it has logged, and the same call ends
    with the bits of a run that was not interrupted. A run that diverges keeps the model of its
    last good round.

    Args:
      simulator: see `make_simulator`.
      workdir: the run directory, made if there is none.
      rounds: rounds in all, those already done included; >= 1.
      eval_every: rounds between evaluations; 0 evaluates at the end only.
      observers: who watches, see `observers.Observer`; `observers.usual()` unless given.
      settings: plain values that tell this run from others beside what `identity` says of the
        simulator, such as what malicious clients do. They are kept, and the run goes on with the
        same only.
      inputs: () -> fingerprints of the data and the base model; `identity.inputs` unless given.
      about: names for the summary, the table and the figures.
      advice: what to tell the user of a run that fails.
      snapshots: when to save one; once a minute unless given.
      tell: writes a line for the user; to stderr unless given.

    Raises:
      RunError: if the directory holds another run or more rounds, or can't be used.
      ValueError: for arguments out of range.

    >>> import tempfile
    >>> import jax, optax
    >>> from zofl_jax.algorithms import decomfl
    >>> from zofl_jax.directions import estimators
    >>> from zofl_jax.tasks import quadratic
    >>> task = quadratic.quadratic(jax.random.key(0), dim=4, effective_rank=2.0, num_clients=3).task
    >>> method = decomfl(task.loss, estimators.forward_difference(1, 1e-3), optax.sgd(0.01))
    >>> simulator = simulation.make_simulator(method, task, clients_per_round=2, batch_size=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     some = train(simulator, workdir=folder, rounds=2, observers=())
    ...     more = train(simulator, workdir=folder, rounds=3, observers=(), tell=lambda line: None)
    >>> some.summary["rounds"], more.summary["rounds"], more.failure
    (2, 3, None)
    """
    if rounds < 1 or eval_every < 0:
        raise ValueError(f"rounds must be >= 1 and eval_every >= 0, got {rounds} and {eval_every}")
    path = Path(workdir).expanduser()
    stored = read_flags(path) if (path / "flags.json").exists() else {}
    kept = {
        **identity.settings(simulator),
        **(settings or {}),
        "rounds": rounds,
        "eval_every": eval_every,
    }
    inputs = inputs or (lambda: identity.inputs(simulator))
    with open_run(path, kept, identity.may_change(stored)) as run:
        complete = ended(run, rounds, inputs, tell)
        if complete:
            progress, _ = recording.restore(run, simulator)
            outcome = complete._replace(progress=progress)
        else:
            outcome = go_on(
                run,
                simulator,
                rounds=rounds,
                eval_every=eval_every,
                observers=usual() if observers is None else observers,
                inputs=inputs,
                about=about,
                advice=advice,
                snapshots=snapshots,
                tell=tell,
            )
    if outcome.failure:
        tell(f"note: {outcome.failure}")
    return outcome


def ended(
    run: Run,
    rounds: int,
    inputs: Callable[[], Fingerprints],
    tell: Callable[[str], None] = to_stderr,
) -> Outcome | None:
    """Returns how a run ended, None if there are rounds to do, and tells what was repaired.

    Args:
      run: the open run directory.
      rounds: rounds in all.
      inputs: () -> fingerprints of data and base model, called if the run is complete.
      tell: writes a line for the user.

    Raises:
      RunError: if it holds more rounds than are asked for, or if it has ended and its data or
        base model have changed since.
    """
    logged = run.log.last_round + 1
    if logged > rounds:
        raise RunError(
            f"{run.path} holds {logged} rounds already; give --rounds={logged} or more, or "
            "another --workdir"
        )
    summary = run.read_summary()
    complete = summary and logged == summary.get("rounds") == rounds
    if complete:
        run.check_inputs(inputs())
    if run.notice:
        tell(f"note: {run.notice}")
    return Outcome(summary, summary.get("failure")) if summary and complete else None


def go_on(
    run: Run,
    simulator: simulation.Simulator,
    *,
    rounds: int,
    eval_every: int,
    inputs: Callable[[], Fingerprints],
    observers: Sequence[Observer] = (),
    about: About | None = None,
    advice: Advice | None = None,
    notices: Sequence[str] = (),
    snapshots: Snapshots | None = None,
    tell: Callable[[str], None] = to_stderr,
) -> Outcome:
    """Runs the rounds that are missing, and writes the log and the summary.

    Args:
      run: the open run directory, of which `ended` has told what was repaired.
      simulator: of this run.
      rounds: rounds in all, those already done included.
      eval_every: rounds between evaluations; 0 evaluates at the end only.
      inputs: () -> fingerprints of the data and the base model.
      observers: who watches.
      about: names for the summary and the figures.
      advice: what to tell the user of a run that fails.
      notices: sentences that the user is told before the first round.
      snapshots: when to save one; once a minute unless given.
      tell: writes a line for the user.

    Raises:
      RunError: if the run can't be read, is of another simulation, or if its data or base model
        have changed.
    """
    began = time.perf_counter()
    progress = _restored(run, simulator, inputs, notices, tell)
    context = Context(run, simulator, progress, rounds, eval_every, advice or Advice(), tell)
    watching = (_Recorder(snapshots or Snapshots()), *observers)
    progress, diverged = _rounds(context, watching)
    recording.save_snapshot(run, progress)
    summary = summaries.summarise(simulator, progress, about)
    seconds = {at: found.get(recording.RUN_SECONDS) for at, found in run.log.metrics().items()}
    summary["history_seconds"] = [seconds.get(row["round"]) for row in summary["history"]]
    summary["total_seconds"] = time.perf_counter() - began
    summary |= _failure(context, diverged)
    for each in watching:
        summary |= each.end(summary)
    run.write_summary(summary)
    return Outcome(summary, summary.get("failure"), progress)


class _Recorder(Observer):
    """Writes the log, and snapshots from time to time; it watches every run, before all others."""

    def __init__(self, snapshots: Snapshots):
        self._snapshots = snapshots

    def start(self, context: Context) -> None:
        self._run, self._saving = context.run, False
        self._snapshots.start(time.perf_counter())

    def wants_state(self, rounds_done: int) -> bool:
        self._saving = self._snapshots.due(time.perf_counter())
        return self._saving

    def rounds(
        self,
        trace: simulation.Trace,
        counted: Sequence[ledger.RoundBytes],
        progress: simulation.Progress,
    ) -> None:
        recording.write_rounds(self._run, trace, counted, progress)
        if self._saving:
            self._saving, began = False, time.perf_counter()
            recording.save_snapshot(self._run, progress)
            self._snapshots.saved(began, time.perf_counter())

    def record(self, record: simulation.Record) -> None:
        recording.write_record(self._run, record)


def _restored(
    run: Run,
    simulator: simulation.Simulator,
    inputs: Callable[[], Fingerprints],
    notices: Sequence[str],
    tell: Callable[[str], None],
) -> simulation.Progress:
    """Returns the progress in a run directory, and tells what there is to tell of it."""
    repaired = run.notice or ""
    run.check_inputs(inputs())
    progress, notice = recording.restore(run, simulator)
    found = (run.notice or "").removeprefix(repaired).strip()
    for sentence in (found, notice, *notices):
        if sentence:
            tell(f"note: {sentence}")
    if progress.ledger.num_rounds:
        tell(f"resuming {run.path} after round {progress.ledger.num_rounds}")
    return progress


def _rounds(
    context: Context, watching: Sequence[Observer]
) -> tuple[simulation.Progress, simulation.Diverged | None]:
    """Runs the rounds under the eyes of observers; returns where they end, and why if early."""

    def reads_state(done: int) -> bool:
        return any([each.wants_state(done) for each in watching])  # all are asked

    told = False

    def on_rounds(*what: Any) -> None:
        nonlocal told
        if context.simulator.fell_back and not told:
            told = True
            context.tell(
                "note: the memory did not suffice for as many clients at once as were chosen, and "
                "half as many are evaluated now; --clients_at_once sets the number"
            )
        for each in watching:
            each.rounds(*what)

    def on_record(record: simulation.Record) -> None:
        for each in watching:
            each.record(record)

    try:
        with contextlib.ExitStack() as started:
            for each in watching:
                each.start(context)
                started.callback(each.close)
            progress = simulation.run(
                context.simulator,
                rounds=context.rounds,
                eval_every=context.eval_every,
                progress=context.progress,
                on_rounds=on_rounds,
                on_record=on_record,
                reads_state=reads_state,
            )
    except simulation.Diverged as error:
        return error.progress, error
    return progress, None


def _failure(context: Context, diverged: simulation.Diverged | None) -> dict[str, Any]:
    """Returns what the summary says of a run that has diverged, {} of others."""
    advice = context.advice
    if diverged:
        # Local steps alone can have moved anything in the first round.
        local_steps = context.simulator.phases[0].algorithm.local_steps
        blameless = diverged.round == 0 and local_steps == 1
        remedy = remedied(advice.start if blameless else advice.rate)
        return {"diverged_round": diverged.round, "failure": f"{diverged.finding}{remedy}"}
    losses = context.run.log.train_losses()
    stalled = divergence.ended_above(losses)
    if stalled is None:
        return {}
    return {
        "diverged_round": stalled,
        "failure": f"the training loss ended at {losses[-1]:.3g}, from {losses[0]:.3g} at the "
        f"start: the run diverged at round {stalled}{remedied(advice.rate)}",
    }
