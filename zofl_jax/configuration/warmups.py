"""The config of the rounds of a warm-up, which are another method's."""

import dataclasses

from zofl_jax.algorithms import METHODS
from zofl_jax.configuration import rates
from zofl_jax.configuration.config import Config


def config_of(config: Config) -> Config:
    """Returns the config of the rounds before those of `--algorithm`.

    Data, clients, directions (Gaussian in place of subspace ones), conditions and the schedule are
    those of the run. The method is that of `--warmup`, with its own defaults and what it fixes, and
    sgd without momentum.

    Args:
      config: with `warmup_rounds` > 0. Where `warmup_learning_rate` is None, it is the default.

    >>> from zofl_jax.configuration.resolve import resolve
    >>> found = config_of(resolve({"warmup_rounds": 5, "warmup": "fedkseed"}))
    >>> found.algorithm, found.local_steps, found.num_perturbations, found.momentum
    ('fedkseed', 200, 1, 0.0)
    """
    method = METHODS[config.warmup]
    steps = config.warmup_local_steps or method.defaults.get("local_steps", config.local_steps)
    found = dataclasses.replace(
        config,
        algorithm=method.name,
        options=method.options(),
        optimizer="sgd",
        momentum=0.0,
        local_steps=steps,
        learning_rate=config.warmup_learning_rate,
        warmup_rounds=0,
    )
    # Subspaces, histories and means are of a round, a pool stays, and a batch has one direction.
    plain = "gaussian" if config.perturbation == "subspace" else config.perturbation
    found = found.replace(
        perturbation=plain,
        history=0,
        centre_rounds="",
        examples_per_direction=0,
        **method.fixed,
    )
    if found.learning_rate is None:
        return found.replace(learning_rate=rates.default(found))
    return found
