"""Measures how fast random directions are drawn, by generator and distribution.

    python -m benchmarks.generators --out=benchmarks/results/generators.json

A direction for one square matrix is drawn and summed up (so that it is made, but need not be
written), `SIZE` numbers at a time, on one device. Rates are millions of entries a second. Low rank
draws only the factors: a matrix of `SIZE` entries takes two vectors of its square root.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measuring, workloads
from zofl_jax import compilation, keys, placement
from zofl_jax.core import Array, PRNGKey

SIZE, SMOKE_SIZE = 2048**2, 64**2


def draws(size: int) -> dict[str, Callable[[PRNGKey], Any]]:
    """Returns what is drawn by name, each key -> a tree of arrays."""
    side = math.isqrt(size)
    params = {"kernel": jnp.zeros((side, side))}
    named: dict[str, Callable[[PRNGKey], Any]] = {
        "words": lambda key: jax.random.bits(key, (size,), jnp.uint32),
        "normal": lambda key: jax.random.normal(key, (size,)),
        "jax_rademacher": lambda key: jax.random.rademacher(key, (size,), jnp.float32),
    }
    for variant in ("gaussian", "rademacher", "low_rank"):
        sample = workloads.perturbation(variant).sample
        named[variant] = functools.partial(_sample, sample, params)
    return named


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
        for name, draw in draws(size).items():
            compiled = compilation.compiled(functools.partial(_total, draw), (key,))
            names.append((impl, name))
            jobs.append(functools.partial(_wait, compiled, key))
    times = measuring.by_turns(jobs, options.repeats)
    rates: dict[str, dict[str, Any]] = {impl: {} for impl in keys.IMPLEMENTATIONS}
    for (impl, name), each in zip(names, times, strict=True):
        rates[impl][name] = {
            "million_per_second": size / each.median / 1e6,
            "best_million_per_second": size / min(each.seconds) / 1e6,
            "million_per_cpu_second": size / each.median_cpu / 1e6,
        }
    result = {"size": size, "turns": options.repeats, "rates": rates, **measuring.machine(1)}
    measuring.report(result, options.out)
    return result


def _sample(sample: Callable[..., Any], params: Any, key: PRNGKey) -> Any:
    return sample(key, params)


def _total(draw: Callable[[PRNGKey], Any], key: PRNGKey) -> Array:
    leaves = jax.tree.leaves(draw(key))
    return sum((jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves), jnp.zeros(()))


def _wait(compiled: Callable[..., Any], key: PRNGKey) -> None:
    jax.block_until_ready(compiled(key))


if __name__ == "__main__":
    main()
