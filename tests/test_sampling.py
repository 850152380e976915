import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax import sampling

subset = jax.jit(sampling.subset, static_argnums=2)


def draws(n, size, number, seed=0):
    keys = jax.random.split(jax.random.key(seed), number)
    return np.asarray(jax.jit(jax.vmap(lambda key: sampling.subset(key, n, size)))(keys))


@pytest.mark.parametrize(("n", "size"), [(5, 3), (6, 1), (5, 4)])
def test_every_subset_is_equally_likely(n, size):
    number = 20_000
    found = np.sort(draws(n, size, number), axis=1)
    subsets = list(itertools.combinations(range(n), size))
    counts = np.array([np.all(found == one, axis=1).sum() for one in subsets])
    assert counts.sum() == number
    share = 1 / len(subsets)
    z = (counts - number * share) / np.sqrt(number * share * (1 - share))
    assert np.abs(z).max() < 5


@pytest.mark.parametrize(("n", "size"), [(100, 99), (2**31 - 1, 200)])
def test_elements_are_distinct_and_in_range(n, size):
    found = np.sort(draws(n, size, 50), axis=1)
    assert found.dtype == np.int32
    assert found.min() >= 0
    assert found.max() < n
    assert np.all(np.diff(found, axis=1) > 0)


def test_each_of_many_elements_is_equally_likely():
    n, size, number = 50, 10, 20_000
    counts = np.bincount(draws(n, size, number).ravel(), minlength=n)
    share = size / n
    z = (counts - number * share) / np.sqrt(number * share * (1 - share))
    assert np.abs(z).max() < 5


def test_a_traced_population_may_differ_under_vmap():
    sizes = jnp.array([4, 5, 40, 2_000_000])
    keys = jax.random.split(jax.random.key(1), 4)
    found = jax.jit(jax.vmap(lambda key, n: sampling.subset(key, n, 4)))(keys, sizes)
    for key, n, row in zip(keys, sizes.tolist(), found, strict=True):
        assert len(set(row.tolist())) == 4
        assert row.min() >= 0 and row.max() < n
        if n > 4:
            np.testing.assert_array_equal(row, subset(key, n, 4))
    assert sorted(found[0].tolist()) == [0, 1, 2, 3]


def test_the_whole_population_is_a_range():
    np.testing.assert_array_equal(sampling.subset(jax.random.key(0), 7, 7), np.arange(7))


def test_memory_does_not_depend_on_the_population():
    compiled = subset.lower(jax.random.key(0), jnp.int32(2**30), 32).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10_000


def test_bits_are_fixed():
    key = jax.random.key(20)
    golden = [1, 6, 7, 3]
    assert sampling.subset(key, 10, 4).tolist() == golden
    assert subset(key, 10, 4).tolist() == golden
    with jax.enable_x64(True):
        assert sampling.subset(key, 10, 4).tolist() == golden


@pytest.mark.parametrize(("n", "size"), [(3, 4), (5, 0), (2**31, 4), (0, 1)])
def test_a_subset_that_cannot_be_drawn_is_refused(n, size):
    with pytest.raises(ValueError, match=f"{size}" if size else "must be >= 1, got 0"):
        sampling.subset(jax.random.key(0), n, size)
