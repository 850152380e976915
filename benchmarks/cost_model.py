"""Compares what a plan predicts with what rounds take on this machine.

    python -m benchmarks.cost_model --out=benchmarks/results/cost_model.json

For rounds of several kinds, each in a process of its own: FLOPs of the traced program against those
that XLA counts in one forward pass, times the passes; memory by estimate (`planning.paper`, and the
check before a run) and by the compiler against the peak of the process; and the time of a round
against what the peak rates allow, which are measured by turns with it: products of two matrices of
float32 numbers, and an addition to an array that no cache holds. All are CPU seconds, so peak rates
are those of a core. A plan's time is a bound from below, so what is told is how many times as long
a round takes. Rows that FILE.json holds are kept: delete it to begin anew.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measuring, speed, workloads
from benchmarks.round import Rounds
from benchmarks.workloads import Work
from zofl_jax.engine import compilation, placement
from zofl_jax.engine.exhaustion import in_words
from zofl_jax.models import mlp
from zofl_jax.planning import estimates, paper, plans
from zofl_jax.tasks import tokens

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "vocab_size": 4096,
    "width": 128,
    "mlp_width": 512,
    "head_dim": 32,
}
SMALL |= {"num_heads": 4, "num_kv_heads": 4}


def _digits(smoke: bool = False) -> Work:
    """Returns the perceptron on 8 x 8 images: 5 clients of 20, batch 32, central differences."""
    clients, each, batch = (2, 4, 4) if smoke else (5, 90, 32)
    task = workloads.image_task(mlp.MLP(10), 4 * clients * each, 4 * clients, (8, 8, 1))
    return Work(task, 4 * clients, clients, batch, 1, 10, "central", None, (batch,))


def _decoder(smoke: bool = False, **sizes: Any) -> Work:
    chosen = {} if smoke else sizes
    return workloads.decoder_work("smollm2-135m", clients=2, length=40, smoke=smoke, **chosen)


WORKS: dict[str, tuple[str, Callable[..., Work]]] = {
    "perceptron on 8 x 8 images": ("gaussian", _digits),
    "MNIST CNN, K=1, P=10": ("gaussian", workloads.CONFIGS["cnn"]),
    "MNIST CNN, K=4, P=20": ("low_rank", workloads.CONFIGS["cnn-k4"]),
    "decoder of 4 layers, width 128": ("low_rank", functools.partial(_decoder, **SMALL)),
    "SmolLM2's width, 3 layers": ("low_rank", functools.partial(_decoder, num_layers=3)),
    "SmolLM2's width, 3 layers, dense": ("gaussian", functools.partial(_decoder, num_layers=3)),
}
"""By what they are called in the table: how directions are drawn, and what makes the work."""

MATRIX, ARRAY = 1024, 2**26  # numbers


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and saves."""
    made = measuring.parser(__doc__)
    made.add_argument("--one", choices=WORKS, help="one of them, in this process")
    options = made.parse_args(argv)
    measuring.check_repeats(made, options)
    placement.use_cpu_devices(1)
    if options.one:
        row = measured(options.one, options.repeats, options.smoke)
        measuring.report(row, options.out)
        return row
    done = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    rows = {row["name"]: row for row in done.get("rows", ())}
    for name in WORKS:
        if name not in rows:
            rows[name] = _in_process(name, options)
        ordered = [rows[each] for each in WORKS if each in rows]
        result = {"rows": ordered, **measuring.machine(1)}
        if options.out:  # as soon as a row is there
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return result


def measured(name: str, repeats: int, smoke: bool) -> dict[str, Any]:
    """Returns what is predicted of a round, and what it takes."""
    variant, make = WORKS[name]
    work = make(smoke=smoke)
    simulator = workloads.simulator(work, variant)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((work.batch, *x.shape[1:]), x.dtype),
        work.task.train.examples,
    )
    by_paper, by_xla = paper.make(simulator), forward_flops(work) * work.examples // work.batch
    with _cache():
        compiled = plans.make(simulator)
        each = Rounds(simulator)
        each()
        peak = _process_peak(each)
        matrix, array = (64, 2**12) if smoke else (MATRIX, ARRAY)
        times = measuring.by_turns([_product(matrix), _addition(array), each], repeats)
    # By CPU seconds, which other work on the machine changes little.
    flops = 2 * matrix**3 / times[0].median_cpu
    memory_rate = 2 * 4 * array / times[1].median_cpu
    compute, traffic = compiled.costs.products / flops, compiled.figures.traffic
    memory = None if traffic is None else traffic / memory_rate
    bound = max(compute, memory or 0.0)
    return {
        "name": name,
        "variant": variant,
        "flops_predicted": compiled.costs.products,
        "flops_by_xla": by_xla,
        "memory_by_check": estimates.needed(simulator, batch, work.clients_at_once or 0),
        "memory_by_paper": by_paper.memory.needed,
        "memory_by_compiler": compiled.memory.needed,
        "memory_of_process": peak,
        "traffic_by_paper": by_paper.figures.traffic,
        "traffic_by_compiler": traffic,
        "peak_flops": flops,
        "peak_memory_rate": memory_rate,
        "seconds_compute": compute,
        "seconds_memory": memory,
        "seconds": times[2].median,
        "cpu_seconds": times[2].median_cpu,
        "ratio_to_bound": times[2].median_cpu / bound,
        "load_average": measuring.machine(1)["load_average"],
    }


def forward_flops(work: Work) -> int:
    """Returns the FLOPs that XLA counts in the loss of one client's batch.

    Other operations than products are among them. Of a loop XLA counts the body once, so those of a
    decoder's layers are what it counts beyond a decoder without any, times the layers.
    """

    def counted(task: Any) -> float:
        params = jax.eval_shape(task.init, jax.random.key(0))
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((work.batch, *x.shape[1:]), x.dtype),
            task.train.examples,
        )
        account = jax.jit(task.loss).lower(params, batch).compile().cost_analysis() or {}
        return account["flops"]

    whole, config = counted(work.task), work.architecture
    if config is None:
        return round(whole)
    length = work.task.test["tokens"].shape[1]
    bare = dataclasses.replace(config, num_layers=0)
    outside = counted(tokens.random_task(bare, work.clients, work.batch, length))
    return round(outside + config.num_layers * (whole - outside))


def table(results: Path) -> str:
    """Returns what the committed file says, as Markdown."""
    file = results / "cost_model.json"
    if not file.exists():
        return f"{speed.MISSING.capitalize()}: `python -m benchmarks.cost_model` does.\n"
    found = json.loads(file.read_text())
    lines = [
        "| round | FLOPs: plan, by XLA | memory: by paper, by the compiler, of the process "
        "| traffic: by paper, by the compiler | bound, CPU time: compute, memory | a round took "
        "| of the bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        memory = (row[f"memory_{kind}"] for kind in ("by_paper", "by_compiler", "of_process"))
        traffic = (row[f"traffic_{kind}"] for kind in ("by_paper", "by_compiler"))
        times = (row["seconds_compute"], row["seconds_memory"])
        cells = [
            f"{row['name']}, {row['variant'].replace('_', ' ')}",
            f"{row['flops_predicted']:.3g}, {row['flops_by_xla']:.3g}",
            ", ".join(in_words(size) for size in memory),
            ", ".join("not known" if size is None else in_words(size) for size in traffic),
            ", ".join("not known" if s is None else f"{1000 * s:.3g}" for s in times) + " ms",
            f"{1000 * row['cpu_seconds']:.3g} ms",
            f"{row['ratio_to_bound']:.2f}x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _in_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.cost_model", f"--one={name}"]
    command += ["--smoke"] if options.smoke else [f"--repeats={options.repeats}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


@contextlib.contextmanager
def _cache() -> Iterator[None]:
    """Keeps what is compiled inside the block, so that the round is compiled once."""
    before = getattr(jax.config, "jax_compilation_cache_dir", None)
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", before)


def _process_peak(each: Rounds) -> int:
    """Returns the most bytes that this process held for its arrays during a round."""
    arrays = sum(array.nbytes for array in jax.live_arrays())
    beside = measuring.status_bytes("VmRSS") - arrays
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    each()
    return measuring.status_bytes("VmHWM") - beside


def _product(size: int) -> Callable[[], Any]:
    x = jnp.ones((size, size))
    product = compilation.compiled(lambda x: x @ x, (x,))
    return lambda: jax.block_until_ready(product(x))


def _addition(size: int) -> Callable[[], Any]:
    x = jnp.ones(size)
    added = compilation.compiled(lambda x: x + 1, (x,))
    return lambda: jax.block_until_ready(added(x))


if __name__ == "__main__":
    main()
