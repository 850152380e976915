"""Runs that a config describes: what the commands do, for a notebook too.

    outcome = simulate("digits", "decomfl", rounds=100)

trains as `zofl train --task=digits --algorithm=decomfl --rounds=100` does, in the same run
directory: one goes on where the other was stopped, to the same bits.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from zofl_jax.configuration import experiment as experiments
from zofl_jax.configuration.config import Config
from zofl_jax.configuration.experiment import Experiment
from zofl_jax.configuration.resolve import resolve
from zofl_jax.runs.directory import Run, open_run
from zofl_jax.training import loop, observers, summaries
from zofl_jax.training.observers import Advice, Observer, to_stderr

MAY_CHANGE = ("rounds", "eval_every")
"""Settings that may differ when a run is resumed: they change no round already done."""


def simulate(
    task: str,
    algorithm: str,
    *,
    workdir: str | os.PathLike[str] | None = None,
    observers: Sequence[Observer] | None = None,
    devices: experiments.Devices = None,
    tell: Callable[[str], None] = to_stderr,
    **settings: Any,
) -> loop.Outcome:
    """Trains with a method on a task, and returns how the run ended.

    Args:
      task: as --task: "digits", "idx", "reviews", "quadratic" ...
      algorithm: as --algorithm, a key of `algorithms.METHODS`.
      workdir: the run directory; a name made from the settings under runs/ unless given.
      observers: who watches; a progress bar, a warning of divergence and figures unless given.
      devices: see `configuration.experiment.build`.
      tell: writes a line for the user; to stderr unless given.
      **settings: any of `configuration.config.Config` or of the method, by the names of the flags.

    Raises:
      ValueError: for settings that are wrong or don't go together, see `resolve`.
      RunError: if the directory holds another run, or can't be used.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     options = {"workdir": folder, "observers": (), "quadratic_dim": 10}
    ...     outcome = simulate("quadratic", "decomfl", rounds=3, eval_every=3, **options)
    >>> outcome.summary["rounds"], outcome.failure
    (3, None)
    """
    config = resolve({"task": task, "algorithm": algorithm, **settings})
    path = Path(workdir or workdir_of(config)).expanduser()
    config, flags = experiments.resumed(config, path)
    # A new run is built before its directory is made, so that a mistake leaves nothing.
    experiment = None if path.exists() else experiments.build(config, devices)
    with open_run(path, flags, MAY_CHANGE) as run:
        outcome = ended(run, config, experiment, devices, tell)
        if outcome is None:
            experiment = experiment or experiments.build(config, devices)
            outcome = go_on(run, config, experiment, observers, tell=tell)
    if outcome.failure:
        tell(f"note: {outcome.failure}")
    return outcome


def ended(
    run: Run,
    config: Config,
    experiment: Experiment | None = None,
    devices: experiments.Devices = None,
    tell: Callable[[str], None] = to_stderr,
) -> loop.Outcome | None:
    """Returns how a run ended, None if there are rounds to do; see `loop.ended`.

    Args:
      run: the open run directory.
      config: its settings.
      experiment: built from them, if it is built already.
      devices: see `configuration.experiment.build`.
      tell: writes a line for the user.

    Raises:
      RunError: as `loop.ended`.
      ValueError: if its data and base model can't be read.
    """
    inputs = experiment.inputs if experiment else lambda: experiments.inputs(config, devices)
    return loop.ended(run, config.rounds, inputs, tell)


def go_on(
    run: Run,
    config: Config,
    experiment: Experiment,
    observers: Sequence[Observer] | None = None,
    *,
    rate_advice: str | None = None,
    tell: Callable[[str], None] = to_stderr,
) -> loop.Outcome:
    """Runs the rounds that are missing; see `loop.go_on`.

    Args:
      run: the open run directory.
      config: its settings.
      experiment: built from them.
      observers: who watches; `watching(config, experiment)` unless given.
      rate_advice: what to type if the loss rises or the run diverges, see `advice`.
      tell: writes a line for the user.

    Raises:
      RunError: if the run can't be read, or if its data or base model have changed.
    """
    return loop.go_on(
        run,
        experiment.simulator,
        rounds=config.rounds,
        eval_every=config.eval_every,
        observers=watching(config, experiment) if observers is None else observers,
        inputs=experiment.inputs,
        about=about(config, experiment),
        advice=advice(config, rate_advice),
        notices=experiment.notices,
        tell=tell,
    )


def watching(config: Config, experiment: Experiment) -> tuple[Observer, ...]:
    """Returns the observers of a run that is watched by a person."""
    return (figures(config, experiment), observers.DivergenceWarning(), observers.ProgressBar())


def figures(config: Config, experiment: Experiment) -> observers.Figures:
    """Returns what draws the figures of a run."""
    title = f"{experiment.task.name}, {config.partition} partition"
    return observers.Figures(experiment.label_counts, title)


def about(config: Config, experiment: Experiment) -> summaries.About:
    """Returns what the summary says of a run beside its rounds."""
    return summaries.About(
        config.algorithm, config.task, str(config.model), experiment.minimum, config.dp_delta
    )


def advice(config: Config, rate: str | None = None) -> Advice:
    """Returns what to do where a run fails.

    Args:
      config: its settings.
      rate: what to type where its learning rate is to blame, the end of a sentence, "" for nothing;
        a tenth of it unless given.
    """
    start = Advice().start
    if config.attack != "none":
        start += f", or leave out --attack={config.attack}"
    if config.estimator in ("forward", "central"):
        start += f", or type --smoothing={config.smoothing / 10:.3g} (a tenth)"
    if rate is None:
        rate = f"give learning_rate={(config.learning_rate or 0) / 10:.3g}"
    return Advice(rate, start)


def workdir_of(config: Config, asked: Mapping[str, bool] = MappingProxyType({})) -> Path:
    """Returns a folder whose name tells the run and whose digest tells its settings.

    Args:
      config: the settings.
      asked: what is found out in the run's first moments, such as its learning rate.
    """
    task, model = plain(config.task), plain(summaries.model_name(str(config.model)))
    told = digest({**fixed(config), **asked})
    return Path("runs") / f"{task}-{model}-{config.algorithm}-{told}"


def fixed(config: Config) -> dict[str, Any]:
    """Returns the settings that may not change."""
    return {name: value for name, value in config.flat().items() if name not in MAY_CHANGE}


def digest(plain_json: Mapping[str, Any] | Sequence[Any]) -> str:
    """Returns eight hexadecimal digits that tell settings from others."""
    return hashlib.sha256(json.dumps(plain_json, sort_keys=True).encode()).hexdigest()[:8]


def plain(name: str) -> str:
    """Returns a name as a folder's.

    >>> plain("org/a model")
    'org_a_model'
    """
    return re.sub(r"[^\w.-]+", "_", name)
