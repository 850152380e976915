"""Measures the memory of a round of the 135M decoder, dense and low rank, 2 and 64 clients.

    python -m benchmarks.memory --out=benchmarks/results/memory.json

Two figures, both in units of the params and without the bound's own activations (the temporaries of
one forward pass of as many examples as the round evaluates at once): what the compiler says a round
needs, arguments, results and temporaries; and the peak of a process during its second round, less
what it held beside its arrays before that round (with one direction and short texts, which change
no array of the params' size).
Clients are evaluated two at a time, so that their number changes nothing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measuring, workloads
from benchmarks.workloads import Work
from zofl_jax import keys
from zofl_jax.engine import compilation, ledger, placement, rounds

CLIENTS, AT_ONCE, LENGTH = (2, 64), 2, 40
PROCESS_LENGTH = 8  # tokens in the process that runs a round
VARIANTS = ("gaussian", "rademacher", "low_rank")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and saves."""
    made = measuring.parser(__doc__)
    made.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas")
    made.add_argument("--clients", default=",".join(map(str, CLIENTS)), help="separated by commas")
    made.add_argument(
        "--process",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run rounds too, each in a process of its own",
    )
    made.add_argument("--prng_impl", default="threefry2x32", choices=keys.IMPLEMENTATIONS)
    made.add_argument(
        "--perturbations_at_once", type=int, default=1, help="of low_rank; as `round` unless given"
    )
    made.add_argument("--one", help=argparse.SUPPRESS)
    options = made.parse_args(argv)
    placement.use_cpu_devices(1)
    measuring.without_cache()
    if options.one:
        variant, clients = options.one.split(",")
        work = work_for(int(clients), options, short=True)
        print(json.dumps(process_peak(work, variant, options.prng_impl)))
        return {}
    rows = []
    for variant in options.variants.split(","):
        for clients in map(int, options.clients.split(",")):
            work = work_for(clients, options)
            row = {
                "variant": variant,
                "clients": clients,
                **compiled_peak(work, variant, options.prng_impl),
            }
            if options.process:
                row |= _in_process(variant, clients, options)
            rows.append(row)
    result = {
        "config": "decoder-135m",
        "prng_impl": options.prng_impl,
        "clients_at_once": AT_ONCE,
        "perturbations_at_once": options.perturbations_at_once,
        "rows": rows,
        "multiples": {f"{r['variant']}_{r['clients']}": r["params_multiple"] for r in rows},
        **measuring.machine(1),
    }
    measuring.report(result, options.out)
    return result


def work_for(clients: int, options: argparse.Namespace, short: bool = False) -> Work:
    """Returns the round; `short` has one direction and short texts."""
    return workloads.decoder_work(
        "smollm2-135m",
        population=clients,
        clients=clients,
        length=PROCESS_LENGTH if short else LENGTH,
        num_perturbations=1 if short else 5,
        clients_at_once=AT_ONCE,
        smoke=options.smoke,
    )._replace(perturbations_at_once=options.perturbations_at_once)


def compiled_peak(work: Work, variant: str, prng_impl: str) -> dict[str, Any]:
    """Returns the bytes of a round by the compiler's account, without running it."""
    algorithm = workloads.algorithm(work, variant)
    advance = rounds.make_advance(algorithm, work.task, work.clients, work.batch, "uniform")
    params = jax.eval_shape(work.task.init, jax.random.key(0))
    state = jax.eval_shape(algorithm.init, params)
    args = (state, (), work.task.train, keys.root(0, prng_impl), np.int32(1))
    peak = compilation.memory_bytes(compilation.compiled(advance, args, donate=(0, 1)))
    size, activations = ledger.tree_bytes(params), forward_temporaries(work, variant)
    return {
        "params_bytes": size,
        "activations_bytes": activations,
        "peak_memory_bytes": peak,
        "params_multiple": (peak - activations) / size,
    }


def forward_temporaries(work: Work, variant: str) -> int:
    """Returns the temporaries of a forward pass of what the round evaluates at once, in bytes."""
    params = jax.eval_shape(work.task.init, jax.random.key(0))
    models = work.perturbations_at_once or 1
    size = work.batch * AT_ONCE * (models if variant == "low_rank" else 1)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), work.task.test
    )
    whole = compilation.memory_bytes(compilation.compiled(work.task.loss, (params, batch)))
    return whole - ledger.tree_bytes((params, batch))


def process_peak(work: Work, variant: str, prng_impl: str) -> dict[str, Any]:
    """Returns the most bytes that this process held for its arrays during a round."""
    simulator = workloads.simulator(work, variant, 1, prng_impl)
    state, _, _ = simulator.advance(simulator.start(None).state, (), 1)
    jax.block_until_ready(state)
    arrays = sum(array.nbytes for array in jax.live_arrays())
    beside = measuring.status_bytes("VmRSS") - arrays
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    state, _, _ = simulator.advance(state, (), 1)
    jax.block_until_ready(state)
    return {
        "process_peak_bytes": measuring.status_bytes("VmHWM") - beside,
        "process_activations_bytes": forward_temporaries(work, variant),
    }


def _in_process(variant: str, clients: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", f"--one={variant},{clients}"]
    command += [f"--prng_impl={options.prng_impl}", *(["--smoke"] if options.smoke else [])]
    if options.perturbations_at_once:
        command += [f"--perturbations_at_once={options.perturbations_at_once}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    params = ledger.tree_bytes(
        jax.eval_shape(work_for(clients, options).task.init, jax.random.key(0))
    )
    peak = found["process_peak_bytes"] - found["process_activations_bytes"]
    return found | {"process_params_multiple": peak / params}


if __name__ == "__main__":
    main()
