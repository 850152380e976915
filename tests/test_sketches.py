"""Sketches: unbiased, with the error of their formula, and least where they are shrunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax import keys
from zofl_jax.directions import perturbations, sums
from zofl_jax.directions.sketches import sketch

COUNT = 2000  # of keys, so that a mean square is known to about three per cent
P = 12
X = {"w": jnp.linspace(-1.0, 2.0, 12).reshape(4, 3)}
TREE = {
    "head": jnp.linspace(1.0, 2.0, 5),
    "layers": {"w": jnp.linspace(-2.0, 2.0, 24).reshape(2, 4, 3)},
}


def reconstructions(made, x):
    """Returns sketches [COUNT, P] of x by keys of their own, and what is read of them."""

    def one(key):
        scalars = made.measure(key, x)
        return scalars, made.expand(key, x, scalars)

    chunked = jax.jit(lambda each: jax.lax.map(one, each, batch_size=500))
    return chunked(jax.random.split(jax.random.key(3), COUNT))


def errors(read, x, factor=1.0):
    """Returns ‖factor x̂ − x‖² / ‖x‖², [COUNT]."""
    square = jax.tree.map(
        lambda r, t: jnp.sum(jnp.square(factor * r - t), tuple(range(1, r.ndim))), read, x
    )
    return np.asarray(sum(jax.tree.leaves(square)) / squared(x))


def squared(x):
    return sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(x))


KINDS = {
    "gaussian": (perturbations.gaussian(), 12 + 1),
    "rademacher": (perturbations.rademacher(), 12 - 1),
    "sphere": (perturbations.sphere(), 12 - 1),
    "rank 2": (perturbations.low_rank(2), 12 - 1 + 4 + 3 + 2 + 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_is_unbiased_and_its_error_falls_as_d_over_p(kind):
    """Within 5 standard errors; shrunk by the best factor the error is (1 − f), and no less."""
    perturbation, excess = KINDS[kind]
    scalars, read = reconstructions(sketch(P, perturbation, rank=0), X)
    mean, spread = jnp.mean(read["w"], 0), jnp.std(read["w"], 0) / COUNT**0.5
    assert (abs(mean - X["w"]) <= 5 * spread).all()
    lengths = np.asarray(jnp.sum(jnp.square(scalars), 1)) / squared(X)
    assert abs(lengths.mean() - 1) <= 5 * lengths.std() / COUNT**0.5
    best = P / (P + excess)
    for factor in (1.0, best, 0.7 * best, 1.4 * best):
        found = errors(read, X, factor)
        expected = (1 - factor) ** 2 + factor**2 * excess / P
        assert abs(found.mean() - expected) <= 5 * found.std() / COUNT**0.5
        assert expected >= 1 - best - 1e-9


def test_the_error_falls_with_the_number_of_directions():
    """13 / (P + 13) where it is shrunk: below 1 with a single one."""
    gaussian = perturbations.gaussian()
    for count in (1, 16):
        _, shrunk = reconstructions(sketch(count, gaussian), X)
        found = errors(shrunk, X)
        expected = 13 / (count + 13)
        assert abs(found.mean() - expected) <= 5 * found.std() / COUNT**0.5


def test_blocks_have_directions_of_their_own_in_proportion_to_their_size():
    """29 numbers, of which 5 and twice 12: 2 and twice 4 of ten directions; the error is that of
    ten along the whole."""
    gaussian = perturbations.gaussian()
    for by_block, size in ((True, 10), (False, 10)):
        made = sketch(10, gaussian, by_block=by_block, rank=0)
        scalars, read = reconstructions(made, TREE)
        assert scalars.shape == (COUNT, size)
        if by_block:
            norms = [squared(TREE["head"]), *(squared(w) for w in TREE["layers"]["w"])]
            expected = 6 / 2 * norms[0] + 13 / 4 * (norms[1] + norms[2])
        else:
            expected = 30 / 10 * squared(TREE)
        found = errors(read, TREE)
        assert abs(found.mean() - expected / squared(TREE)) <= 5 * found.std() / COUNT**0.5
    # A block's numbers tell nothing of others, and layers have different directions.
    measure, key = jax.jit(sketch(10, gaussian).measure), jax.random.key(0)
    head, layers = np.ones(5, np.float32), np.ones((2, 4, 3), np.float32)
    second = layers * np.array([0, 1], np.float32)[:, None, None]
    alone = np.asarray(measure(key, {"head": 0 * head, "layers": {"w": second}}))
    np.testing.assert_array_equal(alone[:6], 0)
    both = np.asarray(measure(key, {"head": head, "layers": {"w": layers}}))
    np.testing.assert_allclose(both[6:], alone[6:], rtol=1e-6)
    assert abs(both[2:6] - both[6:]).min() > 1e-3


def test_a_block_s_directions_hang_on_its_name_alone():
    made, key = sketch(6, perturbations.rademacher(), rank=0), jax.random.key(1)
    measure = jax.jit(made.measure)
    one = np.asarray(measure(key, {"w": X["w"]}))
    two = np.asarray(measure(key, {"a": X["w"] + 3, "w": X["w"]}))
    np.testing.assert_allclose(two[3:] * 3**0.5, one[:3] * 6**0.5, rtol=1e-5)


@pytest.mark.parametrize("perturbation", [perturbations.low_rank(), perturbations.gaussian()])
def test_hundreds_of_directions_are_summed_in_groups(perturbation):
    """130 of them, in three groups where their factors are held; the sum is that of one by one."""

    def draw(key):
        each = [keys.direction_keys(key, 130)[p] for p in (0, 64, 129)]
        z = [sums.arrays(perturbation.sample(k, X))["w"] for k in each]
        return -1.0 * z[0] + 0.5 * z[1] + 2.0 * z[2]

    made, key = sketch(130, perturbation, by_block=False, rank=0), jax.random.key(1)
    chosen = jnp.zeros(130).at[jnp.array([0, 64, 129])].set(jnp.array([-1.0, 0.5, 2.0]))
    read, drawn = jax.jit(lambda: (made.expand(key, X, chosen), draw(key)))()
    np.testing.assert_allclose(read["w"], drawn / 130**0.5, atol=1e-6)


def test_an_effective_rank_is_the_mean_s_share():
    """r = 6 of 12: f = P / (P + 13 / 2); of as many as there are and more, the least error's."""
    gaussian, key = perturbations.gaussian(), jax.random.key(2)
    shares = {0: 1, 6: P / (P + 6.5), 12: P / (P + 13), 1e9: P / (P + 13)}
    made = [sketch(P, gaussian, rank=rank) for rank in shares]
    read = jax.jit(lambda scalars: [each.expand(key, X, scalars)["w"] for each in made])
    unbiased, *others = map(np.asarray, read(jnp.arange(1.0, P + 1)))
    for found, share in zip(others, list(shares.values())[1:], strict=True):
        np.testing.assert_allclose(found, share * unbiased, rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "rank", "message"),
    [
        (0, 1.0, "num_perturbations must be >= 1, got 0"),
        (1, -1.0, "rank must be >= 0, got -1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(count, rank, message):
    with pytest.raises(ValueError, match=message):
        sketch(count, perturbations.gaussian(), rank=rank)
