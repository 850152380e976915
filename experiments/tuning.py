"""A probe that finds a learning rate that trains to the end, for `--auto_lr`.

The rule, for a run of T rounds: try a rate η by running T / m rounds at m η, m = `MARGIN`, from the
same start with the same data and seed. If the loss on a fixed batch of training examples did not
rise, η is good; of the good ones that were tried, the one whose trial ended lowest is chosen.

Why it holds: T rounds at η and T / m rounds at m η go the same way. Descent by a noisy gradient of
covariance Σ follows dx = −∇f ds + √(η Σ) dW in the time s = η · steps (Li, Tai & E 2017, arXiv
1511.06251), where only the noise depends on the rate. So a trial sees the whole run, the curvature
at its end and the walk that the noise of the directions lets the weights take included, with the
variance of the noise m times as large; and m times as near to the edge of stability, where the
noise is small and λ_max decides (`rates.py`). A probe at η itself sees the start alone: a
multilayer perceptron on digits, P = 20, K = 1 descends for 60 rounds at 0.008, twice the
best rate, and is lost at round 80.

Momentum β starts from rest and lacks β / (1 − β) steps on the way; a trial has them in addition.
Local steps K make a round K steps long for trial and run alike. First-order methods lack the noise
of the directions and have m = `FIRST_ORDER_MARGIN`.

The search starts at --learning_rate or its default. While trials are good and end lower the rate
is doubled, fourfold where the loss fell by less than `LITTLE` of its start, until three quarters of
the run's rounds are spent; where four times the best is no better, the rate in between follows. If
the first is bad the rate is halved, or quartered if the loss rose in the first half of the trial,
until one is good. A bad trial ends where the loss has doubled. Where the next rate tried above the
best is bad, but not before the second half of its trial, the geometric mean of the two is tried
last. Only a rate whose own trial was good is chosen: means that were not tried have diverged.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from zofl_jax.configuration.config import Config
from zofl_jax.configuration.experiment import Devices, Experiment, at_learning_rate
from zofl_jax.core import Params, Task
from zofl_jax.engine import compilation, simulation
from zofl_jax.observation import diagnostics

from .entry import UserError

MARGIN = 3.0
FIRST_ORDER_MARGIN = 2.0
LEAST_ROUNDS = 5
MOST_TRIALS = 12
SPENT = 0.75  # of the run's rounds, after which nothing higher is tried
CHECKS = 8  # of the loss in a trial
BATCHES = 8  # of a client's batch size: examples that the loss is measured on
RISE = 0.25  # of its fall, that the loss may end above its least value
NOTHING = 0.02  # of the loss at the start: less is no fall or rise
LITTLE = 0.2  # of the loss at the start: a trial that falls by less is far below the best rate


class Trial(NamedTuple):
    """A learning rate and the losses on the fixed batch, in a probe at a multiple of it."""

    learning_rate: float
    losses: list[float]  # at the start and at equal distances; inf where a round diverged
    rounds: int  # done
    complete: bool = True  # whether these are all that were asked for

    @property
    def end(self) -> float:
        """The last loss."""
        return self.losses[-1]

    @property
    def fall(self) -> float:
        """From the start to the least loss, in units of the start."""
        return (self.losses[0] - min(self.losses)) / max(abs(self.losses[0]), 1e-30)

    @property
    def late(self) -> bool:
        """Whether it got through half of its checks."""
        return len(self.losses) > CHECKS / 2

    @property
    def good(self) -> bool:
        """Whether the loss didn't rise, neither from the start nor from its least value."""
        start, least = self.losses[0], min(self.losses)
        if not (self.complete and math.isfinite(self.end)):
            return False
        return self.end - least <= RISE * (start - least) + NOTHING * abs(start)


class Probe(NamedTuple):
    """What the probe found."""

    learning_rate: float
    margin: float
    trials: list[Trial]  # in the order in which they were made

    @property
    def rounds(self) -> int:
        """That all trials together took."""
        return sum(trial.rounds for trial in self.trials)

    @property
    def sentence(self) -> str:
        """For the user: what was chosen, of what, and what that took."""
        ends = ", ".join(
            f"{t.learning_rate:.3g}: {f'{t.end:.3g}' if t.good else 'rises'}"
            for t in sorted(self.trials)
        )
        return (
            f"--auto_lr chose {self.learning_rate:.3g}: tried at {self.margin:g} times each rate, "
            f"from a loss of {self.trials[0].losses[0]:.3g}, the ends are {ends}; the probe took "
            f"{self.rounds} rounds"
        )


def margin(config: Config) -> float:
    """Returns m, how many times the rate of the run a trial has."""
    return FIRST_ORDER_MARGIN if config.method.order == 1 else MARGIN


def probe_rounds(config: Config) -> int:
    """Returns the rounds of a trial.

    >>> probe_rounds(Config(momentum=0.9, local_steps=1, rounds=399))  # 399 / 3 and 2/3 of 9 steps
    139
    """
    times = margin(config)
    momentum = config.momentum if config.optimizer == "sgd" else 0.0
    start = (1 - 1 / times) * momentum / (1 - momentum) / config.local_steps
    return min(config.rounds, max(LEAST_ROUNDS, math.ceil(config.rounds / times + start)))


def probe(config: Config, experiment: Experiment, devices: Devices = None) -> Probe:
    """Returns the learning rate to take.

    Args:
      config: the settings, with the learning rate that the search starts from.
      experiment: built from them.
      devices: as for `configuration.experiment.build`.

    Raises:
      UserError: if the loss rises at every rate that is tried.
    """

    def at(rate: float) -> simulation.Simulator:
        return at_learning_rate(experiment, config.replace(learning_rate=rate), devices).simulator

    return probe_with(config, experiment.task, at)


def probe_with(config: Config, task: Task, at: Callable[[float], simulation.Simulator]) -> Probe:
    """Returns what `probe` does, from simulators at any learning rate.

    Args:
      config: the settings, with the learning rate that the search starts from.
      task: that of the simulators.
      at: learning rate -> the run's simulator at that rate.

    Raises:
      UserError: if the loss rises at every rate that is tried.
    """
    loss = _loss_on_a_batch(task, config.batch_size)
    times, rounds = margin(config), probe_rounds(config)

    def attempt(rate: float) -> Trial:
        return _trial(at(times * rate), rate, rounds, loss)

    chosen, trials = search(attempt, float(config.learning_rate or 0), SPENT * config.rounds)
    return Probe(chosen, times, trials)


def search(
    attempt: Callable[[float], Trial], first: float, enough: float
) -> tuple[float, list[Trial]]:
    """Returns the learning rate to take, and the trials made to find it.

    Args:
      attempt: learning rate -> its trial.
      first: the learning rate to start from.
      enough: rounds spent, after which no higher rate is tried.

    Raises:
      UserError: if no trial is good.

    >>> def attempt(rate):  # good up to 0.5
    ...     return Trial(rate, [1.0, 1.0 - rate if rate <= 0.5 else 9.0], 10)
    >>> search(attempt, 0.3, 100)[0], search(attempt, 0.1, 100)[0]
    (0.3, 0.4)
    """
    trials = [attempt(_rounded(first))]
    while not trials[-1].good and len(trials) < MOST_TRIALS:
        trials.append(attempt(_rounded(trials[-1].learning_rate / (2 if trials[-1].late else 4))))
    best = trials[-1]
    if not best.good:
        rates = [trial.learning_rate for trial in trials]
        raise UserError(
            f"--auto_lr: the loss rises at every learning rate tried, from {min(rates):.3g} to "
            f"{max(rates):.3g}; type a larger --num_perturbations or --batch_size"
        )
    above = min((t for t in trials if not t.good), default=None)  # the next rate that is worse
    while above is None or above.learning_rate > 3 * best.learning_rate:
        spent = above is None and sum(trial.rounds for trial in trials) >= enough
        if spent or len(trials) == MOST_TRIALS:
            break
        step = 4 if above is None and best.fall < LITTLE else 2
        higher = attempt(_rounded(best.learning_rate * step))
        trials.append(higher)
        if higher.good and higher.end < best.end:
            best = higher
        elif step == 4 or not higher.good:
            above = higher
        else:
            break
    if above and above.late and not above.good and above.learning_rate <= 3 * best.learning_rate:
        between = attempt(_rounded(math.sqrt(best.learning_rate * above.learning_rate)))
        trials.append(between)
        if between.good and between.end < best.end:
            best = between
    return best.learning_rate, trials


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _trial(
    simulator: simulation.Simulator,
    rate: float,
    rounds: int,
    loss: Callable[[Params], float],
) -> Trial:
    progress = simulator.start(None)
    state, memory = progress.state, progress.memory
    start = loss(state.params)
    losses, done = [start], 0
    for until in np.ceil(np.linspace(0, rounds, min(CHECKS, rounds) + 1)[1:]).astype(int).tolist():
        while done < until:
            phase = simulation.phase_at(simulator.phases, done)
            ends = [p.first_round for p in simulator.phases[phase + 1 :]]
            n = min([until - done, simulator.capacities[phase], *(e - done for e in ends)])
            state, memory, trace = simulator.advance(state, memory, n)
            done += len(trace.losses)
            if trace.failed_loss is not None:
                return Trial(rate, [*losses, math.inf], done, complete=False)
        value = loss(state.params)
        losses.append(value if math.isfinite(value) else math.inf)
        if losses[-1] > start + abs(start):
            return Trial(rate, losses, done, complete=False)
    return Trial(rate, losses, done)


def _loss_on_a_batch(task: Task, batch_size: int) -> Callable[[Params], float]:
    batch = diagnostics.spread_examples(task.train, BATCHES * batch_size)
    made: list[Callable[..., Any]] = []

    def loss(params: Params) -> float:
        params = jax.tree.map(np.asarray, params)  # from all devices to one
        if not made:
            made.append(compilation.compiled(task.loss, (params, batch)))
        return float(made[0](params, batch))

    return loss
