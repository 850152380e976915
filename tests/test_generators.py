"""Words are JAX's own, normals are the normal quantiles of the words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from zofl_jax import keys
from zofl_jax.directions import generators

SHAPES = [(), (1,), (7,), (3, 5), (4, 0), (2, 3, 4)]

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("impl", keys.IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_words_are_those_of_jax(impl, shape):
    key = keys.round_key(keys.root(5, impl).shared, 2)
    found = jax.jit(generators.words, static_argnums=1)(key, shape)
    np.testing.assert_array_equal(found, jax.random.bits(key, shape))
    assert found.dtype == jnp.uint32 and found.shape == shape


def test_words_of_many_keys_at_once():
    many = keys.direction_keys(keys.root(1).shared, 6)
    found = jax.jit(jax.vmap(lambda key: generators.words(key, (33,))))(many)
    expected = np.stack([jax.random.bits(key, (33,)) for key in many])
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) == expected.size


@pytest.mark.parametrize("impl", keys.IMPLEMENTATIONS)
def test_normals_are_the_quantiles_of_the_words(impl):
    """By float64 and another library, in the centre and in the tails."""
    key, size = jax.random.key(2, impl=impl), 2**21
    z = np.asarray(jax.jit(generators.normal, static_argnums=(1, 2))(key, (size,), jnp.float32))
    words = np.asarray(jax.random.bits(key, (size,)))
    # JAX's convention: 23 bits, spread from just above -1 to just below 1.
    lowest = float(np.nextafter(np.float32(-1), np.float32(0)))
    x = np.maximum(lowest, np.float32(2.0**-22 * (words >> 9) + lowest).astype(np.float64))
    small = np.abs(x) < 0.5
    tails = np.sign(x) * special.erfcinv(1 - np.abs(x))
    expected = np.sqrt(2) * np.where(small, special.erfinv(x), tails)
    np.testing.assert_allclose(z, expected, rtol=1e-5, atol=2e-7)
    assert np.abs(z).max() > 4.9


def test_moments_of_normals():
    z = np.asarray(generators.normal(jax.random.key(7), (2**21,), jnp.float32), np.float64)
    error = 5 / len(z) ** 0.5
    assert abs(z.mean()) < error
    assert abs((z**2).mean() - 1) < error * 2**0.5
    assert abs((z**4).mean() - 3) < error * 96**0.5
    within = np.mean(np.abs(z) < 1)
    assert abs(within - special.erf(0.5**0.5)) < error / 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_normals_are_rounded(dtype):
    key = jax.random.key(3)
    narrow, wide = (generators.normal(key, (99,), d) for d in (dtype, jnp.float32))
    assert narrow.dtype == dtype
    np.testing.assert_array_equal(narrow, wide.astype(dtype))


def test_wide_normals_are_jax_own(x64):
    key = jax.random.key(3)
    found = generators.normal(key, (99,), jnp.float64)
    np.testing.assert_array_equal(found, jax.random.normal(key, (99,), jnp.float64))
