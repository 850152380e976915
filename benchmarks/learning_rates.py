"""Holds the learning rates of --auto_lr, and the defaults, against grids of rates.

    python -m benchmarks.learning_rates --out=benchmarks/results/learning_rates.json
    python -m benchmarks.learning_rates --table=benchmarks/results/learning_rates.json

A cell is a data set, a model, K local steps and P directions. In each, for each seed, --auto_lr
chooses a rate, and the run is done at that rate, at thirds and threefolds of it, until one of
them diverges or does worse, and at the default. A row is a run. The file is written after each
cell and seed, and those it holds are skipped: stop and resume as you like. `--cells=TEXT` takes
those whose name contains the text, `--seeds=N` the first seeds.

Momentum is 0.9 on images and 0 on texts, the flags' defaults. Runs are short, so that rates too low
show: 150 rounds of 5 clients with 32 examples on digits, 80 of 5 with 16 on Fashion-MNIST, 30 of 2
with 8 on the reviews, with low-rank directions.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from experiments import entry, flags, tuning
from zofl_jax.configuration.config import Config
from zofl_jax.configuration.experiment import Experiment, at_learning_rate, build
from zofl_jax.configuration.phases import build_phases
from zofl_jax.configuration.resolve import resolve
from zofl_jax.data import cache
from zofl_jax.engine import compilation, placement, rounds, simulation

SEEDS = (0, 1, 2)
STEP = 3.0  # from rate to rate
LOST = 10.0  # times the first loss: a run has diverged
FASHION = ("--task=idx", "--data_dir=/usr/share/datasets/fashion-mnist", "--num_clients=100")
TASKS = {
    "digits": ("--task=digits", "--rounds=150"),
    "fashion": (*FASHION, "--batch_size=16", "--rounds=80"),
    "reviews": (
        *("--task=reviews", "--perturbation=low_rank", "--estimator=central", "--rounds=30"),
        *("--matmul_dtype=bfloat16", "--batch_size=8", "--max_length=32", "--test_examples=256"),
    ),
}
MODELS = {
    "digits": ("softmax", "mlp", "mnist_cnn"),  # lenet needs 16 x 16 pixels
    "fashion": ("softmax", "mlp", "lenet", "mnist_cnn"),
    "reviews": (None,),
}
STEPS_AND_DIRECTIONS = [(k, p) for k in (1, 4) for p in (1, 5, 20)]


class Cell(NamedTuple):
    """A cell of the table."""

    data: str
    model: str | None
    local_steps: int
    num_perturbations: int

    @property
    def name(self) -> str:
        """For the command line."""
        return (
            f"{self.data},{self.model or 'smollm2'},K={self.local_steps},P={self.num_perturbations}"
        )

    def flags(self, seed: int) -> list[str]:
        """Returns the flags of `experiments.train`."""
        return [
            *TASKS[self.data],
            *([f"--model={self.model}"] if self.model else []),
            f"--local_steps={self.local_steps}",
            f"--num_perturbations={self.num_perturbations}",
            f"--seed={seed}",
        ]


CELLS = [
    Cell(data, model, k, p)
    for data, models in MODELS.items()
    for model in models
    for k, p in STEPS_AND_DIRECTIONS
]


def main(argv: list[str] | None = None) -> None:
    """Measures what the file lacks, or prints it as a table."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--out", type=Path, help="a JSON file to write, and to go on with")
    made.add_argument("--table", type=Path, help="such a file, to print")
    made.add_argument("--cells", default="", help="take those whose name contains this")
    made.add_argument("--seeds", type=int, default=len(SEEDS), help="take so many seeds")
    made.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs")
    options = made.parse_args(argv)
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    use_cache()
    result: dict[str, Any] = {"rows": []}
    if options.out and options.out.exists():
        result = json.loads(options.out.read_text())
    for cell in [cell for cell in CELLS if options.cells in cell.name]:
        for seed in SEEDS[: options.seeds]:
            if any((row["cell"], row["seed"]) == (cell.name, seed) for row in result["rows"]):
                continue
            more = ["--rounds=6", "--num_clients=5"] if options.smoke else []
            result["rows"] += measure(cell, seed, more)
            result |= measuring.machine(1)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(table(_of(result["rows"], cell.name, seed)).splitlines()[-1], flush=True)
    if not options.out:
        print(json.dumps(result, indent=1))


def use_cache() -> None:
    """Turns on the cache of compiled programs: all rates and seeds of a cell have the same."""
    jax.config.update("jax_compilation_cache_dir", str(cache.compiled()))


def measure(cell: Cell, seed: int, more: list[str]) -> list[dict[str, Any]]:
    """Returns the rows of a cell and a seed."""
    config = resolve(flags.parse([*cell.flags(seed), *more]))
    experiment = build(config, 1)
    at = one_program(cell, config, experiment)
    began = time.process_time()
    try:
        found = tuning.probe_with(config, experiment.task, at)
    except entry.UserError as error:
        return [{"cell": cell.name, "seed": seed, "failure": str(error)}]
    probing = time.process_time() - began
    common = {"cell": cell.name, "seed": seed, "rounds": config.rounds}
    chosen = {
        "auto": True,
        "probe_rounds": found.rounds,
        "probe_cpu_seconds": round(probing, 2),
        "trials": {f"{t.learning_rate:g}": t.good for t in found.trials},
    }
    rows = {found.learning_rate: run(config, at, found.learning_rate) | chosen}
    for factor in (STEP, 1 / STEP):  # away from the chosen rate, as long as that helps
        rate = found.learning_rate
        while True:
            before, rate = rate, float(f"{rate * factor:.3g}")
            rows[rate] = run(config, at, rate)
            if not rows[rate]["accuracy"] > rows[before]["accuracy"]:
                break
    default = float(config.learning_rate or 0)
    if default not in rows:
        rows[default] = run(config, at, default)
    rows[default]["default"] = True
    return [common | {"rate": rate} | rows[rate] for rate in sorted(rows)]


programs: dict[Cell, Callable[..., Any]] = {}  # of the cell at hand alone


def one_program(
    cell: Cell, config: Config, experiment: Experiment
) -> Callable[[float], simulation.Simulator]:
    """Returns learning rate -> simulator; they share a program that takes rate and seed.

    `at_learning_rate` traces anew for each rate, which takes longer than most of these runs.
    Where the optimiser is tried out on numbers while a round is traced, it is taken instead:
    low-rank directions at K > 1.
    """
    simulator, task = experiment.simulator, experiment.task
    if config.perturbation == "low_rank" and config.local_steps > 1:
        return lambda rate: (
            at_learning_rate(experiment, config.replace(learning_rate=rate), 1).simulator
        )

    def advance(rate: Any, *args: Any) -> Any:
        (phase,) = build_phases(config.replace(learning_rate=rate), task)
        sizes = config.clients_per_round, config.batch_size
        made = rounds.make_advance(
            *(phase.algorithm, task, *sizes, config.weighting, placement.ONE_DEVICE),
            *(simulator.capacities[0], simulator.conditions),
        )
        return made(*args)

    def at(rate: float) -> simulation.Simulator:
        def launch(state: Any, memory: Any, n: int) -> simulation.Flight:
            first_round = int(state.round)
            args = (jnp.float32(rate), state, memory, task.train, simulator.root, np.int32(n))
            if cell not in programs:
                programs.clear()
                programs[cell] = compilation.compiled(advance, args)
            return simulation.Flight(first_round, programs[cell](*args))

        return simulator.wrapped(launch=launch)

    return at


def run(config: Config, at: Callable[[float], simulation.Simulator], rate: float) -> dict[str, Any]:
    """Returns the accuracy after all rounds of a rate, 0 and the round where the run diverged."""
    simulator = at(rate)
    progress, began = simulator.start(None), time.process_time()
    state, memory, first = progress.state, progress.memory, math.nan
    done, diverged = 0, None
    while done < config.rounds and diverged is None:
        n = min(max(1, config.rounds // 10), config.rounds - done, min(simulator.capacities))
        state, memory, trace = simulator.advance(state, memory, n)
        done += len(trace.losses)
        first = first if done > n else float(trace.losses[0])
        if trace.failed_loss is not None or not trace.losses[-5:].mean() < LOST * first:
            diverged = done
    metrics = simulator.evaluate(state.params) if diverged is None else {}
    found = {
        "accuracy": round(metrics.get("accuracy", 0.0), 4),
        "loss": round(metrics["loss"], 4) if metrics else None,
        "cpu_seconds": round(time.process_time() - began, 2),
    }
    return found | ({"diverged_round": diverged} if diverged is not None else {})


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as Markdown, a line a cell: per seed and as means over seeds."""
    lines = [
        "| data, model, K, P | seeds | rate of --auto_lr | accuracy | best of the grid | behind, "
        "each seed | diverged | probe, of the run's rounds | default | accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["cell"] for row in rows):
        lines.append(_line(name, [row for row in rows if row["cell"] == name]))
    return "\n".join(lines)


def _line(name: str, rows: list[dict[str, Any]]) -> str:
    failed = [row for row in rows if "failure" in row]
    if failed:
        return f"| {name} | {len(failed)} | {failed[0]['failure']} | | | | | | | |"
    seeds = sorted({row["seed"] for row in rows})
    auto = [next(r for r in rows if r["seed"] == seed and r.get("auto")) for seed in seeds]
    default = [next(r for r in rows if r["seed"] == seed and r.get("default")) for seed in seeds]
    best = [max(r["accuracy"] for r in rows if r["seed"] == seed) for seed in seeds]
    behind = [b - row["accuracy"] for b, row in zip(best, auto, strict=True)]
    return (
        f"| {name} | {len(seeds)} | {_few(auto)} | {_mean([r['accuracy'] for r in auto])} "
        f"| {_mean(best)} | {', '.join(f'{b:.3f}' for b in behind)} "
        f"| {sum('diverged_round' in row for row in auto)} "
        f"| {_mean([row['probe_rounds'] / row['rounds'] for row in auto])} | {_few(default)} "
        f"| {_mean([r['accuracy'] for r in default])} |"
    )


def _mean(found: list[float]) -> str:
    return f"{sum(found) / len(found):.3f}"


def _few(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{rate:.2g}" for rate in dict.fromkeys(row["rate"] for row in rows))


def _of(rows: list[dict[str, Any]], name: str, seed: int) -> list[dict[str, Any]]:
    return [row for row in rows if (row["cell"], row["seed"]) == (name, seed)]


if __name__ == "__main__":
    main()
