"""Compares methods on one task: the same data, seeds and tuning budget.

    python -m experiments.compare --flagfile=experiments/flagfiles/compare_digits.flags

Flags are those of `experiments.train`, shared by all methods. Each `--method` names one, with
flags of its own after its name:

    --method=hiso
    --method=decomfl-20 --algorithm=decomfl --num_perturbations=20

The name is the algorithm unless `--algorithm` follows. With the first seed a method tries its
`--learning_rate` times each factor of `--grid`, for `--trial_share` of its rounds; the one of the
best accuracy it takes to all rounds and the other seeds. The workdir holds the table (`table.md`,
`table.csv`), the figures, and a run directory for each run, as `experiments.train` writes them.
The same command again goes on where it was stopped.
"""

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tqdm
from absl import flags

from zofl_jax.configuration.config import Config
from zofl_jax.configuration.experiment import inputs, resumed
from zofl_jax.runs.directory import open_run
from zofl_jax.runs.run_files import save_figure, write_atomically
from zofl_jax.training import described, observers, summaries

from . import comparison, devices, entry, train
from . import flags as settings

flags.DEFINE_multi_string(
    "method", [], "A method and flags of its own, as in 'hiso --learning_rate=0.1'; repeat it."
)
flags.DEFINE_list(
    "grid",
    ["0.3", "1", "3"],
    "Learning rates that each method tries, as multiples of its --learning_rate.",
)
flags.DEFINE_float(
    "trial_share",
    1.0,
    "Share of its rounds that a method tries each learning rate for, in (0, 1].",
    upper_bound=1.0,
)
flags.DEFINE_integer("seeds", 3, "Repetitions, with seeds from --seed on.", lower_bound=1)
flags.DEFINE_list("targets", ["0.8", "0.9"], "Test accuracies that costs are counted to.")

FLAGS = flags.FLAGS

OWN = ("method", "grid", "trial_share", "seeds", "targets")


class Method(NamedTuple):
    """A method of the comparison.

    Attributes:
      name: of its row.
      config: its settings, with the first seed and its own learning rate.
    """

    name: str
    config: Config

    @property
    def folder(self) -> str:
        """The name as a folder's."""
        return described.plain(self.name)

    def trial_rounds(self, share: float) -> int:
        """Returns the rounds of a trial: a share of all, up to an evaluation."""
        rounds, every = self.config.rounds, self.config.eval_every
        return min(rounds, math.ceil(share * rounds / every) * every)


def main() -> None:
    """Runs the comparison that the flags describe."""
    methods = parse_methods(FLAGS.method)
    factors = _numbers("grid", FLAGS.grid)
    targets = sorted(_numbers("targets", FLAGS.targets))
    if targets[-1] > 1:
        raise entry.UserError(f"--targets are accuracies of at most 1, got {targets[-1]:g}")
    for method in methods:
        train.check_diagnose_every(method.config)
    if not FLAGS.trial_share > 0:
        raise entry.UserError(f"--trial_share must be in (0, 1], got {FLAGS.trial_share:g}")
    if FLAGS.auto_lr:
        raise entry.UserError("--auto_lr is for single runs: here --grid tries the learning rates")
    seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)
    workdir = Path(FLAGS.workdir or default_workdir(methods)).expanduser()
    if (workdir / "flags.json").exists():
        raise entry.UserError(f"{workdir} holds a single run: choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)

    first = methods[0].config
    title = f"{first.task}, {summaries.model_name(str(first.model))}"
    share = FLAGS.trial_share
    tried_for = "" if share == 1 else f", each tried for {100 * share:g} % of the rounds"
    repeated = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    spread = "; mean ± standard deviation over seeds" if len(seeds) > 1 else ""
    best_of = (
        f"; of {len(factors)} learning rates the one of the best accuracy with seed {seeds[0]}"
        if len(factors) > 1
        else ""
    )
    grids = {
        method.name: [float(f"{(method.config.learning_rate or 0) * f:.6g}") for f in factors]
        for method in methods
    }
    results: list[comparison.Result] = []
    chosen: dict[str, float] = {}

    def write() -> list[dict]:
        table = comparison.rows(results, chosen, targets)
        heading = (
            f"Methods on {title} ({results[0].summary['num_params']:,} params): "
            f"{first.num_clients} clients, {repeated}{best_of}{tried_for}. "
            f"Costs are of all clients together{spread}. {comparison.FIRST_MODEL}"
        )
        _write(workdir / "table.csv", comparison.as_csv(table))
        _write(workdir / "table.md", comparison.as_markdown(table, grids, heading))
        return table

    trials = {method.name: method.trial_rounds(share) for method in methods}
    more = len(seeds) - (share == 1)  # runs of all rounds beside the trials
    with tqdm.tqdm(
        total=sum(len(factors) * trials[m.name] + more * m.config.rounds for m in methods),
        unit=" rounds",
        smoothing=0,  # methods differ in speed: the time left comes from the mean
        dynamic_ncols=True,
        disable=not FLAGS.progress,
    ) as bar:
        for method in methods:
            tried = [
                _run(workdir, method, seeds[0], rate, bar, trials[method.name])
                for rate in grids[method.name]
            ]
            best = comparison.best_rate(tried)
            # The chosen trial goes on to all rounds.
            results += [each for each in tried if share == 1 or each.learning_rate != best]
            for seed in seeds[len(seeds) - more :]:
                results.append(_run(workdir, method, seed, best, bar, method.config.rounds))
            chosen[method.name] = best
            write()
    for name, figure in comparison.figures(results, chosen, targets, title).items():
        save_figure(workdir / name, figure)
    print((workdir / "table.md").read_text())
    print(f"Table, figures and runs are in {workdir}")


def parse_methods(lines: Sequence[str]) -> list[Method]:
    """Returns the methods of `--method`, with the flags of this process where they set none.

    Raises:
      UserError: for no method, names that repeat, or flags that are wrong.
    """
    if not lines:
        raise entry.UserError("no method to compare: give --method=NAME for each")
    methods = []
    for line in lines:
        try:
            name, *own = shlex.split(line)
        except ValueError as error:
            raise entry.UserError(f"--method={line!r} can't be read: {error}") from None
        if not any(re.match(r"--?algorithm\b", token) for token in own):
            own = [f"--algorithm={name}", *own]
        try:
            methods.append(Method(name, settings.config_of_method(own)))
        except settings.LineError as error:
            raise entry.UserError(f"--method={line!r}: {error}") from None
    names = [method.folder for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise entry.UserError(
                f"two methods are named {name!r}: name one '{name}-2 --algorithm={name} ...'"
            )
    first = methods[0].config
    for method in methods:
        if (method.config.task, method.config.model) != (first.task, first.model):
            raise entry.UserError(f"--method={method.name}: all methods share --task and --model")
    if first.kind == "quadratic":
        raise entry.UserError(
            f"--task={first.task} has no accuracy to compare: use experiments.theory"
        )
    return methods


def default_workdir(methods: Sequence[Method]) -> Path:
    """Returns a folder whose name tells the task and whose digest tells all methods' flags."""
    told = described.digest([described.fixed(m.config) | {"method": m.name} for m in methods])
    return Path("runs") / f"compare-{described.plain(methods[0].config.task)}-{told}"


def _run(
    workdir: Path, method: Method, seed: int, rate: float, bar: tqdm.tqdm, rounds: int
) -> comparison.Result:
    """Returns the result of one run; a finished one is read, a stopped one goes on."""
    config = method.config.replace(seed=seed, learning_rate=rate, rounds=rounds)
    bar.set_description(f"{method.name} lr={rate:g} seed={seed}")

    path = workdir / method.folder / f"lr{rate:g}-seed{seed}"
    config, flags_of_run = resumed(config, path)
    with open_run(path, flags_of_run, described.MAY_CHANGE) as run:
        summary = run.read_summary()
        if summary:  # results of other data would stand in the same table
            with entry.user_errors():
                found = inputs(config, devices.chosen())
            run.check_inputs(found)
        got_to = max(run.log.last_round + 1, (summary or {}).get("diverged_round", 0))
        if summary and summary["rounds"] >= rounds and got_to > rounds:  # a trial that went on
            observers.skip(bar, rounds)
            return comparison.Result(method.name, seed, rate, comparison.cut(summary, rounds))
        with entry.user_errors():
            ended = described.ended(run, config, devices=devices.chosen())
        summary = ended.summary if ended else summary
        if summary and "diverged_round" in summary:
            observers.skip(bar, rounds)
            return comparison.Result(method.name, seed, rate, summary)
        if summary and ended:
            observers.skip(bar, rounds)
        else:
            summary = train.train(
                run, config, None, observers.ProgressBar(bar), figures=False
            ).summary
            observers.skip(bar, rounds - summary["rounds"])
    if summary.get("failure"):
        entry.note(f"{method.name}, learning rate {rate:g}, seed {seed}: {summary['failure']}")
    return comparison.Result(method.name, seed, rate, summary)


def _numbers(name: str, texts: Sequence[str]) -> list[float]:
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise entry.UserError(
            f"--{name} must be positive numbers with commas between, got {','.join(texts)!r}"
        )
    return numbers


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


if __name__ == "__main__":
    entry.run(main, interrupted="stopped; the same command goes on from here")
