"""Measures what a run of the digits demo spends outside its compiled rounds and evaluations.

    python -m benchmarks.dispatch --out=benchmarks/results/dispatch.json

500 rounds as `experiments.train` runs them (dispatches that grow, an evaluation every 50 rounds,
the ledger, the log in SQLite), compiled before. It takes turns with the bare work: the same rounds
in dispatches as long as they may be, and as many evaluations, nothing else.
"""

import functools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import optax

from benchmarks import measuring
from zofl_jax import keys
from zofl_jax.algorithms import decomfl
from zofl_jax.data import partition, sources
from zofl_jax.directions import estimators
from zofl_jax.engine import placement, simulation
from zofl_jax.models import mlp
from zofl_jax.runs import recording
from zofl_jax.runs.directory import open_run
from zofl_jax.tasks import vision

ROUNDS, EVAL_EVERY = 500, 50


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and saves."""
    made = measuring.parser(__doc__)
    options = made.parse_args(argv)
    measuring.check_repeats(made, options)
    placement.use_cpu_devices(1)
    measuring.without_cache()
    simulator = demo()
    rounds, every = (10, 5) if options.smoke else (ROUNDS, EVAL_EVERY)
    whole, bare = measuring.by_turns(
        [
            functools.partial(run, simulator, rounds, every),
            functools.partial(bare_work, simulator, rounds, every),
        ],
        options.repeats,
    )
    shares = [1 - b / a for a, b in zip(whole.seconds, bare.seconds, strict=True)]
    result = {
        "config": "digits",
        "rounds": rounds,
        "run_seconds": whole.median,
        "device_seconds": bare.median,
        "seconds_per_round": bare.median / rounds,
        "overhead": statistics.median(shares),
        "overhead_standard_error": np.std(shares) / len(shares) ** 0.5,
        "compile_seconds": simulator.compile_seconds(),
        "peak_memory_bytes": simulator.memory_bytes(),
        "turns": len(whole.seconds),
        **measuring.machine(1),
    }
    measuring.report(result, options.out)
    return result


def demo() -> simulation.Simulator:
    """Returns the simulator of experiments/flagfiles/digits.flags."""
    dataset = sources.digits()
    order, offsets = partition.iid(keys.root(0).partition, dataset.train["label"], 20)
    task = vision.classification(dataset, mlp.Softmax(10), order, offsets)
    algorithm = decomfl(
        task.loss,
        estimators.central_difference(20, 1e-3),
        optax.sgd(0.02, momentum=0.9),
        local_steps=4,
    )
    return simulation.make_simulator(algorithm, task, clients_per_round=5, batch_size=32)


def run(simulator: simulation.Simulator, rounds: int, eval_every: int) -> None:
    """Runs the demo with its log, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, open_run(Path(folder) / "run", {}) as log:
        simulation.run(
            simulator,
            rounds=rounds,
            eval_every=eval_every,
            on_rounds=functools.partial(recording.write_rounds, log),
            on_record=functools.partial(recording.write_record, log),
            reads_state=lambda done: False,
        )


def bare_work(simulator: simulation.Simulator, rounds: int, eval_every: int) -> None:
    """Does the same rounds and as many evaluations."""
    state, memory, *_ = simulator.start(None)
    for done in range(0, rounds, simulator.capacities[0]):
        n = min(simulator.capacities[0], rounds - done)
        state, memory, _ = simulator.advance(state, memory, n)
    for _ in range(rounds // eval_every):
        simulator.evaluate(state.params)


if __name__ == "__main__":
    main()
