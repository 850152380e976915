"""Measures what a direction of a sketch costs: drawn, and multiplied or summed, never stored.

    python -m benchmarks.sketches --out=benchmarks/results/sketches.json

Each shape of params is sketched by some directions for a cohort of `CLIENTS`, and the mean is
expanded, by block and along the whole vector, for each kind of direction. A figure is microseconds
a direction; by block a direction is one of a block, about as many in all.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measuring
from zofl_jax.core import Array, Params, PRNGKey
from zofl_jax.directions import perturbations
from zofl_jax.directions.sketches import Sketch, sketch
from zofl_jax.engine import compilation, placement

SMOKE_COUNT, CLIENTS = 8, 5
SHAPES: dict[str, tuple[int, Any]] = {
    "perceptron, 3,610": (
        1024,
        {"in": (64, 48), "in_bias": (48,), "out": (48, 10), "out_bias": (10,)},
    ),
    "decoder layers, 3,538,944": (
        32,
        {"layers": {"down": (2, 1536, 576), "up": (2, 576, 1536)}},
    ),
}
KINDS = {
    "gaussian": perturbations.gaussian,
    "rademacher": perturbations.rademacher,
    "low_rank": perturbations.low_rank,
}
PARTS = ("measured", "expanded")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and saves."""
    made = measuring.parser(__doc__, repeats=5)
    options = made.parse_args(argv)
    measuring.check_repeats(made, options)
    placement.use_cpu_devices(1)
    measuring.without_cache()
    names, jobs = [], []
    for title, (full, shapes) in SHAPES.items():
        if options.smoke and "decoder" in title:
            continue
        count = SMOKE_COUNT if options.smoke else full
        key, x = jax.random.key(0), _filled(shapes)
        for kind, make in KINDS.items():
            for by_block in (True, False):
                chosen = sketch(count, make(), by_block=by_block)
                measure = compilation.compiled(functools.partial(measured, chosen), (key, x))
                scalars = measure(key, x)[0]
                given = (key, x, scalars)
                expand = compilation.compiled(functools.partial(expanded, chosen), given)
                names += [(title, kind, by_block, part, scalars.size) for part in PARTS]
                jobs.append(functools.partial(_wait, measure, key, x))
                jobs.append(functools.partial(_wait, expand, *given))
    times = measuring.by_turns(jobs, options.repeats)
    rows = [
        {
            "params": title,
            "kind": kind,
            "by_block": by_block,
            "part": part,
            "directions": size,
            "microseconds_a_direction": 1e6 * each.median / size,
            "cpu_microseconds_a_direction": 1e6 * each.median_cpu / size,
        }
        for (title, kind, by_block, part, size), each in zip(names, times, strict=True)
    ]
    result = {"clients": CLIENTS, "turns": options.repeats, "rows": rows, **measuring.machine(1)}
    measuring.report(result, options.out)
    return result


def measured(made: Sketch, key: PRNGKey, x: Params) -> Array:
    """Returns the sketches of all clients, [C, P]."""
    return jax.vmap(made.measure, (None, 0))(key, x)


def expanded(made: Sketch, key: PRNGKey, x: Params, scalars: Array) -> Params:
    """Returns what everyone makes of the mean sketch."""
    return made.expand(key, jax.tree.map(lambda leaf: leaf[0], x), scalars)


def _filled(shapes: Any) -> Params:
    """Returns a tree of arrays [C, ...], all different."""
    return jax.tree.map(
        lambda shape: jnp.cos(
            jnp.arange(CLIENTS * jnp.prod(jnp.array(shape)), dtype=jnp.float32)
        ).reshape(CLIENTS, *shape),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def _wait(compiled: Any, *arguments: Any) -> None:
    jax.block_until_ready(compiled(*arguments))


if __name__ == "__main__":
    main()
