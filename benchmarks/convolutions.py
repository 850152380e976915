"""Times the forms of a convolution that the vision models could use.

    python -m benchmarks.convolutions --out=benchmarks/results/convolutions.json

What is timed is the loss of the MNIST CNN on 10 clients x 32 images as rounds evaluate it,
inside a scan over perturbations, with each of the two stages (convolution, pool, bias,
ReLU) in one of several forms; and its gradient. "own" means params that differ by client,
as at local steps after the first. Medians over interleaved repeats, so that a busy moment
hits all cases alike; the best is given too, and the peak of a 1024 x 1024 product.
With XLA_FLAGS=--xla_force_host_platform_device_count=2 the clients are sharded over the
devices, and only the settings without a loop over clients are timed.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks import measuring
from zofl_jax.core import Array, Params
from zofl_jax.models import cnn

CLIENTS, BATCH, SIZE, CLASSES = 10, 32, 28, 10
PERTURBATIONS, ROUNDS, SMOOTHING = 4, 2, 1e-3
FLOPS = 2 * CLIENTS * BATCH * (28 * 28 * 25 * 16 + 14 * 14 * 25 * 16 * 32 + 1568 * 10)
PEAK_SIZE = 1024
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)

Stage = Callable[[Array, Array, Array], Array]  # x, kernel, bias -> pooled activations
Loss = Callable[[Params, Array, Array], Array]


class Case(NamedTuple):
    """One line of the table: the forms of both stages and the setting they are timed in."""

    first: str
    second: str
    setting: str


def patches(x: Array, height: int, width: int, stride: int = 1) -> Array:
    """Returns the windows of x [B, H, W, C] side by side, [B, H', W', height * width * C]."""
    rows = (x.shape[1] - height) // stride + 1
    columns = (x.shape[2] - width) // stride + 1
    return jnp.concatenate(
        [
            x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
            for i in range(height)
            for j in range(width)
        ],
        axis=-1,
    )


def pad(x: Array, kernel: Array) -> Array:
    margins = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return jnp.pad(x, ((0, 0), *margins, (0, 0)))


def xla(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def im2col(x: Array, kernel: Array) -> Array:
    return patches(pad(x, kernel), *kernel.shape[:2]) @ kernel.reshape(-1, kernel.shape[-1])


def shifted(x: Array, kernel: Array) -> Array:
    height, width, _, _ = kernel.shape
    rows, columns = x.shape[1:3]
    x = pad(x, kernel)
    products = [
        x[:, i : i + rows, j : j + columns] @ kernel[i, j]
        for i in range(height)
        for j in range(width)
    ]
    return functools.reduce(jnp.add, products)


def by_rows(x: Array, kernel: Array) -> Array:
    """Sums over kernel rows; within one, the columns side by side."""
    height, width, _, features = kernel.shape
    rows = x.shape[1]
    x = patches(pad(x, kernel), 1, width)
    products = [x[:, i : i + rows] @ kernel[i].reshape(-1, features) for i in range(height)]
    return functools.reduce(jnp.add, products)


def minimal(x: Array, kernel: Array) -> Array:
    """Makes four outputs in a row by 8 products in place of 20 (Winograd's F(4, 5) in rows).

    Inputs and kernel are turned into values of polynomials at `POINTS` and at infinity, where
    each is a convolution of one column, and what those return into four outputs.
    """
    outputs, width = len(POINTS) + 2 - kernel.shape[1], kernel.shape[1]
    powers = np.vander(np.array([*POINTS, 0.0]), len(POINTS) + 1, increasing=True)
    powers[-1] = np.eye(len(powers))[-1]
    to_inputs = np.linalg.inv(powers).T
    scale = np.abs(to_inputs).max(1, keepdims=True)  # for the rounding's sake
    to_kernel, to_outputs = powers[:, :width] * scale, powers[:, :outputs].T.copy()
    to_kernel[-1, -1], to_outputs[-1, -1] = scale[-1, 0], 1

    batch, rows, columns, channels = x.shape
    tiles = -(-columns // outputs)
    x = jnp.pad(pad(x, kernel), ((0, 0), (0, 0), (0, (tiles + 1) * outputs - columns), (0, 0)))
    x = x[:, :, : (tiles + 1) * outputs].reshape(*x.shape[:2], tiles + 1, outputs * channels)

    def column(i: int) -> Array:  # of each tile
        skip, at = divmod(i, outputs)
        return x[:, :, skip : skip + tiles, at * channels : (at + 1) * channels]

    values = _combinations(to_inputs / scale, [column(i) for i in range(len(powers))])
    kernels = _combinations(to_kernel, [kernel[:, i : i + 1] for i in range(width)])
    products = [
        lax.conv_general_dilated(
            value, one, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        for value, one in zip(values, kernels, strict=True)
    ]
    out = jnp.stack(_combinations(to_outputs, products), axis=3)
    return out.reshape(batch, rows, tiles * outputs, -1)[:, :, :columns]


def _combinations(matrix: np.ndarray, values: list[Array]) -> list[Array]:
    return [
        functools.reduce(
            jnp.add, [float(w) * v for w, v in zip(row, values, strict=True) if abs(w) > 1e-9]
        )
        for row in matrix
    ]


def pool_last(convolve: Callable[[Array, Array], Array]) -> Stage:
    return lambda x, kernel, bias: cnn.max_pool(jax.nn.relu(convolve(x, kernel) + bias))


def pool_first(convolve: Callable[[Array, Array], Array]) -> Stage:
    return lambda x, kernel, bias: jax.nn.relu(cnn.max_pool(convolve(x, kernel)) + bias)


def pool_window(x: Array, kernel: Array, bias: Array) -> Array:
    """The plain form: XLA's convolution and XLA's windowed maximum."""
    x = jax.nn.relu(xla(x, kernel) + bias)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def blocks(x: Array, kernel: Array, bias: Array) -> Array:
    """Computes the four values of a pooling window as four features of one wider kernel.

    The kernel has one more row and column, so 36 / 25 of the operations of a 5 x 5 one, but
    a quarter of the windows. Pairs of rows and columns are first merged into channels.
    """
    height, width, channels, features = kernel.shape
    shifts = [(i, j) for i in range(2) for j in range(2)]
    wide = [jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i, j in shifts]
    stacked = jnp.stack(wide, axis=3).reshape(
        (height + 1) // 2, 2, (width + 1) // 2, 2, channels, 4 * features
    )
    merged = stacked.transpose(0, 2, 1, 3, 4, 5).reshape(
        (height + 1) // 2, (width + 1) // 2, 4 * channels, 4 * features
    )
    x = pad(x, kernel)
    batch, rows, columns, _ = x.shape
    x = x.reshape(batch, rows // 2, 2, columns // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    x = patches(x.reshape(batch, rows // 2, columns // 2, 4 * channels), 1, merged.shape[1])
    count = rows // 2 - merged.shape[0] + 1
    products = [
        x[:, i : i + count] @ merged[i].reshape(-1, 4 * features) for i in range(merged.shape[0])
    ]
    x = functools.reduce(jnp.add, products)
    return jax.nn.relu(x.reshape(*x.shape[:3], 4, features).max(3) + bias)


def hoisted(x: Array, kernel: Array, bias: Array) -> Array:
    """Takes `patches` computed before the scan over perturbations."""
    return jax.nn.relu(cnn.max_pool(x @ kernel.reshape(-1, kernel.shape[-1])) + bias)


STAGES: dict[str, Stage] = {
    "xla": pool_first(xla),
    "xla, pool last": pool_last(xla),
    "xla, reduce_window": pool_window,
    "im2col": pool_first(im2col),
    "im2col, pool last": pool_last(im2col),
    "im2col, hoisted": hoisted,
    "shifted": pool_first(shifted),
    "rows": pool_first(by_rows),
    "minimal": pool_first(minimal),
    "blocks": blocks,
}
LOOPED = ("shared, map", "own, map", "gradient, map")
SETTINGS = ("alone", "shared", "rounds", "own", *LOOPED, "gradient")
CASES = [
    *(Case("library", "library", setting) for setting in SETTINGS),
    *(Case(first, "xla", setting) for first in STAGES for setting in ("shared", "shared, map")),
    *(
        Case("im2col", second, setting)
        for second in ("xla", "im2col", "shifted", "rows", "minimal", "blocks")
        for setting in ("shared", "own", "own, map", "gradient", "gradient, map")
    ),
]


def loss_of(first: str, second: str) -> Loss:
    """Returns (params, images [B, 28, 28, 1], labels [B]) -> mean loss."""
    model: Any = cnn.MnistCnn(CLASSES)

    def logits(params: Params, x: Array) -> Array:
        if first == "library":
            return model.apply(params, x)
        layers = params["params"]
        for name, stage in (("conv1", STAGES[first]), ("conv2", STAGES[second])):
            x = stage(x, layers[name]["kernel"], layers[name]["bias"])
        return x.reshape(x.shape[0], -1) @ layers["output"]["kernel"] + layers["output"]["bias"]

    def loss(params: Params, images: Array, labels: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, images), labels
        ).mean()

    return loss


def program(case: Case) -> tuple[Callable[..., Any], int]:
    """Returns (params, directions, images, labels) -> losses, and its number of forwards."""
    loss = loss_of(case.first, case.second)
    fn = jax.grad(loss) if case.setting.startswith("gradient") else loss
    own = case.setting.startswith("own")

    def clients(params: Params, direction: Params, images: Array, labels: Array) -> Any:
        def one(params: Params, images: Array, labels: Array) -> Any:
            moved = jax.tree.map(lambda w, z: w + SMOOTHING * z, params, direction)
            return fn(moved, images, labels)

        if case.setting not in LOOPED:
            return jax.vmap(one, in_axes=(0 if own else None, 0, 0))(params, images, labels)
        if own:
            return lax.map(lambda args: one(*args), (params, images, labels))
        return lax.map(lambda args: one(params, *args), (images, labels))

    def perturbations(params: Params, directions: Params, images: Array, labels: Array) -> Any:
        if case.first == "im2col, hoisted":
            folded = images.reshape(-1, *images.shape[2:])
            folded = jnp.pad(folded, ((0, 0), (2, 2), (2, 2), (0, 0)))
            images = patches(folded, 5, 5).reshape(*images.shape[:-1], -1)
        _, losses = lax.scan(
            lambda carry, z: (carry, clients(params, z, images, labels)), None, directions
        )
        return losses

    def rounds(params: Params, directions: Params, images: Array, labels: Array) -> Any:
        def step(params: Params, _: None) -> tuple[Params, Array]:
            losses = perturbations(params, directions, images, labels)
            return jax.tree.map(lambda w: w - SMOOTHING * losses.mean(), params), losses

        return lax.scan(step, params, length=ROUNDS)

    def alone(params: Params, directions: Params, images: Array, labels: Array) -> Any:
        return clients(params, jax.tree.map(lambda z: z[0], directions), images, labels)

    if case.setting == "rounds":
        return rounds, ROUNDS * PERTURBATIONS
    if case.setting == "alone" or case.setting.startswith("gradient"):
        return alone, 1
    return perturbations, PERTURBATIONS


def inputs(own: bool) -> tuple[Params, Params, Array, Array]:
    """Returns params, directions [P, ...], images and labels; clients over all devices."""
    key = jax.random.key(0)
    images = jax.random.normal(key, (CLIENTS, BATCH, SIZE, SIZE, 1))
    labels = jax.random.randint(key, (CLIENTS, BATCH), 0, CLASSES)
    params = cnn.MnistCnn(CLASSES).init(key, images[0])

    def copies(count: int) -> Params:
        return jax.tree.map(lambda w: jax.random.normal(key, (count, *w.shape)), params)

    directions = copies(PERTURBATIONS)
    if own:
        params = jax.tree.map(lambda w, z: w + 0.01 * z, params, copies(CLIENTS))
    if jax.device_count() > 1:
        kinds = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((jax.device_count(),), ("clients",), axis_types=kinds)
        spec = jax.sharding.PartitionSpec
        split = jax.sharding.NamedSharding(mesh, spec("clients"))
        whole = jax.sharding.NamedSharding(mesh, spec())
        images, labels = jax.device_put((images, labels), split)
        params = jax.device_put(params, split if own else whole)
        directions = jax.device_put(directions, whole)
    return params, directions, images, labels


def measure(cases: list[Case], repeats: int) -> dict[str, Any]:
    """Returns milliseconds a forward pass (or gradient) of each case, and the peak."""
    data = {own: inputs(own) for own in (False, True)}
    square = jnp.ones((PEAK_SIZE, PEAK_SIZE))
    peak = jax.jit(lambda a: a @ a).lower(square).compile()
    jobs: list[tuple[Any, Any, int]] = [(peak, (square,), 1)]
    for case in cases:
        fn, passes = program(case)
        args = data[case.setting.startswith("own")]
        jobs.append((jax.jit(fn).lower(*args).compile(), args, passes))
    calls = [
        lambda compiled=compiled, args=args: jax.block_until_ready(compiled(*args))
        for compiled, args, _ in jobs
    ]
    seconds = [
        [second / passes for second in times.seconds]
        for times, (_, _, passes) in zip(measuring.by_turns(calls, repeats), jobs, strict=True)
    ]
    peak_flops = 2 * PEAK_SIZE**3
    rows = [
        {
            **case._asdict(),
            "milliseconds": 1e3 * statistics.median(times),
            "best_milliseconds": 1e3 * min(times),
        }
        for case, times in zip(cases, seconds[1:], strict=True)
    ]
    return {
        "peak_gflops": peak_flops / statistics.median(seconds[0]) / 1e9,
        "best_peak_gflops": peak_flops / min(seconds[0]) / 1e9,
        "forward_gflop": FLOPS / 1e9,
        "cases": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times forms of convolution.")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error(f"--repeats must be >= 5 for a median, got {args.repeats}")
    cases = [case for case in CASES if jax.device_count() == 1 or case.setting not in LOOPED]
    cases = list(dict.fromkeys(cases))
    result = {
        "machine": measuring.machine(),
        "repeats": args.repeats,
        **measure(cases, args.repeats),
    }
    print(f"peak {result['peak_gflops']:.0f} GFLOP/s (best {result['best_peak_gflops']:.0f})")
    print(f"{'first stage':22}{'second stage':14}{'setting':16}{'ms':>8}{'best':>8}")
    for row in result["cases"]:
        print(
            f"{row['first']:22}{row['second']:14}{row['setting']:16}"
            f"{row['milliseconds']:8.1f}{row['best_milliseconds']:8.1f}"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
