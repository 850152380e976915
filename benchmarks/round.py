"""Times a round against the forward passes it can't do without.

    python -m benchmarks.round --config=cnn --variant=gaussian --out=FILE.json

The round is that of `simulation.make_simulator`, random weights and data; its bound is the
unperturbed forward pass of the same number of examples, in the batches and on as many devices
as are fastest, by their medians. All take turns in one process, so that a busy moment hits all.
`--variant=projection` times the round with finite differences too, by turns with it.

`--config=population` times rounds of 10 clients out of 100 to a million (softmax regression, the
hardest case: the less a round does, the more a population would show).
"""

import argparse
import functools
import math
import time
from typing import Any

import jax
import numpy as np

from benchmarks import measuring, workloads
from benchmarks.workloads import Work
from zofl_jax import keys
from zofl_jax.engine import compilation, placement, simulation

POPULATION = "population"
POPULATIONS = (100, 1000, 10_000, 100_000, 1_000_000)
DISPATCH_SECONDS = 0.5  # short rounds are timed several at a time
ROOM = 4.0  # memory of the largest model's round in units of its params, activations included


class Rounds:
    """Rounds of one simulator, taken a few at a time."""

    def __init__(self, simulator: simulation.Simulator, count: int = 1):
        self.simulator, self.count = simulator, count
        self.progress = simulator.start(None)
        self.state, self.memory = self.progress.state, self.progress.memory

    def __call__(self) -> None:
        """Advances `count` rounds and counts their bytes."""
        self.state, self.memory, trace = self.simulator.advance(self.state, self.memory, self.count)
        if trace.failed_loss is not None:
            raise ArithmeticError(f"the loss became {trace.failed_loss}")
        for cohort in trace.cohorts:
            self.progress.ledger.record(cohort, self.simulator.sizes[0])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and saves."""
    made = measuring.parser(__doc__)
    made.add_argument("--config", required=True, choices=[*workloads.CONFIGS, POPULATION])
    made.add_argument("--variant", default="gaussian", choices=workloads.VARIANTS)
    made.add_argument(
        "--devices", type=int, help="local devices; all cores of a CPU for cnn, else 1"
    )
    made.add_argument("--prng_impl", default="threefry2x32", choices=keys.IMPLEMENTATIONS)
    options = made.parse_args(argv)
    measuring.check_repeats(made, options)
    devices = _devices(made, options)
    measuring.without_cache()
    if options.config == POPULATION:
        result = populations(options)
    else:
        work = workloads.work_of(options.config, options.variant, options.smoke)
        _check_memory(made, work)
        result = {
            "config": options.config,
            "variant": options.variant,
            "prng_impl": options.prng_impl,
            **measure(work, options.variant, devices, options.prng_impl, options.repeats),
        }
    measuring.report(result | measuring.machine(devices), options.out)
    return result


def measure(work: Work, variant: str, devices: int, prng_impl: str, repeats: int) -> dict[str, Any]:
    """Returns the times of a round and of its bound, and the round's memory."""
    rounds = [Rounds(workloads.simulator(work, variant, devices, prng_impl))]
    if variant == "projection":
        rounds.append(Rounds(workloads.simulator(work, "gaussian", devices, prng_impl)))
    for each in rounds:
        began = time.perf_counter()
        each()
        took = time.perf_counter() - began - each.simulator.compile_seconds()
        each.count = _rounds_at_once(took) if repeats > 1 else 1
    compile_seconds = rounds[0].simulator.compile_seconds()
    bounds, batchings = bounds_of(work, devices)
    least = 5.0 if repeats > 1 else 0.0
    times = measuring.by_turns([*bounds, *rounds], repeats, least)
    candidates = [t.scaled(b.pop("factor")) for t, b in zip(times, batchings, strict=False)]
    best = min(range(len(candidates)), key=lambda i: candidates[i].median)
    times = [candidates[best], *times[len(candidates) :]]
    seconds = [t.median / each.count for t, each in zip(times[1:], rounds, strict=True)]
    result = {
        "seconds_per_round": seconds[0],
        "bound_seconds": times[0].median,
        "ratio_to_bound": measuring.ratio(times[1], times[0]) / rounds[0].count,
        "ratio_to_bound_best": min(times[1].seconds) / min(times[0].seconds) / rounds[0].count,
        "ratio_to_bound_cpu_seconds": times[1].median_cpu / times[0].median_cpu / rounds[0].count,
        "cpu_seconds_per_round": times[1].median_cpu / rounds[0].count,
        "bound_cpu_seconds": times[0].median_cpu,
        "bound_batching": batchings[best],
        "examples_per_round": work.examples,
        "rounds_per_dispatch": rounds[0].count,
        "turns": len(times[0].seconds),
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": peak_memory(rounds[0].simulator),
        "params_bytes": rounds[0].simulator.sizes[0].params,
        "perturbations_at_once": work.perturbations_at_once,
        "precision": getattr(jax.config, "jax_default_matmul_precision", None) or "default",
    }
    if variant == "projection":
        result["differences_seconds_per_round"] = seconds[1]
        result["speedup_over_differences"] = measuring.ratio(times[2], times[1]) * (
            rounds[0].count / rounds[1].count
        )
    return result


def bounds_of(work: Work, devices: int) -> tuple[list[Any], list[dict[str, Any]]]:
    """Returns ways to do the forward passes, and what each is.

    Where only a share of them is timed, they take "factor" times as long.
    """
    jobs, labels = [], []
    initial = work.task.init(jax.random.key(0))
    for used in sorted({1, devices}):
        params = placement.Placement(workloads.mesh_of(used)).replicated(initial)
        for batch in work.bound_batches:
            job, factor = workloads.bound(work, params, batch, used)
            jobs.append(functools.partial(job, params))
            share = {"share_timed": 1 / factor} if factor > 1 else {}
            labels.append({"batch": batch, "devices": used, "factor": factor, **share})
    return jobs, labels


def peak_memory(simulator: simulation.Simulator) -> int:
    """Returns the accelerator's own peak; on a CPU what the compiler says a round needs."""
    found = jax.local_devices()[0].memory_stats() or {}
    return found.get("peak_bytes_in_use") or simulator.memory_bytes()


def populations(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the time and the memory of a round by the size of the population."""
    sizes = (20, 40) if options.smoke else POPULATIONS
    batch, clients = (4, 10) if options.smoke else (32, 10)
    rounds: list[Rounds] = []
    rows: list[dict[str, Any]] = []
    for size in sizes:
        before = measuring.status_bytes("VmRSS")
        task = workloads.softmax_task(size, batch)
        work = Work(task, size, clients, batch, 1, 10, "central", None, (batch * clients,))
        each = Rounds(workloads.simulator(work, options.variant, 1, options.prng_impl))
        each()
        index = task.train.order.nbytes + task.train.offsets.nbytes
        rounds.append(each)
        rows.append(
            {
                "clients": size,
                "index_bytes": index,
                "peak_memory_bytes": each.simulator.memory_bytes(),
                "process_bytes": measuring.status_bytes("VmRSS") - before,
            }
        )
    count = _rounds_at_once(measuring.by_turns(rounds[:1], 1)[0].median)
    for each in rounds:
        each.count = count
    times = measuring.by_turns(rounds, options.repeats, least_seconds=0 if options.smoke else 10)
    for row, took in zip(rows, times, strict=True):
        row["seconds_per_round"] = took.median / count
        row["ratio_to_first"] = measuring.ratio(took, times[0])
    return {
        "config": POPULATION,
        "variant": options.variant,
        "cohort": clients,
        "populations": rows,
        "seconds_per_round": rows[-1]["seconds_per_round"],
        "rounds_per_dispatch": count,
        "compile_seconds": rounds[-1].simulator.compile_seconds(),
        "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
        "ratio_last_to_first": rows[-1]["ratio_to_first"],
    }


def _rounds_at_once(seconds: float) -> int:
    return int(np.clip(math.ceil(DISPATCH_SECONDS / seconds), 1, 100))


def _devices(made: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    convolutional = options.config.startswith("cnn")
    if options.devices is not None and options.devices < 1:
        made.error(f"--devices must be >= 1, got {options.devices}")
    wanted = options.devices or (None if convolutional else 1)
    found = placement.use_cpu_devices(wanted)
    if options.devices and options.devices > found:
        made.error(f"--devices={options.devices}: there are only {found}")
    return options.devices or (found if convolutional else 1)


def _check_memory(made: argparse.ArgumentParser, work: Work) -> None:
    """Ends the program if the params are too many for this machine."""
    shapes = jax.eval_shape(work.task.init, jax.random.key(0))
    params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    room = compilation.memory_available()
    if room and ROOM * params > room:
        made.error(
            f"this round needs about {ROOM * params / 1e9:.0f} GB and the device has "
            f"{room / 1e9:.0f} GB: take a smaller --config or a larger device"
        )


if __name__ == "__main__":
    main()
