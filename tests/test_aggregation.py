"""Each rule against plain NumPy on the clients that are there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax.conditions import aggregation

SIZE = 9


def uploads(seed: int = 0) -> dict[str, np.ndarray]:
    """Returns the uploads of nine clients, the last two far away."""
    random = np.random.default_rng(seed)
    tree = {"a": random.normal(size=(SIZE, 2, 3)), "b": random.normal(size=SIZE)}
    return {
        name: (x + 20 * (np.arange(SIZE) >= 7).reshape(-1, *(1,) * (x.ndim - 1))).astype("f4")
        for name, x in tree.items()
    }


def flat(tree: dict[str, np.ndarray]) -> np.ndarray:
    """Returns uploads as a matrix [C, d] in float64."""
    return np.concatenate([x.reshape(len(x), -1) for x in tree.values()], axis=1).astype(float)


def np_mean(u, w):
    return np.average(u, axis=0, weights=w)


def np_trimmed(u, w, share):
    drop = int(share * len(u) + 1e-9)
    return np.sort(u, axis=0)[drop : len(u) - drop].mean(axis=0)


def np_krum(u, w, f, m):
    scores = []
    for i in range(len(u)):
        squares = sorted(((u[i] - u[j]) ** 2).sum() for j in range(len(u)) if j != i)
        scores.append(sum(squares[: max(len(u) - f - 2, 1)]))
    return u[np.argsort(scores)[:m]].mean(axis=0)


def np_geometric(u, w, iterations):
    v = np_mean(u, w)
    for _ in range(iterations):
        v = np_mean(u, w / np.maximum(np.linalg.norm(u - v, axis=1), 1e-6))
    return v


def np_clipped(u, w, norm):
    lengths = np.linalg.norm(u, axis=1, keepdims=True)
    return np_mean(u * np.minimum(1, norm / lengths), w)


def np_majority(u, w, size):
    return size * np.sign(w @ np.sign(u))


RULES = {
    "mean": (aggregation.mean, np_mean),
    "median": (aggregation.median, lambda u, w: np.median(u, axis=0)),
    "trimmed_mean": (
        aggregation.trimmed_mean(0.3),
        functools.partial(np_trimmed, share=0.3),
    ),
    "krum": (aggregation.krum(2), functools.partial(np_krum, f=2, m=1)),
    "multi_krum": (aggregation.multi_krum(2, 3), functools.partial(np_krum, f=2, m=3)),
    "geometric_median": (
        aggregation.geometric_median(20),
        functools.partial(np_geometric, iterations=20),
    ),
    "clipped_mean": (aggregation.clipped_mean(2.0), functools.partial(np_clipped, norm=2.0)),
    "majority_sign": (aggregation.majority_sign(0.5), functools.partial(np_majority, size=0.5)),
}
each_rule = pytest.mark.parametrize("name", RULES)


@functools.cache
def jitted(name: str):
    return jax.jit(RULES[name][0])


WEIGHTS = {
    "all": [1.0] * SIZE,
    "of unlike weight": [3.0, 1, 2, 1, 5, 1, 1, 2, 1],
    "some absent": [2.0, 0, 1, 1, 0, 3, 1, 0, 1],
    "an even number": [0, 0, 1, 1, 1, 1, 0, 0, 0],
    "one alone": [0.0, 0, 0, 4, 0, 0, 0, 0, 0],
}


@each_rule
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_rule_is_what_numpy_makes_of_the_clients_that_are_there(name, kind):
    tree, weights = uploads(), np.array(WEIGHTS[kind], np.float32)
    here = weights > 0
    expected = RULES[name][1](flat(tree)[here], weights[here].astype(float))
    actual = jitted(name)(tree, weights)
    assert {k: x.shape for k, x in actual.items()} == {"a": (2, 3), "b": ()}
    joined = np.concatenate([np.ravel(x) for x in actual.values()])
    np.testing.assert_allclose(joined, expected, rtol=2e-5, atol=1e-6)


@each_rule
def test_what_an_absent_client_would_send_changes_no_bit(name):
    tree, weights = uploads(), np.array(WEIGHTS["some absent"], np.float32)
    expected = jitted(name)(tree, weights)
    for junk in (np.nan, np.inf, -1e30):
        poisoned = jax.tree.map(np.copy, tree)
        for leaf in poisoned.values():
            leaf[weights == 0] = junk
        actual = jitted(name)(poisoned, weights)
        for leaf in tree:
            assert np.array_equal(actual[leaf], expected[leaf])


@each_rule
def test_with_everybody_absent_the_broadcast_is_zero(name):
    for leaf in jitted(name)(uploads(), np.zeros(SIZE, np.float32)).values():
        assert not np.any(leaf)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_two_liars_of_nine_do_not_move_it(name):
    """These rules stay among the seven honest uploads; the mean doesn't."""
    tree, weights = uploads(), np.ones(SIZE, np.float32)
    honest = flat(tree)[:7]
    moved = np.concatenate([np.ravel(x) for x in jitted(name)(tree, weights).values()])
    assert np.all(moved <= honest.max(axis=0))
    assert np.all(moved >= honest.min(axis=0))
    mean = np.concatenate([np.ravel(x) for x in jitted("mean")(tree, weights).values()])
    assert np.all(mean > honest.mean(axis=0) + 3)


def test_the_geometric_median_is_the_least_sum_of_distances():
    points = uploads()["a"].reshape(SIZE, -1)
    v = np.asarray(aggregation.geometric_median(300)(jnp.asarray(points), jnp.ones(SIZE)))

    def distance(x):
        return np.linalg.norm(points - x, axis=1).sum()

    random = np.random.default_rng(1)
    assert all(distance(v) < distance(v + 0.05 * random.normal(size=6)) for _ in range(50))


def test_the_mean_keeps_half_precision_apart_from_its_sum():
    u = jnp.array([1.0, 1 + 2**-7, 1 + 2**-6], jnp.bfloat16)
    assert aggregation.mean(u, jnp.ones(3)).dtype == jnp.bfloat16
    assert float(aggregation.mean(u, jnp.ones(3))) == 1 + 2**-7


def test_trimming_counts_as_one_does_by_hand():
    """0.29 of 100 is 29, which floating point puts a little below."""
    u = jnp.where(jnp.arange(100) >= 71, 1e6, 0.0)
    assert float(aggregation.trimmed_mean(0.29)(u, jnp.ones(100))) == 0.0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: aggregation.trimmed_mean(0.5), r"\[0, 0.5\), got 0.5"),
        (lambda: aggregation.trimmed_mean(-0.1), "got -0.1"),
        (lambda: aggregation.krum(-1), "num_byzantine must be >= 0, got -1"),
        (lambda: aggregation.multi_krum(1, 0), "num_kept must be >= 1, got 0"),
        (lambda: aggregation.geometric_median(0), "iterations must be >= 1, got 0"),
        (lambda: aggregation.geometric_median(1, 0.0), "smoothing must be positive"),
        (lambda: aggregation.clipped_mean(0.0), "must be positive, got 0.0"),
        (lambda: aggregation.majority_sign(float("inf")), "must be positive, got inf"),
    ],
)
def test_numbers_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("name", sorted(set(RULES) - {"mean"}))
def test_rules_need_floating_point(name):
    with pytest.raises(ValueError, match=r"got a leaf of int32; use the aggregation"):
        RULES[name][0](jnp.arange(SIZE), jnp.ones(SIZE))


@pytest.mark.parametrize("rule", [aggregation.mean, aggregation.median])
def test_a_row_for_each_client_and_a_weight_for_each_row(rule):
    with pytest.raises(AssertionError, match="assert_tree_shape_prefix"):
        rule({"a": jnp.ones((3, 2)), "b": jnp.ones(4)}, jnp.ones(3))
    with pytest.raises(AssertionError, match="assert_rank"):
        rule(jnp.ones((3, 2)), jnp.ones((3, 1)))
