"""HiSo: DeComFL without learning, a preconditioned step with a curvature, and faster for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_simulations import assert_same_bits
from tiny_tasks import softmax_task

from zofl_jax import estimators, keys, perturbations
from zofl_jax.algorithms import decomfl, hiso

KEY = keys.round_key(keys.root(2).shared, 0)


def central(perturbation):
    return estimators.central_difference(3, 1e-2, perturbation)


def test_without_learning_it_is_decomfl_bit_for_bit():
    """The client's scalars and everyone's params, over local steps with momentum."""
    task = softmax_task()
    optimizer = optax.sgd(0.1, momentum=0.9)
    plain = decomfl(task.loss, central(perturbations.gaussian()), optimizer, local_steps=2)
    still = hiso(task.loss, central, optimizer, nu=0.0, local_steps=2)
    batches = jax.tree.map(lambda x: jnp.asarray(x[:8]).reshape(2, 4, *x.shape[1:]), task.test)

    def round_of(algorithm):
        state = algorithm.init(task.init(KEY))
        upload = jax.jit(algorithm.client)(KEY, state, (), batches, KEY).upload
        return upload, jax.jit(algorithm.server)(KEY, state, upload)

    (upload, after), (expected_upload, expected) = round_of(still), round_of(plain)
    assert_same_bits(upload, expected_upload)
    assert_same_bits(after.params, expected.params)
    assert_same_bits(after.opt_state.inner, expected.opt_state)
    assert {float(x.min()) for x in jax.tree.leaves(after.opt_state.curvature)} == {1.0}


@pytest.mark.parametrize("learn_from", ["first", "last", "all"])
def test_the_curvature_follows_its_formula(quick_compile, learn_from):
    """H ← (1 − ν) H + ν (Δx² + ε), in the order of the local steps."""
    estimator = central(perturbations.gaussian())
    algorithm = hiso(
        lambda x, batch: jnp.sum(x), central, optax.sgd(0.1), nu=0.25, epsilon=0.5,
        learn_from=learn_from, local_steps=3,
    )  # fmt: skip
    params = jnp.zeros(5)
    broadcast = jnp.array([[1.0, 2.0, -1.0], [0.5, 0.0, 2.0], [-1.0, 1.0, 1.0]])
    after = jax.jit(algorithm.server)(KEY, algorithm.init(params), broadcast)
    expected = np.ones(5)
    for k in {"first": [0], "last": [2], "all": [0, 1, 2]}[learn_from]:
        step = np.asarray(estimator.expand(keys.step_key(KEY, k), params, broadcast[k]))
        expected = 0.75 * expected + 0.25 * (step**2 + 0.5)
    np.testing.assert_allclose(after.opt_state.curvature, expected, rtol=1e-5)


def test_a_step_is_preconditioned_by_the_curvature(quick_compile):
    """E[Δx] = H⁻¹ ∇f, within 5 standard errors over 4,000 directions."""
    curvature, slope = jnp.array([4.0, 1.0, 0.25]), jnp.array([1.0, -2.0, 0.5])
    algorithm = hiso(
        lambda x, batch: x @ slope, lambda z: estimators.projection(1, z), optax.sgd(1.0)
    )
    state = algorithm.init(jnp.zeros(3))
    state = state._replace(opt_state=state.opt_state._replace(curvature=curvature))

    @jax.jit
    @jax.vmap
    def step(key):
        upload = algorithm.client(key, state, (), jnp.zeros((1, 1)), key).upload
        return -algorithm.server(key, state, upload).params

    steps = np.asarray(step(jax.random.split(KEY, 4000)))
    errors = steps.std(0) / len(steps) ** 0.5
    assert (abs(steps.mean(0) - slope / curvature) <= 5 * errors).all()


def test_it_whitens_a_quadratic_and_needs_a_third_of_the_rounds():
    """A diagonal quadratic of condition number 1,000; both methods with the best of their rates."""
    spectrum = jnp.logspace(0, -3, 16)

    def loss(x, batch):
        return jnp.sum(spectrum * x * x) / 2

    def estimator(perturbation):
        return estimators.projection(64, perturbation)

    start = 1 / jnp.sqrt(spectrum)  # as much of the loss in every coordinate
    target = 0.01 * loss(start, None)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def run(method, rate):
        if method == "hiso":
            algorithm = hiso(loss, estimator, optax.sgd(rate), nu=0.1)
        else:
            algorithm = decomfl(loss, estimator(perturbations.gaussian()), optax.sgd(rate))

        def body(state):
            key = keys.round_key(KEY, state.round)
            upload = algorithm.client(key, state, (), jnp.zeros((1, 1)), key).upload
            return algorithm.server(key, state, upload)

        def unfinished(state):
            return (loss(state.params, None) > target) & (state.round < 1500)

        end = jax.lax.while_loop(unfinished, body, algorithm.init(start))
        reached = loss(end.params, None) <= target
        return jnp.where(reached, end.round, 1500), end.opt_state

    rounds, states = run("hiso", jnp.array([0.3, 0.5, 1.0]))
    plain, _ = run("decomfl", jnp.array([1.2, 1.6, 2.0, 2.4]))
    assert 3 * rounds.min() <= plain.min() < 1500
    shaped = np.asarray(spectrum / states.curvature[rounds.argmin()])
    assert shaped.max() / shaped.min() < 1000 / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nu": 1.0}, r"nu must be in \[0, 1\), got 1.0"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"learn_from": "none"}, "learn_from must be"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hiso(softmax_task().loss, central, optax.sgd(0.1), **options)
