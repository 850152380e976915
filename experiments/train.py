"""Trains with a federated algorithm, from flags.

    python -m experiments.train --flagfile=experiments/flagfiles/digits.flags

The run directory (`--workdir`) holds the flags, the log, snapshots, `summary.json` and the
figures. The same command again resumes a stopped run, to the same bits.

With `--distributed` the same command runs on every host of a TPU pod or a GPU cluster, and
process 0 alone does all that is not rounds; `experiments.launch_local` tries it on one machine.
"""

import functools
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from absl import flags

from experiments import config, distributed, entry, report, tuning
from zofl_jax.engine import ledger, simulation
from zofl_jax.engine.processes import Team
from zofl_jax.observation import diagnostics, divergence, plots
from zofl_jax.runs import recording
from zofl_jax.runs.directory import Run, RunError, open_run, read_flags
from zofl_jax.tasks import objectives

flags.DEFINE_string(
    "workdir", None, "Run directory; a name made from the flags under runs/ unless given."
)
flags.DEFINE_bool("tensorboard", False, "Write TensorBoard events to WORKDIR/tensorboard.")
flags.DEFINE_bool("progress", True, "Show a progress bar.")
flags.DEFINE_integer(
    "devices",
    None,
    "Devices that the clients of a round are shared out over. Unless given, all accelerators; on a "
    "CPU its cores for convolutional models, 1 for others. With --distributed, of each process.",
    lower_bound=1,
)
flags.DEFINE_bool(
    "auto_lr",
    False,
    "Find the learning rate by trials from --learning_rate on, or its default, which take about "
    "half to once as many rounds as the run; flags.json keeps it.",
)
flags.DEFINE_integer(
    "diagnose_every",
    0,
    "Rounds between diagnoses (curvature, noise, stability), 0 for none; a multiple of "
    "--eval_every.",
    lower_bound=0,
)

MAY_CHANGE = ("rounds", "eval_every")
"""Flags that may differ when a run is resumed: they change no round already done."""

SNAPSHOT_SECONDS = 60.0
SNAPSHOT_SHARE = 0.01
"""The longest part of the time that saving snapshots may take."""

FLAGS = flags.FLAGS


class Outcome(NamedTuple):
    """How a run ended."""

    summary: dict[str, Any]
    failure: str | None  # a sentence for the user if it diverged


class SnapshotClock:
    """When to save a snapshot: once a minute, and more seldom if saving one takes long.

    >>> clock = SnapshotClock(now=0.0)
    >>> clock.due(59.0), clock.due(60.0)
    (False, True)
    >>> clock.saved(began=60.0, ended=63.0)  # of a large model
    >>> clock.due(362.0), clock.due(363.0)
    (False, True)
    """

    def __init__(self, now: float):
        self._next = now + SNAPSHOT_SECONDS

    def due(self, now: float) -> bool:
        """Returns whether it is time, in seconds of any clock."""
        return now >= self._next

    def saved(self, began: float, ended: float) -> None:
        """Takes note of a snapshot."""
        self._next = ended + max(SNAPSHOT_SECONDS, (ended - began) / SNAPSHOT_SHARE)


def main() -> None:
    """Runs the experiment that the flags describe."""
    values = config.resolve()
    if FLAGS.workdir:
        values = config.resumed(values, Path(FLAGS.workdir).expanduser())
    check_diagnose_every(values)
    if FLAGS.distributed:
        if FLAGS.auto_lr:
            raise entry.UserError(
                "--auto_lr probes in one process: find the rate without --distributed, then give "
                "it as --learning_rate"
            )
        distributed.run(
            {**values, "devices": FLAGS.devices},
            lead=lambda team: _main(values, team),
            simulator=lambda: config.build(values, FLAGS.devices).simulator,
        )
    else:
        _main(values)


def _main(values: dict[str, Any], team: Team | None = None) -> None:
    workdir = Path(FLAGS.workdir or default_workdir(values, FLAGS.auto_lr)).expanduser()
    # A new run is built before its directory is made, so that a mistake leaves nothing.
    build = team or not workdir.exists()
    experiment = config.build(values, FLAGS.devices, team) if build else None
    if FLAGS.auto_lr and (workdir / "flags.json").exists():
        values["learning_rate"] = read_flags(workdir)["learning_rate"]
    elif FLAGS.auto_lr:
        experiment = experiment or config.build(values, FLAGS.devices)
        note(
            f"--auto_lr tries learning rates for {tuning.probe_rounds(values)} rounds each, from "
            f"{values['learning_rate']:.3g} on"
        )
        probed = tuning.probe(values, experiment, FLAGS.devices)
        note(probed.sentence)
        values["learning_rate"] = probed.learning_rate
        experiment = config.at_learning_rate(experiment, values, FLAGS.devices)
    with open_run(workdir, values, MAY_CHANGE) as run:
        ended = finished(run, values, experiment)
        if ended:
            print(f"The run in {run.path} is complete; give more --rounds to go on.\n")
        outcome = ended or train(
            run, values, experiment, lambda done: _bar(values, done), advice=advice(values)
        )
        report.print_table(outcome.summary)
        if not ended:
            print(f"\nFigures, log and summary are in {run.path}")
    if outcome.failure:
        raise entry.UserError(outcome.failure)


def advice(values: config.Values) -> str:
    """Returns what to type where a run diverges: the end of a sentence."""
    found = f"type --learning_rate={values['learning_rate'] / 10:.3g} (a tenth)"
    if FLAGS.auto_lr:
        found += " in place of --auto_lr"
    elif not FLAGS.distributed:
        found += ", or --auto_lr"
    return f"{found}, with another --workdir" if FLAGS.workdir else found


def check_diagnose_every(values: config.Values) -> None:
    """Checks --diagnose_every.

    Raises:
      UserError: if it doesn't fit the run.
    """
    every = FLAGS.diagnose_every
    if every % values["eval_every"]:
        raise entry.UserError(
            f"--diagnose_every={every} must be a multiple of --eval_every={values['eval_every']}"
        )
    if every and values["objective"] in objectives.WITHOUT_GRADIENT:
        raise entry.UserError(
            f"--diagnose_every needs a gradient, which --objective={values['objective']} lacks"
        )


def diagnosis_due(done: int) -> bool:
    """Returns whether --diagnose_every asks for a diagnosis after so many rounds."""
    return FLAGS.diagnose_every > 0 and done % FLAGS.diagnose_every == 0


def default_workdir(values: config.Values, auto_lr: bool = False) -> Path:
    """Returns a folder whose name tells the run and whose digest tells its flags."""
    fixed = {name: value for name, value in values.items() if name not in MAY_CHANGE}
    fixed |= {"auto_lr": True} if auto_lr else {}
    digest = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:8]
    names = values["task"], report.model_name(values)
    task, model = (re.sub(r"[^\w.-]+", "_", name) for name in names)
    return Path("runs") / f"{task}-{model}-{values['algorithm']}-{digest}"


def finished(
    run: Run, values: config.Values, experiment: config.Experiment | None = None
) -> Outcome | None:
    """Returns how a run ended, None if there are rounds to do.

    Args:
      run: the open run directory.
      values: its flags.
      experiment: built from them, if it is built already.

    Raises:
      RunError: if it holds more rounds than are asked for, or if it has ended and its data or
        base model have changed since.
      UserError: if these can't be read.
    """
    logged = run.log.last_round + 1
    if logged > values["rounds"]:
        raise RunError(
            f"{run.path} holds {logged} rounds already; give --rounds={logged} or more, or "
            "another --workdir"
        )
    summary = run.read_summary()
    complete = summary and logged == summary.get("rounds") == values["rounds"]
    if complete:
        run.check_inputs(
            experiment.inputs() if experiment else config.inputs(values, FLAGS.devices)
        )
    if run.notice:
        note(run.notice)
    return Outcome(summary, summary.get("failure")) if summary and complete else None


def train(
    run: Run,
    values: config.Values,
    experiment: config.Experiment | None,
    start_bar: Callable[[int], AbstractContextManager[tqdm.tqdm]],
    *,
    advice: str = "",
    figures: bool = True,
) -> Outcome:
    """Runs the rounds that are missing, and writes the log, the summary and the figures.

    Args:
      run: the open run directory.
      values: its flags.
      experiment: built from them; None builds it.
      start_bar: (rounds done) -> the progress bar, which is told of each round from there on.
      advice: what to type if the loss rises or the run diverges, the end of a sentence.
      figures: whether to draw them; they take about a second.

    Raises:
      RunError, UserError: if the run can't be read or the experiment not be built, or if its data
        or base model have changed.
    """
    began = time.perf_counter()
    experiment = experiment or config.build(values, FLAGS.devices)
    simulator = experiment.simulator
    repaired = run.notice or ""
    run.check_inputs(experiment.inputs())
    progress, notice = recording.restore(run, simulator)
    found = (run.notice or "").removeprefix(repaired).strip()
    for sentence in (found, notice, *experiment.notices):
        if sentence:
            note(sentence)
    done = int(progress.state.round)
    if done:
        tqdm.tqdm.write(f"resuming {run.path} after round {done}", file=sys.stderr)
    if figures and experiment.label_counts is not None:
        title = f"{experiment.task.name}, {values['partition']} partition"
        run.save_figure("labels.png", plots.label_distribution(experiment.label_counts, title))

    shown: dict[str, str] = {}
    clock, saving = SnapshotClock(time.perf_counter()), False
    losses = run.log.train_losses()
    warned = False
    diagnose = _diagnose(run, values, experiment)
    diagnose(progress)
    writer = _event_writer(run) if FLAGS.tensorboard else None  # closed below, however it ends

    def reads_state(done: int) -> bool:
        nonlocal saving
        saving = clock.due(time.perf_counter())
        return saving or diagnosis_due(done)

    def on_rounds(
        trace: simulation.Trace,
        counted: list[ledger.RoundBytes],
        progress: simulation.Progress,
    ) -> None:
        nonlocal saving, warned
        recording.write_rounds(run, trace, counted, progress)
        diagnose(progress)
        losses.extend(trace.losses.tolist())
        if not warned and (rise := divergence.rising(losses)):
            note(
                f"the training loss rises, to {rise.last:.3g} from {rise.best:.3g} near round "
                f"{rise.best_round}: the run may diverge{_then(advice)}"
            )
            warned = True
        if saving:
            saving, started = False, time.perf_counter()
            recording.save_snapshot(run, progress)
            clock.saved(started, time.perf_counter())
        shown["loss"] = f"{trace.losses[-1]:.4g}"
        if progress.ledger.rejected:
            shown["rejected"] = str(progress.ledger.rejected)
        bar.set_postfix(shown, refresh=False)
        bar.update(len(counted))
        if writer:
            for i, loss in enumerate(trace.losses):
                writer.add_scalar("train/loss", loss, trace.first_round + i + 1)

    def on_record(record: simulation.Record) -> None:
        recording.write_record(run, record)
        name = "accuracy" if "accuracy" in record.metrics else "loss"
        shown[f"test {name}"] = f"{record.metrics[name]:.4g}"
        if record.epsilon is not None:
            shown["ε"] = f"{record.epsilon:.3g}"
        bar.set_postfix(shown)
        if writer:
            for name, value in record.metrics.items():
                writer.add_scalar(f"test/{name}", value, record.round)
            writer.add_scalar("bytes/up", record.bytes_up, record.round)
            writer.add_scalar("bytes/down", record.bytes_down, record.round)

    diverged = None
    try:
        with start_bar(done) as bar:
            progress = simulation.run(
                simulator,
                rounds=values["rounds"],
                eval_every=values["eval_every"],
                progress=progress,
                on_rounds=on_rounds,
                on_record=on_record,
                reads_state=reads_state,
            )
    except simulation.Diverged as error:
        diverged, progress = error, error.progress
    finally:
        if writer:
            writer.close()
    recording.save_snapshot(run, progress)
    summary = report.summarise(values, experiment, progress)
    seconds = {at: found.get(recording.RUN_SECONDS) for at, found in run.log.metrics().items()}
    summary["history_seconds"] = [seconds.get(row["round"]) for row in summary["history"]]
    summary["total_seconds"] = time.perf_counter() - began
    stalled = divergence.ended_above(losses)
    if diverged:
        # Local steps alone can have moved anything in the first round.
        blameless = diverged.round == 0 and values["local_steps"] == 1
        remedy = _not_the_rate(values) if blameless else advice
        failure = f"{diverged.finding}{_then(remedy)}"
        summary |= {"diverged_round": diverged.round, "failure": failure}
    elif stalled is not None:
        sentence = (
            f"the training loss ended at {losses[-1]:.3g}, from {losses[0]:.3g} at the start: "
            f"the run diverged at round {stalled}{_then(advice)}"
        )
        summary |= {"diverged_round": stalled, "failure": sentence}
    if FLAGS.diagnose_every:
        summary["diagnoses"] = recording.diagnoses(run)
    if figures:
        report.save_figures(run, experiment.task.name, summary)
    run.write_summary(summary)
    return Outcome(summary, summary.get("failure"))


def _then(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""


def _not_the_rate(values: config.Values) -> str:
    """Returns what to do where a run fails before its first step."""
    remedy = "no step had been taken, so the learning rate is not the cause: check the data"
    if values["attack"] != "none":
        remedy += f", or leave out --attack={values['attack']}"
    if values["estimator"] in ("forward", "central"):
        remedy += f", or type --smoothing={values['smoothing'] / 10:.3g} (a tenth)"
    return remedy


def _diagnose(
    run: Run, values: config.Values, experiment: config.Experiment
) -> Callable[[simulation.Progress], None]:
    """Returns what diagnoses a progress and logs it, where one is due and not yet logged."""
    simulator = experiment.simulator
    if not FLAGS.diagnose_every:
        return lambda progress: None
    logged = {row["round"] for row in recording.diagnoses(run)}
    phase_diagnose = functools.cache(
        lambda phase: diagnostics.make_diagnose(
            simulator.phases[phase].algorithm, simulator.task, values["batch_size"]
        )
    )

    def diagnose(progress: simulation.Progress) -> None:
        done = progress.ledger.num_rounds
        if not diagnosis_due(done) or done in logged:
            return
        phase = simulation.phase_at(simulator.phases, done)
        state = jax.tree.map(np.asarray, progress.state)
        # The same probes each time, so that only the run makes a difference.
        found = phase_diagnose(phase)(state, simulator.root.init)
        recording.write_diagnosis(run, done, found)

    return diagnose


def _bar(values: config.Values, done: int) -> tqdm.tqdm:
    return tqdm.tqdm(
        total=values["rounds"],
        initial=done,
        unit=" rounds",
        dynamic_ncols=True,
        disable=not FLAGS.progress,
    )


def note(sentences: str) -> None:
    """Tells the user, above a progress bar if there is one."""
    tqdm.tqdm.write(f"note: {sentences}", file=sys.stderr)


def _event_writer(run: Run) -> Any:
    try:
        import tensorboardX
    except ImportError:
        raise RunError(
            "--tensorboard needs the package tensorboardX; pip install 'zofl-jax[tensorboard]'"
        ) from None
    return tensorboardX.SummaryWriter(str(run.path / "tensorboard"))


if __name__ == "__main__":
    entry.run(main, interrupted="stopped; the same command goes on from here")
