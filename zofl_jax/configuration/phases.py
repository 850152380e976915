"""The algorithm of a config, and its phases."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys
from zofl_jax.algorithms import Parts
from zofl_jax.algorithms.local_training import ClientOptimizer
from zofl_jax.configuration import choices, schedules, wrapping
from zofl_jax.configuration.config import Config
from zofl_jax.core import Algorithm, Params, Phase, Task
from zofl_jax.directions import estimators, perturbations, scaling
from zofl_jax.directions.estimators import Estimator
from zofl_jax.directions.perturbations import Perturbation


def build_phases(config: Config, task: Task) -> list[Phase]:
    """Returns the algorithm of each phase of the schedule.

    Phases differ in their number of perturbations alone; learning rate and smoothing
    follow the round within them.

    Args:
      config: the settings.
      task: whose loss is lowered; its initial params and its data make the masks.

    Raises:
      ValueError: for values out of range.
    """
    changes = schedules.parse_schedule(config.schedule)
    smoothing = schedules.piecewise(changes, "smoothing", config.smoothing)
    root = keys.root(config.seed, config.prng_impl)
    optimizer, perturbation = schedules.make_optimizer(config), perturbation_of(config)
    client_optimizer = schedules.make_client_optimizer(config)
    mask = _mask(config, task, root)
    if mask is not None:
        optimizer, client_optimizer, perturbation = (
            scaling.masked(optimizer, mask),
            _masked(client_optimizer, mask),
            scaling.scaled(perturbation, mask),
        )
    pool_key = keys.pool_key(root.shared)

    def algorithm(count: int) -> Algorithm:
        def make(private: Callable[[Estimator], Estimator]) -> Algorithm:
            def make_estimator(directions: Perturbation) -> Estimator:
                return private(_estimator(config, count, smoothing, directions))

            parts = Parts(
                loss_fn=task.loss,
                optimizer=optimizer,
                client_optimizer=client_optimizer,
                # An array, not a constant of the program: runs at another rate share it.
                learning_rate=jnp.asarray(config.learning_rate),
                scheduled_rate=schedules.learning_rate(config),
                rate_factor=schedules.rate_factor(config),
                make_estimator=make_estimator,
                perturbation=perturbation,
                pool_key=pool_key,
                codec=wrapping.codec(config),
                rule=wrapping.robust_rule(config),
                local_steps=config.local_steps,
                clients_at_once=config.clients_at_once or None,
                share=config.clients_per_round / task.train.num_clients,
                delta=config.dp_delta,
            )
            return config.method.build(parts, config.options)

        guarded = wrapping.guarded(config, wrapping.make_private(config, make))
        sent = wrapping.compressed(config, guarded)
        return wrapping.compressed_broadcast(config, wrapping.with_late_uploads(config, sent))

    phases: list[Phase] = []
    previous = 0
    for change in changes:
        count = schedules.directions(config, change)
        if count != previous:
            phases.append(Phase(change.first_round, algorithm(count)))
        previous = count
    return phases


def perturbation_of(config: Config) -> Perturbation:
    """Returns the directions of the settings, without a mask."""
    if config.perturbation == "low_rank":
        return perturbations.low_rank(config.rank)
    return getattr(perturbations, config.perturbation)()


def _mask(config: Config, task: Task, root: keys.RootKeys) -> Params | None:
    if config.mask == "none":
        return None
    params, density = task.init(root.init), config.mask_density
    if config.mask == "random":
        return scaling.random_mask(keys.pool_key(root.shared), params, density)
    if config.mask == "magnitude":
        return scaling.magnitude_mask(params, density)
    batch = jax.tree.map(lambda x: x[: choices.CALIBRATION_EXAMPLES], task.train.examples)
    return scaling.sensitivity_mask(task.loss, params, batch, density)


def _masked(optimizer: ClientOptimizer, mask: Params) -> ClientOptimizer:
    if callable(optimizer):
        return lambda round_index: scaling.masked(optimizer(round_index), mask)
    return scaling.masked(optimizer, mask)


def _estimator(
    config: Config, count: int, smoothing: optax.Schedule, perturbation: Perturbation
) -> Estimator:
    at_once, groups = config.clients_at_once or None, config.groups
    if config.estimator == "projection":
        return estimators.projection(count, perturbation, at_once, groups)
    if config.estimator == "jvp":
        return estimators.forward_gradient(count, perturbation, at_once, groups)
    kinds = {"forward": estimators.forward_difference, "central": estimators.central_difference}
    together = config.perturbations_at_once or None
    return kinds[config.estimator](count, smoothing, perturbation, at_once, together, groups)
