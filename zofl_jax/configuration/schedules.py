"""Learning rates that follow the rounds, and the optimiser of a run's settings."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from zofl_jax.algorithms import step_rules
from zofl_jax.algorithms.local_training import ClientOptimizer
from zofl_jax.configuration import choices
from zofl_jax.configuration.config import Config
from zofl_jax.core import Array


class Change(NamedTuple):
    """Factors relative to the start that hold from a round on."""

    first_round: int
    learning_rate: float = 1.0
    smoothing: float = 1.0
    num_perturbations: float = 1.0


def parse_schedule(text: str) -> list[Change]:
    """Returns the changes of a `--schedule`, the start included.

    Raises:
      ValueError: for text that is not a schedule.

    >>> parse_schedule("500:lr=0.8,P=2")[1].num_perturbations
    2.0
    """
    text = choices.AUTHORS if text == "authors" else text
    fields = {"lr": "learning_rate", "mu": "smoothing", "P": "num_perturbations"}
    changes = [Change(0)]
    for part in filter(None, text.split(";")):
        try:
            start, _, assignments = part.partition(":")
            factors = {}
            for assignment in assignments.split(","):
                name, _, value = assignment.partition("=")
                factors[fields[name.strip()]] = float(value)
            changes.append(Change(int(start), **factors))
        except (KeyError, ValueError):
            raise ValueError(
                f"--schedule: can't read {part!r}; write 'ROUND:lr=F,mu=F,P=F' with factors "
                "relative to the start, parts separated by ';'"
            ) from None
        in_order = changes[-2].first_round < changes[-1].first_round
        if not in_order or not all(0 < factor < math.inf for factor in changes[-1][1:]):
            raise ValueError(
                "--schedule: factors must be positive and finite, and rounds increase from 1 on, "
                f"got {part!r}"
            )
    return changes


def parse_rounds(text: str) -> list[int]:
    """Returns the rounds of a `--centre_rounds`, none for "".

    Raises:
      ValueError: for text that is not rounds in order.

    >>> parse_rounds("0,100")
    [0, 100]
    """
    try:
        rounds = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(
            f"--centre_rounds={text} is not a list of rounds: write them as 0 or 0,100"
        ) from None
    if rounds != sorted(set(rounds)) or min(rounds, default=0) < 0:
        raise ValueError(
            f"--centre_rounds={text} must be rounds from 0 on in their order, as 0 or 0,100"
        )
    return rounds


def directions(config: Config, change: Change) -> int:
    """Returns P from a change on."""
    return max(1, round(config.num_perturbations * change.num_perturbations))


def changing(changes: Sequence[Change], field: str) -> bool:
    """Returns whether a schedule changes a field of `Change`."""
    return any(getattr(change, field) != 1 for change in changes)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the optimiser of the settings, whose state goes on from round to round.

    Its rate follows the schedule by the count of local steps, K a round, after a warm-up.
    """
    rate, first = learning_rate(config), config.warmup_rounds
    if callable(rate):
        return _optimizer(config, lambda count: rate(first + count // config.local_steps))
    return _optimizer(config, rate)


def make_client_optimizer(config: Config) -> ClientOptimizer:
    """Returns the optimiser of the settings, whose state starts anew in every round."""
    rate = learning_rate(config)
    if callable(rate):
        return lambda round_index: _optimizer(config, rate(round_index))
    return _optimizer(config, rate)


def learning_rate(config: Config) -> Array | optax.Schedule:
    """Returns the learning rate, or round -> learning rate where the schedule changes it."""
    factor, rate = rate_factor(config), jnp.asarray(config.learning_rate)
    return rate if factor is None else lambda round_index: rate * factor(round_index)


def rate_factor(config: Config) -> optax.Schedule | None:
    """Returns round -> factor on the learning rate, or None if it is always 1."""
    changes = parse_schedule(config.schedule)
    return piecewise(changes, "learning_rate", 1.0) if changing(changes, "learning_rate") else None


def _optimizer(config: Config, rate: Any) -> optax.GradientTransformation:
    decay = config.weight_decay
    if config.optimizer == "adam":
        return optax.adamw(rate, weight_decay=decay) if decay else optax.adam(rate)
    if config.optimizer == "radazo":
        return step_rules.radazo(rate, weight_decay=decay)
    sgd = optax.sgd(rate, momentum=config.momentum or None)
    return optax.chain(optax.add_decayed_weights(decay), sgd) if decay else sgd


def piecewise(changes: list[Change], field: str, start: float) -> optax.Schedule:
    """Returns round -> start · factor."""
    rounds = np.array([change.first_round for change in changes])
    values = np.array([start * getattr(change, field) for change in changes])

    def value(round_index: Any) -> Any:
        at = jnp.sum(jnp.asarray(round_index) >= rounds) - 1
        return jnp.asarray(values, jnp.result_type(float))[at]

    return value
