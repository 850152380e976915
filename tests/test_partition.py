import itertools

import jax
import numpy as np
import pytest

from zofl_jax import keys
from zofl_jax.data import partition

KEY = keys.root(0).partition
LABELS = np.random.default_rng(0).integers(0, 10, 3000).astype(np.int32)

PARTITIONS = {
    "iid": lambda key: partition.iid(key, LABELS, 70),
    "dirichlet": lambda key: partition.dirichlet(key, LABELS, 70, 0.5),
    "shards": lambda key: partition.shards(key, LABELS, 70),
    "natural": lambda key: partition.natural(LABELS),
}
DRAWN = ("iid", "dirichlet", "shards")


@pytest.mark.parametrize("name", PARTITIONS)
def test_every_example_has_one_owner(name):
    order, offsets = PARTITIONS[name](KEY)
    assert order.dtype == offsets.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(3000))
    assert offsets[0] == 0 and offsets[-1] == 3000
    assert np.all(np.diff(offsets) >= 1)
    assert len(offsets) == (11 if name == "natural" else 71)


@pytest.mark.parametrize("name", DRAWN)
def test_the_key_decides(name):
    order, offsets = PARTITIONS[name](KEY)
    again = PARTITIONS[name](KEY)
    np.testing.assert_array_equal(order, again[0])
    np.testing.assert_array_equal(offsets, again[1])
    assert np.any(order != PARTITIONS[name](keys.root(1).partition)[0])


def test_partitions_are_the_same_on_every_machine():
    labels = np.arange(12) % 3
    order, offsets = partition.iid(KEY, labels, 3)
    assert order.tolist() == [0, 5, 10, 11, 1, 3, 8, 9, 2, 4, 6, 7]
    assert offsets.tolist() == [0, 4, 8, 12]
    order, offsets = partition.shards(KEY, labels, 3)
    assert order.tolist() == [2, 5, 8, 11, 4, 6, 7, 9, 0, 1, 3, 10]
    order, offsets = partition.dirichlet(KEY, labels, 3, 1.0)
    assert order.tolist() == [0, 3, 4, 9, 1, 2, 5, 7, 8, 6, 10, 11]
    assert offsets.tolist() == [0, 4, 9, 12]


def test_iid_sizes_differ_by_at_most_one():
    sizes = np.diff(partition.iid(KEY, LABELS, 70)[1])
    assert set(sizes) == {42, 43}


def test_iid_gives_an_example_to_each_client_equally_often():
    number, num_clients = 2000, 4
    counts = np.zeros((6, num_clients))
    for key in jax.random.split(KEY, number):
        order, offsets = partition.iid(key, np.zeros(6), num_clients)
        counts[order, np.repeat(np.arange(num_clients), np.diff(offsets))] += 1
    share = np.diff(offsets) / 6
    z = (counts - number * share) / np.sqrt(number * share * (1 - share))
    assert np.abs(z).max() < 5


def test_dirichlet_shares_have_the_moments_of_a_dirichlet_vector():
    num_clients, alpha, number = 20, 0.5, 400
    labels = np.zeros(4000, np.int32)
    shares = np.array(
        [
            np.diff(partition.dirichlet(key, labels, num_clients, alpha, min_size=0)[1])
            for key in jax.random.split(KEY, number)
        ]
    ) / len(labels)
    z = (shares.mean(0) - 1 / num_clients) / (shares.std(0) / number**0.5)
    assert np.abs(z).max() < 5
    squares = np.sum(shares**2, axis=1)  # E Σ p² = (α + 1) / (M α + 1); the cuts add under 1e-6
    z = (squares.mean() - (alpha + 1) / (num_clients * alpha + 1)) / (squares.std() / number**0.5)
    assert abs(z) < 5


def test_dirichlet_draws_each_class_on_its_own():
    labels = np.repeat([0, 1], 5000)
    order, offsets = partition.dirichlet(KEY, labels, 10, 0.3, min_size=0)
    first, second = partition.label_counts(labels, order, offsets, 2).T / 5000
    assert np.abs(first - second).max() > 0.1


def test_a_large_alpha_gives_equal_shares():
    order, offsets = partition.dirichlet(KEY, LABELS, 10, 1e6)
    counts = partition.label_counts(LABELS, order, offsets, 10)
    assert np.abs(counts - np.bincount(LABELS) / 10).max() < 3


def test_dirichlet_draws_again_until_no_client_is_short():
    labels = np.arange(300) % 3
    any_size = [partition.dirichlet(k, labels, 5, 0.5, min_size=0) for k in keys_of(30)]
    assert any(np.diff(offsets).min() < 8 for _, offsets in any_size)
    at_least = [partition.dirichlet(k, labels, 5, 0.5, min_size=8) for k in keys_of(30)]
    for (order, offsets), (order_8, offsets_8) in zip(any_size, at_least, strict=True):
        assert np.diff(offsets_8).min() >= 8
        if np.diff(offsets).min() >= 8:  # the first draw is kept if it will do
            np.testing.assert_array_equal(order_8, order)
            np.testing.assert_array_equal(offsets_8, offsets)


def keys_of(number):
    return jax.random.split(KEY, number)


def test_dirichlet_gives_up_with_a_remedy():
    message = (
        r"\d+ of 70 clients have fewer than 32 examples in the last of 10 Dirichlet draws with "
        r"alpha=0.01 \(the smallest has \d+\): use a larger alpha, fewer clients or a smaller batch"
    )
    with pytest.raises(ValueError, match=message):
        partition.dirichlet(KEY, LABELS, 70, 0.01, min_size=32)
    with pytest.raises(ValueError, match="3000 examples cannot give 70 clients 43 each"):
        partition.dirichlet(KEY, LABELS, 70, 1.0, min_size=43)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_dirichlet_refuses_a_bad_alpha(alpha):
    with pytest.raises(ValueError, match=f"must be positive and finite, got {alpha}"):
        partition.dirichlet(KEY, LABELS, 10, alpha)


def test_a_client_sees_few_labels_of_its_shards():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 200))
    order, offsets = partition.shards(KEY, labels, 20, 2)  # 40 shards, 4 to a label
    counts = partition.label_counts(labels, order, offsets, 10)
    assert np.all(np.diff(offsets) == 100)
    assert np.all(np.isin(counts, [0, 50, 100]))
    assert np.all(counts.sum(0) == 200)
    assert np.sum(counts > 0) > 30


@pytest.mark.parametrize("shards_per_client", [0, 43])
def test_shards_must_hold_an_example(shards_per_client):
    with pytest.raises(ValueError, match=rf"={shards_per_client}: it must be in \[1, 42\]"):
        partition.shards(KEY, LABELS, 70, shards_per_client)


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("num_clients", [0, -1, 6])
def test_more_clients_than_examples_are_refused(name, num_clients):
    draw = getattr(partition, name)
    extra = {"alpha": 1.0} if name == "dirichlet" else {}
    with pytest.raises(ValueError, match=rf"in \[1, 5\], .* got {num_clients}"):
        draw(KEY, np.zeros(5, np.int32), num_clients, **extra)
    with pytest.raises(ValueError, match=r"shape \[n\], got \(5, 1\)"):
        draw(KEY, np.zeros((5, 1), np.int32), 2, **extra)


def test_natural_clients_own_what_the_source_says():
    writers = np.array(["f1", "f0", "f1", "f9", "f0"])
    order, offsets = partition.natural(writers)
    owned = [order[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert owned == [[1, 4], [0, 2], [3]]
    for empty in (np.zeros(0), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="client_ids must have the shape"):
            partition.natural(empty)


def test_a_million_clients():
    n = 10**6
    order, offsets = partition.natural(np.arange(n)[::-1])
    np.testing.assert_array_equal(order, np.arange(n)[::-1])
    np.testing.assert_array_equal(offsets, np.arange(n + 1))
    order, offsets = partition.iid(KEY, np.zeros(n, np.int8), n)
    assert np.all(np.bincount(order) == 1)
    np.testing.assert_array_equal(offsets, np.arange(n + 1))


def test_client_data_is_on_the_device():
    order, offsets = partition.iid(KEY, LABELS, 7)
    data = partition.client_data({"label": LABELS}, order, offsets)
    assert data.num_clients == 7
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(data))
    assert data.order.dtype == data.offsets.dtype == np.int32
    np.testing.assert_array_equal(data.examples["label"], LABELS)


@pytest.mark.parametrize(
    ("order", "offsets", "message"),
    [
        ([0, 1, 2], [0, 3], r"order has 3 entries, but leaves of examples have \[4\]"),
        ([0, 1, 2, 2], [0, 4], r"every integer in \[0, 4\) once"),
        ([0, 1, 2, 3], [0, 3], "from 0 to 4, the number of examples, but run from 0 to 3"),
        ([0, 1, 2, 3], [1, 4], "from 0 to 4, the number of examples, but run from 1 to 4"),
        ([0, 1, 2, 3], [0, 3, 2, 4], "smallest step of -1"),
    ],
)
def test_client_data_refuses_an_index_that_does_not_fit(order, offsets, message):
    with pytest.raises(ValueError, match=message):
        partition.client_data({"x": np.zeros((4, 2))}, order, offsets)


def test_a_client_too_small_for_a_batch_is_refused():
    offsets = np.array([0, 10, 14, 30, 33])
    partition.check_batch_size(offsets, 3)
    message = (
        r"2 of 4 clients have fewer examples than batch_size=5 \(the smallest, client 3, has 3\): "
        "use a smaller batch"
    )
    with pytest.raises(ValueError, match=message):
        partition.check_batch_size(offsets, 5)


def test_label_counts_equal_counting_by_hand():
    order, offsets = partition.dirichlet(KEY, LABELS, 30, 0.3)
    counts = partition.label_counts(LABELS, order, offsets, 11)
    for client, row in enumerate(counts):
        owned = LABELS[order[offsets[client] : offsets[client + 1]]]
        np.testing.assert_array_equal(row, np.bincount(owned, minlength=11))


OWNERS = ["b", None, "a", None, "b", "10"]


def test_owners_that_are_missing_are_refused_dropped_or_made_clients():
    with pytest.raises(
        ValueError,
        match=r"^row 1 names no owner, as 2 of 6 examples do: .*--missing_owner=drop .*=own",
    ):
        partition.known_owners(OWNERS, "error", lambda i: f"row {i}")
    kept, owners = partition.known_owners(OWNERS, "drop", str)
    assert kept.tolist() == [0, 2, 4, 5] and owners.tolist() == [2, 1, 2, 0]
    kept, owners = partition.known_owners(OWNERS, "own", str)
    assert kept.tolist() == [0, 1, 2, 3, 4, 5] and owners.tolist() == [2, 3, 1, 4, 2, 0]
    known = [name for name in OWNERS if name]
    for missing in ("error", "drop", "own"):
        kept, owners = partition.known_owners(known, missing, str)
        assert kept.tolist() == [0, 1, 2, 3] and owners.tolist() == [2, 1, 2, 0]
    kept, owners = partition.known_owners([None, None], "own", str)
    assert owners.tolist() == [0, 1]
    kept, owners = partition.known_owners(OWNERS, "drop", str, least=2)
    assert kept.tolist() == [0, 4] and owners.tolist() == [0, 0]
    with pytest.raises(ValueError, match="no owner has --least_examples=3, the largest has 2: ask"):
        partition.known_owners(OWNERS, "drop", str, least=3)
    with pytest.raises(ValueError, match="no example does: there are no clients"):
        partition.known_owners([None, None], "drop", str)


def test_an_index_is_two_vectors_of_integers():
    examples = {"x": np.zeros((2, 3), np.float32)}
    with pytest.raises(AssertionError, match="assert_rank"):
        partition.client_data(examples, np.zeros((2, 1), int), np.array([0, 2]))
    with pytest.raises(AssertionError, match="assert_type"):
        partition.client_data(examples, np.array([0.0, 1.0]), np.array([0, 2]))
