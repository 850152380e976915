"""How many examples a direction should be measured on, for `--auto_examples`.

With M clients a round, of which each measures a direction on m examples of its own, the error of
the gradient estimate goes with 1 + N / (M m) over the number of directions, N the noise scale of
an example's gradient (`diagnostics.noise_scale`). A direction costs a client m example-passes, and
what c of them would cost: to be drawn where it is measured, where it is summed, and at the server.
So for as much work the error goes with

    (m + c) (1 + N / (M m)),   least at m = √(c N / M).

The choice is the divisor of the batch nearest to that, by ratio. N is measured on the initial
params, by forward passes of `EXAMPLES` training examples along `DIRECTIONS` directions; it grows
along a run, which makes the choice a small one. c is reckoned from the numbers that a direction is
drawn from and the products of a pass, so the choice is the same on every machine.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from zofl_jax import keys
from zofl_jax.configuration import phases
from zofl_jax.configuration.config import Config
from zofl_jax.configuration.resolve import resolve
from zofl_jax.core import Array, Batch, Params, Task
from zofl_jax.directions import jaxprs, perturbations, sums
from zofl_jax.directions.perturbations import Perturbation
from zofl_jax.engine import compilation
from zofl_jax.observation import diagnostics
from zofl_jax.planning import costs

EXAMPLES = 64
DIRECTIONS = 32
DRAWS = 3
"""How often a direction is drawn for a client: measured, summed, and by the server."""

FLOPS_OF_A_NUMBER = 250.0
"""A normal's time as FLOPs of products: a core draws 180 million and multiplies at 45 GFLOP/s
(`benchmarks/results/generators.json`); signs are as 20."""

FLOPS_OF_A_SIGN = 20.0


class Choice(NamedTuple):
    """What was measured, and what follows."""

    examples: int  # m
    noise_scale: float  # N
    cost: float  # c, in example-passes

    @property
    def sentence(self) -> str:
        """For the user."""
        return (
            f"--auto_examples chose {self.examples}: the noise scale of an example's gradient is "
            f"{self.noise_scale:.3g} at the start, and a direction costs {self.cost:.2g} "
            "example-passes beside its own"
        )


def choose(config: Config, task: Task) -> Choice:
    """Returns how many examples a direction should have.

    Args:
      config: the settings.
      task: built from them.
    """
    root = keys.root(config.seed, config.prng_impl)
    params, perturbation = task.init(root.init), phases.perturbation_of(config)
    batch = diagnostics.spread_examples(task.train, EXAMPLES)

    def measure(params: Params, batch: Batch) -> Array:
        return diagnostics.noise_scale(
            task.loss,
            params,
            batch,
            root.init,
            perturbation=perturbation,
            num_directions=DIRECTIONS,
            smoothing=config.smoothing,
        )

    scale = float(compilation.compiled(measure, (params, batch))(params, batch))
    cost = cost_of_a_direction(config, task, perturbation)
    return Choice(
        nearest(config.batch_size, math.sqrt(cost * scale / config.clients_per_round)), scale, cost
    )


def nearest(batch_size: int, wanted: float) -> int:
    """Returns the divisor of a batch that is nearest by ratio.

    >>> nearest(16, 3.0), nearest(16, 0.1), nearest(12, math.inf)
    (4, 1, 12)
    """
    divisors = [m for m in range(1, batch_size + 1) if batch_size % m == 0]
    if wanted >= batch_size:
        return batch_size
    return min(divisors, key=lambda m: abs(math.log(m / max(wanted, 1e-9))))


def cost_of_a_direction(config: Config, task: Task, perturbation: Perturbation) -> float:
    """Returns c, the work of a direction beside its passes, in passes of one example."""
    key = keys.root(config.seed, config.prng_impl).init
    params = jax.eval_shape(task.init, key)
    example = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), x.dtype), task.train.examples
    )
    if config.perturbation == "subspace":  # whose sums are cheaper, but for the bases
        perturbation = perturbations.low_rank(config.rank)
    program, _ = jaxprs.trace(task.loss, params, example)
    size = sum(x.size for x in jax.tree.leaves(params))
    if perturbation.combine is None:
        drawn, summed = size, 0
    else:  # factors, whose product is a term of the sum
        z = jax.eval_shape(perturbation.sample, key, params)
        leaves = jax.tree.leaves(z, is_leaf=lambda x: isinstance(x, sums.Factors))
        drawn = sum(x.size for x in jax.tree.leaves(z))
        summed = sum(2 * x.a.size * x.b.shape[-2] for x in leaves if isinstance(x, sums.Factors))
    each = FLOPS_OF_A_SIGN if config.perturbation == "rademacher" else FLOPS_OF_A_NUMBER
    work = DRAWS * each * drawn + summed
    return work / max(costs.of(program).products, 1)


def with_examples(config: Config, examples: int) -> Config:
    """Returns the config with the choice, and as many more directions as its groups need.

    >>> config = resolve({"batch_size": 16, "num_perturbations": 20})
    >>> with_examples(config, 1).num_perturbations
    32
    """
    given = {name: config.get(name) for name in config.given} | {"examples_per_direction": examples}
    groups = config.batch_size // examples
    if "num_perturbations" in given:
        given["num_perturbations"] = math.ceil(config.num_perturbations / groups) * groups
    return resolve(given)
