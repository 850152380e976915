"""The default learning rates: their formula, and that the demo trains whatever flag is changed."""

import math

import jax
import numpy as np
import pytest
from flag_lines import build, resolve

from zofl_jax.algorithms import METHODS
from zofl_jax.configuration import rates
from zofl_jax.configuration.config import Config
from zofl_jax.models.images import MODELS, Curvature

FLAGS = {
    "task": "digits",
    "model": "softmax",
    "algorithm": "decomfl",
    "optimizer": "sgd",
    "momentum": 0.9,
    "num_perturbations": 20,
}


def default(**changes):
    return rates.default(Config(**{**FLAGS, **changes}))


def test_the_edge_is_where_a_gaussian_step_no_longer_lowers_the_loss_on_average():
    top, others, count = 1.0, 0.25, 4
    eigenvalues = np.array([top] + [others] * 8)
    z = np.random.default_rng(0).normal(size=(400_000, count, 9))
    along_top = np.zeros(9)
    along_top[0] = 1.0  # a gradient along the top eigenvector has the nearest edge
    estimates = np.einsum("npd,np->nd", z, z @ along_top) / count
    curved = (eigenvalues * estimates**2).sum(1)
    worth = 2 * estimates[:, 0].mean() / curved.mean()
    edge = rates.edge(Curvature(eigenvalues.sum(), top), count)
    assert edge == pytest.approx(worth, rel=0.02)


def test_the_edge_of_momentum_is_that_of_the_heavy_ball_without_noise():
    momentum, top = 0.9, 3.0
    edge = (1 - momentum) * rates.edge(Curvature(top, top), math.inf, momentum)
    for factor, stable in ((0.98, True), (1.02, False)):
        x, speed = 1.0, 0.0
        for _ in range(2000):
            speed = momentum * speed + top * x
            x -= factor * edge * speed
        assert (abs(x) < 1) is stable


def test_the_rate_follows_directions_momentum_and_optimiser():
    assert default() == 0.02
    assert default(num_perturbations=1) == pytest.approx(0.02 / 20, rel=0.15)
    assert default(momentum=0.0, num_perturbations=1) == pytest.approx(0.01, rel=0.1)
    # Many directions are almost a gradient.
    assert default(momentum=0.0, num_perturbations=10**6) == default(
        momentum=0.0, algorithm="fedsgd"
    )
    assert default(model="mlp") < default() / 5
    assert default(optimizer="adam", num_perturbations=4) < default(optimizer="adam") < 0.03
    assert default(optimizer="adam", algorithm="fedavg") == rates.ADAM


def test_a_rate_that_is_given_is_kept_and_others_suit_the_task():
    assert resolve("--learning_rate=0.5", "--model=mlp").learning_rate == 0.5
    assert resolve("--model=mlp").learning_rate == default(model="mlp")
    texts = resolve("--task=reviews", "--model=gguf:model.gguf")
    assert texts.learning_rate == 1e-4  # at P = 5, without momentum
    assert resolve("--task=quadratic", "--effective_rank=5").learning_rate == 0.046


def test_every_model_and_algorithm_has_a_rate():
    for task in ("digits", "idx", "npz", "tfds:mnist"):
        for model in MODELS:
            for algorithm in METHODS:
                assert 0 < default(task=task, model=model, algorithm=algorithm) < 1


# The demo's text with one change: what a newcomer does first.
DEMO = ["--task=digits", "--rounds=60", "--local_steps=1"]


@pytest.mark.parametrize(
    "change",
    [
        ["--model=mlp"],
        ["--algorithm=fedavg"],
        ["--algorithm=feedsign"],
        ["--optimizer=adam"],
    ],
    ids=lambda change: change[0],
)
def test_the_demo_with_one_change_trains(change):
    fixed = change[0].startswith("--algorithm")  # feedsign's own P is 1, fedavg has none
    arguments = (*DEMO, *change, *([] if fixed else ["--num_perturbations=5"]))
    simulator = build(*arguments).simulator
    progress = simulator.start(None)
    before = simulator.evaluate(progress.state.params)["loss"]
    state, _, trace = simulator.advance(progress.state, progress.memory, resolve(*arguments).rounds)
    assert trace.failed_loss is None
    loss = simulator.evaluate(jax.tree.map(np.asarray, state.params))["loss"]
    assert loss < before - 0.02
    assert trace.losses[-5:].max() < before
