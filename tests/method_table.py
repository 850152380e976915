"""Every method of the library, one row each: what `test_contract.py` runs.

A new method is one more row of `METHODS`: how it is made for a loss and a step size, and the step
size with which it learns the digits. What differs from such a row in a part alone (directions,
mask, estimator, rule) is a row of `VARIANTS`, tried on a quadratic. Phases of two methods have rows
of their own in `test_warmup.py`, which checks the same of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys
from zofl_jax.algorithms import (
    decomfl,
    decomfl_groups,
    fedadagrad,
    fedadam,
    fedavg,
    fedkseed,
    fedsgd,
    fedyogi,
    fedzo,
    feedsign,
    ferret,
    hiso,
    hybrid,
    mezo,
    scaffold,
)
from zofl_jax.algorithms.history import with_history
from zofl_jax.algorithms.step_rules import normalized, radazo, second_moment
from zofl_jax.algorithms.subspaces import in_subspaces
from zofl_jax.conditions import aggregation, privacy
from zofl_jax.conditions.compression import (
    compressed,
    compressed_broadcast,
    floats,
    integers,
    signs,
    top_k,
)
from zofl_jax.core import Algorithm, Batch, LossFn, Params, Task
from zofl_jax.directions import estimators, perturbations, scaling


class Method(NamedTuple):
    """One row.

    Attributes:
      make: (loss_fn, step size) -> the algorithm; of masked methods (loss_fn, step size, mask).
      rate: its step size, for softmax regression on the digits; a variant's is for a quadratic of
        20 dimensions.
      rounds: in which it takes a good part of the way.
      clients: (population, cohort).
      mask: (loss_fn, initial params, batch) -> a mask, of masked methods.
    """

    make: Callable[..., Algorithm]
    rate: float
    rounds: int = 40
    clients: tuple[int, int] = (8, 3)
    mask: Callable[[LossFn, Params, Batch], Params] | None = None

    def on(self, task: Task, rate: float) -> Algorithm:
        """Returns the algorithm for a task, its mask from the initial params and 64 examples."""
        if self.mask is None:
            return self.make(task.loss, rate)
        params = task.init(jax.random.key(0))
        batch = jax.tree.map(lambda x: jnp.asarray(x[:64]), task.train.examples)
        return self.make(task.loss, rate, self.mask(task.loss, params, batch))


def _central(num_perturbations: int = 10, perturbation=None) -> estimators.Estimator:
    return estimators.central_difference(num_perturbations, 1e-3, perturbation)


def _masked(loss: LossFn, rate: float, mask: Params) -> Algorithm:
    directions = scaling.scaled(perturbations.gaussian(), mask)
    return decomfl(loss, _central(perturbation=directions), scaling.masked(optax.sgd(rate), mask))


def _random_half(loss: LossFn, params: Params, batch: Batch) -> Params:
    return scaling.random_mask(jax.random.key(5), params, 0.5)


def _robust(rule: aggregation.Rule) -> Method:
    return Method(
        lambda loss, rate: decomfl(loss, _central(), optax.sgd(rate), aggregate=rule),
        rate=0.1,
        clients=(8, 6),
    )


def _hiso(loss: LossFn, rate: float, **options) -> Algorithm:
    return hiso(loss, lambda z: _central(10, z), optax.sgd(rate), **options)


def _fedkseed(loss: LossFn, rate: float, **options) -> Algorithm:
    pool_key = keys.pool_key(keys.root(0).shared)
    return fedkseed(loss, _central(1), rate, pool_key=pool_key, pool_size=512, **options)


def _fedavg(loss: LossFn, rate: float, **options) -> Algorithm:
    return fedavg(loss, optax.sgd(rate), local_steps=3, **options)


SCALAR = {
    "decomfl": Method(lambda loss, rate: decomfl(loss, _central(), optax.sgd(rate)), rate=0.05),
    "decomfl, local steps and momentum": Method(
        lambda loss, rate: decomfl(loss, _central(), optax.sgd(rate, momentum=0.9), local_steps=3),
        rate=0.005,
    ),
    "decomfl, forward differences and Adam": Method(
        lambda loss, rate: decomfl(
            loss, estimators.forward_difference(5, 1e-3), optax.adam(rate), local_steps=2
        ),
        rate=0.01,
    ),
    "decomfl, directions of a few examples each": Method(
        lambda loss, rate: decomfl(
            loss, estimators.forward_difference(32, 1e-3, groups=4), optax.sgd(rate)
        ),
        rate=0.05,
    ),
    "decomfl in int8 both ways": Method(
        lambda loss, rate: compressed_broadcast(
            compressed(decomfl(loss, _central(), optax.sgd(rate)), integers(8)),
            integers(8, stochastic=False),
        ),
        rate=0.05,
    ),
    "decomfl, projections on Rademacher directions": Method(
        lambda loss, rate: decomfl(
            loss, estimators.projection(10, perturbations.rademacher()), optax.sgd(rate)
        ),
        rate=0.05,
    ),
    "decomfl, groups with directions of their own": Method(
        lambda loss, rate: decomfl_groups(
            loss, _central(5), optax.sgd(rate, momentum=0.5), groups=2, local_steps=2
        ),
        rate=0.02,
    ),
    "hiso": Method(_hiso, rate=0.02),
    "hiso, local steps, the last one's curvature": Method(
        lambda loss, rate: _hiso(loss, rate, local_steps=2, learn_from="last"),
        rate=0.01,
    ),
    "fedkseed": Method(lambda loss, rate: _fedkseed(loss, rate, local_steps=10), rate=0.003),
    "fedkseed pro": Method(
        lambda loss, rate: _fedkseed(loss, rate, local_steps=10, pro=True),
        rate=0.003,
    ),
    "feedsign": Method(
        lambda loss, rate: feedsign(loss, _central(), optax.sgd(rate)),
        rate=0.05,
        rounds=80,
    ),
    "feedsign, private": Method(
        lambda loss, rate: feedsign(loss, _central(10), optax.sgd(rate), epsilon=2.0),
        rate=0.1,
        rounds=80,
    ),
    "ferret": Method(
        lambda loss, rate: ferret(loss, optax.sgd(rate), 40, local_steps=3),
        rate=1.0,
    ),
    "ferret, a pool of directions": Method(
        lambda loss, rate: ferret(
            loss,
            optax.sgd(rate),
            40,
            local_steps=2,
            pool_key=keys.pool_key(keys.root(0).shared),
            pool_size=5,
        ),
        rate=1.0,
    ),
    "mezo": Method(
        lambda loss, rate: mezo(loss, 1e-3, optax.sgd(rate)),
        rate=0.005,
        rounds=250,
        clients=(1, 1),
    ),
    "decomfl, random mask": Method(_masked, rate=0.1, rounds=60, mask=_random_half),
    "decomfl, subspaces of two rounds": Method(
        lambda loss, rate: in_subspaces(
            lambda z: decomfl(loss, _central(perturbation=z), optax.sgd(rate)),
            keys.pool_key(keys.root(0).shared),
            rank=3,
            rounds=2,
        ),
        rate=0.03,
    ),
    "decomfl, leaning towards its last updates": Method(
        lambda loss, rate: with_history(
            lambda z: decomfl(loss, _central(perturbation=z), optax.sgd(rate)),
            perturbations.gaussian(),
            length=4,
            share=0.2,
        ),
        rate=0.03,
    ),
    "decomfl in float16": Method(
        lambda loss, rate: compressed(
            decomfl(loss, _central(), optax.sgd(rate)), floats(jnp.float16)
        ),
        rate=0.05,
    ),
    "decomfl in bfloat16, stochastic": Method(
        lambda loss, rate: compressed(
            decomfl(loss, _central(), optax.sgd(rate)), floats(jnp.bfloat16, stochastic=True)
        ),
        rate=0.05,
    ),
    "decomfl in int8": Method(
        lambda loss, rate: compressed(decomfl(loss, _central(), optax.sgd(rate)), integers(8)),
        rate=0.05,
    ),
}

DENSE = {
    "fedzo": Method(
        lambda loss, rate: fedzo(loss, _central(), optax.sgd(rate), local_steps=2),
        rate=0.05,
    ),
    "fedsgd": Method(lambda loss, rate: fedsgd(loss, optax.sgd(rate)), rate=0.1),
    "fedavg": Method(_fedavg, rate=0.1),
    "fedprox": Method(lambda loss, rate: _fedavg(loss, rate, proximal=0.1), rate=0.1),
    "fedadam": Method(
        lambda loss, rate: fedadam(loss, optax.sgd(rate), 0.03, local_steps=3),
        rate=0.1,
    ),
    "fedyogi": Method(
        lambda loss, rate: fedyogi(loss, optax.sgd(rate), 0.03, local_steps=3),
        rate=0.1,
    ),
    "fedadagrad": Method(
        lambda loss, rate: fedadagrad(loss, optax.sgd(rate), 0.1, local_steps=3),
        rate=0.1,
    ),
    "fedavg, broadcast in bfloat16": Method(
        lambda loss, rate: compressed_broadcast(_fedavg(loss, rate), floats(jnp.bfloat16)),
        rate=0.1,
    ),
    "hybrid": Method(
        lambda loss, rate: hybrid(
            loss, _central(), optax.sgd(rate, momentum=0.5), optax.sgd(rate), local_steps=2
        ),
        rate=0.05,
    ),
    "scaffold": Method(
        lambda loss, rate: scaffold(loss, rate, share=3 / 8, local_steps=3),
        rate=0.1,
    ),
    "fedavg, top-k with error feedback": Method(
        lambda loss, rate: compressed(_fedavg(loss, rate), top_k(0.1), error_feedback=True),
        rate=0.1,
    ),
    "fedavg, QSGD": Method(
        lambda loss, rate: compressed(_fedavg(loss, rate), integers(4, scale="norm", bucket=64)),
        rate=0.1,
    ),
    "fedcom": Method(
        lambda loss, rate: compressed(_fedavg(loss, rate), integers(8)),
        rate=0.1,
    ),
    "fedavg, signs with error feedback": Method(
        lambda loss, rate: compressed(_fedavg(loss, rate), signs(), error_feedback=True),
        rate=0.1,
    ),
    "signsgd": Method(
        lambda loss, rate: compressed(fedsgd(loss, optax.sgd(rate)), signs(magnitude=False)),
        rate=0.01,
    ),
    "decomfl, private clients in a secure sum": Method(
        lambda loss, rate: privacy.fixed_point(
            privacy.client_level(
                decomfl(loss, _central(), optax.sgd(rate)), 50.0, 0.002, 3, delta=None
            ),
            16,
            200.0,
            3,
        ),
        rate=0.05,
    ),
    "decomfl, private examples": Method(
        lambda loss, rate: privacy.example_level(
            lambda private: decomfl(loss, private(_central()), optax.sgd(rate), local_steps=2),
            50.0,
            0.002,
            16,
            delta=None,
        ),
        rate=0.02,
    ),
    "fedsgd, median": Method(
        lambda loss, rate: fedsgd(loss, optax.sgd(rate), aggregate=aggregation.median),
        rate=0.1,
    ),
}
METHODS = SCALAR | DENSE

VARIANTS = {
    "magnitude mask": Method(
        _masked,
        rate=0.2,
        rounds=60,
        mask=lambda loss, params, batch: scaling.magnitude_mask(params, 0.5),
    ),
    "sensitivity mask": Method(
        _masked,
        rate=0.2,
        rounds=60,
        mask=lambda loss, params, batch: scaling.sensitivity_mask(loss, params, batch, 0.5),
    ),
    "forward gradients": Method(
        lambda loss, rate: decomfl(loss, estimators.forward_gradient(10), optax.sgd(rate)),
        rate=0.1,
    ),
    "low-rank directions, local steps and momentum": Method(
        lambda loss, rate: decomfl(
            loss,
            _central(perturbation=perturbations.low_rank(2)),
            optax.sgd(rate, momentum=0.5),
            local_steps=2,
        ),
        rate=0.03,
    ),
    "hiso, low-rank directions and local steps": Method(
        lambda loss, rate: _hiso(loss, rate, perturbation=perturbations.low_rank(), local_steps=2),
        rate=0.03,
    ),
    "hiso, the first local step's curvature": Method(
        lambda loss, rate: _hiso(loss, rate, local_steps=2, learn_from="first"), rate=0.03
    ),
    "hiso, all local steps' curvature": Method(
        lambda loss, rate: _hiso(loss, rate, local_steps=2, learn_from="all"), rate=0.03
    ),
    "fedkseed in int8": Method(
        lambda loss, rate: _fedkseed(loss, rate, local_steps=10, codec=integers(8)), rate=0.02
    ),
    "fedzo, shared directions": Method(
        lambda loss, rate: fedzo(
            loss, _central(), optax.sgd(rate), local_steps=2, shared_directions=True
        ),
        rate=0.1,
    ),
    "groups with low-rank directions in int8, local steps": Method(
        lambda loss, rate: decomfl_groups(
            loss,
            _central(perturbation=perturbations.low_rank(2)),
            optax.sgd(rate),
            groups=300,
            local_steps=2,
            codec=integers(8),
        ),
        rate=0.05,
    ),
    "normalised by the spread of the losses": Method(
        lambda loss, rate: decomfl(
            loss, _central(), optax.sgd(rate), local_steps=2, step_rule=normalized()
        ),
        rate=0.05,
    ),
    "one second moment, low-rank directions and local steps": Method(
        lambda loss, rate: decomfl(
            loss,
            _central(perturbation=perturbations.low_rank()),
            optax.sgd(rate, momentum=0.5),
            local_steps=2,
            step_rule=second_moment(),
        ),
        rate=0.01,
    ),
    "R-AdaZO": Method(
        lambda loss, rate: decomfl(loss, _central(), radazo(rate)),
        rate=0.1,
    ),
    "ferret, low-rank directions and what they don't say": Method(
        lambda loss, rate: ferret(
            loss, optax.sgd(rate), 10, perturbations.low_rank(2), local_steps=3, remainder=True
        ),
        rate=0.1,
    ),
    "trimmed mean": _robust(aggregation.trimmed_mean(0.2)),
    "Krum": _robust(aggregation.krum(1)),
    "multi-Krum": _robust(aggregation.multi_krum(1, 3)),
    "geometric median": _robust(aggregation.geometric_median()),
    "clipped mean": _robust(aggregation.clipped_mean(5.0)),
    "majority sign": _robust(aggregation.majority_sign(0.5)),
}
"""Rows of `decomfl` unless they name another method."""
