"""A short probe that finds a learning rate, for `--auto_lr`.

From the same start, with the same data and seed, a few rounds are run at each rate of a
geometric grid around --learning_rate. A rate is stable if its loss on a fixed batch of training
examples ends below the start, and not above where it was half-way. Of the stable rates whose loss
fell as far as the best one's, give or take a fiftieth, the largest is chosen. A short probe
can't see what noise does to a long run: where accuracy wears off late, take a smaller rate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import config
from experiments.entry import UserError
from zofl_jax import compilation, simulation
from zofl_jax.core import Params, Task

ROUNDS = 20
FACTORS = tuple(10 ** (i / 2) for i in range(-4, 5))
"""The grid, as multiples of --learning_rate."""

BATCHES = 8  # of a client's batch size: examples that the loss is measured on
CLOSE = 0.02  # of the best fall, that a larger rate may lack


class Trial(NamedTuple):
    """A learning rate and the losses on the fixed batch."""

    learning_rate: float
    half_way: float
    end: float  # inf if a round diverged

    def stable(self, start: float) -> bool:
        """Whether the loss fell and wasn't on its way up."""
        return self.end < start and self.end <= self.half_way + CLOSE * (start - self.half_way)


class Probe(NamedTuple):
    """What the probe found."""

    learning_rate: float
    start: float
    trials: list[Trial]

    @property
    def sentence(self) -> str:
        """For the user: what was chosen, and of what."""
        chosen = next(t for t in self.trials if t.learning_rate == self.learning_rate)
        others = ", ".join(f"{t.learning_rate:.3g}: {t.end:.3g}" for t in self.trials)
        highest = self.learning_rate == max(t.learning_rate for t in self.trials)
        ends = " It is the largest tried: raise --learning_rate to try more." if highest else ""
        return (
            f"--auto_lr chose {self.learning_rate:.3g}: the loss falls from {self.start:.3g} to "
            f"{chosen.end:.3g} in the probe (of {others}).{ends}"
        )


def probe(
    values: config.Values, experiment: config.Experiment, devices: int | None = None
) -> Probe:
    """Returns the learning rate to take.

    Args:
      values: the flags, with the learning rate in the middle of the grid.
      experiment: built from them.
      devices: as for `config.build`.

    Raises:
      UserError: if no rate of the grid lowers the loss.
    """
    loss = _loss_on_a_batch(experiment.task, values["batch_size"])
    rounds = min(ROUNDS, values["rounds"])
    start = loss(experiment.simulator.start(None).state.params)
    trials: list[Trial] = []
    for factor in FACTORS:
        rate = float(f"{values['learning_rate'] * factor:.6g}")
        at_rate = config.at_learning_rate(
            experiment, {**values, "learning_rate": rate}, devices
        ).simulator
        trials.append(Trial(rate, *_losses(at_rate, rounds, loss)))
        if trials[-1].end > 2 * abs(start) and len(trials) > 1:
            break  # larger rates are worse
    return Probe(choose(trials, start), start, trials)


def choose(trials: list[Trial], start: float) -> float:
    """Returns the largest stable rate whose loss fell about as far as the best one's.

    Raises:
      UserError: if none is stable.

    >>> choose([Trial(0.1, 0.9, 0.8), Trial(1.0, 0.5, 0.2), Trial(10.0, 0.3, 0.9)], 1.0)
    1.0
    """
    stable = [trial for trial in trials if trial.stable(start)]
    if not stable:
        rates = [trial.learning_rate for trial in trials]
        raise UserError(
            f"--auto_lr: no learning rate from {min(rates):.3g} to {max(rates):.3g} lowers the "
            "loss; raise --num_perturbations, or give a --learning_rate of another magnitude"
        )
    best = min(trial.end for trial in stable)
    close = [t for t in stable if start - t.end >= (1 - CLOSE) * (start - best)]
    return max(trial.learning_rate for trial in close)


def _losses(
    simulator: simulation.Simulator, rounds: int, loss: Callable[[Params], float]
) -> tuple[float, float]:
    """Returns the loss half-way and at the end; infinity from where a round diverged."""
    found: list[float] = []
    start = simulator.start(None)
    state, memory = start.state, start.memory
    for until in (max(1, rounds // 2), rounds):
        while int(state.round) < until:
            n = min(until - int(state.round), min(simulator.capacities))
            state, memory, trace = simulator.advance(state, memory, n)
            if trace.failed_loss is not None:
                return (found or [np.inf])[0], np.inf
        value = loss(state.params)
        found.append(value if np.isfinite(value) else np.inf)
    return found[0], found[1]


def _loss_on_a_batch(task: Task, batch_size: int) -> Callable[[Params], float]:
    data = task.train
    total = int(data.offsets[-1])
    spread = np.linspace(0, total - 1, min(total, BATCHES * batch_size)).astype(int)
    rows = np.asarray(data.order)[spread]
    batch: Any = jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)[rows]), data.examples)
    made: list[Callable[..., Any]] = []

    def loss(params: Params) -> float:
        params = jax.tree.map(np.asarray, params)  # from all devices to one
        if not made:
            made.append(compilation.compiled(task.loss, (params, batch)))
        return float(made[0](params, batch))

    return loss
