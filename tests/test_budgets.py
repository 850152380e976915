"""A budget gives the rounds that it pays for, which is what the runs then spend."""

import functools

import numpy as np
import optax
import pytest
from tiny_simulations import COHORT, make_simulator
from tiny_tasks import BATCH_SIZE, softmax_task

from zofl_jax.algorithms import decomfl, fedavg
from zofl_jax.conditions import participation
from zofl_jax.core import Phase
from zofl_jax.directions import estimators
from zofl_jax.engine import budgets, passes, simulation
from zofl_jax.engine.budgets import Budget
from zofl_jax.engine.rounds import Conditions

ROUNDS = 7  # before and after the second phase begins


def simulator_of(algorithm, **options):
    return simulation.make_simulator(
        algorithm, softmax_task(), clients_per_round=COHORT, batch_size=BATCH_SIZE, **options
    )


def phases():
    loss = softmax_task().loss

    def phase(first_round, count):
        estimator = estimators.central_difference(count, 1e-2)
        return Phase(first_round, decomfl(loss, estimator, optax.sgd(0.05)))

    return simulator_of([phase(0, 1), phase(5, 3)])


def come_and_go(seed=0):
    """A conditions' keys are those of the seed, as late joiners' are."""
    clients = softmax_task().train.num_clients
    root = make_simulator("sgd", "gaussian", 1, seed=seed).root
    attend = participation.partial(
        clients,
        COHORT,
        dropout=0.3,
        deadline=1.5,
        availability=participation.day_and_night(clients, 4, 0.5),
        joins=participation.late_joiners(root.presence, clients, 0.5, 3),
    )
    return make_simulator("sgd", "gaussian", 1, seed=seed, conditions=Conditions(attend))


def models():
    return simulator_of(fedavg(softmax_task().loss, optax.sgd(0.05), local_steps=2))


@functools.cache
def ran(make):
    """Returns a simulator, and passes and bytes of three runs of it, each a round longer."""
    simulator, progress, found = make(), None, []
    for rounds in (ROUNDS, ROUNDS + 1, ROUNDS + 2):
        progress = simulation.run(simulator, rounds=rounds, progress=progress)
        book = progress.ledger
        found.append((passes.total(simulator.phases, book.attended), book.totals))
    return simulator, found


def spent(passed, totals, backward_cost):
    together = passed.forward + backward_cost * passed.backward
    return {
        "passes": together,
        "example_passes": BATCH_SIZE * together,
        "bytes": totals.up + totals.down,
        "bytes_up": totals.up,
    }


@pytest.mark.parametrize("make", [phases, come_and_go, models])
@pytest.mark.parametrize("backward_cost", [2, 0.5])
def test_a_run_of_these_rounds_is_the_longest_that_the_budget_pays_for(make, backward_cost):
    simulator, found = ran(make)
    costs = [spent(*run, backward_cost) for run in found]
    for kind in costs[0]:
        less, enough, more = (cost[kind] for cost in costs)
        assert less < enough < more
        for amount in (enough, enough + 0.5, more - 0.5):
            found = budgets.rounds_within(simulator, Budget(kind, amount), backward_cost)
            assert found == ROUNDS + 1, (kind, amount)
        assert budgets.rounds_within(simulator, Budget(kind, enough - 0.5), backward_cost) == ROUNDS


def test_rounds_of_another_seed_are_those_of_its_own_simulator():
    first, other = come_and_go(0), come_and_go(7)
    found = []
    for amount in np.linspace(1500, 4000, 12):
        budget = Budget("bytes", amount)
        expected = budgets.rounds_within(other, budget)
        there = {"root": other.root, "conditions": other.conditions}
        assert budgets.rounds_within(first, budget, **there) == expected
        found.append(expected != budgets.rounds_within(first, budget))
    assert any(found)


def test_a_budget_of_rounds_is_that():
    assert budgets.rounds_within(models(), budgets.parse("rounds:600")) == 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2e6", "KIND:AMOUNT, as in passes:2e6, with one of passes, example_passes, bytes"),
        ("seconds:3", "got 'seconds:3'"),
        ("bytes:", "positive number after bytes:"),
        ("bytes:50MB", "positive number after bytes:"),
        ("passes:-1", "positive number"),
        ("passes:nan", "positive number"),
        ("passes:inf", "positive number"),
        ("rounds:2.5", "whole number of rounds"),
        ("rounds:1e7", "1 to 1,000,000"),
    ],
)
def test_budgets_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        budgets.parse(text)


def test_budgets_that_pay_for_nothing_or_for_all():
    # A central difference of one direction takes each client two passes.
    with pytest.raises(ValueError, match=f"first round, which takes {2 * COHORT}: give a larger"):
        budgets.rounds_within(phases(), Budget("passes", 2 * COHORT - 1))
    with pytest.raises(ValueError, match="more than 1,000,000 rounds: give a smaller"):
        budgets.rounds_within(phases(), Budget("passes", 1e9))
