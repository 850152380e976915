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
Ref: arXiv 2405.15861, Algorithms 3 and 4 (Algorithm 5 with the `projection` estimator).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys, precision
from zofl_jax.algorithms.method import Method, NoOptions, Parts
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


def decomfl(
    loss_fn: LossFn,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    *,
    local_steps: int = 1,
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
      aggregate: (uploads [C, K, P], weights [C]) -> broadcast [K, P].

    Raises:
      ValueError: if `local_steps` < 1.

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

    def descend(
        key: PRNGKey, params: Params, opt_state: optax.OptState, scalars: Array
    ) -> tuple[Params, optax.OptState]:
        direction = estimator.expand(key, params, scalars)
        updates, opt_state = optimizer.update(direction, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def init(params: Params) -> ServerState:
        params = precision.wide(params)
        return ServerState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

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
            model, scalars = carry
            k, batch = inputs
            model = local_models.descend(
                optimizer, model, (k - 1) * num_perturbations, scalars / num_perturbations
            )
            estimate = measure(k, combine(model.params, used, model.coefficients), batch)
            return (model, estimate.scalars), estimate

        rest = (jnp.arange(1, local_steps), jax.tree.map(lambda b: b[1:], batches))
        later: Estimate
        if combine is not None and local_models.is_linear(optimizer, state.params):
            used = keys.directions_of_steps(shared_key, local_steps - 1, num_perturbations)
            model = local_models.start(optimizer, state.params, state.opt_state, used.size)
            _, later = jax.lax.scan(step_in_common, (model, scalars), rest)
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


def build(parts: Parts, options: NoOptions) -> Algorithm:
    """Returns the algorithm of `METHOD`."""
    return decomfl(parts.loss_fn, parts.estimator, parts.optimizer, local_steps=parts.local_steps)


METHOD = Method(
    "decomfl",
    build,
    order=0,
    summary="K local steps along P shared directions; K·P scalars up and down (Li et al. 2025)",
    coefficients=True,
)
