"""HiSo: curvature learnt from the broadcasts alone (Li et al. 2025).

A diagonal curvature H, part of the state that all share, shapes the directions:

    z[k,p] = H^(−1/2) u[k,p],  u ~ N(0, I)
    Δx_k = (1/P) Σ_p ḡ[k,p] z[k,p],  x ← optimiser(x, Δx_k)
    after the round  H ← (1 − ν) H + ν (Δx_k² + ε),  H_0 = 1

Since E[Δx] = H⁻¹ ∇f, a step is a preconditioned one, and not a byte more is sent than in
DeComFL: whoever replays the scalars has H. ε is the floor of H, so 1/ε bounds how far a flat
coordinate is stretched. Within a round H stays as it was at its start. With directions enough
that Δx ≈ H⁻¹ ∇f, H settles near |∇f|^(2/3): a condition number κ falls to about κ^(2/3), not to 1,
where the loss is spread evenly over the coordinates of a quadratic.
Ref: arXiv 2506.02370, Algorithm 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofl_jax import precision
from zofl_jax.algorithms.decomfl import decomfl
from zofl_jax.algorithms.method import Method, Parts, Refusal
from zofl_jax.core import (
    Algorithm,
    Array,
    Batches,
    Broadcast,
    ClientResult,
    LossFn,
    Params,
    PRNGKey,
    ServerState,
)
from zofl_jax.directions.estimators import Estimator
from zofl_jax.directions.perturbations import Perturbation, gaussian
from zofl_jax.directions.scaling import scaled
from zofl_jax.settings import setting


class HisoState(NamedTuple):
    """What HiSo keeps beside the params: the `opt_state` of its `ServerState`."""

    inner: optax.OptState
    curvature: Params  # H, in the dtype of the params


def hiso(
    loss_fn: LossFn,
    make_estimator: Callable[[Perturbation], Estimator],
    optimizer: optax.GradientTransformation,
    *,
    nu: float = 0.01,
    epsilon: float = 1e-3,
    learn_from: Literal["first", "last", "all"] = "all",
    perturbation: Perturbation | None = None,
    local_steps: int = 1,
) -> Algorithm:
    """Returns HiSo as an `Algorithm`; its messages are those of DeComFL, [K, P].

    Args:
      loss_fn: (params, batch) -> mean loss, [].
      make_estimator: from the stretched directions to an estimator.
      optimizer: applied to Δx, `optax.sgd` in the paper.
      nu: ν in [0, 1), the share of the newest step in H; 0 is DeComFL.
      epsilon: ε > 0, in units of Δx².
      learn_from: the local steps whose Δx enter H.
      perturbation: of u, Gaussian unless given.
      local_steps: K >= 1.

    Raises:
      ValueError: for arguments out of range.

    >>> from zofl_jax.directions import estimators
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> algorithm = hiso(f, lambda z: estimators.central_difference(4, 1e-3, z), optax.sgd(0.1))
    >>> state = algorithm.init(jnp.zeros(3))
    >>> state.opt_state.curvature.tolist()
    [1.0, 1.0, 1.0]
    """
    if not 0 <= nu < 1:
        raise ValueError(f"nu must be in [0, 1), got {nu}")
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if learn_from not in ("first", "last", "all"):
        raise ValueError(f"learn_from must be 'first', 'last' or 'all', got {learn_from!r}")
    base = perturbation or gaussian()

    def in_the_metric_of(curvature: Params, optimizer: optax.GradientTransformation) -> Algorithm:
        factors = jax.tree.map(lambda h: 1 / jnp.sqrt(h), curvature)
        estimator = make_estimator(scaled(base, factors))
        return decomfl(loss_fn, estimator, optimizer, local_steps=local_steps)

    def learning() -> optax.GradientTransformation:
        """The optimiser, whose state also counts the steps of a round and learns H."""

        def update(direction: Params, state: tuple, params: Params) -> tuple[Params, tuple]:
            inner, curvature, step = state
            chosen = {"first": step == 0, "last": step == local_steps - 1, "all": True}[learn_from]

            def learn(h: Array, x: Array) -> Array:
                square = jnp.square(x.astype(h.dtype))
                return jnp.where(chosen, (1 - nu) * h + nu * (square + epsilon), h)

            updates, inner = optimizer.update(direction, inner, params)
            return updates, (inner, jax.tree.map(learn, curvature, direction), step + 1)

        def init(params: Params) -> Any:
            raise NotImplementedError

        return optax.GradientTransformation(init, update)

    def init(params: Params) -> ServerState:
        params = precision.wide(params)
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params)
        opt_state = HisoState(optimizer.init(params), ones)
        return ServerState(params, opt_state, jnp.zeros((), jnp.int32))

    def client(
        shared_key: PRNGKey, state: ServerState, memory: tuple, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        # Without learning H: what a client expects of the round's end it forgets anyway.
        inner, curvature = state.opt_state
        algorithm = in_the_metric_of(curvature, optimizer) if nu else plain
        return algorithm.client(
            shared_key, state._replace(opt_state=inner), memory, batches, own_key
        )

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        inner, curvature = state.opt_state
        algorithm = in_the_metric_of(curvature, learning())
        carried = (inner, curvature, jnp.zeros((), jnp.int32))
        after = algorithm.server(key, state._replace(opt_state=carried), broadcast)
        return after._replace(opt_state=HisoState(*after.opt_state[:2]))

    def server_without_learning(
        key: PRNGKey, state: ServerState, broadcast: Broadcast
    ) -> ServerState:
        inner, curvature = state.opt_state
        after = plain.server(key, state._replace(opt_state=inner), broadcast)
        return after._replace(opt_state=HisoState(after.opt_state, curvature))

    plain = decomfl(loss_fn, make_estimator(base), optimizer, local_steps=local_steps)
    # Without learning H stays 1, and multiplying by it might round otherwise than DeComFL.
    replayed = server if nu else server_without_learning
    return Algorithm(init, client, plain.aggregate, replayed, local_steps, passes=plain.passes)


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of HiSo."""

    hiso_nu: float = setting(0.01, "ν of hiso, the newest step's share in the curvature.")
    hiso_epsilon: float = setting(1e-3, "ε of hiso, the floor of the curvature.")
    hiso_learn_from: Literal["first", "last", "all"] = setting(
        "all", "Local steps that hiso learns from.", choices=("first", "last", "all")
    )


def build(parts: Parts, options: Options) -> Algorithm:
    """Returns the algorithm of `METHOD`."""
    return hiso(
        parts.loss_fn,
        parts.make_estimator,
        parts.optimizer,
        nu=options.hiso_nu,
        epsilon=options.hiso_epsilon,
        learn_from=options.hiso_learn_from,
        perturbation=parts.perturbation,
        local_steps=parts.local_steps,
    )


METHOD = Method(
    "hiso",
    build,
    order=0,
    summary="DeComFL in a diagonal metric learnt from the broadcasts (Li et al. 2025)",
    options=Options,
    defaults={"momentum": 0.0},
    refuses={
        "centre_rounds": Refusal("which stretches its directions, back towards the means"),
        "late_weight": Refusal(
            "which keeps no curvature of the round before to draw its directions in"
        ),
    },
)
