"""The algorithm of a config, and its phases."""

import bisect
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys
from zofl_jax.algorithms import Parts
from zofl_jax.algorithms.centred import centred
from zofl_jax.algorithms.history import with_history
from zofl_jax.algorithms.local_training import ClientOptimizer
from zofl_jax.algorithms.subspaces import in_subspaces
from zofl_jax.algorithms.warmup import warmed_up
from zofl_jax.configuration import choices, schedules, warmups, wrapping
from zofl_jax.configuration.config import Config
from zofl_jax.configuration.public import Calibration
from zofl_jax.core import Algorithm, Batch, Params, Phase, Task
from zofl_jax.directions import estimators, perturbations, scaling
from zofl_jax.directions.estimators import Estimator
from zofl_jax.directions.perturbations import Perturbation


def build_phases(config: Config, task: Task, public: Calibration | None = None) -> list[Phase]:
    """Returns the algorithm of each phase: of the warm-up, and of the schedule.

    The schedule's phases differ in their number of perturbations alone; learning rate and smoothing
    follow the round within them. Rounds that measure activations are phases of their own.

    Args:
      config: the settings.
      task: whose loss is lowered; its initial params and its data make the masks.
      public: what makes a sensitivity mask in place of its data.

    Raises:
      ValueError: for values out of range.
    """
    phases = _scheduled(config, task, public)
    if not config.warmup_rounds:
        return phases
    # Its own schedule's phases would be of perturbations, which it has no number of.
    first = _scheduled(warmups.config_of(config), task, public)[0].algorithm
    return [*warmed_up(first, phases, config.warmup_rounds)]


def _scheduled(config: Config, task: Task, public: Calibration | None) -> list[Phase]:
    """Returns the phases of a schedule, without a warm-up."""
    changes = schedules.parse_schedule(config.schedule)
    smoothing = schedules.piecewise(changes, "smoothing", config.smoothing)
    root = keys.root(config.seed, config.prng_impl)
    optimizer, perturbation = schedules.make_optimizer(config), perturbation_of(config)
    client_optimizer = schedules.make_client_optimizer(config)
    mask = _mask(config, task, root, public)
    if mask is not None:
        optimizer, client_optimizer, perturbation = (
            scaling.masked(optimizer, mask),
            _masked(client_optimizer, mask),
            scaling.scaled(perturbation, mask),
        )
    pool_key = keys.pool_key(root.shared)

    def algorithm(count: int, measuring: bool = False) -> Algorithm:
        def make(private: Callable[[Estimator], Estimator]) -> Algorithm:
            def make_estimator(directions: Perturbation) -> Estimator:
                return private(_estimator(config, count, smoothing, directions))

            def along(directions: Perturbation) -> Algorithm:
                own = dataclasses.replace(parts, perturbation=directions)
                return config.method.build(own, config.options)

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
            if config.perturbation == "subspace":
                own_key = jax.random.fold_in(pool_key, keys.name_id("subspaces"))
                return in_subspaces(
                    lambda z: along(z if mask is None else scaling.scaled(z, mask)),
                    own_key,
                    config.rank,
                    config.subspace_rounds,
                )
            if config.history:
                size = None if mask is None else sum(int(m.sum()) for m in jax.tree.leaves(mask))
                share = config.history_share
                return with_history(along, perturbation, config.history, share, size)
            if config.centre_rounds:
                shapes, at_once = batch_shapes(config, task), config.clients_at_once or None
                both = centred(along, perturbation, task.loss, shapes, at_once)
                return both.measuring if measuring else both.method
            return along(perturbation)

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
    rounds = schedules.parse_rounds(config.centre_rounds)
    return _measured(phases, rounds, algorithm(count, measuring=True)) if rounds else phases


def _measured(phases: list[Phase], rounds: list[int], measuring: Algorithm) -> list[Phase]:
    """Returns the phases with rounds of measuring among them, in place of theirs."""
    begin = [phase.first_round for phase in phases]
    firsts = sorted({*begin, *rounds, *(r + 1 for r in rounds)})

    def algorithm(r: int) -> Algorithm:
        return measuring if r in rounds else phases[bisect.bisect(begin, r) - 1].algorithm

    return [Phase(r, algorithm(r)) for r in firsts]


def batch_shapes(config: Config, task: Task) -> Batch:
    """Returns the shapes of one client's examples in a local step."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype),
        task.train.examples,
    )


def perturbation_of(config: Config) -> Perturbation:
    """Returns the directions of the settings, without a mask."""
    if config.perturbation == "subspace":
        return perturbations.gaussian()  # in their place until the rounds are known
    if config.perturbation == "low_rank":
        return perturbations.low_rank(config.rank)
    return getattr(perturbations, config.perturbation)()


def _mask(
    config: Config, task: Task, root: keys.RootKeys, public: Calibration | None
) -> Params | None:
    if config.mask == "none":
        return None
    params, density = task.init(root.init), config.mask_density
    if config.mask == "random":
        return scaling.random_mask(keys.pool_key(root.shared), params, density)
    if config.mask == "magnitude":
        return scaling.magnitude_mask(params, density)
    if public is not None:
        return scaling.sensitivity_mask(public.loss_fn, params, public.batch, density)
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
