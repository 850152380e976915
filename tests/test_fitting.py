"""Algorithms in a simulation that they were not made for, and the ε of what really runs."""

import math
import re
import sys
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from test_conditions import COHORT, POPULATION, gradients, make
from tiny_tasks import BATCH_SIZE, CLIENT_SIZES, softmax_task

from zofl_jax.algorithms import decomfl, feedsign, scaffold
from zofl_jax.conditions import accounting, aggregation, compression, participation, privacy
from zofl_jax.conditions.staleness import with_late_uploads
from zofl_jax.core import Expectations, Phase
from zofl_jax.directions import estimators
from zofl_jax.engine import ledger, simulation
from zofl_jax.engine.carried import Memory
from zofl_jax.engine.rounds import Conditions
from zofl_jax.tasks.quadratic import quadratic

DELTA = 1e-5
TASK = softmax_task()
PLAIN = gradients(TASK)


def central(count):
    return estimators.central_difference(count, 1e-2)


def scalars(count=2, loss=TASK.loss):
    return decomfl(loss, central(count), optax.sgd(0.05))


def private(cohort=COHORT, delta=None, noise=2.0):
    return privacy.client_level(PLAIN, 1.0, noise, cohort, delta=delta)


def private_examples(batch=BATCH_SIZE, delta=None):
    def method(private):
        return decomfl(TASK.loss, private(central(1)), optax.sgd(0.1), local_steps=2)

    return privacy.example_level(method, 1.0, 4.0, batch, delta=delta)


def private_bits(count, epsilon=0.5, delta=DELTA):
    return feedsign(TASK.loss, central(count), optax.sgd(1e-3), epsilon=epsilon, delta=delta)


# What an algorithm was made for.


@pytest.mark.parametrize(
    ("algorithm", "options", "sentence"),
    [
        (private(1000), {}, f"clients_per_round=1000, .* has clients_per_round={COHORT}"),
        (private(), {"weighting": "examples"}, "weighting='uniform', .* has weighting='examples'"),
        (
            privacy.fixed_point(PLAIN, 16, 100.0, 4),
            {},
            f"clients_per_round=4, .* has clients_per_round={COHORT}",
        ),
        (
            privacy.fixed_point(PLAIN, 16, 100.0, COHORT),
            {"weighting": "examples"},
            "weighting='uniform', .* has weighting='examples'",
        ),
        (private_examples(16), {}, f"batch_size=16, .* has batch_size={BATCH_SIZE}"),
        (scaffold(TASK.loss, 0.1, share=0.1), {}, "share=0.1 of .* has 3 / 6 = 0.5: give both"),
        (
            PLAIN._replace(expects=Expectations(num_clients=100)),
            {},
            f"num_clients=100, .* has num_clients={POPULATION}: give both the same",
        ),
    ],
)
def test_an_algorithm_for_another_simulation_is_refused(algorithm, options, sentence):
    with pytest.raises(ValueError, match=f"the algorithm was made for {sentence}"):
        make(Conditions(), TASK, algorithm, **options)
    with pytest.raises(ValueError, match=f"the algorithm was made for {sentence}"):
        make(Conditions(), TASK, [Phase(0, PLAIN), Phase(3, algorithm)], **options)


def test_what_goes_around_an_algorithm_keeps_what_it_was_made_for():
    both = privacy.fixed_point(private(delta=DELTA), 16, 100.0, COHORT)
    assert both.expects == Expectations(clients_per_round=COHORT, weighting="uniform")
    assert both.accountant == accounting.ClientAccountant(2.0, DELTA)
    examples = private_examples(delta=DELTA)
    for outer in (
        compression.compressed(examples, compression.integers(8)),
        with_late_uploads(examples, 0.5),
        examples._replace(aggregate=aggregation.median),
    ):
        assert outer.expects == Expectations(batch_size=BATCH_SIZE)
        assert outer.accountant == accounting.ExampleAccountant(4.0, DELTA)
    late = with_late_uploads(compression.compressed(PLAIN, compression.integers(8)), 0.5)
    assert late.late_uploads and late.wire is not None


@pytest.mark.parametrize(
    ("make_algorithm", "sentence"),
    [
        (
            lambda: privacy.fixed_point(private(), 16, 100.0, 5),
            f"made for clients_per_round={COHORT} and what goes around it for clients_per_round=5",
        ),
        (
            lambda: privacy.client_level(private_examples(delta=DELTA), 1.0, 2.0, 3, delta=DELTA),
            "is private already",
        ),
        (
            lambda: compression.compressed(private(delta=DELTA), compression.integers(8)),
            "not of codes of its parts: leave compressed out",
        ),
        (
            lambda: privacy.client_level(
                compression.compressed(PLAIN, compression.integers(8)), 1.0, 2.0, 3, delta=None
            ),
            "client_level needs uploads that are plain numbers",
        ),
        (
            lambda: privacy.fixed_point(private_bits(2), 16, 100.0, 3),
            "fixed_point needs uploads that are plain numbers",
        ),
        (lambda: with_late_uploads(private(), 0.5), "made for a uniform mean of one round's"),
        (
            lambda: privacy.client_level(with_late_uploads(PLAIN, 0.5), 1.0, 2.0, 3, delta=None),
            "this algorithm weighs late ones: leave with_late_uploads out",
        ),
        (lambda: with_late_uploads(with_late_uploads(PLAIN, 1), 1), "late uploads already"),
        (lambda: private(delta=1.0), r"delta must be in \(0, 1\), got 1.0"),
        (lambda: private_bits(1, epsilon=None), "delta=1e-05 has no effect without epsilon"),
    ],
)
def test_what_can_t_go_around_an_algorithm_is_refused(make_algorithm, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_algorithm()


# Late uploads.


def on_quadratic(algorithm_around, **options):
    """Returns the progress of 60 rounds with cohorts of 4 of 8 clients."""
    made = quadratic(
        jax.random.key(0), dim=20, effective_rank=5.0, num_clients=8, heterogeneity=0.5
    )
    algorithm = algorithm_around(decomfl(made.task.loss, central(4), optax.sgd(0.02)))
    sizes = {"clients_per_round": 4, "batch_size": 1}
    simulator = simulation.make_simulator(algorithm, made.task, **sizes, **options)
    return simulation.run(simulator, rounds=60)


def late(algorithm):
    return with_late_uploads(algorithm, 0.5)


def test_with_everybody_in_time_late_uploads_change_nothing():
    """No part of the cohort counts as late, though nobody says so but the algorithm."""
    plain, wrapped = on_quadratic(lambda algorithm: algorithm), on_quadratic(late)
    assert not np.any(wrapped.memory.late.weights)
    params = (jax.tree.leaves(progress.state.params) for progress in (wrapped, plain))
    for actual, expected in zip(*params, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_algorithm_alone_decides_whether_late_uploads_are_used():
    conditions = Conditions(attend=participation.partial(8, 4, deadline=0.6, spread=1.0))
    lost = on_quadratic(lambda algorithm: algorithm, conditions=conditions)
    used = on_quadratic(late, conditions=conditions)
    assert lost.memory == ()
    assert isinstance(used.memory, Memory)
    assert np.any(used.memory.late.weights > 0)
    assert used.history[-1].metrics["loss"] < lost.history[-1].metrics["loss"] - 0.01


def test_phases_agree_on_late_uploads():
    phases = [Phase(0, PLAIN), Phase(3, with_late_uploads(PLAIN, 0.5))]
    with pytest.raises(ValueError, match="some phases use late uploads and others lose them"):
        make(Conditions(), TASK, phases)


# ε.


def book_of(*cohorts):
    """A ledger in which these cohorts took part, all in time."""
    book = ledger.Ledger(POPULATION)
    for cohort in cohorts:
        book.record(cohort, ledger.MessageSizes(8, 8, 8, 8))
        book.contributors[len(cohort)] += 1
    return book


BOOK = book_of([0, 1, 2], [1, 2], [1, 3, 5])


def test_epsilon_is_that_of_what_runs():
    pytest.importorskip("dp_accounting")
    assert make(Conditions(), TASK, private()).epsilon is None
    spent = make(Conditions(), TASK, private(delta=DELTA)).epsilon
    assert spent(BOOK) == accounting.client_epsilon(
        {3: 2, 2: 1},
        noise_multiplier=2.0,
        clients_per_round=COHORT,
        num_clients=POPULATION,
        delta=DELTA,
    )
    spent = make(Conditions(), TASK, private_examples(delta=DELTA)).epsilon
    assert spent(BOOK) == accounting.example_epsilon(
        2 * 3,
        noise_multiplier=4.0,
        batch_size=BATCH_SIZE,
        num_examples=min(CLIENT_SIZES),
        delta=DELTA,
    )
    spent = make(Conditions(), TASK, private_bits(2)).epsilon
    assert spent(BOOK) == accounting.bit_epsilon(2 * 3, epsilon=0.5, delta=DELTA)


def test_rounds_of_phases_count_as_those_of_the_dearest_that_has_begun():
    pytest.importorskip("dp_accounting")
    phases = [Phase(0, private_bits(2)), Phase(3, private_bits(5)), Phase(9, private_bits(2))]
    spent = make(Conditions(), TASK, phases).epsilon
    assert spent(BOOK) == accounting.bit_epsilon(2 * 3, epsilon=0.5, delta=DELTA)
    longer = book_of([0, 1, 2], [1, 2], [1, 3, 5], [1, 4])
    assert spent(longer) == accounting.bit_epsilon(5 * 4, epsilon=0.5, delta=DELTA)


@pytest.mark.parametrize("other", [PLAIN, private(delta=1e-6), private_examples(delta=DELTA)])
def test_phases_agree_on_their_privacy(other):
    phases = [Phase(0, private(delta=DELTA)), Phase(3, other)]
    with pytest.raises(ValueError, match="phases differ in their privacy"):
        make(Conditions(), TASK, phases)


@pytest.mark.parametrize(
    "algorithm", [private(delta=DELTA), private_examples(delta=DELTA), private_bits(1)]
)
def test_a_missing_package_is_named_before_the_run(algorithm, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'zofl-jax[privacy]'")):
        make(Conditions(), TASK, algorithm)


class Free(NamedTuple):
    """An accountant of one's own."""

    delta: float = DELTA

    def __call__(self, exposure):
        return math.inf if exposure.num_clients != POPULATION else exposure.participations / 8


def test_an_accountant_may_be_one_s_own():
    simulator = make(Conditions(), TASK, PLAIN._replace(accountant=Free()))
    assert simulator.epsilon(BOOK) == 3 / 8
