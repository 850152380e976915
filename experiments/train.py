"""Trains with a federated algorithm, from flags.

    python -m experiments.train --flagfile=experiments/flagfiles/digits.flags

The run directory (`--workdir`) holds the flags, the log, snapshots, `summary.json` and the
figures. The same command again resumes a stopped run, to the same bits.

With `--distributed` the same command runs on every host of a TPU pod or a GPU cluster, and
process 0 alone does all that is not rounds; `experiments.launch_local` tries it on one machine.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import config, distributed, entry, report, tuning, workdirs
from zofl_jax.engine.processes import Team
from zofl_jax.runs.directory import Run, open_run, read_flags
from zofl_jax.tasks import objectives
from zofl_jax.training import loop, observers

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

FLAGS = flags.FLAGS


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
    workdir = Path(FLAGS.workdir or workdirs.of_run(values, FLAGS.auto_lr)).expanduser()
    # A new run is built before its directory is made, so that a mistake leaves nothing.
    experiment = config.build(values, FLAGS.devices, team) if team or not workdir.exists() else None
    if FLAGS.auto_lr:
        values, experiment = _at_probed_rate(values, experiment, workdir)
    with open_run(workdir, values, workdirs.MAY_CHANGE) as run:
        ended = finished(run, values, experiment)
        if ended:
            print(f"The run in {run.path} is complete; give more --rounds to go on.\n")
        outcome = ended or train(
            run,
            values,
            experiment,
            observers.ProgressBar(shown=FLAGS.progress),
            rate_advice=_rate_advice(values),
        )
        report.print_table(outcome.summary)
        if not ended:
            print(f"\nFigures, log and summary are in {run.path}")
    if outcome.failure:
        raise entry.UserError(outcome.failure)


def finished(
    run: Run, values: config.Values, experiment: config.Experiment | None = None
) -> loop.Outcome | None:
    """Returns how a run ended, None if there are rounds to do; see `loop.ended`.

    Args:
      run: the open run directory.
      values: its flags.
      experiment: built from them, if it is built already.

    Raises:
      RunError: as `loop.ended`.
      UserError: if its data and base model can't be read.
    """
    build = experiment.inputs if experiment else lambda: config.inputs(values, FLAGS.devices)
    return loop.ended(run, values["rounds"], build)


def train(
    run: Run,
    values: config.Values,
    experiment: config.Experiment | None,
    bar: observers.ProgressBar,
    *,
    rate_advice: str = "",
    figures: bool = True,
) -> loop.Outcome:
    """Runs the rounds that are missing, as the flags say; see `loop.go_on`.

    Args:
      run: the open run directory.
      values: its flags.
      experiment: built from them; None builds it.
      bar: shows them.
      rate_advice: what to type if the loss rises or the run diverges, the end of a sentence.
      figures: whether to draw them; they take about a second.

    Raises:
      RunError, UserError: if the run can't be read or the experiment not be built, or if its data
        or base model have changed.
    """
    experiment = experiment or config.build(values, FLAGS.devices)
    title = f"{experiment.task.name}, {values['partition']} partition"
    watching: list[observers.Observer] = [observers.DivergenceWarning(), bar]
    if FLAGS.tensorboard:
        watching.insert(0, observers.TensorBoard())
    if FLAGS.diagnose_every:
        watching.insert(0, observers.Diagnoses(FLAGS.diagnose_every, values["batch_size"]))
    if figures:
        watching.insert(0, observers.Figures(experiment.label_counts, title))
    return loop.go_on(
        run,
        experiment.simulator,
        rounds=values["rounds"],
        eval_every=values["eval_every"],
        observers=watching,
        inputs=experiment.inputs,
        about=report.about(values, experiment),
        advice=report.advice(values, rate_advice),
        notices=experiment.notices,
    )


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


def _at_probed_rate(
    values: dict[str, Any], experiment: config.Experiment | None, workdir: Path
) -> tuple[dict[str, Any], config.Experiment | None]:
    """Returns flags and experiment at the rate that --auto_lr finds, or found for this run."""
    if (workdir / "flags.json").exists():
        return {**values, "learning_rate": read_flags(workdir)["learning_rate"]}, experiment
    experiment = experiment or config.build(values, FLAGS.devices)
    report.note(
        f"--auto_lr tries learning rates for {tuning.probe_rounds(values)} rounds each, from "
        f"{values['learning_rate']:.3g} on"
    )
    probed = tuning.probe(values, experiment, FLAGS.devices)
    report.note(probed.sentence)
    values = {**values, "learning_rate": probed.learning_rate}
    return values, config.at_learning_rate(experiment, values, FLAGS.devices)


def _rate_advice(values: config.Values) -> str:
    """Returns what to type where a run diverges: the end of a sentence."""
    found = f"type --learning_rate={values['learning_rate'] / 10:.3g} (a tenth)"
    if FLAGS.auto_lr:
        found += " in place of --auto_lr"
    elif not FLAGS.distributed:
        found += ", or --auto_lr"
    return f"{found}, with another --workdir" if FLAGS.workdir else found


if __name__ == "__main__":
    entry.run(main, interrupted="stopped; the same command goes on from here")
