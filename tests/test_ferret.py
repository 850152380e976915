"""Ferret: what its paper promises, and what keeps clients' memory honest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flag_lines import resolve
from tiny_tasks import softmax_task

from experiments.entry import UserError
from zofl_jax import keys
from zofl_jax.algorithms import fedavg, ferret
from zofl_jax.configuration.phases import build_phases
from zofl_jax.directions import perturbations

KEY = keys.round_key(keys.root(0).shared, 0)
TASK = softmax_task()
BATCHES = jax.tree.map(lambda x: x[:24].reshape(3, 2, 4, *x.shape[1:]), TASK.train.examples)


def after_a_round(algorithm, key=KEY):
    """Returns the step of a round of three clients, x − x⁺, as one vector."""

    @jax.jit
    def step(key):
        state = algorithm.init(TASK.init(KEY))
        memory = algorithm.init_memory(state.params)
        clients = jax.vmap(algorithm.client, in_axes=(None, None, None, 0, 0))
        uploads = clients(key, state, memory, BATCHES, jax.random.split(key, 3)).upload
        after = algorithm.server(key, state, algorithm.aggregate(uploads, jnp.ones(3)))
        moved = jax.tree.map(jnp.subtract, state.params, after.params)
        return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(moved)])

    return step(key)


def make(count, **options):
    return ferret(TASK.loss, optax.sgd(0.3), count, local_steps=2, **options)


def test_with_many_directions_the_step_is_fedavg_s():
    """d = 18: what is missing with P directions is 19 / (P + 19) of it in square, about."""
    expected = after_a_round(fedavg(TASK.loss, optax.sgd(0.3), local_steps=2))
    for count in (200, 20_000):
        step = after_a_round(make(count, effective_rank=18))
        error = jnp.linalg.norm(step - expected) / jnp.linalg.norm(expected)
        bound = (19 / (count + 19)) ** 0.5
        assert bound / 3 < error < 2 * bound


def test_the_mean_step_is_fedavg_s_with_any_number_of_directions():
    """Over 1,000 rounds' directions, 5 standard errors; shrunk by block, in the mean as much."""
    expected = after_a_round(fedavg(TASK.loss, optax.sgd(0.3), local_steps=2))
    round_keys = jax.random.split(jax.random.key(5), 1000)
    for options, factors in (
        ({"effective_rank": 0.0}, (1.0, 1.0)),
        ({"server_rate": 2.0, "effective_rank": 9.0}, (2 * 1 / (1 + 4 / 2), 2 * 5 / (5 + 16 / 2))),
    ):
        algorithm = make(6, **options)
        steps = jax.lax.map(lambda key: after_a_round(algorithm, key), round_keys, batch_size=100)  # noqa: B023
        share = jnp.concatenate([jnp.full(3, factors[0]), jnp.full(15, factors[1])])
        spread = jnp.std(steps, 0) / 1000**0.5
        assert (abs(jnp.mean(steps, 0) - share * expected) <= 5 * spread).all()


def test_a_remainder_sends_everything_in_the_end():
    """What was read of the uploads and what is left add up to all that clients changed."""
    slopes = np.random.default_rng(0).normal(size=(4, 1, 1, 8)).astype(np.float32)
    algorithm = ferret(lambda x, batch: jnp.sum(x * batch[0]), optax.sgd(1.0), 3, remainder=True)
    state, memory = algorithm.init(jnp.zeros(8)), algorithm.init_memory(jnp.zeros(8))
    client, server = jax.jit(algorithm.client), jax.jit(algorithm.server)
    for r, slope in enumerate(slopes):
        key = keys.round_key(KEY, r)
        result = client(key, state, memory, slope, KEY)
        state, memory = server(key, state, result.upload), result.memory
    np.testing.assert_allclose(memory - state.params, slopes.sum(0)[0, 0], atol=1e-5)
    assert abs(memory).max() > 0.1


def test_a_pool_s_accumulators_give_the_model_that_replay_gives():
    """After 30 rounds along 4 seeds' directions, 30 messages of 7 numbers and 4 accumulators."""
    pool_key = keys.pool_key(keys.root(0).shared)
    algorithm = make(7, pool_key=pool_key, pool_size=4)
    initial = state = algorithm.init(TASK.init(KEY))
    server, heard = jax.jit(algorithm.server), []
    for r in range(30):
        key = keys.round_key(KEY, r)
        heard.append(tuple(state.opt_state.any(1).tolist()))
        state = server(key, state, jax.random.normal(key, (7,)))
    assert len(set(heard)) == 5 and all(heard[-1])  # one seed after the other was drawn first
    message = algorithm.sync.message(state)
    assert message.shape == (4, 7)
    restored = algorithm.sync.restore(initial._replace(round=state.round), message)
    moved = jax.tree.map(jnp.subtract, state.params, initial.params)
    found = jax.tree.map(jnp.subtract, restored.params, initial.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), found, moved)
    # Every model is in the span of the pool's directions: with one seed, of 7 of 18 dimensions.
    lone = make(7, pool_key=pool_key, pool_size=1)
    steps = np.stack([np.asarray(after_a_round(lone, keys.round_key(KEY, r))) for r in range(3)])
    np.testing.assert_allclose(steps - steps[:1], 0, atol=1e-6)


def test_a_schedule_of_its_directions_changes_the_message_alone():
    config = resolve("--algorithm=ferret", "--num_perturbations=6", "--schedule=2:P=2")
    state, sizes = jax.eval_shape(lambda: TASK.init(KEY)), []
    for phase in build_phases(config.replace(ferret_remainder=True, local_steps=2), TASK):
        arguments = jax.eval_shape(phase.algorithm.init, state), phase.algorithm.init_memory(state)
        batches = jax.tree.map(lambda x: x[0], BATCHES)
        result = jax.eval_shape(phase.algorithm.client, KEY, *arguments, batches, KEY)
        assert jax.tree.map(jnp.shape, result.memory) == jax.tree.map(jnp.shape, state)
        sizes.append(result.upload.size)
    assert sizes == [6, 12]


def test_the_default_rate_counts_the_noise_of_a_step_that_is_k_steps_long():
    """Of the perceptron's curvature, trace 700 and top 4: f is 1/6 of K = 4 steps, at P = 20."""
    flags = ["--algorithm=ferret", "--model=mlp", "--num_perturbations=20"]
    share = 4 / 6 / 20
    expected = 0.3 * 2 / ((1 + share) * 4 + 700 * share)
    assert resolve(*flags).learning_rate == pytest.approx(expected, rel=0.05)
    first_order = resolve("--algorithm=fedavg", "--model=mlp").learning_rate
    assert resolve(*flags, "--ferret_remainder").learning_rate == first_order
    assert resolve("--algorithm=ferret", "--model=softmax").learning_rate < first_order


@pytest.mark.parametrize("kind", ["rademacher", "low_rank"])
def test_its_directions_are_those_of_its_flags(kind):
    config = resolve("--algorithm=ferret", f"--perturbation={kind}", "--num_perturbations=6")
    algorithm = build_phases(config, TASK)[0].algorithm
    perturbation = getattr(perturbations, kind)()
    expected = ferret(TASK.loss, optax.sgd(0.1), 6, perturbation, effective_rank=100)
    state = algorithm.init(TASK.init(KEY))
    found, other = (jax.jit(a.server)(KEY, state, jnp.arange(6.0)) for a in (algorithm, expected))
    jax.tree.map(np.testing.assert_array_equal, found.params, other.params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--estimator=jvp"], "--estimator has no effect with --algorithm=ferret"),
        (["--smoothing=0.1"], "--smoothing has no effect with --algorithm=ferret"),
        (["--mask=random"], "--mask has no effect with --algorithm=ferret"),
        (["--perturbations_at_once=2"], "--perturbations_at_once has no effect with"),
        (["--schedule=5:mu=2"], "mu has no effect with --algorithm=ferret"),
        (["--rank=2"], "--rank has no effect with --perturbation=gaussian"),
        (
            ["--ferret_remainder", "--ferret_rank=5"],
            "--ferret_rank has no effect with --ferret_rem",
        ),
        (["--ferret_pool=4", "--schedule=5:P=2"], "P is not possible with --ferret_pool=4, whose"),
        (["--dp=example"], "clips each example's scalars, which --algorithm=ferret does not meas"),
        (["--task=rte", "--objective=accuracy"], "has no useful gradient"),
    ],
)
def test_what_it_does_not_read_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        resolve("--algorithm=ferret", *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_steps": 0}, "local_steps must be >= 1, got 0"),
        ({"pool_size": 3}, "a pool needs a pool_key and pool_size >= 1, got pool_size=3"),
        ({"pool_key": KEY}, "a pool needs a pool_key and pool_size >= 1, got pool_size=0"),
        ({"server_rate": 0.0}, "server_rate must be positive and finite, got 0.0"),
        ({"num_directions": 0}, "num_perturbations must be >= 1, got 0"),
        ({"effective_rank": -1.0}, "rank must be >= 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ferret(**{"loss_fn": TASK.loss, "optimizer": optax.sgd(1.0), "num_directions": 4} | options)
