"""Trains with a federated algorithm, from flags.

    python -m experiments.train --flagfile=experiments/flagfiles/digits.flags

The run directory (`--workdir`) holds the flags, the log, snapshots, `summary.json` and the
figures. The same command again resumes a stopped run, to the same bits.

With `--distributed` the same command runs on every host of a TPU pod or a GPU cluster, and
process 0 alone does all that is not rounds; `experiments.launch_local` tries it on one machine.
"""

from pathlib import Path

from absl import flags

from zofl_jax.configuration.config import Config
from zofl_jax.configuration.experiment import Experiment, at_learning_rate, build, resumed
from zofl_jax.engine.processes import Team
from zofl_jax.runs.directory import Run, open_run, read_flags
from zofl_jax.tasks import objectives
from zofl_jax.training import described, loop, observers

from . import devices, distributed, entry, few_examples, report, tuning
from . import flags as settings

flags.DEFINE_string(
    "workdir", None, "Run directory; a name made from the flags under runs/ unless given."
)
flags.DEFINE_bool("tensorboard", False, "Write TensorBoard events to WORKDIR/tensorboard.")
flags.DEFINE_bool("progress", True, "Show a progress bar.")
flags.DEFINE_bool("figures", True, "Draw figures into WORKDIR, which takes one or two seconds.")
flags.DEFINE_bool(
    "auto_lr",
    False,
    "Find the learning rate by trials from --learning_rate on, or its default, which take about "
    "half to once as many rounds as the run; flags.json keeps it.",
)
flags.DEFINE_bool(
    "auto_examples",
    False,
    "Choose --examples_per_direction by the noise of examples' gradients, measured at the start; "
    "flags.json keeps it.",
)
flags.DEFINE_integer(
    "diagnose_every",
    0,
    "Rounds between diagnoses (curvature, noise, stability), 0 for none; a multiple of "
    "--eval_every.",
    lower_bound=0,
)

FLAGS = flags.FLAGS

EXAMPLES = "examples_per_direction"


def main() -> None:
    """Runs the experiment that the flags describe."""
    config = settings.config()
    flags_of_run = config.flat()
    if FLAGS.workdir:
        config, flags_of_run = resumed(config, Path(FLAGS.workdir).expanduser())
    check_diagnose_every(config)
    if FLAGS.auto_examples:
        check_auto_examples(config)
    if FLAGS.auto_lr and config.warmup_rounds:
        raise entry.UserError(
            f"--auto_lr tries rates from the initial model on, which --warmup_rounds="
            f"{config.warmup_rounds} trains at a rate of its own: find the rate without a warm-up"
        )
    if FLAGS.distributed:
        for asked, found in (("auto_lr", "learning_rate"), ("auto_examples", EXAMPLES)):
            if FLAGS[asked].value:
                raise entry.UserError(
                    f"--{asked} probes in one process: find it without --distributed, then give it "
                    f"as --{found}"
                )
        distributed.run(
            {**flags_of_run, "devices": FLAGS.devices, "mesh": FLAGS.mesh},
            lead=lambda team: _main(config, team),
            simulator=lambda: built(config).simulator,
        )
    else:
        _main(config)


def _main(config: Config, team: Team | None = None) -> None:
    asked = {name: True for name in ("auto_lr", "auto_examples") if FLAGS[name].value}
    workdir = Path(FLAGS.workdir or described.workdir_of(config, asked)).expanduser()
    # A new run is built before its directory is made, so that a mistake leaves nothing.
    experiment = built(config, team) if team or not workdir.exists() else None
    if FLAGS.auto_examples:
        config, experiment = _with_chosen_examples(config, experiment, workdir)
    if FLAGS.auto_lr:
        config, experiment = _at_probed_rate(config, experiment, workdir)
    config, flags_of_run = resumed(config, workdir)
    with open_run(workdir, flags_of_run, described.MAY_CHANGE) as run:
        with entry.user_errors():
            ended = described.ended(run, config, experiment, devices.chosen())
        if ended:
            print(f"The run in {run.path} is complete; give more --rounds to go on.\n")
        outcome = ended or train(
            run,
            config,
            experiment,
            observers.ProgressBar(shown=FLAGS.progress),
            rate_advice=_rate_advice(config),
            figures=FLAGS.figures,
        )
        report.print_table(outcome.summary)
        if not ended:
            found = "Figures, log" if FLAGS.figures else "Log"
            print(f"\n{found} and summary are in {run.path}")
    if outcome.failure:
        raise entry.UserError(outcome.failure)


def built(config: Config, team: Team | None = None) -> Experiment:
    """Returns what a config describes, on --devices or --mesh.

    Raises:
      UserError: if it can't be built.
    """
    with entry.user_errors():
        return build(config, devices.chosen(), team)


def train(
    run: Run,
    config: Config,
    experiment: Experiment | None,
    bar: observers.ProgressBar,
    *,
    rate_advice: str = "",
    figures: bool = True,
) -> loop.Outcome:
    """Runs the rounds that are missing, watched as the flags say.

    Args:
      run: the open run directory.
      config: its settings.
      experiment: built from them; None builds it.
      bar: shows the rounds.
      rate_advice: what to type if the loss rises or the run diverges, the end of a sentence.
      figures: whether to draw them; they take about a second.

    Raises:
      RunError, UserError: if the run can't be read or the experiment not be built, or if its data
        or base model have changed.
    """
    experiment = experiment or built(config)
    watching: list[observers.Observer] = []
    if figures:
        watching.append(described.figures(config, experiment))
    if FLAGS.diagnose_every:
        watching.append(observers.Diagnoses(FLAGS.diagnose_every, config.batch_size))
    if FLAGS.tensorboard:
        watching.append(observers.TensorBoard())
    watching += [observers.DivergenceWarning(), bar]
    return described.go_on(run, config, experiment, watching, rate_advice=rate_advice)


def check_diagnose_every(config: Config) -> None:
    """Checks --diagnose_every.

    Raises:
      UserError: if it doesn't fit the run.
    """
    every = FLAGS.diagnose_every
    if every % config.eval_every:
        raise entry.UserError(
            f"--diagnose_every={every} must be a multiple of --eval_every={config.eval_every}"
        )
    if every and config.objective in objectives.WITHOUT_GRADIENT:
        raise entry.UserError(
            f"--diagnose_every needs a gradient, which --objective={config.objective} lacks"
        )


def _at_probed_rate(
    config: Config, experiment: Experiment | None, workdir: Path
) -> tuple[Config, Experiment | None]:
    """Returns config and experiment at the rate that --auto_lr finds, or found for this run."""
    if (workdir / "flags.json").exists():
        return config.replace(learning_rate=read_flags(workdir)["learning_rate"]), experiment
    experiment = experiment or built(config)
    entry.note(
        f"--auto_lr tries learning rates for {tuning.probe_rounds(config)} rounds each, from "
        f"{config.learning_rate:.3g} on"
    )
    probed = tuning.probe(config, experiment, devices.chosen())
    entry.note(probed.sentence)
    config = config.replace(learning_rate=probed.learning_rate)
    return config, at_learning_rate(experiment, config, devices.chosen())


def check_auto_examples(config: Config) -> None:
    """Checks that --auto_examples has something to choose.

    Raises:
      UserError: if it has not.
    """
    if EXAMPLES in config.given:
        raise entry.UserError(
            f"--auto_examples chooses --{EXAMPLES}, which is given: leave one of them out"
        )
    with entry.user_errors():
        few_examples.with_examples(config, 1)


def _with_chosen_examples(
    config: Config, experiment: Experiment | None, workdir: Path
) -> tuple[Config, Experiment | None]:
    """Returns config and experiment with what --auto_examples chooses, or chose for this run."""
    if (workdir / "flags.json").exists():
        chosen = read_flags(workdir)[EXAMPLES] or config.batch_size
        return few_examples.with_examples(config, int(str(chosen))), experiment
    experiment = experiment or built(config)
    choice = few_examples.choose(config, experiment.task)
    entry.note(choice.sentence)
    config = few_examples.with_examples(config, choice.examples)
    return config, at_learning_rate(experiment, config, devices.chosen())


def _rate_advice(config: Config) -> str:
    """Returns what to type where a run diverges: the end of a sentence."""
    found = f"type --learning_rate={(config.learning_rate or 0) / 10:.3g} (a tenth)"
    if FLAGS.auto_lr:
        found += " in place of --auto_lr"
    elif not FLAGS.distributed:
        found += ", or --auto_lr"
    return f"{found}, with another --workdir" if FLAGS.workdir else found


if __name__ == "__main__":
    entry.run(main, interrupted="stopped; the same command goes on from here")
