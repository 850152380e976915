"""Measures how fast random directions are drawn and summed, by generator and distribution.

    python -m benchmarks.generators --out=benchmarks/results/generators.json

A round adds directions up block by block, so that is what is timed: `COUNT` draws of a block of
`SIZE` numbers, each added to a sum, on one device. Names that begin with "jax" are `jax.random`'s,
the others those of `zofl_jax.generators`. Rates are millions of numbers a second.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measuring
from zofl_jax import keys
from zofl_jax.core import Array, PRNGKey
from zofl_jax.directions import generators, sums
from zofl_jax.engine import compilation, placement

SIZE, SMOKE_SIZE, COUNT = sums.BLOCK, 64**2, 16

DRAWS: dict[str, Callable[[PRNGKey, tuple[int, ...]], Array]] = {
    "jax_words": lambda key, shape: jax.random.bits(key, shape, jnp.uint32).astype(jnp.float32),
    "words": lambda key, shape: generators.words(key, shape).astype(jnp.float32),
    "jax_normal": jax.random.normal,
    "normal": lambda key, shape: generators.normal(key, shape, jnp.float32),
    "jax_rademacher": lambda key, shape: jax.random.rademacher(key, shape, jnp.float32),
    "signs": lambda key, shape: generators.signs(key, shape, jnp.float32),
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and saves."""
    made = measuring.parser(__doc__, repeats=9)
    options = made.parse_args(argv)
    measuring.check_repeats(made, options)
    placement.use_cpu_devices(1)
    measuring.without_cache()
    size = SMOKE_SIZE if options.smoke else SIZE
    names, jobs = [], []
    for impl in keys.IMPLEMENTATIONS:
        key = jax.random.key(0, impl=impl)
        for name, draw in DRAWS.items():
            compiled = compilation.compiled(functools.partial(total, draw, size), (key,))
            names.append((impl, name))
            jobs.append(functools.partial(_wait, compiled, key))
    times = measuring.by_turns(jobs, options.repeats)
    rates: dict[str, dict[str, Any]] = {impl: {} for impl in keys.IMPLEMENTATIONS}
    numbers = size * COUNT / 1e6
    for (impl, name), each in zip(names, times, strict=True):
        rates[impl][name] = {
            "million_per_second": numbers / each.median,
            "best_million_per_second": numbers / min(each.seconds),
            "million_per_cpu_second": numbers / each.median_cpu,
        }
    result = {"size": size, "turns": options.repeats, "rates": rates, **measuring.machine(1)}
    measuring.report(result, options.out)
    return result


def total(draw: Callable[[PRNGKey, tuple[int, ...]], Array], size: int, key: PRNGKey) -> Array:
    """Returns the sum of `COUNT` draws of so many numbers."""

    def add(sum_so_far: Array, own_key: PRNGKey) -> tuple[Array, None]:
        return sum_so_far + draw(own_key, (size,)), None

    return jax.lax.scan(add, jnp.zeros(size), keys.direction_keys(key, COUNT))[0]


def _wait(compiled: Callable[..., Any], key: PRNGKey) -> None:
    jax.block_until_ready(compiled(key))


if __name__ == "__main__":
    main()
