"""Measures how much of a loss's gradient and of its curvature lies along the mean activations.

    python -m benchmarks.activations --out=benchmarks/results/activations.json

For each model, at its start and after some steps of gradient descent on the same examples, with the
means of other examples and Π the projection away from them (`zofl_jax.directions.activations`):

    gradient    the share of ‖g‖² along the means, of the matrices that have one
    curvature   the share of tr(H), by Hutchinson's estimator, with its standard error
    gain        (‖Πg‖² / tr(ΠHΠ)) / (‖g‖² / tr(H)): by how much fewer scalars or rounds P directions
                at right angles to the means take for the same first fall of the loss, each kind at
                its best rate (the fall is then P ‖g‖⁴ / (2 ‖g‖² tr(H)), but for noise)
    inside      the same of directions along the means alone
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from zofl_jax import keys
from zofl_jax.configuration import experiment
from zofl_jax.configuration.resolve import resolve
from zofl_jax.core import Array, Batch, LossFn, Params, PRNGKey, Task
from zofl_jax.directions import activations, perturbations, sums
from zofl_jax.directions.estimators import inner
from zofl_jax.engine import placement
from zofl_jax.observation.diagnostics import hessian_product


class Model(NamedTuple):
    """A model's settings, the gradient descent before it is measured, and how it is."""

    settings: dict[str, Any]
    rate: float = 0.0
    steps: tuple[int, ...] = (0,)
    examples: int = 512
    probes: int = 100


FASHION = {"task": "idx", "data_dir": "/usr/share/datasets/fashion-mnist", "num_clients": 100}
STEPS = (0, 50, 500)
MODELS = {
    "digits, softmax": Model({"model": "softmax"}, 0.05, STEPS, probes=400),
    "digits, mlp": Model({"model": "mlp"}, 0.05, STEPS, probes=400),
    "Fashion-MNIST, mlp": Model({**FASHION, "model": "mlp"}, 0.01, STEPS),
    "Fashion-MNIST, mnist_cnn": Model({**FASHION, "model": "mnist_cnn"}, 0.003, STEPS, 256, 40),
    "film reviews, SmolLM2-135M": Model({"task": "reviews", "max_length": 40}, 0.0, (0,), 16, 16),
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and saves."""
    made = measuring.parser(__doc__, repeats=1)
    made.add_argument("--models", default="", help="those whose names contain this; all by default")
    options = made.parse_args(argv)
    placement.use_cpu_devices(1)
    rows = []
    for title, model in MODELS.items():
        if options.models not in title or (options.smoke and title != "digits, mlp"):
            continue
        if options.smoke:
            model = model._replace(steps=(0,), probes=40)
        task = experiment.build(resolve(model.settings)).task
        for steps in model.steps:
            about = {"model": title, "rate": model.rate, "steps": steps}
            about |= {"examples": model.examples, "probes": model.probes}
            rows.append(about | of_model(task, model, steps))
            print(rows[-1], file=sys.stderr)
    result = {"benchmark": "activations", "machine": measuring.machine(), "rows": rows}
    measuring.report(result, options.out)
    return result


def table(results: Path) -> str:
    """Returns the committed figures as Markdown."""
    lines = [
        "| | steps | of the gradient along the means | of the curvature | gain at right angles "
        "| along them |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads((results / "activations.json").read_text())["rows"]:
        curvature = f"{row['curvature']:.2f} ± {row['curvature_error']:.2f}"
        lines.append(
            f"| {row['model']} | {row['steps']} | {row['gradient']:.2f} | {curvature} "
            f"| {row['gain']:.1f} | {row['inside']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def of_model(task: Task, model: Model, steps: int) -> dict[str, Any]:
    """Returns the figures of a model after steps of gradient descent."""

    def batch(first: int) -> Batch:
        own = slice(first, first + model.examples)
        return jax.tree.map(lambda x: jnp.asarray(x[own]), task.train.examples)

    @jax.jit
    def descended(params: Params, batch: Batch) -> Params:
        gradient = jax.grad(task.loss)(params, batch)
        return jax.tree.map(lambda x, g: x - model.rate * g, params, gradient)

    here, others = batch(0), batch(model.examples)
    params = task.init(jax.random.key(0))
    for _ in range(steps):
        params = descended(params, here)
    return figures(task.loss, params, here, others, jax.random.key(1), model.probes)


def figures(
    loss_fn: LossFn, params: Params, batch: Batch, others: Batch, key: PRNGKey, probes: int
) -> dict[str, Any]:
    """Returns the shares and the gains of one state.

    Args:
      loss_fn: (params, batch) -> mean loss, twice differentiable.
      params: the state.
      batch: of gradient and Hessian.
      others: of the means.
      key: draws the probes.
      probes: how many.
    """
    means = jax.jit(lambda x, b: activations.means(loss_fn, x, b)[1])(params, others)

    @jax.jit
    def measured(params: Params, batch: Batch) -> tuple[Array, Array, Array, Array]:
        def matrices(tree: Params) -> Params:
            return jax.tree.map_with_path(
                lambda path, x: x if keys.path_name(path) in means else jnp.zeros_like(x), tree
            )

        def square(z: Params) -> Array:
            return inner(z, hessian_product(loss_fn, params, batch, z))

        def probe(key: PRNGKey) -> tuple[Array, Array]:
            u = matrices(sums.arrays(perturbations.gaussian().sample(key, params)))
            apart = activations.away(means, u)
            return square(jax.tree.map(jnp.subtract, u, apart)), square(apart)

        gradient = matrices(jax.grad(loss_fn)(params, batch))
        part = activations.away(means, gradient)
        curvatures = jax.lax.map(probe, jax.random.split(key, probes))
        return inner(gradient, gradient), inner(part, part), *curvatures

    square, square_away, inside, outside = (np.asarray(x) for x in measured(params, batch))
    total = inside + outside  # without what is between the two, whose mean is 0
    gradient, curvature = 1 - square_away / square, inside.mean() / total.mean()
    spread = (inside - curvature * total).std() / abs(total.mean())
    return {
        "loss": float(jax.jit(loss_fn)(params, batch)),
        "gradient": float(gradient),
        "curvature": float(curvature),
        "curvature_error": float(spread / probes**0.5),
        "gain": float((1 - gradient) / (1 - curvature)),
        "inside": float(gradient / curvature),
    }


if __name__ == "__main__":
    main()
