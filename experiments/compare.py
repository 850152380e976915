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

With a budget, as in `--budget=passes:2e6` or `--budget=bytes:50e6`, each run has the most rounds
that it pays for, which are known before the first.
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import tqdm
from absl import flags

from zofl_jax import keys
from zofl_jax.configuration import wrapping
from zofl_jax.configuration.config import Config
from zofl_jax.configuration.experiment import inputs, resumed
from zofl_jax.engine import budgets
from zofl_jax.observation.quantities import human_bytes, human_count
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
flags.DEFINE_string(
    "budget",
    None,
    "What a run of any method may spend, all clients together, in place of --rounds: KIND:AMOUNT, "
    f"as in passes:2e6, of {'; '.join(f'{kind} ({what})' for kind, what in budgets.KINDS.items())}"
    ". The first model that clients get is among the bytes. Unless --eval_every is given, a run "
    "is evaluated 40 times.",
)
flags.DEFINE_float(
    "backward_cost",
    2.0,
    "Forward passes that a backward pass counts as, in --budget and where both are told together.",
    lower_bound=0.0,
)

FLAGS = flags.FLAGS

EVALUATIONS = 40
"""Of a run with a budget."""


class Method(NamedTuple):
    """A method of the comparison.

    Attributes:
      name: of its row.
      config: its settings, with the first seed, its rounds and the method's own learning rate.
      rounds: seed -> rounds, of those that a budget gives other rounds than the first.
    """

    name: str
    config: Config
    rounds: Mapping[int, int] = MappingProxyType({})

    @property
    def folder(self) -> str:
        """The name as a folder's."""
        return described.plain(self.name)

    def rounds_of(self, seed: int) -> int:
        """Returns the rounds of a run with a seed."""
        return self.rounds.get(seed, self.config.rounds)

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
    if not FLAGS.trial_share > 0:
        raise entry.UserError(f"--trial_share must be in (0, 1], got {FLAGS.trial_share:g}")
    if FLAGS.auto_lr:
        raise entry.UserError("--auto_lr is for single runs: here --grid tries the learning rates")
    if not FLAGS.backward_cost < math.inf:
        raise entry.UserError(f"--backward_cost must be finite, got {FLAGS.backward_cost:g}")
    budget = parse_budget(FLAGS.budget, methods) if FLAGS.budget is not None else None
    workdir = Path(FLAGS.workdir or default_workdir(methods)).expanduser()
    if (workdir / "flags.json").exists():
        raise entry.UserError(f"{workdir} holds a single run: choose another --workdir")
    seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)
    if budget:
        methods = [within(budget, method, seeds) for method in methods]
    for method in methods:
        train.check_diagnose_every(method.config)
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
    trials: list[comparison.Result] = []
    chosen: dict[str, float] = {}
    sizes = {method.config.batch_size for method in methods}
    by_example = len(sizes) > 1 or (budget is not None and budget.kind == "example_passes")
    counted = comparison.Passes(FLAGS.backward_cost, by_example)

    def write() -> None:
        table = comparison.rows(results, chosen, targets, trials)
        heading = (
            f"Methods on {title} ({results[0].summary['num_params']:,} params): "
            f"{first.num_clients} clients, {repeated}{best_of}{tried_for}. "
            f"Costs are of all clients together{spread}. {counted.sentence} "
            f"{comparison.FIRST_MODEL}"
        )
        text = comparison.as_markdown(table, grids, heading, counted, _told(budget))
        _write(workdir / "table.csv", comparison.as_csv(table))
        _write(workdir / "table.md", text)

    full = seeds[1:] if share == 1 else seeds  # of the runs beside the trials
    with tqdm.tqdm(
        total=sum(
            len(factors) * method.trial_rounds(share) + sum(map(method.rounds_of, full))
            for method in methods
        ),
        unit=" rounds",
        smoothing=0,  # methods differ in speed: the time left comes from the mean
        dynamic_ncols=True,
        disable=not FLAGS.progress,
    ) as bar:
        for method in methods:
            tried = [
                _run(workdir, method, seeds[0], rate, bar, method.trial_rounds(share))
                for rate in grids[method.name]
            ]
            best = comparison.best_rate(tried)
            trials += tried if len(tried) > 1 else []  # of one rate nothing is chosen
            # The chosen trial goes on to all rounds.
            results += [each for each in tried if share == 1 or each.learning_rate != best]
            for seed in full:
                results.append(_run(workdir, method, seed, best, bar, method.rounds_of(seed)))
            chosen[method.name] = best
            write()
    if FLAGS.figures:
        figures = comparison.figures(results, chosen, targets, title, counted)
        for name, figure in figures.items():
            save_figure(workdir / name, figure)
    print((workdir / "table.md").read_text())
    print(f"Table{', figures' if FLAGS.figures else ''} and runs are in {workdir}")


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


def parse_budget(text: str, methods: Sequence[Method]) -> budgets.Budget:
    """Returns the budget of `--budget`.

    Raises:
      UserError: for one that can't be read, or that says the same as other flags or less.
    """
    try:
        budget = budgets.parse(text)
    except ValueError as error:
        raise entry.UserError(f"--budget: {error}") from None
    for method in methods:
        if "rounds" in method.config.given:
            raise entry.UserError(
                f"--method={method.name}: --budget={text} says how many rounds there are; leave "
                "out --rounds"
            )
    sizes = sorted({method.config.batch_size for method in methods})
    if budget.kind == "passes" and len(sizes) > 1:
        raise entry.UserError(
            f"--budget={text}: methods have batches of {', '.join(map(str, sizes))} examples, so "
            "that passes are no common measure; give example_passes:AMOUNT"
        )
    return budget


def within(budget: budgets.Budget, method: Method, seeds: Sequence[int]) -> Method:
    """Returns a method with the rounds that a budget pays for, with each seed.

    Raises:
      UserError: if it doesn't pay for one, or if the method can't be built.
    """
    config = method.config
    if budget.kind == "rounds":
        rounds = dict.fromkeys(seeds, int(budget.amount))
    else:
        experiment = train.built(config)
        rounds = {}
        for seed in seeds:
            root = keys.root(seed, config.prng_impl)
            try:
                rounds[seed] = budgets.rounds_within(
                    experiment.simulator,
                    budget,
                    FLAGS.backward_cost,
                    root=root,
                    conditions=wrapping.build(config, experiment.task, root),
                )
            except ValueError as error:
                raise entry.UserError(f"--method={method.name}: --budget: {error}") from None
    first = rounds[seeds[0]]
    config = config.replace(rounds=first)
    if "eval_every" not in config.given:
        config = config.replace(eval_every=math.ceil(first / EVALUATIONS))
    return method._replace(config=config, rounds=rounds)


def _told(budget: budgets.Budget | None) -> str:
    """Returns a budget for people, "" for none."""
    if budget is None:
        return ""
    number = human_bytes if budget.kind.startswith("bytes") else human_count
    what = budgets.KINDS[budget.kind].removeprefix("bytes ")
    return f"{number(budget.amount)} {what}"


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
            return _result(method, seed, rate, comparison.cut(summary, rounds))
        with entry.user_errors():
            ended = described.ended(run, config, devices=devices.chosen())
        summary = ended.summary if ended else summary
        if summary and "diverged_round" in summary:
            observers.skip(bar, rounds)
            return _result(method, seed, rate, summary)
        if summary and ended:
            observers.skip(bar, rounds)
        else:
            summary = train.train(
                run, config, None, observers.ProgressBar(bar), figures=False
            ).summary
            observers.skip(bar, rounds - summary["rounds"])
    if summary.get("failure"):
        entry.note(f"{method.name}, learning rate {rate:g}, seed {seed}: {summary['failure']}")
    return _result(method, seed, rate, summary)


def _result(method: Method, seed: int, rate: float, summary: Mapping) -> comparison.Result:
    return comparison.Result(method.name, seed, rate, summary, method.config.batch_size)


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
