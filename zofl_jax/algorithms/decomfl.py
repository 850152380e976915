"""DeComFL: communication independent of the model's size (Li et al., ICLR 2025).

Round r, shared key s_r, cohort C_r, K local steps, P directions z[k,p] drawn from s_r:

    client i, from x = x_r:   for k = 1..K:
        g_i[k,p] ≈ ⟨∇f_i(x; ξ_k), z[k,p]⟩
        x ← optimiser(x, (1/P) Σ_p g_i[k,p] z[k,p])
      uploads g_i, K·P scalars, and forgets x
    server: broadcasts ḡ = mean_i g_i
    everyone, from x_r: the same K optimiser steps with ḡ in place of g_i

The update after a client's last local step is never needed, so it is not computed. With
low-rank directions and a linear optimiser no client has params of its own: see `local_models.py`.
A step rule divides a step's scalars by a number that they tell (FZOO, MEAZO): see `step_rules.py`.
Ref: arXiv 2405.15861, Algorithms 3 and 4 (Algorithm 5 with the `projection` estimator).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys, precision
from zofl_jax.algorithms.method import Method, Parts
from zofl_jax.algorithms.step_rules import RULES, StepRule, WithRule
from zofl_jax.conditions import aggregation
from zofl_jax.core import (
    Algorithm,
    Array,
    Batch,
    Batches,
    Broadcast,
    ClientResult,
    LossFn,
    Params,
    PRNGKey,
    ServerState,
    Upload,
)
from zofl_jax.directions import local_models
from zofl_jax.directions.estimators import Estimate, Estimator
from zofl_jax.settings import setting, share


def decomfl(
    loss_fn: LossFn,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    *,
    local_steps: int = 1,
    step_rule: StepRule | None = None,
    aggregate: Callable[[Upload, Array], Broadcast] = aggregation.mean,
) -> Algorithm:
    """Returns DeComFL as an `Algorithm`; the upload and the broadcast are [K, P].

    Args:
      loss_fn: (params, batch) -> mean loss, [].
      estimator: how a step's P scalars are measured and expanded.
      optimizer: any optax optimiser. Its state is part of the shared `ServerState`:
        clients start a round from it and discard theirs, so it is replayed like the
        params. Its step count advances by K a round.
      local_steps: K >= 1.
      step_rule: what a step's scalars are divided by; its state is shared and replayed as that of
        the optimiser.
      aggregate: (uploads [C, K, P], weights [C]) -> broadcast [K, P].

    Raises:
      ValueError: if `local_steps` < 1, or for fewer scalars than the rule needs.

    >>> from zofl_jax.directions import estimators
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> algorithm = decomfl(f, estimators.central_difference(4, 1e-3), optax.sgd(0.1))
    >>> state = algorithm.init(jnp.zeros(3))
    >>> key = jax.random.key(0)
    >>> result = algorithm.client(key, state, (), jnp.ones((1, 3)), jax.random.key(1))
    >>> result.upload.shape
    (1, 4)
    >>> int(algorithm.server(key, state, result.upload).round)
    1
    """
    if local_steps < 1:
        raise ValueError(f"local_steps must be >= 1, got {local_steps}")
    if step_rule is not None and estimator.num_perturbations < step_rule.least:
        raise ValueError(
            f"the step rule needs num_perturbations >= {step_rule.least}, got "
            f"{estimator.num_perturbations}"
        )

    def ruled(opt_state: Any, scalars: Array) -> tuple[Array, Any]:
        """Returns what stands for a step's scalars, and the state after the rule."""
        if step_rule is None:
            return scalars, opt_state
        scalars, rule = step_rule.update(opt_state.rule, scalars)
        return scalars, opt_state._replace(rule=rule)

    def inner(opt_state: Any) -> optax.OptState:
        return opt_state if step_rule is None else opt_state.inner

    def descend(key: PRNGKey, params: Params, opt_state: Any, scalars: Array) -> tuple[Params, Any]:
        scalars, opt_state = ruled(opt_state, scalars)
        direction = estimator.expand(key, params, scalars)
        updates, moved = optimizer.update(direction, inner(opt_state), params)
        after = moved if step_rule is None else opt_state._replace(inner=moved)
        return optax.apply_updates(params, updates), after

    def init(params: Params) -> ServerState:
        params = precision.wide(params)
        state = optimizer.init(params)
        start = state if step_rule is None else WithRule(state, step_rule.init())
        return ServerState(params, start, jnp.zeros((), jnp.int32))

    def client(
        shared_key: PRNGKey, state: ServerState, memory: tuple, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        del own_key  # every direction is shared

        def measure(k: Array | int, params: Params, batch: Batch) -> Estimate:
            return estimator.measure(
                loss_fn, keys.step_key(shared_key, k), state.round, params, batch
            )

        # The first step stands apart from the loop: there the params are the same for
        # all clients of a vmap, and inside the loop every client has its own.
        scalars, loss = measure(0, state.params, jax.tree.map(lambda b: b[0], batches))
        if local_steps == 1:
            return ClientResult(scalars[None], memory, {"loss": loss})

        def step(carry: tuple, inputs: tuple) -> tuple:
            params, opt_state, scalars = carry
            k, batch = inputs
            params, opt_state = descend(
                keys.step_key(shared_key, k - 1), params, opt_state, scalars
            )
            estimate = measure(k, params, batch)
            return (params, opt_state, estimate.scalars), estimate

        num_perturbations = estimator.num_perturbations
        combine = estimator.perturbation.combine

        def step_in_common(carry: tuple, inputs: tuple) -> tuple:
            assert combine is not None
            model, opt_state, scalars = carry
            k, batch = inputs
            scalars, opt_state = ruled(opt_state, scalars)
            model = local_models.descend(
                optimizer, model, (k - 1) * num_perturbations, scalars / num_perturbations
            )
            estimate = measure(k, combine(model.params, used, model.coefficients), batch)
            return (model, opt_state, estimate.scalars), estimate

        rest = (jnp.arange(1, local_steps), jax.tree.map(lambda b: b[1:], batches))
        later: Estimate
        if combine is not None and local_models.is_linear(optimizer, state.params):
            used = keys.directions_of_steps(shared_key, local_steps - 1, num_perturbations)
            begun = inner(state.opt_state)
            model = local_models.start(optimizer, state.params, begun, used.size)
            rule = state.opt_state._replace(inner=()) if step_rule else ()
            _, later = jax.lax.scan(step_in_common, (model, rule, scalars), rest)
        else:
            _, later = jax.lax.scan(step, (state.params, state.opt_state, scalars), rest)
        upload = jnp.concatenate([scalars[None], later.scalars])
        return ClientResult(upload, memory, {"loss": (loss + later.loss.sum()) / local_steps})

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        def step(carry: tuple, inputs: tuple) -> tuple:
            params, opt_state = carry
            k, scalars = inputs
            return descend(keys.step_key(key, k), params, opt_state, scalars), None

        (params, opt_state), _ = jax.lax.scan(
            step, (state.params, state.opt_state), (jnp.arange(local_steps), broadcast)
        )
        return ServerState(params, opt_state, state.round + 1)

    passes = estimator.passes.times(local_steps)
    return Algorithm(init, client, aggregate, server, local_steps, passes=passes)


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The settings of the step rule."""

    step_rule: str = setting(
        next(iter(RULES)),
        "What a step's scalars are divided by: nothing (plain), their standard deviation (fzoo), "
        "or the root of a running mean of their squared mean (meazo).",
        choices=RULES,
    )
    step_decay: float = setting(
        0.99, "β of the running mean of --step_rule=meazo.", within=share(below_one=True)
    )


def build(parts: Parts, options: StepOptions) -> Algorithm:
    """Returns the algorithm of `METHOD`."""
    return decomfl(
        parts.loss_fn,
        parts.estimator,
        parts.optimizer,
        local_steps=parts.local_steps,
        step_rule=RULES[options.step_rule].make(options.step_decay),
    )


METHOD = Method(
    "decomfl",
    build,
    order=0,
    summary="K local steps along P shared directions; K·P scalars up and down (Li et al. 2025)",
    options=StepOptions,
    coefficients=True,
)
