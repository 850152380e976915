"""Holds rounds for accelerators against their bounds where there is no accelerator.

    python -m benchmarks.without_a_card --out=benchmarks/results/without_a_card.json

For each round that `benchmarks.accelerator` times on a card, and for the forward passes that are
its bound: FLOPs of the products and memory traffic of the program as it is traced for a GPU
(`planning.paper`), and the same as the TPU's compiler has it for one v5e chip, with its account of
the memory, the cycles it expects and what compiling took. Nothing runs, and nothing here is a time
on a card. The bound's batch is the one that takes the fewest cycles, or moves least. Needs the
extra [plan]. A row is written as soon as it is there, and those that FILE.json holds are kept:
delete it to begin anew.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import measuring, workloads
from benchmarks.workloads import Work
from zofl_jax.core import Array, Batch, Params
from zofl_jax.directions import jaxprs
from zofl_jax.engine import compilation, placement, simulation
from zofl_jax.planning import costs, paper, plans, programs, topologies
from zofl_jax.planning.plans import UNKNOWN

GPU, TPU = "h100:1", "v5e:2x2"
ROWS = (
    ("cnn-k4", "low_rank", False),
    ("cnn-k4", "gaussian", False),
    ("cnn", "gaussian", False),
    ("decoder-135m", "low_rank", False),
    ("decoder-135m", "gaussian", False),
    ("opt-1.3b", "low_rank", False),
    ("opt-1.3b", "gaussian", False),
    ("opt-1.3b", "low_rank", True),
    ("opt-1.3b", "gaussian", True),
)
"""Configs of `workloads`, how directions are drawn, and whether clients and models are evaluated
one at a time, in place of as many as the library takes."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Counts, prints and saves."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--out", type=Path, help="a JSON file to write")
    made.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs")
    made.add_argument("--only", default="", help="rows whose name contains this, as in opt-1.3b")
    options = made.parse_args(argv)
    topologies.prepare()
    done = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    rows = {
        _name(row["config"], row["variant"], row["single"]): row for row in done.get("rows", ())
    }
    for row in ROWS:
        name = _name(*row)
        if name in rows or options.only not in name:
            continue
        rows[name] = counted(*row, options.smoke)
        ordered = [rows[each] for each in (_name(*row) for row in ROWS) if each in rows]
        measuring.report({"rows": ordered, **measuring.machine(1)}, options.out)
    return {"rows": list(rows.values())}


def counted(config: str, variant: str, single: bool, smoke: bool = False) -> dict[str, Any]:
    """Returns a row: what a round takes, and its bound."""
    gpu, tpu = (_OneDevice(name, config, variant, single, smoke) for name in (GPU, TPU))
    return {
        "config": config,
        "variant": variant,
        "single": single,
        "gpu_by_trace": {"round": gpu.traced_round(), "bound": gpu.traced_bound()},
        "tpu_by_compiler": {"round": tpu.compiled_round(), "bound": tpu.compiled_bound()},
    }


class _OneDevice:
    """A round and its bound on a device that need not be there."""

    def __init__(self, topology: str, config: str, variant: str, single: bool, smoke: bool):
        self.mesh = topologies.mesh(topology, placement.Shape(clients=1))
        self.where = placement.Placement(self.mesh)
        with self.where.tracing():
            made = workloads.CONFIGS[config](smoke=smoke, accelerator=True)
            self.work = workloads.in_form(made, variant)
        if single:
            self.work = self.work._replace(clients_at_once=1, perturbations_at_once=1)
        self.simulator = simulation.make_simulator(
            workloads.algorithm(self.work, variant),
            self.work.task,
            clients_per_round=self.work.clients,
            batch_size=self.work.batch,
            mesh=self.mesh,
        )

    def traced_round(self) -> dict[str, Any]:
        found = paper.make(self.simulator)
        return _figures(found.costs.products, found.figures.traffic, found.memory.temporaries)

    def traced_bound(self) -> dict[str, Any]:
        return min(map(self._traced_passes, self.work.bound_batches), key=lambda x: x["traffic"])

    def _traced_passes(self, batch: int) -> dict[str, Any]:
        args = self._args(batch)
        with self.where.tracing():
            program = jaxprs.trace(passes(self.work, batch), *args)[0]
        inputs = [*program.consts, *jax.tree.leaves(args)]
        found = paper.estimate(program, inputs, fast=paper.FAST[self.where.platform])
        figures = _figures(costs.of(program).products, found.traffic, found.temporaries)
        return {**figures, "batch": batch}

    def compiled_round(self) -> dict[str, Any]:
        began = time.process_time()
        found = plans.make(self.simulator)
        seconds = time.process_time() - began
        figures = _figures(found.costs.products, found.figures.traffic, found.memory.temporaries)
        return {
            **figures,
            "cycles": found.figures.cycles,
            "params": found.memory.params,
            "compile_cpu_seconds": seconds,
        }

    def compiled_bound(self) -> dict[str, Any]:
        found = list(map(self._compiled_passes, self.work.bound_batches))
        known = [each for each in found if each["cycles"]]
        return min(known, key=lambda x: x["cycles"]) if known else found[-1]

    def _compiled_passes(self, batch: int) -> dict[str, Any]:
        args = self._args(batch)
        lowered = compilation.lower(passes(self.work, batch), args, (), self.where)
        compiled = lowered.lowered.compile()
        found = programs.figures(compiled.as_text() or "")
        memory = compiled.memory_analysis()
        products = costs.of(lowered.program).products
        figures = _figures(products, found.traffic, getattr(memory, "temp_size_in_bytes", None))
        return {**figures, "cycles": found.cycles, "batch": batch}

    def _args(self, batch: int) -> tuple[Any, ...]:
        """Returns shapes of params, examples and the number of turns, on the device."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        params = jax.eval_shape(self.work.task.init, jax.random.key(0))
        shapes = (params, self.work.task.test, jnp.zeros((), jnp.int32))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
        )


def passes(work: Work, batch: int) -> Callable[[Params, Batch, Array], Array]:
    """Returns (params, examples, turns) -> sum of losses; a turn has a round's forward passes.

    How many turns there are is not known to the compiler, as in a simulator's rounds.
    """
    count = -(-work.examples // batch)
    positions = len(work.task.test["label"]) - batch + 1

    def one(params: Params, examples: Batch, total: Array, index: Array) -> tuple[Array, None]:
        start = (index * batch) % positions
        rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, batch), examples)
        return total + work.task.loss(params, rows).astype(jnp.float32), None

    def turns(params: Params, examples: Batch, limit: Array) -> Array:
        each = functools.partial(one, params, examples)

        def turn(carried: tuple[Array, Array]) -> tuple[Array, Array]:
            index, total = carried
            indices = index * count + jnp.arange(count)
            return index + 1, jax.lax.scan(each, total, indices)[0]

        start = (jnp.zeros((), jnp.int32), jnp.zeros(()))
        return jax.lax.while_loop(lambda carried: carried[0] < limit, turn, start)[1]

    return turns


def table(results: Path) -> str:
    """Returns what the committed file says, as Markdown: rounds in units of their bounds."""
    lines = [
        "| round | products, GPU's trace | traffic, GPU's trace | products, TPU | traffic, TPU's "
        "compiler | cycles, TPU's compiler | temporaries beyond the bound's, over the params "
        "| compiling, CPU time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in json.loads((results / "without_a_card.json").read_text())["rows"]:
        gpu, tpu = row["gpu_by_trace"], row["tpu_by_compiler"]
        beyond = tpu["round"]["temporaries"] - tpu["bound"]["temporaries"]
        cells = [
            _name(row["config"], row["variant"], row["single"]),
            *(_ratio(each, name) for each in (gpu, tpu) for name in ("flops", "traffic")),
            _ratio(tpu, "cycles"),
            f"{beyond / tpu['round']['params']:.2f}",
            f"{tpu['round']['compile_cpu_seconds']:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ratio(found: dict[str, dict[str, Any]], name: str) -> str:
    round_s, bound_s = found["round"][name], found["bound"][name]
    return f"{round_s / bound_s:.3f}" if round_s and bound_s else UNKNOWN


def _figures(products: int, traffic: int | None, temporaries: int | None) -> dict[str, Any]:
    return {"flops": products, "traffic": traffic, "temporaries": temporaries}


def _name(config: str, variant: str, single: bool) -> str:
    return f"{config}, {variant.replace('_', ' ')}{', one at a time' if single else ''}"


if __name__ == "__main__":
    main()
