"""Clients in groups with directions of their own: the error of a step, and what is summed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zofl_jax import keys
from zofl_jax.algorithms import decomfl, decomfl_groups
from zofl_jax.directions import estimators

DIM, COUNT, CLIENTS, TRIALS = 6, 2, 4, 20_000
KEY = jax.random.key(3)


def linear(params, batch):
    return jnp.mean(batch @ params)


def make(groups, **options):
    return decomfl_groups(
        linear, estimators.projection(COUNT), optax.sgd(1.0), groups=groups, **options
    )


@pytest.mark.parametrize("groups", [1, 3, 30])
def test_the_error_of_a_step_falls_as_its_formula_says(groups):
    """With gradients c_i of mean c: E|ĝ − c|² = (d + 1)/P E Σ_g |v_g|², v_g a group's sum / M."""
    gradients = jax.random.normal(KEY, (CLIENTS, 1, 1, DIM)) + 1.0
    algorithm = make(groups)
    state = algorithm.init(jnp.zeros(DIM))

    def estimate(key):
        shared, own = jax.random.split(key)
        client = jax.vmap(lambda batches, k: algorithm.client(shared, state, (), batches, k).upload)
        uploads = client(gradients, jax.random.split(own, CLIENTS))
        broadcast = algorithm.aggregate(uploads, jnp.ones(CLIENTS))
        return -algorithm.server(shared, state, broadcast).params

    found = np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(KEY, TRIALS)), np.float64)
    each = np.asarray(gradients[:, 0, 0], np.float64)
    mean = each.mean(0)
    apart, together = np.square(each).sum() / CLIENTS**2, np.square(mean).sum()
    expected = (DIM + 1) / COUNT * (apart * (1 - 1 / groups) + together / groups)
    errors = np.square(found - mean).sum(1)
    assert abs(errors.mean() - expected) < 5 * errors.std() / TRIALS**0.5
    spread = found.std(0) / TRIALS**0.5
    assert (abs(found.mean(0) - mean) < 5 * spread).all()  # right on average
    if groups > 1:
        assert expected < 0.7 * (DIM + 1) / COUNT * together


def test_a_client_does_what_one_of_decomfl_does_along_the_directions_of_its_group():
    algorithm = make(300, local_steps=3)
    alike = decomfl(linear, estimators.projection(COUNT), optax.sgd(1.0), local_steps=3)
    batches = jax.random.normal(KEY, (3, 5, DIM))
    state = algorithm.init(jnp.ones(DIM))
    upload = algorithm.client(KEY, state, (), batches, jax.random.key(9)).upload
    assert upload["group"].dtype == np.uint16  # 300 groups
    key = keys.group_key(KEY, upload["group"])
    expected = alike.client(key, state, (), batches, jax.random.key(9)).upload
    np.testing.assert_array_equal(upload["scalars"], expected)
    # Its own broadcast, with nothing from other groups, moves the model as decomfl's does.
    alone = algorithm.aggregate(jax.tree.map(lambda x: x[None], upload), jnp.ones(1))
    assert alone.shape == (300, 3, COUNT)
    moved, wanted = algorithm.server(KEY, state, alone), alike.server(key, state, expected)
    np.testing.assert_allclose(moved.params, wanted.params, rtol=1e-5, atol=1e-6)


def test_the_broadcast_is_a_weighted_sum_over_each_group():
    uploads = {
        "group": jnp.array([2, 0, 2, 1], jnp.uint8),
        "scalars": jnp.array([1.0, 10.0, 4.0, jnp.nan])[:, None, None] * jnp.ones((4, 1, COUNT)),
    }
    weights = jnp.array([1.0, 3.0, 4.0, 0.0])  # the last one is absent, whatever it holds
    found = make(4).aggregate(uploads, weights)
    expected = np.array([3 * 10.0, 0.0, 1 * 1.0 + 4 * 4.0, 0.0]) / 8
    np.testing.assert_allclose(found[:, 0, 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(make(4).aggregate(uploads, jnp.zeros(4)), 0)


@pytest.mark.parametrize("groups", [0, 2**16 + 1])
def test_a_number_of_groups_that_no_upload_can_name_is_refused(groups):
    with pytest.raises(ValueError, match=rf"^groups must be in \[1, 65536\], got {groups}$"):
        make(groups)
