"""Measures what a run of the digits demo spends outside its compiled rounds and evaluations.

    python -m benchmarks.dispatch --out=benchmarks/results/dispatch.json

500 rounds as `experiments.train` runs them (dispatches that grow, an evaluation every 50 rounds,
the ledger, the log in SQLite), compiled before. A round's time on the device is the slope between
dispatches of 32 and 128 rounds; an evaluation's is that of a call. The run and these take turns.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from benchmarks import measuring
from zofl_jax import estimators, keys, placement, recording, simulation
from zofl_jax.algorithms import decomfl
from zofl_jax.data import partition, sources
from zofl_jax.models import mlp
from zofl_jax.runs import open_run
from zofl_jax.tasks import vision

ROUNDS, EVAL_EVERY = 500, 50
SHORT, LONG = 32, 128  # rounds in a dispatch


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and saves."""
    made = measuring.parser(__doc__)
    options = made.parse_args(argv)
    measuring.check_repeats(made, options)
    placement.use_cpu_devices(1)
    measuring.without_cache()
    simulator = demo()
    rounds = 2 * EVAL_EVERY if options.smoke else ROUNDS
    params = simulator.start(None).state.params

    jobs: list[Callable[[], Any]] = [
        functools.partial(run, simulator, rounds),
        functools.partial(dispatch, simulator, SHORT),
        functools.partial(dispatch, simulator, LONG),
        functools.partial(simulator.evaluate, params),
    ]
    times = measuring.by_turns(jobs, options.repeats)
    whole, short, long, evaluation = (t.median for t in times)
    device = rounds * (long - short) / (LONG - SHORT) + rounds // EVAL_EVERY * evaluation
    result = {
        "config": "digits",
        "rounds": rounds,
        "run_seconds": whole,
        "device_seconds": device,
        "seconds_per_round": (long - short) / (LONG - SHORT),
        "overhead": 1 - device / whole,
        "compile_seconds": simulator.compile_seconds(),
        "peak_memory_bytes": simulator.memory_bytes(),
        "turns": len(times[0].seconds),
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


def run(simulator: simulation.Simulator, rounds: int) -> None:
    """Runs the demo with its log, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, open_run(Path(folder) / "run", {}) as log:
        simulation.run(
            simulator,
            rounds=rounds,
            eval_every=EVAL_EVERY,
            on_rounds=functools.partial(recording.write_rounds, log),
            on_record=functools.partial(recording.write_record, log),
        )


def dispatch(simulator: simulation.Simulator, rounds: int) -> None:
    """Does so many rounds at once."""
    state, _, _ = simulator.advance(simulator.start(None).state, (), rounds)
    jax.block_until_ready(state)


if __name__ == "__main__":
    main()
