"""Every method of the library, one row each: what `test_contract.py` runs.

A new method is one more row: how it is made for a loss and a step size, and the step sizes
with which it descends on the digits and on a quadratic.
"""

from collections.abc import Callable
from typing import NamedTuple

import optax

from zofl_jax import estimators, perturbations
from zofl_jax.algorithms import decomfl
from zofl_jax.core import Algorithm, LossFn


class Method(NamedTuple):
    """One row.

    Attributes:
      make: (loss_fn, step size) -> the algorithm.
      digits: its step size for softmax regression on the digits.
      quadratic: its step size on a quadratic of 20 dimensions.
      rounds: in which it takes a good part of the way on both.
      clients: (population, cohort).
    """

    make: Callable[[LossFn, float], Algorithm]
    digits: float
    quadratic: float
    rounds: int = 40
    clients: tuple[int, int] = (8, 3)


def _central(num_perturbations: int = 10, perturbation=None) -> estimators.Estimator:
    return estimators.central_difference(num_perturbations, 1e-3, perturbation)


METHODS = {
    "decomfl": Method(
        lambda loss, rate: decomfl(loss, _central(), optax.sgd(rate)), digits=0.05, quadratic=0.1
    ),
    "decomfl, local steps and momentum": Method(
        lambda loss, rate: decomfl(loss, _central(), optax.sgd(rate, momentum=0.9), local_steps=3),
        digits=0.005,
        quadratic=0.01,
    ),
    "decomfl, forward differences and Adam": Method(
        lambda loss, rate: decomfl(
            loss, estimators.forward_difference(5, 1e-3), optax.adam(rate), local_steps=2
        ),
        digits=0.01,
        quadratic=0.05,
    ),
    "decomfl, projections on Rademacher directions": Method(
        lambda loss, rate: decomfl(
            loss, estimators.projection(10, perturbations.rademacher()), optax.sgd(rate)
        ),
        digits=0.05,
        quadratic=0.1,
    ),
}
