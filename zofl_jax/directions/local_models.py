"""Local models of many clients without copies of the params.

From its second local step on a client's model is x + Σ_j c_j z_j with directions z_j that all
clients share, as long as the optimiser is linear: it then moves the params and each coefficient
alike. So what all clients share (weight decay, momentum from earlier rounds) is computed once
on the params, with directions of zero, and a client keeps the coefficients alone. SGD with
momentum and weight decay is linear; Adam is not, and its clients keep params of their own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zofl_jax.core import Array, Params


class LocalModel(NamedTuple):
    """A client's model in a round: params + Σ_j coefficients[j] z_j."""

    params: Params  # what all clients share
    opt_state: optax.OptState
    coefficients: Params  # a tree like params of arrays [J], a client's own
    coefficient_state: optax.OptState


def start(
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    num_directions: int,
) -> LocalModel:
    """Returns the model that a round starts from, all J coefficients zero."""
    zeros = jax.tree.map(lambda x: jnp.zeros(num_directions, _wide(x)), params)
    # The optimiser's own numbers, such as its count of steps, stay; its sums start at zero.
    state = optax.tree_utils.tree_map_params(
        optimizer, lambda _, zero: zero, opt_state, zeros, transform_non_params=lambda x: x
    )
    return LocalModel(params, opt_state, zeros, state)


def descend(
    optimizer: optax.GradientTransformation, model: LocalModel, first: Array | int, weights: Array
) -> LocalModel:
    """Returns the model after a step along Σ_p weights[p] z[first + p].

    Args:
      optimizer: a linear one, see `is_linear`.
      model: before the step.
      first: the first of the step's directions among all J.
      weights: [P].
    """
    along = jax.tree.map(
        lambda c: jax.lax.dynamic_update_slice_in_dim(
            jnp.zeros_like(c), weights.astype(c.dtype), first, 0
        ),
        model.coefficients,
    )
    nowhere = jax.tree.map(jnp.zeros_like, model.params)
    params, opt_state = _apply(optimizer, nowhere, model.params, model.opt_state)
    own, own_state = _apply(optimizer, along, model.coefficients, model.coefficient_state)
    return LocalModel(params, opt_state, own, own_state)


def is_linear(optimizer: optax.GradientTransformation, params: Params) -> bool:
    """Returns whether the optimiser moves params + Σ_j c_j z_j as it moves the c_j.

    It is tried on arrays of the same structure with sides of at most two, for directions of
    very different lengths. `params` may be shapes; nothing is traced.

    >>> x = {"w": jnp.zeros((3, 4))}
    >>> is_linear(optax.sgd(0.1, momentum=0.9), x), is_linear(optax.adam(0.1), x)
    (True, False)
    """
    with jax.ensure_compile_time_eval():
        random = np.random.default_rng(0)

        def draw(scale: float) -> Params:
            return jax.tree.map(
                lambda x: jnp.asarray(
                    scale * random.standard_normal([min(n, 2) for n in x.shape]), _wide(x)
                ),
                params,
            )

        for scale in (1e-4, 1.0, 1e4):
            x = draw(scale)
            state = optimizer.init(x)
            # A state that is not the first one.
            x, state = _apply(optimizer, draw(scale), x, state)
            directions = [draw(scale) for _ in range(3)]
            model = start(optimizer, x, state, len(directions))
            for j, z in enumerate(directions):
                x, state = _apply(optimizer, z, x, state)
                model = descend(optimizer, model, j, jnp.ones(1))
            expected = jax.tree.map(
                lambda y, c, *zs: y + sum(c[j] * z for j, z in enumerate(zs)),
                model.params,
                model.coefficients,
                *directions,
            )
            if not _close(x, expected):
                return False
    return True


def _apply(
    optimizer: optax.GradientTransformation, direction: Params, params: Params, state: Any
) -> tuple[Params, Any]:
    updates, state = optimizer.update(direction, state, params)
    return optax.apply_updates(params, updates), state


def _close(x: Params, y: Params) -> bool:
    def leaf(a: Array, b: Array) -> bool:
        largest = max(float(jnp.max(jnp.abs(a), initial=0.0)), 1e-30)
        return bool(jnp.max(jnp.abs(a - b), initial=0.0) <= 1e-5 * largest)

    return all(jax.tree.leaves(jax.tree.map(leaf, x, y)))


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
