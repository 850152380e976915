"""Budgets: how many rounds so many passes or bytes pay for, known before the run.

    budget = budgets.parse("bytes:50e6")
    train(simulator, workdir="runs/mine", rounds=budgets.rounds_within(simulator, budget))

Who takes part in a round is a function of (seed, round), and what each of them computes and sends
is declared: so a run's costs are known before it, and it ends with the last round that the budget
pays for. It is a run of so many rounds like any other, which resumes and replays.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax import keys
from zofl_jax.conditions import participation
from zofl_jax.engine import ledger, passes, rounds
from zofl_jax.engine.simulator import Simulator, phase_at

KINDS = {
    "passes": "forward passes of a batch",
    "example_passes": "forward passes of an example",
    "bytes": "bytes up and down",
    "bytes_up": "bytes up",
    "rounds": "rounds",
}
"""What a budget can be of, all clients together; a backward pass counts as several forward ones."""

MOST_ROUNDS = 1_000_000
"""A budget that pays for more is taken for a slip."""


class Budget(NamedTuple):
    """What a run may cost, all clients together.

    Attributes:
      kind: a key of `KINDS`.
      amount: of it, positive.
    """

    kind: str
    amount: float


def parse(text: str) -> Budget:
    """Returns the budget that is written as KIND:AMOUNT.

    Raises:
      ValueError: for an unknown kind, or an amount that is no positive number, or no whole number
        of rounds.

    >>> parse("passes:2e6")
    Budget(kind='passes', amount=2000000.0)
    """
    kind, _, number = text.partition(":")
    if kind not in KINDS:
        raise ValueError(
            f"a budget is KIND:AMOUNT, as in passes:2e6, with one of {', '.join(KINDS)}; "
            f"got {text!r}"
        )
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not 0 < amount < math.inf:
        raise ValueError(f"the budget {text!r} needs a positive number after {kind}:")
    if kind == "rounds" and (amount != int(amount) or amount > MOST_ROUNDS):
        raise ValueError(
            f"the budget {text!r} needs a whole number of rounds, 1 to {MOST_ROUNDS:,}"
        )
    return Budget(kind, amount)


def rounds_within(
    simulator: Simulator,
    budget: Budget,
    backward_cost: float = 2.0,
    *,
    root: keys.RootKeys | None = None,
    conditions: rounds.Conditions | None = None,
) -> int:
    """Returns the most rounds that cost no more than the budget, in a run that does not diverge.

    Passes are those that clients compute, whether or not their upload arrives; bytes are the
    ledger's, the first model that a client gets included.

    Args:
      simulator: of the run.
      budget: what all clients together may spend.
      backward_cost: forward passes that a backward pass counts as.
      root: the keys of another seed; the simulator's own unless given.
      conditions: the rounds' with that seed; the simulator's own unless given.

    Raises:
      ValueError: if the budget doesn't pay for one round, or for more than `MOST_ROUNDS`.

    >>> import optax
    >>> from zofl_jax.algorithms import decomfl
    >>> from zofl_jax.directions import estimators
    >>> from zofl_jax.engine.simulation import make_simulator
    >>> from zofl_jax.tasks import quadratic
    >>> task = quadratic.quadratic(jax.random.key(0), dim=4, effective_rank=2.0, num_clients=3).task
    >>> method = decomfl(task.loss, estimators.forward_difference(9, 1e-3), optax.sgd(0.01))
    >>> simulator = make_simulator(method, task, clients_per_round=2, batch_size=1)
    >>> rounds_within(simulator, parse("passes:100"))  # two clients with ten passes each a round
    5
    """
    if budget.kind == "rounds":
        return int(budget.amount)
    attend = (conditions or simulator.conditions).attend
    costs = _costs(simulator, budget.kind, backward_cost, root or simulator.root, attend)
    spent, done, cost = 0.0, 0, next(costs)
    first = cost
    while spent + cost <= budget.amount:
        spent, done, cost = spent + cost, done + 1, next(costs)
        if done > MOST_ROUNDS:
            raise ValueError(
                f"{budget.amount:g} {KINDS[budget.kind]} pay for more than {MOST_ROUNDS:,} rounds: "
                "give a smaller budget"
            )
    if not done:
        raise ValueError(
            f"{budget.amount:g} {KINDS[budget.kind]} don't pay for the first round, which takes "
            f"{first:.6g}: give a larger budget"
        )
    return done


def _costs(
    simulator: Simulator,
    kind: str,
    backward_cost: float,
    root: keys.RootKeys,
    attend: participation.Attend | None,
) -> Iterator[float]:
    """Yields the cost of round 0, 1, ..., all clients together."""
    setting, phases = simulator.setting, simulator.phases
    if kind in ("passes", "example_passes"):
        examples = setting.batch_size if kind == "example_passes" else 1
        own = [
            examples * passes.in_forward_passes(p.algorithm.passes, backward_cost) for p in phases
        ]
        for r, there in enumerate(_numbers_there(setting.clients_per_round, attend, root)):
            yield there * own[phase_at(phases, r)]
        return
    book = ledger.Ledger(setting.num_clients)
    asked = (
        _uniform(setting.num_clients, setting.clients_per_round)
        if attend is None
        else _by_round(attend)
    )
    for r, attendance in enumerate(_each_round(asked, root)):
        counted = book.record_attendance(attendance, simulator.sizes[phase_at(phases, r)])
        yield counted.up if kind == "bytes_up" else counted.up + counted.down


def _numbers_there(
    clients_per_round: int, attend: participation.Attend | None, root: keys.RootKeys
) -> Iterator[int]:
    """Yields how many clients are there in round 0, 1, ...."""
    if attend is None:
        yield from itertools.repeat(clients_per_round)
        return
    for attendance in _each_round(_by_round(attend), root):
        yield int(attendance.there.sum())


_ByRound = Callable[[keys.RootKeys, np.ndarray], participation.Attendance]


def _each_round(asked: _ByRound, root: keys.RootKeys) -> Iterator[participation.Attendance]:
    first = 0
    while True:
        several = np.arange(first, first + rounds.CAPACITY, dtype=np.int32)
        yield from participation.each_round(asked(root, several))
        first += rounds.CAPACITY


def _by_round(attend: participation.Attend) -> _ByRound:
    compiled = jax.jit(jax.vmap(attend, in_axes=(None, 0)))
    return lambda root, several: compiled(root, jnp.asarray(several))


@functools.lru_cache
def _uniform(num_clients: int, clients_per_round: int) -> _ByRound:
    """Compiles once for all methods and seeds."""
    return _by_round(participation.everyone(num_clients, clients_per_round))
