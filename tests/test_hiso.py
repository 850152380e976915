"""HiSo: DeComFL without learning, a preconditioned step with a curvature, and faster for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_simulations import assert_same_bits
from tiny_tasks import softmax_task

from zofl_jax import keys
from zofl_jax.algorithms import decomfl, hiso
from zofl_jax.directions import estimators, perturbations, sums

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
def test_the_curvature_follows_its_formula(learn_from):
    """H ← (1 − ν) H + ν (Δx² + ε), in the order of the local steps."""
    estimator = central(perturbations.gaussian())
    algorithm = hiso(
        lambda x, batch: jnp.sum(x), central, optax.sgd(0.1), nu=0.25, epsilon=0.5,
        learn_from=learn_from, local_steps=3,
    )  # fmt: skip
    params = jnp.zeros(5)
    broadcast = jnp.array([[1.0, 2.0, -1.0], [0.5, 0.0, 2.0], [-1.0, 1.0, 1.0]])
    after = jax.jit(algorithm.server)(KEY, algorithm.init(params), broadcast)
    expected, expand = np.ones(5), jax.jit(estimator.expand)
    for k in {"first": [0], "last": [2], "all": [0, 1, 2]}[learn_from]:
        step = np.asarray(expand(keys.step_key(KEY, k), params, broadcast[k]))
        expected = 0.75 * expected + 0.25 * (step**2 + 0.5)
    np.testing.assert_allclose(after.opt_state.curvature, expected, rtol=1e-5)


def test_a_step_is_preconditioned_by_the_curvature():
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


def test_low_rank_directions_are_stretched_by_the_curvature():
    """Scalars and steps are those of the directions H^(−1/2) A Bᵀ, formed one by one."""
    low_rank, rate = perturbations.low_rank(2), 0.1
    random = np.random.default_rng(0)
    params, curvature, data = (
        {"w": jnp.asarray(x, jnp.float32)}
        for x in (
            random.normal(size=(4, 3)),
            random.uniform(0.1, 1.1, (4, 3)),
            random.normal(size=(4, 3)),
        )
    )

    def loss(x, batch):
        return jnp.sum(jnp.square(jnp.tanh(x["w"]) - batch)) / 2

    algorithm = hiso(
        loss, lambda z: estimators.projection(3, z), optax.sgd(rate), nu=0.25, epsilon=0.5,
        perturbation=low_rank, local_steps=2,
    )  # fmt: skip
    state = algorithm.init(params)
    state = state._replace(opt_state=state.opt_state._replace(curvature=curvature))
    batches = jnp.stack([data["w"], -data["w"]])
    upload = jax.jit(algorithm.client)(KEY, state, (), batches, KEY).upload
    after = jax.jit(algorithm.server)(KEY, state, upload)

    w, h = np.asarray(params["w"]), np.asarray(curvature["w"])
    draw = jax.jit(jax.vmap(lambda key: sums.arrays(low_rank.sample(key, params))["w"]))
    for k in range(2):
        drawn = list(np.asarray(draw(keys.direction_keys(keys.step_key(KEY, k), 3))))
        assert all(np.linalg.matrix_rank(u) == 2 for u in drawn)
        directions = [u / np.sqrt(np.asarray(curvature["w"])) for u in drawn]
        slope = np.asarray(jax.grad(loss)({"w": jnp.asarray(w)}, batches[k])["w"])
        scalars = [np.sum(slope * z) for z in directions]
        np.testing.assert_allclose(upload[k], scalars, rtol=1e-4, atol=1e-4)
        step = sum(g * z for g, z in zip(scalars, directions, strict=True)) / 3
        w, h = w - rate * step, 0.75 * h + 0.25 * (step**2 + 0.5)
    np.testing.assert_allclose(after.params["w"], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.opt_state.curvature["w"], h, rtol=1e-3)


SPECTRUM = jnp.logspace(0, -3, 16)  # of a diagonal quadratic of condition number 1,000


def rounds_and_curvature(make, num_perturbations):
    """Returns (rate, key) -> rounds to 1 % of the loss, 1,500 at most, and HiSo's H at the end.

    `make` is (loss, estimator of directions, optimiser) -> algorithm.
    """

    def loss(x, batch):
        return jnp.sum(SPECTRUM * x * x) / 2

    start = 1 / jnp.sqrt(SPECTRUM)  # as much of the loss in every coordinate
    target = 0.01 * loss(start, None)

    def run(rate, key):
        algorithm = make(
            loss, lambda z: estimators.projection(num_perturbations, z), optax.sgd(rate)
        )

        def body(state):
            round_key = keys.round_key(key, state.round)
            upload = algorithm.client(round_key, state, (), jnp.zeros((1, 1)), round_key).upload
            return algorithm.server(round_key, state, upload)

        def unfinished(state):
            return (loss(state.params, None) > target) & (state.round < 1500)

        end = jax.lax.while_loop(unfinished, body, algorithm.init(start))
        reached = loss(end.params, None) <= target
        return jnp.where(reached, end.round, 1500), getattr(end.opt_state, "curvature", None)

    return run


def learning(loss, estimator, optimizer):
    return hiso(loss, estimator, optimizer, nu=0.1)


def plain(loss, estimator, optimizer):
    return decomfl(loss, estimator(perturbations.gaussian()), optimizer)


@pytest.mark.optimized  # a round more or less hangs on the rounding
def test_it_needs_a_third_of_the_rounds_on_an_ill_conditioned_quadratic():
    """Both with the best of their rates, which lies inside the grid: 128 rounds for 513."""

    def fewest(make, rates):
        run = jax.jit(jax.vmap(rounds_and_curvature(make, 64), in_axes=(0, None)))
        rounds = np.asarray(run(jnp.array(rates), KEY)[0])
        assert rounds.min() < min(rounds[0], rounds[-1]), rounds
        return rounds.min()

    slow = fewest(plain, [1.6, 1.8, 2.0, 2.2])
    quick = fewest(learning, [0.7, 1.0, 1.4])
    assert 3.5 * quick <= slow < 600


def test_it_whitens_a_quadratic():
    """H ≈ Δx² = (g / H)² in directions enough, so H ∝ λ^(1/3) where g = λ x ∝ λ^(1/2): the
    condition number falls from 1,000 to 1,000^(2/3) = 100. The mean over 16 runs.
    """
    run = jax.jit(jax.vmap(rounds_and_curvature(learning, 512), in_axes=(None, 0)))
    rounds, curvature = run(1.0, jax.random.split(KEY, 16))
    assert rounds.max() < 150
    mean = np.asarray(curvature).mean(axis=0)
    slope = np.polyfit(np.log(SPECTRUM), np.log(mean), 1)[0]
    assert slope == pytest.approx(1 / 3, abs=0.05)
    shaped = np.asarray(SPECTRUM) / mean
    assert shaped.max() / shaped.min() == pytest.approx(100, rel=0.4)


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
