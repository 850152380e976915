import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax import keys
from zofl_jax.data import batches, partition

BATCHES = keys.root(0).batches
sample = jax.jit(batches.sample, static_argnums=(3, 4))


@jax.jit
def sample_cohort(cohort_keys, data, cohort):
    in_axes = (0, None, 0, None, None)
    return jax.vmap(batches.sample, in_axes=in_axes)(cohort_keys, data, cohort, 4, 2)


def population(sizes, width=3, seed=0):
    """Clients of the given sizes; an example's label is its row."""
    owners = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = np.arange(len(owners), dtype=np.int32)
    examples = {"image": np.repeat(rows[:, None], width, axis=1), "label": rows}
    return partition.client_data(examples, *partition.natural(owners)), owners


def test_batches_hold_distinct_examples_of_the_client():
    data, owners = population([7, 40, 12])
    for client in range(3):
        batch = sample(keys.batch_key(BATCHES, 5, client), data, client, 6, 20)
        assert batch["image"].shape == (20, 6, 3)
        assert batch["label"].shape == (20, 6)
        np.testing.assert_array_equal(batch["image"][..., 0], batch["label"])
        assert set(owners[np.asarray(batch["label"]).ravel()]) == {client}
        assert all(len(set(labels)) == 6 for labels in batch["label"].tolist())


def test_every_example_of_a_client_is_equally_likely():
    data, owners = population([30, 10, 50])
    number, batch_size = 20_000, 4
    labels = sample(BATCHES, data, 1, batch_size, number)["label"]
    counts = np.bincount(np.ravel(labels), minlength=90)[owners == 1]
    assert counts.sum() == number * batch_size
    share = batch_size / 10
    z = (counts - number * share) / np.sqrt(number * share * (1 - share))
    assert np.abs(z).max() < 5


def test_batches_of_two_steps_are_independent():
    data, _ = population([10, 20])
    pair_keys = jax.random.split(BATCHES, 20_000)
    pairs = jax.vmap(lambda key: sample(key, data, 0, 1, 2)["label"][:, 0])(pair_keys)
    repeats = np.mean(pairs[:, 0] == pairs[:, 1])  # a batch shares nothing with the one before
    assert abs(repeats - 0.1) / np.sqrt(0.1 * 0.9 / 20_000) < 5


def test_a_longer_sequence_starts_with_the_shorter():
    data, _ = population([30, 20])
    short = sample(BATCHES, data, 0, 8, 2)["label"]
    np.testing.assert_array_equal(sample(BATCHES, data, 0, 8, 5)["label"][:2], short)


def test_vmap_over_clients_equals_a_loop():
    data, _ = population([30, 20, 25, 8])
    cohort = jnp.array([3, 0, 2])
    cohort_keys = jnp.stack([keys.batch_key(BATCHES, 1, client) for client in cohort])
    together = sample_cohort(cohort_keys, data, cohort)
    assert together["image"].shape == (3, 2, 4, 3)
    for row, (key, client) in enumerate(zip(cohort_keys, cohort, strict=True)):
        alone = sample(key, data, client, 4, 2)
        np.testing.assert_array_equal(together["image"][row], alone["image"])
        np.testing.assert_array_equal(together["label"][row], alone["label"])


def test_vmap_does_not_copy_the_data_set():
    data, _ = population([1000] * 10, width=500)
    arguments = (jax.random.split(BATCHES, 10), data, jnp.arange(10))
    memory = sample_cohort.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < data.examples["image"].nbytes / 20


def test_bits_are_fixed():
    data = partition.client_data(np.arange(18), *partition.natural(np.arange(18) // 9))
    batch = sample(keys.batch_key(BATCHES, 0, 1), data, 1, 3, 2)
    assert batch.tolist() == [[13, 11, 15], [9, 15, 11]]


@pytest.mark.parametrize(("batch_size", "num_batches"), [(0, 1), (1, 0), (4, -1)])
def test_sizes_below_one_are_refused(batch_size, num_batches):
    data, _ = population([5, 5])
    with pytest.raises(ValueError, match=r"must be >= 1, got (0|-1)"):
        batches.sample(BATCHES, data, 0, batch_size, num_batches)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 5), (10, 4), (3, 8), (1, 1)])
def test_evaluation_sees_each_example_once(n, batch_size):
    examples = {"x": np.arange(10, 10 + n), "y": jnp.ones((n, 2, 3))}
    cut, mask = batches.evaluation_batches(examples, batch_size)
    number = -(-n // batch_size)
    assert mask.shape == (number, batch_size) and mask.dtype == bool
    assert cut["y"].shape == (number, batch_size, 2, 3)
    np.testing.assert_array_equal(cut["x"][mask], examples["x"])
    assert np.all(cut["x"][~mask] == 10)


def test_evaluation_batches_refuse_what_they_cannot_cut():
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        batches.evaluation_batches({"x": np.arange(3)}, 0)
    with pytest.raises(ValueError, match=r"at least 1, got \[0\]"):
        batches.evaluation_batches({"x": np.zeros((0, 2))}, 4)
    with pytest.raises(ValueError, match=r"one leading axis .* got \[2, 3\]"):
        batches.evaluation_batches({"x": np.zeros(3), "y": np.zeros(2)}, 4)
