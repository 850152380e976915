"""The learning rate of a run that is given none, from its task, model and method.

Where the loss has gradient g and Hessian H, the mean of P directional derivatives times Gaussian
directions, ĝ = (1/P) Σ_p z_p z_pᵀ g, has E ĝ = g and, by the fourth moments of a Gaussian,

    E ĝᵀHĝ = (1 + 1/P) gᵀHg + ‖g‖² tr(H) / P.

The step −η ĝ lowers the loss on average while η < 2 ‖g‖² / E ĝᵀHĝ, whose least value is

    edge = 2 / ((1 + 1/P) λ_max + tr(H) / P),

and most at half of that (Malladi et al. 2023, arXiv 2305.17333, theorem 1; Song et al. 2026, arXiv
2604.14669). Momentum β sums a gradient up to η / (1 − β) of it, so the noise of the directions
meets that rate. Along the top eigenvector the edge of the rate η is 2 (1 + β) / λ_max (Polyak
1964), so there η / (1 − β) is divided by (1 + β) / (1 − β) first. First-order methods have no
noise of directions: P is infinite, unless they say otherwise (`Method.noise`). Local steps K are
steps like others and not in the formula; a run of as many rounds has K times as many, and for the
perceptron on digits its edge at K = 4 was about half of that at K = 1.

The examples' noise is part of the scalars: ‖g‖² above is ‖g‖² + σ² / n where n examples of a cohort
are measured along a direction. Where each direction has all of them that is left out; where it has
a few of its own (`--examples_per_direction`) the noise is (1 + N / n) / (1 + N / n_all) times as
large, with the noise scale N = σ² / ‖g‖² of `diagnostics.noise_scale`.

A default is `SHARE` of the edge. What is missing from the half is for this and for a curvature that
grows: in the noise of a long descent the weights take a random walk, which lets the curvature of a
multilayer model rise, by far more than the gradient's own path would. So the trace in
`models.images.MODELS` is that of the largest rate that trained (`benchmarks/learning_rates.py`)
where it is above the one that `diagnostics.trace` finds along a descent.
"""

import math

from zofl_jax.algorithms.step_rules import RULES
from zofl_jax.configuration import kinds
from zofl_jax.configuration.config import Config
from zofl_jax.models.images import MODELS, Curvature

SHARE = 0.3
"""Of the edge."""

ADAM = 1e-3
"""The rate of Adam with exact gradients (Kingma & Ba 2015)."""

GRADIENT_NORM = 0.5
"""Of the models below at the start, about."""


SPREAD = 5.0
"""Times the trace of the quadratic: its clients have minima of their own, whose noise stays where
the gradient has vanished."""

NOISE_SCALES = {"images": 70.0, "texts": 6.0, "quadratic": 1.0}
"""σ² / ‖g‖² at the start, as measured: perceptron on digits 65 to 75, CNN on Fashion-MNIST 70 to
100, SmolLM2-135M on film reviews 5.5; it grows along a run. That of the quadratic is a guess."""

TEXTS = Curvature(26_400, 600)
"""SmolLM2-135M on film reviews; taken for all language models."""


def default(config: Config) -> float:
    """Returns the learning rate of a config that gives none, in two figures.

    >>> from zofl_jax.configuration.resolve import resolve
    >>> given = {"task": "quadratic", "effective_rank": 12.0, "num_perturbations": 4}
    >>> default(resolve(given | {"momentum": 0.0}))  # 0.3 · 2 / (1.25 + 5 · 12 / 4)
    0.037
    """
    method, count = config.method, config.num_perturbations
    noise = 0.0 if method.order else 1.0
    if method.noise is not None:
        noise = method.noise(config.options or method.options(), count, config.local_steps)
    noise *= _of_few_examples(config)
    momentum = config.momentum if config.optimizer == "sgd" else 0.0
    rate = SHARE * (1 - momentum) * edge(curvature(config), count, momentum, noise)
    rate *= RULES[str(config.get("step_rule"))].divisor(GRADIENT_NORM, config.num_perturbations)
    if config.optimizer != "sgd":
        # A step of Adam has the length η √d, one of P directions η ‖g‖ √(d / P).
        rate = ADAM if method.order else rate * GRADIENT_NORM / math.sqrt(count)
    return float(f"{rate:.1e}")


def _of_few_examples(config: Config) -> float:
    """Returns how much larger the noise is where a direction has examples of its own."""
    scale = NOISE_SCALES[config.kind] / config.clients_per_round
    few = config.batch_size / config.groups
    return (1 + scale / few) / (1 + scale / config.batch_size)


def edge(
    curvature: Curvature, num_perturbations: float, momentum: float = 0.0, noise: float = 1.0
) -> float:
    """Returns the largest η / (1 − β) at which the loss falls on average, see above.

    `noise` is that of a step, as a multiple of that of P directions.

    >>> round(edge(Curvature(trace=10.0, top=1.0), math.inf), 6)
    2.0
    """
    share = noise / num_perturbations
    along_top = (1 + share) * curvature.top * (1 - momentum) / (1 + momentum)
    return 2 / (along_top + curvature.trace * share)


def curvature(config: Config) -> Curvature:
    """Returns the curvature that is reckoned with for a task and model."""
    if config.kind == "quadratic":
        return Curvature(SPREAD * config.effective_rank, 1.0)
    if config.kind == "texts":
        return TEXTS
    model = MODELS[str(config.model)]
    return (config.task == kinds.DIGITS and model.on_digits) or model.curvature
