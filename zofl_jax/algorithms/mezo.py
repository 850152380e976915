"""MeZO: fine-tuning with forward passes alone, on one machine (Malladi et al. 2023).

    g = (f(x + μz; ξ) − f(x − μz; ξ)) / 2μ,   x ← optimiser(x, g z)

It is DeComFL with one client, one direction and one local step, and here it is made so: run it
with a population of one. What the ledger then counts would be sent if model and data lay on two
machines. Ref: arXiv 2305.17333, Algorithm 1.
"""

import optax

from zofl_jax.algorithms.decomfl import StepOptions, build, decomfl
from zofl_jax.algorithms.method import Method, Refusal
from zofl_jax.core import Algorithm, LossFn
from zofl_jax.directions.estimators import central_difference
from zofl_jax.directions.perturbations import Perturbation


def mezo(
    loss_fn: LossFn,
    smoothing: float | optax.Schedule,
    optimizer: optax.GradientTransformation,
    *,
    num_perturbations: int = 1,
    perturbation: Perturbation | None = None,
) -> Algorithm:
    """Returns MeZO (n-SPSA with n = `num_perturbations`) as an `Algorithm`.

    Args:
      loss_fn: (params, batch) -> mean loss, [].
      smoothing: μ > 0, 1e-3 in the paper.
      optimizer: `optax.sgd` in the paper.
      num_perturbations: P >= 1, 1 in the paper.
      perturbation: of z, Gaussian unless given.

    >>> import jax.numpy as jnp
    >>> algorithm = mezo(lambda x, batch: jnp.sum(x**2), 1e-3, optax.sgd(0.1))
    >>> algorithm.local_steps
    1
    """
    estimator = central_difference(num_perturbations, smoothing, perturbation)
    return decomfl(loss_fn, estimator, optimizer)


METHOD = Method(
    "mezo",
    build,  # with one client, one direction and one step
    order=0,
    summary="one place that has all data, one direction a step (Malladi et al. 2023)",
    options=StepOptions,
    defaults={"num_perturbations": 1, "momentum": 0.0},
    fixed={
        "local_steps": 1,
        "estimator": "central",
        "num_clients": 1,
        "clients_per_round": 1,
    },
    refuses={"partition": Refusal("which has all data in one place", ("natural",))},
)
