"""FedKSeed, FeedSign, MeZO and FedZO: what their papers promise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_simulations import assert_same_bits
from tiny_tasks import softmax_task

from zofl_jax import keys
from zofl_jax.algorithms import decomfl, fedkseed, fedzo, feedsign, mezo
from zofl_jax.directions import estimators

KEY = keys.round_key(keys.root(2).shared, 0)
POOL = keys.pool_key(keys.root(2).shared)


def client_batches(num_clients, local_steps):
    random = np.random.default_rng(1)
    shape = (num_clients, local_steps, 4)
    return {
        "features": random.normal(size=(*shape, 5)).astype(np.float32),
        "label": random.integers(0, 3, shape).astype(np.int32),
    }


def run_round(algorithm, params, batches, num_clients):
    """Returns the state after one round of all clients, compiled as a whole."""

    @jax.jit
    def whole(state, batches):
        own = jax.vmap(lambda c: keys.own_key(keys.root(0).own, 0, c))(jnp.arange(num_clients))
        clients = jax.vmap(algorithm.client, in_axes=(None, None, None, 0, 0))
        uploads = clients(KEY, state, (), batches, own).upload
        broadcast = algorithm.aggregate(uploads, jnp.ones(num_clients))
        return uploads, algorithm.server(KEY, state, broadcast)

    return whole(algorithm.init(params), batches)


# FedKSeed.


def linear(x, batch):
    return jnp.sum(x) + 0 * jnp.sum(batch)


def seeds_of(pool_size, local_steps, pro=False):
    estimator = estimators.projection(1)
    return fedkseed(
        linear, estimator, 0.1, pool_key=POOL, pool_size=pool_size, local_steps=local_steps, pro=pro
    )


def test_fedkseed_accumulators_give_the_model_that_replay_gives():
    """Any number of rounds fit into one message of pool_size numbers."""
    algorithm = seeds_of(pool_size=32, local_steps=6)
    random = np.random.default_rng(0)
    initial = algorithm.init(jnp.asarray(random.normal(size=9), jnp.float32))
    state, server = initial, jax.jit(algorithm.server)
    for _ in range(4):
        broadcast = {
            "seeds": jnp.asarray(random.integers(0, 32, (3, 6)), jnp.uint16),
            "scalars": jnp.asarray(random.normal(size=(3, 6)), jnp.float32),
            "weights": jnp.array([0.2, 0.3, 0.5]),
        }
        state = server(KEY, state, broadcast)
    message = algorithm.sync.message(state)
    assert sum(x.nbytes for x in jax.tree.leaves(message)) == 32 * 4
    caught_up = jax.jit(algorithm.sync.restore)(initial._replace(round=state.round), message)
    np.testing.assert_allclose(caught_up.params, state.params, atol=1e-5)
    assert abs(state.params - initial.params).max() > 0.1
    assert_same_bits(caught_up._replace(params=state.params), state)


@pytest.mark.parametrize("pro", [False, True])
def test_fedkseed_draws_from_the_pool_by_importance(pro):
    """Uniformly, or in the Pro form by exp of the amplitude scaled to [0, 1]; 5 standard errors."""
    algorithm = seeds_of(pool_size=4, local_steps=4000, pro=pro)
    state = algorithm.init(jnp.zeros(2))
    logits = np.zeros(4)
    if pro:
        # Means 1, 3, 2 and unknown, which counts as the mean of all measurements, (1+6+6)/6.
        pool = state.opt_state._replace(
            amplitudes=jnp.array([1.0, 6.0, 6.0, 0.0]), counts=jnp.array([1.0, 2.0, 3.0, 0.0])
        )
        state = state._replace(opt_state=pool)
        logits = (np.array([1, 3, 2, 13 / 6]) - 1) / 2
    upload = jax.jit(algorithm.client)(KEY, state, (), jnp.zeros((4000, 1)), KEY).upload
    shares = np.bincount(upload["seeds"], minlength=4) / 4000
    expected = np.exp(logits) / np.exp(logits).sum()
    assert (abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000)).all()


def test_fedkseed_takes_one_direction_a_step():
    with pytest.raises(ValueError, match="give num_perturbations = 1, got 2"):
        fedkseed(linear, estimators.projection(2), 0.1, pool_key=POOL)


# FeedSign.


def test_feedsign_moves_by_the_majority_of_one_bit_each():
    """Bits of the scalars' signs; the vote by weights; ties are positive."""
    task = softmax_task()
    estimator = estimators.central_difference(10, 1e-2)
    algorithm = feedsign(task.loss, estimator, optax.sgd(0.1))
    reference = decomfl(task.loss, estimator, optax.sgd(0.1))
    params, batches = task.init(KEY), client_batches(4, 1)
    uploads, after = run_round(algorithm, params, batches, 4)
    scalars, _ = run_round(reference, params, batches, 4)
    assert uploads.dtype == jnp.uint8 and uploads.shape == (4, 2)
    bits = np.unpackbits(np.asarray(uploads), axis=1, bitorder="little")[:, :10]
    np.testing.assert_array_equal(bits, np.asarray(scalars[:, 0]) < 0)
    votes = np.where(bits, -1, 1).sum(axis=0)
    assert (votes == 0).any()
    majority = jnp.asarray(np.where(votes < 0, -1.0, 1.0), jnp.float32)[None]
    expected = jax.jit(reference.server)(KEY, reference.init(params), majority)
    for name in params:
        np.testing.assert_allclose(after.params[name], expected.params[name], atol=1e-6)
    weighted = algorithm.aggregate(uploads, jnp.array([10.0, 1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(weighted, uploads[0])


def test_feedsign_in_private_flips_bits_at_the_rate_of_its_epsilon():
    """Randomised response: the odds of telling the truth are exp ε; 5 standard errors."""
    epsilon, count = 0.7, 800
    algorithm = feedsign(linear, estimators.projection(8), optax.sgd(0.1), epsilon=epsilon)
    state = algorithm.init(jnp.zeros(3))
    clients = jax.jit(jax.vmap(algorithm.client, in_axes=(None, None, None, None, 0)))
    uploads = clients(KEY, state, (), jnp.zeros((1, 1)), jax.random.split(KEY, count)).upload
    bits = np.unpackbits(np.asarray(uploads), axis=1, bitorder="little")
    shares = bits.mean(axis=0)
    flipped = 1 / (1 + math.exp(epsilon))
    error = 5 * math.sqrt(flipped * (1 - flipped) / count)
    assert (np.minimum(abs(shares - flipped), abs(shares - 1 + flipped)) <= error).all()


# MeZO and FedZO.


def test_mezo_is_one_client_of_decomfl():
    task = softmax_task()
    reference = decomfl(task.loss, estimators.central_difference(1, 1e-2), optax.sgd(0.1))
    params, batches = task.init(KEY), client_batches(1, 1)
    _, expected = run_round(reference, params, batches, 1)
    _, after = run_round(mezo(task.loss, 1e-2, optax.sgd(0.1)), params, batches, 1)
    assert_same_bits(after, expected)


def test_the_dense_model_of_fedzo_is_the_one_that_decomfl_rebuilds():
    """At K = 1 with shared directions; with their own, clients' uploads differ in direction."""
    task = softmax_task()
    estimator = estimators.forward_difference(3, 1e-2)
    params, batches = task.init(KEY), client_batches(4, 1)
    dense = fedzo(task.loss, estimator, optax.sgd(0.1), shared_directions=True)
    uploads, after = run_round(dense, params, batches, 4)
    assert jax.tree.map(jnp.shape, uploads) == {"kernel": (4, 5, 3), "bias": (4, 3)}
    _, expected = run_round(decomfl(task.loss, estimator, optax.sgd(0.1)), params, batches, 4)
    for name in params:
        np.testing.assert_allclose(after.params[name], expected.params[name], atol=1e-5)
        assert abs(after.params[name] - params[name]).max() > 1e-2
    alone, _ = run_round(fedzo(task.loss, estimator, optax.sgd(0.1)), params, batches, 4)

    def rank(uploads):
        return np.linalg.matrix_rank(np.asarray(uploads["kernel"]).reshape(4, 15), tol=1e-4)

    assert (rank(uploads), rank(alone)) == (3, 4)  # shared: in the span of 3 directions
