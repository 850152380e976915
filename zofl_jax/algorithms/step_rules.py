"""How long a step is, told by the P scalars of the step alone, so that everyone replays it.

A rule divides a step's scalars g_1, ..., g_P by one number before they become the direction
ĝ = (1/P) Σ_p g_p z_p that the optimiser follows:

    normalized (FZOO)      σ = the standard deviation of the g_p
    second moment (MEAZO)  √v̂,  v ← β v + (1 − β) (mean_p g_p)²,  v̂ = v / (1 − βᵗ) at step t

FZOO divides by the standard deviation of the P perturbed losses. Those of forward differences are
f(x) + μ g_p, so it is μ σ, and of the cohort's mean loss it is that of the mean scalars: nothing
more is sent, and the paper's rate is μ times ours.
Ref: Dang et al. 2025 (FZOO, arXiv 2506.09034); Dbouk et al. 2026 (MEAZO, 2605.03869).

`radazo` is an optimiser for the directions themselves (Shu et al. 2025, arXiv 2502.01014).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofl_jax.core import Array, Params

TINY = 1e-12
"""Added to what is divided by: of scalars that are all zero the step is none."""


class StepRule(NamedTuple):
    """A rule, and its state, which is part of what all share.

    Attributes:
      init: () -> the state before the first step, a tree of arrays.
      update: (state, scalars [P]) -> what stands for them, and the state after the step.
      least: P that it needs.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Array], tuple[Array, Any]]
    least: int = 1


class WithRule(NamedTuple):
    """The optimiser's state beside that of a rule: the `opt_state` of the `ServerState`."""

    inner: optax.OptState
    rule: Any


class Moment(NamedTuple):
    """The state of `second_moment`."""

    mean_square: Array  # v, float32 []
    steps: Array  # int32 []


def normalized() -> StepRule:
    """Returns the rule of FZOO: a step is as long whatever the loss is multiplied by.

    There must be P >= 2 scalars.

    >>> scaled, _ = normalized().update((), jnp.array([1.0, 3.0]))
    >>> (scaled * 2**0.5).round(4).tolist()
    [1.0, 3.0]
    """

    def update(state: Any, scalars: Array) -> tuple[Array, Any]:
        return scalars / (jnp.std(scalars, ddof=1) + TINY), state

    return StepRule(lambda: (), update, least=2)


def second_moment(decay: float = 0.99) -> StepRule:
    """Returns the rule of MEAZO: one running second moment of the mean scalar.

    Args:
      decay: β in [0, 1).

    Raises:
      ValueError: for a decay out of range.

    >>> rule = second_moment(0.5)
    >>> scaled, state = rule.update(rule.init(), jnp.array([4.0]))
    >>> scaled, _ = rule.update(state, jnp.array([2.0]))
    >>> round(float(scaled[0]), 4)  # v = 2 + 8 / 2, of 3/4
    0.7071
    """
    if not 0 <= decay < 1:
        raise ValueError(f"the decay of the second moment must be in [0, 1), got {decay}")

    def init() -> Moment:
        return Moment(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))

    def update(state: Moment, scalars: Array) -> tuple[Array, Moment]:
        square = jnp.square(jnp.mean(scalars)).astype(jnp.float32)
        moment = decay * state.mean_square + (1 - decay) * square
        steps = state.steps + 1
        unbiased = moment / (1 - decay ** steps.astype(jnp.float32))
        return scalars / (jnp.sqrt(unbiased) + TINY).astype(scalars.dtype), Moment(moment, steps)

    return StepRule(init, update)


class Choice(NamedTuple):
    """A rule as a setting names it.

    Attributes:
      make: decay -> the rule, None for scalars as they are.
      divisor: (norm of the gradient, P) -> what it divides by, about.
    """

    make: Callable[[float], StepRule | None]
    divisor: Callable[[float, int], float]


PLAIN = "plain"
RULES: Mapping[str, Choice] = {
    PLAIN: Choice(lambda decay: None, lambda norm, count: 1.0),
    "fzoo": Choice(lambda decay: normalized(), lambda norm, count: norm),
    "meazo": Choice(second_moment, lambda norm, count: norm / count**0.5),
}
"""By name; the first is the default."""


class Moments(NamedTuple):
    """The state of `radazo`."""

    first: Params
    second: Params


def radazo(
    learning_rate: float | Array | optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns R-AdaZO: Adam whose second moment is that of the first, and not of the noisy ĝ.

        m ← β₁ m + (1 − β₁) ĝ,   v ← β₂ v + (1 − β₂) m²,   x ← x − η m / √(v + ε)

    There is no bias correction, as in the paper: of a constant ĝ the first steps are up to
    1 / √(1 − β₂) times as long as the later ones.

    Args:
      learning_rate: η, or steps done -> η.
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε > 0.
      weight_decay: of the params, decoupled as in AdamW.

    Raises:
      ValueError: for numbers out of range.

    >>> optimizer, x = radazo(0.1, b1=0.5, b2=0.75), jnp.zeros(1)
    >>> updates, _ = optimizer.update(jnp.array([2.0]), optimizer.init(x), x)
    >>> [round(x, 4) for x in updates.tolist()]  # −0.1 m / √(m² / 4)
    [-0.2]
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")

    def init(params: Params) -> Moments:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Moments(zeros, zeros)

    def update(direction: Params, moments: Moments, params: Any = None) -> tuple[Params, Moments]:
        del params
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, moments.first, direction)
        second = jax.tree.map(lambda v, m: b2 * v + (1 - b2) * m * m, moments.second, first)
        step = jax.tree.map(lambda m, v: m / jnp.sqrt(v + eps), first, second)
        return step, Moments(first, second)

    scaled = optax.GradientTransformation(init, update)
    decay = (optax.add_decayed_weights(weight_decay),) if weight_decay else ()
    return optax.chain(scaled, *decay, optax.scale_by_learning_rate(learning_rate))
