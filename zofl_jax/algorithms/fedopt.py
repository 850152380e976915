"""FedAdam, FedYogi and FedAdagrad: FedAvg with an adaptive server (Reddi et al. 2021).

    m ← β₁ m + (1 − β₁) Δ                        Δ the cohort's mean x − y_i
    v ← v + Δ²                                   FedAdagrad
        v − (1 − β₂) Δ² sign(v − Δ²)             FedYogi
        β₂ v + (1 − β₂) Δ²                       FedAdam
    x ← x − η m / (√v + τ),   v_0 = τ²

There is no bias correction, as in the paper, so they differ from `optax.adam`.
Ref: arXiv 2003.00295, Algorithm 2.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofl_jax.algorithms.fedavg import fedavg
from zofl_jax.algorithms.local_training import ClientOptimizer
from zofl_jax.algorithms.method import Method, Parts
from zofl_jax.core import Algorithm, Array, LossFn, Params
from zofl_jax.settings import positive, setting, share


class Moments(NamedTuple):
    """The state of the server's optimiser."""

    first: Params
    second: Params


def fedadam(
    loss_fn: LossFn,
    optimizer: ClientOptimizer,
    server_rate: float,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    **options: Any,
) -> Algorithm:
    """Returns FedAdam.

    Args:
      loss_fn: (params, batch) -> mean loss, differentiable.
      optimizer: of the clients, or round -> that round's.
      server_rate: η > 0.
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      tau: τ > 0, the degree of adaptivity.
      **options: of `fedavg`.

    Raises:
      ValueError: for arguments out of range.

    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> fedadam(f, optax.sgd(0.5), 0.1, local_steps=2).local_steps
    2
    """
    _check_decay("b2", b2)

    def second(v: Array, square: Array) -> Array:
        return b2 * v + (1 - b2) * square

    server = _adaptive(server_rate, b1, tau, second)
    return fedavg(loss_fn, optimizer, server_optimizer=server, **options)


def fedyogi(
    loss_fn: LossFn,
    optimizer: ClientOptimizer,
    server_rate: float,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    **options: Any,
) -> Algorithm:
    """Returns FedYogi, whose v falls slowly; arguments and errors as `fedadam`."""
    _check_decay("b2", b2)

    def second(v: Array, square: Array) -> Array:
        return v - (1 - b2) * square * jnp.sign(v - square)

    server = _adaptive(server_rate, b1, tau, second)
    return fedavg(loss_fn, optimizer, server_optimizer=server, **options)


def fedadagrad(
    loss_fn: LossFn,
    optimizer: ClientOptimizer,
    server_rate: float,
    *,
    b1: float = 0.0,
    tau: float = 1e-3,
    **options: Any,
) -> Algorithm:
    """Returns FedAdagrad, whose v never falls; arguments and errors as `fedadam`."""
    server = _adaptive(server_rate, b1, tau, lambda v, square: v + square)
    return fedavg(loss_fn, optimizer, server_optimizer=server, **options)


def _adaptive(
    rate: float, b1: float, tau: float, second_moment: Callable[[Array, Array], Array]
) -> optax.GradientTransformation:
    _check_decay("b1", b1)
    for name, value in (("server_rate", rate), ("tau", tau)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")

    def init(params: Params) -> Moments:
        return Moments(
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(lambda x: jnp.full_like(x, tau**2), params),
        )

    def update(change: Params, moments: Moments, params: Any = None) -> tuple[Params, Moments]:
        del params
        first = jax.tree.map(lambda m, c: b1 * m + (1 - b1) * c, moments.first, change)
        second = jax.tree.map(lambda v, c: second_moment(v, c * c), moments.second, change)
        step = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + tau), first, second)
        return step, Moments(first, second)

    return optax.GradientTransformation(init, update)


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


@dataclasses.dataclass(frozen=True)
class ServerRate:
    """The setting of methods whose server has a rate of its own."""

    server_learning_rate: float = setting(
        0.01, "Server's rate in methods that have one.", within=positive()
    )


@dataclasses.dataclass(frozen=True)
class Options(ServerRate):
    """The settings of all three methods."""

    server_beta1: float = setting(
        0.9, "β₁ of the server's first moment.", within=share(below_one=True)
    )
    tau: float = setting(1e-3, "τ of adaptive servers.")


@dataclasses.dataclass(frozen=True)
class DecayingOptions(Options):
    """The settings of those whose second moment is forgotten."""

    server_beta2: float = setting(
        0.99, "β₂ of the server's second moment.", within=share(below_one=True)
    )


def _build(algorithm: Callable[..., Algorithm]) -> Callable[[Parts, Options], Algorithm]:
    def build(parts: Parts, options: Options) -> Algorithm:
        second = {"b2": options.server_beta2} if isinstance(options, DecayingOptions) else {}
        return algorithm(
            parts.loss_fn,
            parts.client_optimizer,
            options.server_learning_rate,
            b1=options.server_beta1,
            **second,
            tau=options.tau,
            local_steps=parts.local_steps,
            clients_at_once=parts.clients_at_once,
        )

    return build


METHODS = (
    Method(
        "fedadam",
        _build(fedadam),
        order=1,
        summary="fedavg whose server follows Adam (Reddi et al. 2021)",
        options=DecayingOptions,
        defaults={"momentum": 0.0},
    ),
    Method(
        "fedyogi",
        _build(fedyogi),
        order=1,
        summary="fedavg whose server follows Yogi (Reddi et al. 2021)",
        options=DecayingOptions,
        defaults={"momentum": 0.0},
    ),
    Method(
        "fedadagrad",
        _build(fedadagrad),
        order=1,
        summary="fedavg whose server follows Adagrad (Reddi et al. 2021)",
        options=Options,
        defaults={"momentum": 0.0, "server_learning_rate": 0.1, "server_beta1": 0.0},
    ),
)
