"""Quadratic tasks: spectrum, gradient and minimum are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax.tasks import quadratic as quadratics

KEY = jax.random.key(3)


def make(**options):
    defaults = {"dim": 6, "effective_rank": 2.5, "num_clients": 4, "examples_per_client": 3}
    return quadratics.quadratic(KEY, **{**defaults, **options})


def hessian(quadratic, dim: int) -> np.ndarray:
    batch = {"center": jnp.zeros((1, dim))}
    second = jax.jit(jax.hessian(lambda x: quadratic.task.loss({"x": x}, batch)))
    return np.asarray(second(jnp.ones(dim)))


@pytest.mark.parametrize("effective_rank", [1.0, 2.5, 5.9, 6.0])
def test_spectrum_has_the_effective_rank(x64, effective_rank):
    """λ_max = 1, Σλ = effective rank, exponential decay, and a dense matrix."""
    matrix = hessian(make(effective_rank=effective_rank), 6)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    spectrum = np.sort(np.linalg.eigvalsh(matrix))[::-1]
    np.testing.assert_allclose(spectrum[0], 1, rtol=1e-12)
    np.testing.assert_allclose(spectrum.sum(), effective_rank, rtol=1e-9)
    if effective_rank > 2:
        ratios = spectrum[1:] / spectrum[:-1]
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)
    if effective_rank == 2.5:
        assert np.all(np.abs(matrix) > 1e-3)
    if effective_rank == 6:
        np.testing.assert_allclose(matrix, np.eye(6), atol=1e-12)


@pytest.mark.parametrize("dim", [1, 10, 1_000, 1_000_000])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999, 1.0])
def test_decay_rate_reaches_the_effective_rank(dim, share):
    effective_rank = 1 + share * (dim - 1)
    rate = quadratics.decay_rate(dim, effective_rank)
    assert rate >= 0
    np.testing.assert_allclose(np.exp(-rate * np.arange(dim)).sum(), effective_rank, rtol=1e-6)


def test_gradient_and_metrics_agree_with_the_loss(x64):
    quadratic = make(noise=0.5)
    task, batch = quadratic.task, jax.tree.map(lambda x: x[2:7], quadratic.task.train.examples)
    params = {"x": jnp.linspace(-1.0, 2.0, 6)}
    exact = jax.jit(quadratic.gradient)(params, batch)
    loss, slope = jax.jit(jax.value_and_grad(task.loss))(params, batch)
    np.testing.assert_allclose(exact["x"], slope["x"], rtol=1e-12)
    losses = jax.jit(task.metrics)(params, batch)["loss"]
    assert losses.shape == (5,)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-12)
    error = np.asarray(params["x"] - batch["center"][1])
    np.testing.assert_allclose(losses[1], error @ hessian(quadratic, 6) @ error / 2, rtol=1e-12)


def test_the_minimum_is_the_minimum(x64):
    quadratic = make(noise=0.5)
    task, examples = quadratic.task, quadratic.task.train.examples
    gradient = jax.jit(quadratic.gradient)(quadratic.minimizer, examples)["x"]
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    np.testing.assert_allclose(
        quadratic.minimizer["x"], np.mean(examples["center"], axis=0), rtol=1e-12
    )
    assert quadratic.minimum == float(task.loss(quadratic.minimizer, examples)) > 0
    # A step h away costs exactly hᵀ A h / 2 more.
    step = np.linspace(-1, 1, 6)
    away = float(task.loss({"x": quadratic.minimizer["x"] + step}, examples))
    expected = step @ hessian(quadratic, 6) @ step / 2
    np.testing.assert_allclose(away - quadratic.minimum, expected, rtol=1e-9)
    np.testing.assert_array_equal(task.test["center"], examples["center"])


def test_clients_own_their_examples_in_order():
    task = make(heterogeneity=2.0, noise=0.01).task
    assert task.train.num_clients == 4
    assert task.train.offsets.tolist() == [0, 3, 6, 9, 12]
    assert task.train.order.tolist() == list(range(12))
    centers = np.asarray(task.train.examples["center"]).reshape(4, 3, 6)
    assert centers.std(axis=1).max() < 0.1 < centers.mean(axis=1).std(axis=0).min()


def test_clients_without_heterogeneity_and_noise_agree():
    quadratic = make(heterogeneity=0.0)
    assert quadratic.minimum < 1e-10
    assert np.ptp(np.asarray(quadratic.task.train.examples["center"]), axis=0).max() == 0


def test_noise_and_heterogeneity_scale_the_spread():
    still, noisy, noisier = (
        np.asarray(make(heterogeneity=0.0, noise=noise).task.train.examples["center"])
        for noise in (0.0, 1.0, 2.0)
    )
    np.testing.assert_allclose(noisier - still, 2 * (noisy - still), rtol=1e-4, atol=1e-5)
    assert 0.7 < (noisy - still).std() < 1.3


def test_training_starts_at_zero_with_a_gap_that_is_half_the_rank():
    """Whatever the dimension: the gap is that of 30 independent normal coordinates."""
    for dim in (100, 10_000):
        quadratic = make(
            dim=dim, effective_rank=30.0, num_clients=1, examples_per_client=1, heterogeneity=0.0
        )
        start = quadratic.task.init(KEY)
        assert not np.any(start["x"])
        gap = float(quadratic.task.loss(start, quadratic.task.train.examples)) - quadratic.minimum
        assert 8 < gap < 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be >= 1, got 0"),
        ({"num_clients": 0}, "num_clients must be >= 1, got 0"),
        ({"examples_per_client": 0}, "examples_per_client must be >= 1, got 0"),
        ({"effective_rank": 0.5}, r"effective_rank must be in \[1, dim = 6\], got 0.5"),
        ({"effective_rank": 7.0}, r"effective_rank must be in \[1, dim = 6\], got 7.0"),
        ({"effective_rank": float("nan")}, "effective_rank must be in .* got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
