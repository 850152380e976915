"""The estimators: unbiased for the gradient, exact where they should be, no evaluation wasted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zofl_jax import keys
from zofl_jax.directions import estimators, perturbations, sums

PERTURBATIONS = {
    "gaussian": perturbations.gaussian(),
    "rademacher": perturbations.rademacher(),
    "sphere": perturbations.sphere(),
}
MU = 1e-3
ESTIMATORS = {
    "forward_difference": functools.partial(estimators.forward_difference, smoothing=MU),
    "central_difference": functools.partial(estimators.central_difference, smoothing=MU),
    "projection": estimators.projection,
    "forward_gradient": estimators.forward_gradient,
}
DIFFERENCES = {
    "forward_difference": estimators.forward_difference,
    "central_difference": estimators.central_difference,
}
SAMPLES = 20_000
KEY = keys.round_key(keys.root(5).shared, 0)

PARAMS = {"w": jnp.array([0.5, -1.0, 0.2, 1.5]), "b": jnp.array(0.3)}
DIM = 5


def flat(tree) -> np.ndarray:
    """Returns the leaves b [...] and w [..., 4] side by side, [..., 5]."""
    return np.concatenate([np.asarray(tree["b"])[..., None], np.asarray(tree["w"])], axis=-1)


def logistic_data() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "features": random.normal(size=(16, 4)).astype(np.float32),
        "sign": random.choice([-1.0, 1.0], 16).astype(np.float32),
    }


def logistic(x, batch):
    """Mean of log(1 + exp(−y (a·w + b)))."""
    return jnp.mean(jax.nn.softplus(-batch["sign"] * (batch["features"] @ x["w"] + x["b"])))


def logistic_gradient(batch) -> np.ndarray:
    """Its gradient at PARAMS, written out, [5]."""
    inputs = np.concatenate([np.ones((16, 1)), batch["features"]], axis=1).astype(np.float64)
    margins = batch["sign"] * (inputs @ flat(PARAMS))
    return -np.mean((batch["sign"] / (1 + np.exp(margins)))[:, None] * inputs, axis=0)


def logistic_smoothness(batch) -> float:
    """L: its curvature is at most λ_max of the mean of a aᵀ / 4."""
    inputs = np.concatenate([np.ones((16, 1)), batch["features"]], axis=1).astype(np.float64)
    return float(np.linalg.eigvalsh(inputs.T @ inputs / 16 / 4).max())


@functools.partial(jax.jit, static_argnums=(0, 1))
def measure(estimator, loss_fn, params, batch):
    return estimator.measure(loss_fn, KEY, 0, params, batch)


@functools.partial(jax.jit, static_argnums=2)
def drawn(key, params, perturbation="gaussian"):
    """Returns a direction by itself."""
    return sums.arrays(PERTURBATIONS[perturbation].sample(key, params))


def gradient_estimates(estimator, loss_fn, params, batch):
    """Returns 20,000 independent estimates of the gradient, a tree of [n, ...]."""

    def estimate(key):
        scalars = estimator.measure(loss_fn, key, 0, params, batch).scalars
        return estimator.expand(key, params, scalars)

    return jax.jit(jax.vmap(estimate))(keys.direction_keys(KEY, SAMPLES))


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_mean_estimate_is_the_gradient(name, perturbation):
    """Within 5 standard errors a coordinate, and for differences the bias of smoothing.

    |∇f_μ − ∇f| <= μ L E|z|³ / 2, with E|z|³ <= (d + 3)^{3/2}: Nesterov & Spokoiny 2017, Lemma 3.
    """
    batch = logistic_data()
    estimator = ESTIMATORS[name](4, perturbation=PERTURBATIONS[perturbation])
    estimates = flat(gradient_estimates(estimator, logistic, PARAMS, batch)).astype(np.float64)
    gradient = logistic_gradient(batch)
    bias = MU * logistic_smoothness(batch) * (DIM + 3) ** 1.5 / 2 if name in DIFFERENCES else 0
    standard_error = estimates.std(0) / SAMPLES**0.5
    assert np.all(np.abs(estimates.mean(0) - gradient) <= 5 * standard_error + bias)
    # So a factor of 1.1 on a scalar or a direction would be noticed.
    assert np.linalg.norm(5 * standard_error + bias) < 0.1 * np.linalg.norm(gradient)


@pytest.mark.parametrize(
    ("perturbation", "fourth_moment"),
    [("gaussian", 3), ("rademacher", 1), ("sphere", 3 * DIM / (DIM + 2))],
)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_bias_of_differences_is_that_of_the_smoothed_loss(name, perturbation, fourth_moment):
    """For f = Σ x_i³ and a large μ the mean is 3 x_i² + μ² E z_i⁴: known, and not small."""
    mu = 0.5
    estimator = DIFFERENCES[name](4, mu, PERTURBATIONS[perturbation])

    def cubic(x, batch):
        return jnp.sum(x["w"] ** 3) + x["b"] ** 3

    estimates = flat(gradient_estimates(estimator, cubic, PARAMS, ())).astype(np.float64)
    expected = 3 * flat(PARAMS) ** 2 + mu**2 * fourth_moment
    standard_error = estimates.std(0) / SAMPLES**0.5
    assert np.all(np.abs(estimates.mean(0) - expected) <= 5 * standard_error)
    # The smallest bias, 1/4, stands out of the noise over all coordinates together.
    excess = np.sum(estimates - 3 * flat(PARAMS) ** 2, axis=1)
    assert excess.mean() > 5 * excess.std() / SAMPLES**0.5


@pytest.mark.parametrize("name", ESTIMATORS)
def test_scalars_follow_their_formula(x64, name):
    """In float64, direction by direction; and what is reported as the loss."""
    mu = 0.1
    batch = logistic_data()
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS)
    make = DIFFERENCES.get(name)
    estimator = make(3, mu) if make else ESTIMATORS[name](3)
    estimate = measure(estimator, logistic, params, batch)
    gradient = logistic_gradient(batch)
    base = float(logistic(params, batch))
    evaluations, expected = [], []
    for key in keys.direction_keys(KEY, 3):
        z = drawn(key, params)
        plus, minus = (
            float(logistic(jax.tree.map(lambda x, z: x + s * mu * z, params, z), batch))  # noqa: B023
            for s in (1, -1)
        )
        evaluations += [plus, minus]
        expected.append(
            {
                "forward_difference": (plus - base) / mu,
                "central_difference": (plus - minus) / (2 * mu),
                "projection": gradient @ flat(z),
                "forward_gradient": gradient @ flat(z),
            }[name]
        )
    np.testing.assert_allclose(estimate.scalars, expected, rtol=1e-12)
    loss = np.mean(evaluations) if name == "central_difference" else base
    np.testing.assert_allclose(estimate.loss, loss, rtol=1e-14)


def test_central_differences_are_exact_for_quadratics(x64):
    """At any μ, where forward differences are off by μ zᵀ A z / 2."""
    curvature = jnp.arange(1.0, 6.0)
    x = jnp.linspace(-1.0, 1.0, 5)

    def quadratic(x, batch):
        return jnp.sum(curvature * x**2) / 2

    mu = 2.0
    z = drawn(keys.direction_keys(KEY, 1)[0], x)
    slope, bend = jnp.sum(curvature * x * z), jnp.sum(curvature * z**2)
    central = measure(estimators.central_difference(1, mu), quadratic, x, ())
    forward = measure(estimators.forward_difference(1, mu), quadratic, x, ())
    np.testing.assert_allclose(central.scalars, [slope], rtol=1e-13)
    np.testing.assert_allclose(forward.scalars, [slope + mu * bend / 2], rtol=1e-13)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_expand_averages_the_directions(perturbation):
    """(1/P) Σ_p g_p z_p, with the same directions that were measured."""
    chosen = PERTURBATIONS[perturbation]
    estimator = estimators.projection(3, chosen)
    scalars = np.array([1.0, -2.0, 0.5], np.float32)
    total = sum(
        float(g) * flat(drawn(key, PARAMS, perturbation))
        for g, key in zip(scalars, keys.direction_keys(KEY, 3), strict=True)
    )
    mean = jax.jit(estimator.expand)(KEY, PARAMS, scalars)
    np.testing.assert_allclose(flat(mean), total / 3, rtol=1e-5, atol=1e-6)


def test_smoothing_follows_its_schedule():
    """μ = 1 in rounds 0 and 1, then 1/2: seen in the error μ zᵀ z / 2 of a forward difference."""
    smoothing = optax.piecewise_constant_schedule(1.0, {2: 0.5})
    estimator = estimators.forward_difference(1, smoothing)

    def square(x, batch):
        return jnp.sum(x**2) / 2

    x = jnp.zeros(3)
    z = drawn(keys.direction_keys(KEY, 1)[0], x)
    scalar_of_round = jax.jit(lambda r: estimator.measure(square, KEY, r, x, ()).scalars[0])
    measured = [float(scalar_of_round(r)) for r in range(4)]
    expected = float(jnp.sum(z**2)) / 2 * np.array([1, 1, 0.5, 0.5])
    np.testing.assert_allclose(measured, expected, rtol=1e-5)


@pytest.mark.parametrize("perturbation", ["gaussian", "low_rank"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_group_of_examples_has_directions_of_its_own(x64, name, perturbation):
    """Scalar p is that of group p mod G, as it is measured without groups; so is the mean loss.

    The second round of directions is evaluated apart, in chunks of 3, where they share a product.
    """
    groups, count, batch = 4, 8, logistic_data()
    params = {"w": jnp.array([[0.5], [-1.0], [0.2], [1.5]]), "b": jnp.array(0.3)}
    chosen = {"gaussian": perturbations.gaussian(), "low_rank": perturbations.low_rank()}

    def loss(x, batch):
        return logistic({"w": x["w"][:, 0], "b": x["b"]}, batch)

    options = {"perturbation": chosen[perturbation]}
    if name in DIFFERENCES and perturbation == "low_rank":
        options["perturbations_at_once"] = 3
    found = measure(ESTIMATORS[name](count, groups=groups, **options), loss, params, batch)
    of_one_group, losses = ESTIMATORS[name](count, **options), []
    for group in range(groups):
        own = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:])[group], batch)  # noqa: B023
        alone = measure(of_one_group, loss, params, own)
        np.testing.assert_allclose(
            found.scalars[group::groups], alone.scalars[group::groups], rtol=1e-9
        )
        central = name == "central_difference"  # whose loss is the mean around the params
        losses.append(loss(params, own) if central else alone.loss)
    np.testing.assert_allclose(found.loss, np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_the_error_of_directions_with_examples_of_their_own(size):
    """E ‖ĝ − ∇f‖² = (d + 1) / P · (‖∇f‖² + the variance of the mean gradient of m examples).

    So 32 directions of one example each, 32 example-passes a side, have an eighth of the error of
    two directions of all 16 where the examples agree, and more where they do not.
    """
    batch = {"slope": 0.5 + np.random.default_rng(3).normal(size=(16, 5)).astype(np.float32)}

    def linear(x, batch):
        return jnp.mean(batch["slope"] @ x)

    groups = 16 // size
    count = 32 // size
    estimator = estimators.projection(count, groups=groups)
    estimates = gradient_estimates(estimator, linear, jnp.zeros(5), batch)
    errors = np.sum((np.asarray(estimates, np.float64) - batch["slope"].mean(0)) ** 2, axis=1)
    own = batch["slope"].reshape(groups, size, 5).mean(1)
    expected = (5 + 1) / count * np.mean(np.sum(own.astype(np.float64) ** 2, axis=1))
    assert abs(errors.mean() - expected) < 5 * errors.std() / SAMPLES**0.5
    assert errors.std() / SAMPLES**0.5 < 0.02 * expected


def test_groups_that_do_not_come_out_are_refused():
    with pytest.raises(ValueError, match=r"must be a multiple of the groups .* got 5 and 2"):
        estimators.projection(5, groups=2)
    with pytest.raises(ValueError, match="16 examples can't be shared out to 3 groups"):
        measure(estimators.projection(3, groups=3), logistic, PARAMS, logistic_data())


@pytest.mark.parametrize("num_perturbations", [1, 4])
@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        ("forward_difference", lambda p: p + 1),  # the base loss once
        ("central_difference", lambda p: 2 * p),
        ("projection", lambda p: 1),
        ("forward_gradient", lambda p: p),
    ],
)
def test_no_evaluation_is_wasted(name, evaluations, num_perturbations):
    """Counts the losses that compiled code evaluates."""
    count = []

    def counted(x, batch):
        jax.debug.callback(lambda: count.append(1))
        return logistic(x, batch)

    estimator = ESTIMATORS[name](num_perturbations)
    jax.block_until_ready(measure(estimator, counted, PARAMS, logistic_data()))
    jax.effects_barrier()
    assert len(count) == evaluations(num_perturbations)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_example_is_evaluated_in_vain(name):
    """With groups of two of 16 examples, 24 directions take three times the batch a side."""
    count = []

    def counted(x, batch):
        jax.debug.callback(lambda signs: count.append(signs.size), batch["sign"])
        return logistic(x, batch)

    estimator = ESTIMATORS[name](24, groups=8)
    jax.block_until_ready(measure(estimator, counted, PARAMS, logistic_data()))
    jax.effects_barrier()
    # Forward mode carries a tangent along, which counts as a pass of its own.
    carried = 2 if name == "forward_gradient" else 1
    assert carried * sum(count) == 16 * estimator.passes.forward


@pytest.mark.parametrize("name", ESTIMATORS)
def test_losses_in_half_precision_are_subtracted_in_float32(name):
    def half(x, batch):
        return logistic(x, batch).astype(jnp.bfloat16)

    estimate = measure(ESTIMATORS[name](2), half, PARAMS, logistic_data())
    assert estimate.scalars.dtype == estimate.loss.dtype == jnp.float32


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("name", ["forward_difference", "forward_gradient"])
def test_params_in_half_precision_are_measured_and_expanded(name, perturbation):
    """Directions for bfloat16 params are bfloat16; scalars stay float32 and about right."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    make = DIFFERENCES.get(name)
    chosen = PERTURBATIONS[perturbation]
    estimator = make(2, 0.1, chosen) if make else ESTIMATORS[name](2, perturbation=chosen)
    scalars = measure(estimator, logistic, params, logistic_data()).scalars
    assert scalars.dtype == jnp.float32
    exact = measure(estimators.projection(2, chosen), logistic, PARAMS, logistic_data())
    np.testing.assert_allclose(scalars, exact.scalars, atol=0.25)
    direction = jax.jit(estimator.expand)(KEY, params, scalars)
    assert {leaf.dtype for leaf in jax.tree.leaves(direction)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_perturbations_are_refused(name):
    with pytest.raises(ValueError, match="num_perturbations must be >= 1, got 0"):
        ESTIMATORS[name](0)


@pytest.mark.parametrize("mu", [0.0, -1e-3, float("inf"), float("nan")])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_smoothing_out_of_range_is_refused(name, mu):
    with pytest.raises(ValueError, match=f"smoothing must be positive and finite, got {mu}"):
        DIFFERENCES[name](1, mu)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_loss_for_each_example_is_refused(name):
    with pytest.raises(ValueError, match=r"the loss must be one number.*got shape \(16,\)"):
        ESTIMATORS[name](1).measure(
            lambda x, batch: batch["features"] @ x["w"], KEY, 0, PARAMS, logistic_data()
        )
