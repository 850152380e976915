"""Objectives without a gradient: against scikit-learn and plain counting."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zofl_jax import keys
from zofl_jax.algorithms import decomfl
from zofl_jax.data import partition, sources
from zofl_jax.directions import estimators
from zofl_jax.engine import simulation
from zofl_jax.models.mlp import Softmax
from zofl_jax.tasks import objectives, vision

RNG = np.random.default_rng(3)


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_error_rate_and_macro_f1_are_scikit_learns(classes):
    from sklearn.metrics import accuracy_score, f1_score  # takes two seconds to import

    for _ in range(20):
        scores = RNG.normal(size=(9, classes)).astype(np.float32)
        labels = RNG.integers(0, classes, 9)
        predicted = scores.argmax(axis=1)
        present = np.union1d(labels, predicted)
        f1 = f1_score(labels, predicted, labels=present, average="macro", zero_division=0)
        assert objectives.f1_loss(scores, labels) == pytest.approx(1 - f1, abs=1e-6)
        accuracy = accuracy_score(labels, predicted)
        assert objectives.error_rate(scores, labels) == pytest.approx(1 - accuracy, abs=1e-6)


def test_token_f1_counts_bags():
    for _ in range(50):
        ours, theirs = RNG.integers(-1, 4, (2, 7))
        left, right = (Counter(x[x >= 0].tolist()) for x in (ours, theirs))
        common = sum((left & right).values())
        total = sum(left.values()) + sum(right.values())
        expected = 2 * common / total if total else 0.0
        found = objectives.token_f1_loss(jnp.asarray(ours)[None], jnp.asarray(theirs)[None], -1)
        assert found == pytest.approx(1 - expected, abs=1e-6)


@pytest.mark.parametrize("name", objectives.WITHOUT_GRADIENT)
def test_there_is_indeed_no_gradient(name):
    scores, labels = RNG.normal(size=(8, 3)).astype(np.float32), RNG.integers(0, 3, 8)
    gradient = jax.grad(objectives.CLASSIFICATION[name])(jnp.asarray(scores), labels)
    assert not np.any(gradient)


def test_accuracy_itself_can_be_improved_on_digits():
    """The forward and the central difference both see what has no gradient."""
    dataset = sources.digits()
    root = keys.root(0)
    order, offsets = partition.iid(root.partition, dataset.train["label"], 20)
    task = vision.classification(dataset, Softmax(10), order, offsets, objectives.error_rate)
    for estimator in (estimators.central_difference, estimators.forward_difference):
        algorithm = decomfl(task.loss, estimator(20, 0.2), optax.sgd(0.1, momentum=0.9))
        simulator = simulation.make_simulator(algorithm, task, clients_per_round=5, batch_size=32)
        before = simulator.evaluate(task.init(root.init))["accuracy"]
        after = simulation.run(simulator, rounds=60).history[-1].metrics["accuracy"]
        assert before < 0.2
        assert after > 0.6
