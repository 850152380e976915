"""Directions stretched leaf by leaf, and masks: covariance, shares, what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax.directions import perturbations, scaling

KEY = jax.random.key(3)
PARAMS = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
FACTORS = {"kernel": jnp.linspace(0, 2, 12).reshape(4, 3), "bias": jnp.array([True, False, True])}


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "sphere", "low_rank"])
def test_stretched_directions_are_the_plain_ones_times_the_factors(name):
    """Sampled, added and accumulated; in the space of the params where directions are not."""
    base = getattr(perturbations, name)()
    stretched = scaling.scaled(base, FACTORS)

    @jax.jit
    def both(keys):
        ones = jnp.arange(1.0, 4.0)
        plain = base.accumulate(keys, PARAMS, ones)
        sampled = [stretched.add(PARAMS, stretched.sample(k, PARAMS), 1.0) for k in keys]
        return plain, sampled, stretched.accumulate(keys, PARAMS, ones)

    plain, sampled, accumulated = both(jax.random.split(KEY, 3))
    for leaf in PARAMS:
        expected = plain[leaf] * FACTORS[leaf]
        np.testing.assert_allclose(accumulated[leaf], expected, atol=1e-5)
        total = sum((p + 1) * z[leaf] for p, z in enumerate(sampled))
        np.testing.assert_allclose(total, expected, atol=1e-4)
        assert (np.asarray(expected)[np.asarray(FACTORS[leaf]) == 0] == 0).all()


def test_a_random_mask_keeps_its_share_and_depends_on_the_key():
    params = {"a": jnp.zeros((50, 40)), "b": jnp.zeros(2000)}
    mask = scaling.random_mask(KEY, params, 0.3)
    other = scaling.random_mask(jax.random.key(4), params, 0.3)
    for leaf in params:
        assert abs(float(mask[leaf].mean()) - 0.3) <= 5 * (0.3 * 0.7 / 2000) ** 0.5
        assert (mask[leaf] != other[leaf]).any()


def test_masks_by_magnitude_and_sensitivity_choose_in_each_leaf():
    params = {"a": jnp.array([[5.0, -1.0], [0.5, 2.0]]), "b": jnp.array([3.0])}
    small = scaling.magnitude_mask(params, 0.5)
    np.testing.assert_array_equal(small["a"], [[False, True], [True, False]])
    assert small["b"].tolist() == [True]  # at least one of a leaf

    def loss(x, batch):
        return jnp.sum(batch * jnp.square(x["a"])) + x["b"][0]

    chosen = scaling.sensitivity_mask(loss, params, jnp.array([[0.1, 9.0], [1.0, 1.0]]), 0.5)
    np.testing.assert_array_equal(chosen["a"], [[False, True], [False, True]])


@pytest.mark.parametrize("density", [0.0, 1.5, float("nan")])
def test_shares_out_of_range_are_refused(density):
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got"):
        scaling.magnitude_mask(PARAMS, density)
