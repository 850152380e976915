"""FedZO: zeroth-order local training with dense uploads (Fang et al. 2022).

    client i:  y ← optimiser(y, (1/P) Σ_p g_p z_p) for K local steps, with directions of its own
               uploads x − y, as many numbers as there are params
    server:    x ← x − mean of the uploads

It is FedAvg on estimated gradients: what DeComFL's scalars save is the difference between the
two. Ref: arXiv 2201.09531, Algorithm 1.
"""

import dataclasses

from zofl_jax.algorithms.fedavg import dense
from zofl_jax.algorithms.local_training import ClientOptimizer, estimated
from zofl_jax.algorithms.method import Method, Parts, Refusal
from zofl_jax.core import Algorithm, LossFn
from zofl_jax.directions.estimators import Estimator
from zofl_jax.settings import setting


def fedzo(
    loss_fn: LossFn,
    estimator: Estimator,
    optimizer: ClientOptimizer,
    *,
    local_steps: int = 1,
    shared_directions: bool = False,
) -> Algorithm:
    """Returns FedZO as an `Algorithm`; its messages are trees like the params.

    Args:
      loss_fn: (params, batch) -> mean loss, [].
      estimator: of a local step.
      optimizer: of the clients, or round -> that round's; its state starts anew in every round.
      local_steps: K >= 1.
      shared_directions: whether clients draw from the round's key. Then at K = 1 with plain
        SGD the model is that of DeComFL. Their own directions average out better, and no one
        else can rebuild them.

    Raises:
      ValueError: if `local_steps` < 1.

    >>> import jax, jax.numpy as jnp, optax
    >>> from zofl_jax.directions import estimators
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> algorithm = fedzo(f, estimators.forward_difference(4, 1e-3), optax.sgd(0.1))
    >>> state, key = algorithm.init(jnp.zeros(3)), jax.random.key(0)
    >>> algorithm.client(key, state, (), jnp.ones((1, 3)), key).upload.shape
    (3,)
    """
    gradient = estimated(loss_fn, estimator)
    return dense(
        gradient,
        optimizer,
        local_steps=local_steps,
        shared_directions=shared_directions,
        passes=estimator.passes,
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of FedZO."""

    shared_directions: bool = setting(
        False, "Whether fedzo's clients draw directions from the round's key."
    )


def build(parts: Parts, options: Options) -> Algorithm:
    """Returns the algorithm of `METHOD`."""
    return fedzo(
        parts.loss_fn,
        parts.estimator,
        parts.client_optimizer,
        local_steps=parts.local_steps,
        shared_directions=options.shared_directions,
    )


METHOD = Method(
    "fedzo",
    build,
    order=0,
    summary="local descent by estimated gradients; the change of the model up (Fang et al. 2022)",
    options=Options,
    defaults={"momentum": 0.0},
    refuses={
        "history": Refusal("whose late clients are sent the model without its updates"),
        "centre_rounds": Refusal("whose late clients are sent the model without the means"),
    },
)
