"""Diagnostics against quadratics, where curvature, gradients and noise are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zofl_jax.algorithms import decomfl, hiso
from zofl_jax.directions import estimators, perturbations
from zofl_jax.observation import diagnostics
from zofl_jax.tasks.quadratic import decay_rate, quadratic

DIM, RANK = 40, 6.0
KEY = jax.random.key(0)
QUADRATIC = quadratic(KEY, dim=DIM, effective_rank=RANK, num_clients=8, examples_per_client=2)
TASK = QUADRATIC.task
BATCH = TASK.train.examples
PARAMS = {"x": jax.random.normal(jax.random.key(1), (DIM,))}
ETA = 0.01


@functools.cache
def exact_hessian():
    hessian = jax.jit(jax.hessian(lambda x: TASK.loss({"x": x}, BATCH)))
    return np.asarray(hessian(PARAMS["x"]), np.float64)


def descent(P=4, direction=perturbations.gaussian, rate=ETA, **options):
    estimator = estimators.projection(P, direction())
    return decomfl(TASK.loss, estimator, optax.sgd(rate), **options)


def test_a_product_with_the_hessian():
    v = jax.random.normal(KEY, (DIM,))
    product = diagnostics.hessian_product(TASK.loss, PARAMS, BATCH, {"x": v})["x"]
    np.testing.assert_allclose(product, exact_hessian() @ np.asarray(v), rtol=1e-4, atol=1e-5)


def test_the_trace_is_unbiased_and_its_error_is_known():
    exact = exact_hessian()
    measure = jax.jit(lambda key: diagnostics.trace(TASK.loss, PARAMS, BATCH, key, 64))
    found = jax.vmap(measure)(jax.random.split(KEY, 200))
    error = np.std(found.mean, ddof=1) / 200**0.5
    assert abs(np.mean(found.mean) - np.trace(exact)) < 5 * error
    variance = 2 * (np.sum(exact**2) - np.sum(np.diag(exact) ** 2))
    expected = (variance / 64) ** 0.5
    assert np.std(found.mean, ddof=1) == pytest.approx(expected, rel=5 / (2 * 199) ** 0.5)
    assert np.mean(found.standard_error) == pytest.approx(expected, rel=0.05)


def test_the_trace_of_a_diagonal_needs_one_probe():
    def loss(x, batch):
        return jnp.sum(batch * x**2)

    found = diagnostics.trace(loss, jnp.ones(5), jnp.arange(5.0), KEY, 2)
    assert found == (20.0, 0.0)


def test_the_top_eigenvalue_and_the_effective_rank():
    top = diagnostics.top_eigenvalue(TASK.loss, PARAMS, BATCH, KEY, 64)
    ratio = np.exp(-decay_rate(DIM, RANK))
    assert 1 - DIM * ratio**128 < top <= 1 + 1e-5  # the spectrum starts at 1
    found = diagnostics.trace(TASK.loss, PARAMS, BATCH, KEY, 64)
    assert abs(found.mean / top - RANK) < 5 * found.standard_error


def test_the_top_eigenvalue_where_a_negative_one_is_larger():
    def loss(x, batch):
        return jnp.sum(batch * x**2) / 2

    spectrum = jnp.array([-7.0, -1.0, 0.5, 2.0])
    found = diagnostics.top_eigenvalue(loss, jnp.ones(4), spectrum, KEY, 100)
    assert found == pytest.approx(2.0, rel=1e-4)


def worth(algorithm, count=2000, state=None):
    keys = jax.random.split(jax.random.key(3), count)
    update = diagnostics.update_of(algorithm, state or algorithm.init(PARAMS), BATCH)
    return jax.jit(lambda: diagnostics.updates(update, TASK.loss, PARAMS, BATCH, keys))()


def curvature_along_the_gradient():
    gradient = np.asarray(QUADRATIC.gradient(PARAMS, BATCH)["x"], np.float64)
    return gradient @ exact_hessian() @ gradient / (gradient @ gradient)


@pytest.mark.parametrize("P", [1, 8])
def test_updates_along_gaussian_directions(P):
    found = worth(descent(P))
    # E ‖ĝ − g‖² = (d + 1) / P ‖g‖² and E ĝᵀHĝ = (tr H ‖g‖² + (P + 1) gᵀHg) / P.
    assert found.snr == pytest.approx(P / (DIM + 1), rel=5 * (4 / (2000 * P)) ** 0.5)
    kappa = curvature_along_the_gradient()
    expected = ETA * (np.trace(exact_hessian()) + (P + 1) * kappa) / (2 * P)
    assert found.stability == pytest.approx(expected, rel=5 * (4 / (2000 * P)) ** 0.5)


def test_updates_are_those_of_the_present_state():
    """A rate that follows the rounds, a curvature and moments come from the state."""

    def of_start_and_state(algorithm, **changed):
        start = algorithm.init(PARAMS)
        state = start._replace(opt_state=optax.tree_utils.tree_set(start.opt_state, **changed))
        return [float(worth(algorithm, 4, s).stability) for s in (start, state)]

    def everywhere(value):
        return {"x": jnp.full(DIM, value)}

    halved = descent(rate=lambda count: ETA / (1 + (count >= 7)))
    start, later = of_start_and_state(halved, count=jnp.asarray(7))
    assert later == pytest.approx(start / 2, rel=1e-4)

    learnt = hiso(TASK.loss, lambda z: estimators.projection(4, z), optax.sgd(ETA))
    start, curved = of_start_and_state(learnt, curvature=everywhere(4.0))
    assert curved == pytest.approx(start / 4, rel=1e-4)

    adam = decomfl(TASK.loss, estimators.projection(4), optax.adam(ETA))
    start, still = of_start_and_state(adam, nu=everywhere(1e6), count=jnp.asarray(50))
    assert 0 < still < 0.01 * start


def test_updates_along_the_gradient_have_no_noise():
    def update(key):
        return jax.tree.map(lambda g: -ETA * g, QUADRATIC.gradient(PARAMS, BATCH))

    found = diagnostics.updates(update, TASK.loss, PARAMS, BATCH, jax.random.split(KEY, 4))
    assert found.snr > 1e5
    assert found.stability == pytest.approx(ETA * curvature_along_the_gradient() / 2, rel=1e-4)


@pytest.mark.parametrize(("factor", "falls"), [(0.8, True), (1.25, False)])
def test_the_loss_falls_on_average_where_stability_is_below_one(factor, falls):
    rate = factor * ETA / float(worth(descent(1)).stability)
    algorithm = descent(1, rate=rate)
    keys = jax.random.split(jax.random.key(5), 4000)
    update = diagnostics.update_of(algorithm, algorithm.init(PARAMS), BATCH)

    @jax.jit
    @jax.vmap
    def change(key):
        after = jax.tree.map(jnp.add, PARAMS, update(key))
        return TASK.loss(after, BATCH) - TASK.loss(PARAMS, BATCH)

    changes = np.asarray(change(keys))
    error = changes.std(ddof=1) / len(changes) ** 0.5
    assert (changes.mean() < 0) == falls and abs(changes.mean()) > 2 * error


def test_the_variance_across_clients():
    clients = {"center": BATCH["center"].reshape(8, 2, DIM)}
    gradients = np.stack(
        [
            QUADRATIC.gradient(PARAMS, {"center": clients["center"][c]})["x"].astype(float)
            for c in range(8)
        ]
    )
    mean = gradients.mean(axis=0)
    expected = np.mean(np.sum((gradients - mean) ** 2, axis=1)) / np.sum(mean**2)
    found = diagnostics.client_variance(TASK.loss, PARAMS, clients)
    assert found == pytest.approx(expected, rel=1e-4)
    alike = jax.tree.map(lambda x: jnp.stack([x] * 3), BATCH)
    assert diagnostics.client_variance(TASK.loss, PARAMS, alike) < 1e-10


def test_the_noise_scale_of_examples():
    """That of the examples' own gradients, from forward passes alone, within 4 of its errors."""
    random = np.random.default_rng(0)
    slopes = (0.4 + random.normal(size=(32, 400))).astype(np.float32)
    mean, variance = slopes.mean(0), slopes.var(0, ddof=1).sum()
    exact = variance / (np.sum(mean**2) - variance / 32)

    def linear(x, batch):
        return jnp.mean(batch @ x)

    found = diagnostics.noise_scale(
        linear, jnp.zeros(400), slopes, jax.random.key(1), num_directions=200
    )
    assert abs(float(found) / exact - 1) < 4 * (2 / 200) ** 0.5
    with pytest.raises(ValueError, match="two examples or more, got 1"):
        diagnostics.noise_scale(linear, jnp.zeros(400), slopes[:1], jax.random.key(1))


def test_a_diagnosis_of_a_task():
    algorithm = descent(4, local_steps=2)
    diagnose = diagnostics.make_diagnose(algorithm, TASK, 2)
    found = diagnose(algorithm.init(PARAMS), KEY)
    assert diagnose(algorithm.init(PARAMS), KEY) == found
    assert abs(found.effective_rank - RANK) < 5 * found.trace_error
    assert found.effective_rank == pytest.approx(found.trace / found.top_eigenvalue)
    gradient = QUADRATIC.gradient(PARAMS, BATCH)["x"]
    assert found.gradient_norm == pytest.approx(float(jnp.linalg.norm(gradient)), rel=1e-4)
    assert 0 < found.snr < 1 and 0 < found.stability < 1 and found.client_variance > 0


def test_numbers_that_make_no_sense():
    with pytest.raises(ValueError, match="num_probes must be >= 2, got 1"):
        diagnostics.trace(TASK.loss, PARAMS, BATCH, KEY, 1)
    with pytest.raises(ValueError, match="num_iterations must be >= 1, got 0"):
        diagnostics.top_eigenvalue(TASK.loss, PARAMS, BATCH, KEY, 0)
