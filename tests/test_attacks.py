"""Each attack against plain NumPy, and what no attack may touch."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_privacy import sending

from zofl_jax import keys
from zofl_jax.algorithms import fedkseed
from zofl_jax.conditions import aggregation, attacks, compression, privacy
from zofl_jax.directions import estimators

SIZE = 12
KEY = jax.random.key(3)
MALICIOUS = np.isin(np.arange(SIZE), [1, 4, 9])
PRESENT = ~np.isin(np.arange(SIZE), [0, 4, 7])
HONEST = PRESENT & ~MALICIOUS

ATTACKS = {
    "gaussian": attacks.gaussian(5.0),
    "sign_flip": attacks.sign_flip(2.0),
    "scaling": attacks.scaling(10.0),
    "alie": attacks.alie(),
    "inner_product": attacks.inner_product(2.0),
    "trim": attacks.trim(),
    "krum": attacks.krum(),
    "nan": attacks.constant(float("nan")),
}
each_attack = pytest.mark.parametrize("name", ATTACKS)


def uploads(dtype="f4") -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "a": (random.normal(size=(SIZE, 2, 3)) + 0.3).astype(dtype),
        "b": (random.normal(size=SIZE) - 0.3).astype(dtype),
    }


def flat(tree) -> np.ndarray:
    return np.concatenate(
        [np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(tree)], axis=1
    ).astype(float)


@functools.cache
def sent(name: str, key: int = 3) -> np.ndarray:
    """Returns what the malicious clients that are there send, [m, d]."""
    attack = jax.jit(ATTACKS[name])
    return flat(attack(jax.random.key(key), uploads(), MALICIOUS, PRESENT))[MALICIOUS & PRESENT]


@each_attack
def test_honest_uploads_stay_as_they_are(name):
    attacked = jax.jit(ATTACKS[name])(KEY, uploads(), MALICIOUS, PRESENT)
    np.testing.assert_array_equal(flat(attacked)[~MALICIOUS], flat(uploads())[~MALICIOUS])
    assert np.all(flat(attacked)[MALICIOUS & PRESENT] != flat(uploads())[MALICIOUS & PRESENT])


@each_attack
def test_without_malicious_clients_nothing_changes(name):
    nobody = np.zeros(SIZE, bool)
    attacked = jax.jit(ATTACKS[name])(KEY, uploads(), nobody, PRESENT)
    np.testing.assert_array_equal(flat(attacked), flat(uploads()))


@each_attack
def test_absent_clients_inform_no_attack(name):
    """What an honest client would have sent is not known if it is absent."""
    other = jax.tree.map(np.copy, uploads())
    for leaf in other.values():
        leaf[~PRESENT & ~MALICIOUS] = 1e6
    attack = jax.jit(ATTACKS[name])
    attacked = flat(attack(KEY, other, MALICIOUS, PRESENT))
    np.testing.assert_array_equal(attacked[MALICIOUS & PRESENT], sent(name))


@each_attack
def test_with_nobody_honest_it_stays_defined(name):
    everybody = np.ones(SIZE, bool)
    attacked = flat(jax.jit(ATTACKS[name])(KEY, uploads(), everybody, everybody))
    assert np.all(np.isfinite(attacked)) == (name != "nan")


def test_gaussian_noise_is_as_large_as_said():
    """Mean 0 and variance 5² · that of honest uploads, by 5 standard errors."""
    tree = {"a": np.random.default_rng(1).normal(size=(SIZE, 20_000)).astype("f4")}
    attacked = ATTACKS["gaussian"](KEY, tree, MALICIOUS, PRESENT)
    noise = flat(attacked)[MALICIOUS & PRESENT].ravel()
    assert len(noise) == 40_000
    size = 5 * np.sqrt(np.mean(flat(tree)[HONEST] ** 2))
    assert abs(noise.mean()) < 5 * size / len(noise) ** 0.5
    assert abs(noise.var() / size**2 - 1) < 5 * (2 / len(noise)) ** 0.5
    assert not np.array_equal(sent("gaussian"), sent("gaussian", 4))


def test_flips_and_factors():
    mine = flat(uploads())[MALICIOUS & PRESENT]
    np.testing.assert_allclose(sent("sign_flip"), -2 * mine, rtol=1e-6)
    np.testing.assert_allclose(sent("scaling"), 10 * mine, rtol=1e-6)
    honest = flat(uploads())[HONEST]
    np.testing.assert_allclose(
        sent("inner_product"), np.tile(-2 * honest.mean(axis=0), (2, 1)), rtol=1e-5
    )


def test_a_little_is_enough():
    """n = 9 there, m = 2: s = 5 - 2 = 3, z = Φ⁻¹(4/7)."""
    honest = flat(uploads())[HONEST]
    z = statistics.NormalDist().inv_cdf(4 / 7)
    expected = honest.mean(axis=0) - z * honest.std(axis=0)
    np.testing.assert_allclose(sent("alie"), np.tile(expected, (2, 1)), rtol=1e-4, atol=1e-5)
    given = attacks.alie(1.5)(KEY, uploads(), MALICIOUS, PRESENT)
    expected = honest.mean(axis=0) - 1.5 * honest.std(axis=0)
    np.testing.assert_allclose(flat(given)[1], expected, rtol=1e-4, atol=1e-5)


def test_the_trim_attack_is_just_beyond_the_honest_and_the_wrong_way():
    honest = flat(uploads())[HONEST]
    least, most, rising = honest.min(axis=0), honest.max(axis=0), honest.mean(axis=0) > 0
    assert 0 < rising.sum() < len(rising)
    for row in sent("trim"):
        assert np.all(row[rising] <= least[rising])
        assert np.all(row[rising] >= np.where(least > 0, least / 2, least * 2)[rising])
        assert np.all(row[~rising] >= most[~rising])
        assert np.all(row[~rising] <= np.where(most > 0, most * 2, most / 2)[~rising])


def test_the_krum_attack_deceives_krum_and_twice_as_far_does_not():
    rows = sent("krum")
    honest = flat(uploads())[HONEST]
    direction = np.sign(honest.mean(axis=0))
    size = np.abs(rows[0, 0])
    np.testing.assert_allclose(rows, np.tile(-size * direction, (2, 1)), rtol=1e-6)
    assert size > 0
    rule = aggregation.krum(2)
    weights = jnp.asarray(PRESENT, jnp.float32)
    attacked = ATTACKS["krum"](KEY, uploads(), MALICIOUS, PRESENT)
    taken = np.concatenate([np.ravel(x) for x in rule(attacked, weights).values()])
    np.testing.assert_allclose(taken, rows[0], rtol=1e-6)

    further = attacks.scaling(2.0)(KEY, attacked, MALICIOUS, PRESENT)
    taken = np.concatenate([np.ravel(x) for x in rule(further, weights).values()])
    assert not np.allclose(taken, 2 * rows[0])


def test_the_largest_step_is_the_paper_s():
    """Theorem 1, in NumPy."""
    honest = flat(uploads())[HONEST]
    count, m, n = len(honest), 2, 9
    pairs = np.linalg.norm(honest[:, None] - honest[None], axis=2)
    sums = [np.sort(np.delete(pairs[i], i))[: n - m - 2].sum() for i in range(count)]
    longest = np.linalg.norm(honest, axis=1).max()
    expected = (min(sums) / (n - 2 * m - 1) + longest) / 7**0.5
    actual = attacks._largest_step(uploads(), jnp.asarray(HONEST), jnp.asarray(m))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


PLAIN = jnp.asarray(uploads()["a"])  # [C, 2, 3]


@pytest.mark.parametrize(
    ("wrap", "error"),
    [
        (lambda plain: compression.compressed(plain, compression.integers(8)), 0.04),
        (lambda plain: compression.compressed(plain, compression.floats(jnp.float16)), 1e-2),
        (lambda plain: compression.compressed(plain, compression.top_k(1.0)), 1e-6),
        (lambda plain: privacy.fixed_point(plain, 16, 100.0, SIZE), 1e-4),
    ],
)
def test_attacks_on_encoded_uploads_are_those_on_what_they_say(wrap, error):
    algorithm = wrap(sending(PLAIN))
    own_keys = jax.random.split(KEY, SIZE)
    one = jax.vmap(lambda u, key: algorithm.client(None, None, (), u, key).upload)
    honest = one(PLAIN, own_keys)
    attacked = attacks.on_wire(attacks.sign_flip(2.0), algorithm.wire)(
        KEY, honest, MALICIOUS, PRESENT
    )
    for a, b in zip(jax.tree.leaves(attacked), jax.tree.leaves(honest), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a[~MALICIOUS], b[~MALICIOUS])
    read = jax.vmap(algorithm.wire.numbers)(attacked)
    np.testing.assert_allclose(read[MALICIOUS], -2 * PLAIN[MALICIOUS], atol=2 * error)


def test_flipped_pairs_of_fedkseed_keep_their_seeds():
    algorithm = fedkseed(
        None, estimators.forward_difference(1, 1e-3), 0.1, pool_key=KEY, pool_size=8, local_steps=6
    )
    pairs = {"scalars": PLAIN.reshape(SIZE, 6), "seeds": jnp.arange(6 * SIZE).reshape(SIZE, 6)}
    flipped = attacks.on_wire(attacks.sign_flip(), algorithm.wire)(KEY, pairs, MALICIOUS, PRESENT)
    np.testing.assert_array_equal(flipped["seeds"], pairs["seeds"])
    signs = np.where(MALICIOUS, -1, 1)[:, None]
    np.testing.assert_array_equal(flipped["scalars"], signs * pairs["scalars"])


def test_one_function_serves_all_attacks():
    names = ["sign_flip", "scaling", "alie", "krum"]

    @jax.jit
    def attacked(index):
        attack = attacks.chosen([ATTACKS[name] for name in names], index)
        return attack(KEY, uploads(), MALICIOUS, PRESENT)

    for index, name in enumerate(names):
        actual = flat(attacked(index))[MALICIOUS & PRESENT]
        np.testing.assert_allclose(actual, sent(name), rtol=1e-6)


def test_the_malicious_are_a_function_of_the_key():
    key = keys.root(0).adversary
    for share, count in ((0.0, 0), (0.1, 5), (0.3, 15), (1.0, 50)):
        assert int(attacks.drawn(key, 50, share).sum()) == count
    drawn = attacks.drawn(key, 50, 0.3)
    assert drawn.tolist() == attacks.drawn(key, 50, 0.3).tolist()
    assert drawn.tolist() != attacks.drawn(keys.root(1).adversary, 50, 0.3).tolist()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: attacks.drawn(KEY, 5, 1.2), r"must be in \[0, 1\], got 1.2"),
        (lambda: attacks.trim(1.0), "must be above 1, got 1.0"),
        (lambda: attacks.krum(0), "halvings must be >= 1, got 0"),
        (lambda: attacks.label_flip(1), "labels of 1 classes"),
        (lambda: attacks.label_flip(2)({"x": 1}), "needs a task whose examples have a label"),
        (
            lambda: attacks.scaling()(KEY, jnp.arange(3), jnp.ones(3, bool), jnp.ones(3, bool)),
            "got a leaf of int32; use label flipping",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
