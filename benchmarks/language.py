"""Times a language model's forward pass against one matrix product, and its loading.

    python -m benchmarks.language --model=gguf:FILE --out=benchmarks/results/language.json

The forward pass is the loss that rounds evaluate: the scores of two tokens after the last. The
bound is one jitted product of the model's width and the MLP's, repeated to the same number of
operations. Both are timed by turns, so that a busy moment hits both; medians. Loading is done
in a process of its own, whose peak memory is compared with the size of the float32 params.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from zofl_jax.models import architectures, transformer, weights
from zofl_jax.models.architectures import Config

BATCH, LENGTH, REPEATS = 32, 40, 9

LOADING = """
import sys, time
import jax
from benchmarks.measuring import status_bytes
from zofl_jax.models import weights

jax.numpy.zeros(1).block_until_ready()
before = status_bytes("VmRSS")
began = time.perf_counter()
_, params, _ = weights.load(sys.argv[1])
seconds = time.perf_counter() - began
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(seconds, status_bytes("VmHWM") - before, size)
"""


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="gguf:FILE or hf:FOLDER; random weights unless given")
    parser.add_argument("--config", default="smollm2-135m", help="size of random weights")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.model:
        config, params, _ = weights.load(options.model)
    else:
        config = architectures.named(options.config)
        random = np.random.default_rng(0)
        params = jax.tree.map(
            lambda s: jnp.asarray(random.standard_normal(s.shape, np.float32) / 50),
            transformer.shapes(config),
        )
    result = {"model": Path(options.model).name if options.model else options.config}
    result |= forward(config, params)
    del params
    if options.model:
        result |= loading(options.model)
    result |= measuring.machine()
    measuring.report(result, options.out)


def forward(config: Config, params: Any) -> dict[str, Any]:
    """Returns the times of a forward pass and of its bound, seconds."""
    random = np.random.default_rng(1)
    tokens = jnp.asarray(random.integers(0, config.vocab_size, (BATCH, LENGTH)))
    mask = jnp.ones((BATCH, LENGTH), bool)

    def scores(params: Any, tokens: Any, mask: Any) -> Any:
        features = transformer.last(transformer.hidden(config, params, tokens, mask), mask)
        return transformer.logits(config, params, features, [1, 2])

    began = time.perf_counter()
    compiled = jax.jit(scores).lower(params, tokens, mask).compile()
    compile_seconds = time.perf_counter() - began
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 3)
    product = BATCH * LENGTH * config.width * config.mlp_width
    count = round(BATCH * LENGTH * matrices / product)
    x = jnp.asarray(random.standard_normal((BATCH * LENGTH, config.width), np.float32))
    kernel = jnp.asarray(random.standard_normal((config.width, config.mlp_width), np.float32))
    multiply = jax.jit(jnp.matmul)

    def multiplied() -> None:
        for _ in range(count):
            multiply(x, kernel).block_until_ready()

    def passed() -> None:
        compiled(params, tokens, mask).block_until_ready()

    times, bound = measuring.by_turns([passed, multiplied], REPEATS)
    return {
        "batch": BATCH,
        "length": LENGTH,
        "forward_seconds": times.median,
        "bound_seconds": bound.median,
        "ratio_to_bound": measuring.ratio(times, bound),
        "ratio_to_bound_cpu_seconds": times.median_cpu / bound.median_cpu,
        "compile_seconds": compile_seconds,
    }


def loading(spec: str) -> dict[str, Any]:
    """Returns the time and the peak memory of loading a model, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOADING, spec], check=True, capture_output=True, text=True
    )
    took, peak, size = (float(word) for word in done.stdout.split())
    return {
        "load_seconds": took,
        "load_peak_bytes": int(peak),
        "params_bytes": int(size),
        "load_peak_ratio": peak / size,
    }


if __name__ == "__main__":
    main()
