"""What a method's messages are, told by their shapes.

The method is built for a loss of three params and traced, not run: it takes some milliseconds.
"""

import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys
from zofl_jax.algorithms import METHODS, Parts
from zofl_jax.conditions import aggregation
from zofl_jax.configuration.config import Config
from zofl_jax.core import Array, Batch, Params
from zofl_jax.directions import estimators, perturbations
from zofl_jax.engine import ledger


class Upload(enum.Enum):
    """What an upload is."""

    SCALARS = "one array of numbers"
    PARAMS = "a tree like the params"
    TREES = "several trees like the params"
    SEEDS = "numbers, and codes of the directions that they belong to"
    BITS = "codes or bits alone"

    @property
    def numbers(self) -> bool:
        """Whether it holds floating point numbers alone, which can be summed and sorted."""
        return self in (Upload.SCALARS, Upload.PARAMS, Upload.TREES)


def upload(config: Config) -> Upload:
    """Returns what the uploads of a config's method are, with nothing put around it."""
    return kind_of_upload(config.algorithm, config.options)


def kind_of_upload(name: str, options: Any = None) -> Upload:
    """Returns what the uploads of a method are.

    >>> kind_of_upload("decomfl")
    <Upload.SCALARS: 'one array of numbers'>
    """
    sent = _traced(name, options).upload
    leaves = jax.tree.leaves(sent)
    floating = _floating(sent)
    if not any(floating):
        return Upload.BITS
    if not all(floating):
        return Upload.SEEDS
    if isinstance(sent, dict) and sent.keys() == _PARAMS.keys():
        return Upload.PARAMS
    return Upload.SCALARS if len(leaves) == 1 else Upload.TREES


def numbers_are_broadcast(config: Config) -> bool:
    """Returns whether broadcasts of a config's method are floating point numbers alone."""
    return all(_floating(_traced(config.algorithm, config.options).broadcast))


_PARAMS = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}


def _floating(message: Any) -> list[bool]:
    return [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(message)]


@functools.lru_cache(maxsize=256)
def _traced(name: str, options: Any) -> ledger.MessageShapes:
    """Returns the shapes of the messages of a method for `_PARAMS`."""
    method = METHODS[name]
    count = method.fixed.get("num_perturbations", 2)
    optimizer = optax.sgd(0.1)
    root = keys.root(0)
    parts = Parts(
        loss_fn=_loss,
        optimizer=optimizer,
        client_optimizer=optimizer,
        learning_rate=jnp.asarray(0.1),
        scheduled_rate=jnp.asarray(0.1),
        rate_factor=None,
        make_estimator=lambda z: estimators.central_difference(count, 1e-3, z),
        perturbation=perturbations.gaussian(),
        pool_key=keys.pool_key(root.shared),
        codec=None,
        rule=aggregation.mean,
        local_steps=method.fixed.get("local_steps", 2),
        clients_at_once=None,
        share=1.0,
        delta=1e-5,
    )
    algorithm = method.build(parts, method.options() if options is None else options)
    batches = jax.ShapeDtypeStruct((algorithm.local_steps, 1), jnp.float32)
    return ledger.message_shapes(algorithm, root.shared, _PARAMS, batches)


def _loss(params: Params, batch: Batch) -> Array:
    return jnp.sum(jnp.square(params["x"])) + 0 * jnp.sum(batch)
