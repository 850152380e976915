"""Clipping, noise, their ε, and sums of integers that are the mean."""

import builtins
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_tasks import softmax_task

from zofl_jax import keys
from zofl_jax.algorithms import decomfl, fedkseed
from zofl_jax.conditions import accounting, aggregation, privacy
from zofl_jax.core import Algorithm, ClientResult, ServerState
from zofl_jax.directions import estimators, perturbations

KEY = keys.round_key(keys.root(2).shared, 0)
CLIENTS = 4000

# Without a report of ε.
client_level = functools.partial(privacy.client_level, delta=None)
example_level = functools.partial(privacy.example_level, delta=None)


def sending(upload) -> Algorithm:
    """An algorithm whose clients send what they are given as batches."""

    def client(shared_key, state, memory, batches, own_key):
        return ClientResult(batches, memory, {"loss": jnp.zeros(())})

    def server(key, state, broadcast):
        return state

    return Algorithm(
        lambda params: ServerState(params, (), jnp.zeros((), jnp.int32)),
        client,
        aggregation.mean,
        server,
        1,
    )


def sent(algorithm: Algorithm, uploads):
    """Returns what clients with these uploads send, each with a key of its own."""
    own_keys = jax.random.split(jax.random.key(5), len(jax.tree.leaves(uploads)[0]))
    state = algorithm.init(jnp.zeros(()))
    one = jax.vmap(lambda u, key: algorithm.client(KEY, state, (), u, key).upload)
    return jax.jit(one)(uploads, own_keys)


# Clients.


def test_uploads_are_clipped_over_all_their_leaves():
    uploads = {"a": jnp.array([[3.0, 0.0], [0.3, 0.0]]), "b": jnp.array([4.0, 0.4])}
    clipped = sent(client_level(sending(uploads), 1.0, 0.0, 2), uploads)
    np.testing.assert_allclose(clipped["a"], [[0.6, 0], [0.3, 0]], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [0.8, 0.4], rtol=1e-6)


def test_the_noise_of_all_clients_together_is_that_of_the_sum():
    """Mean 0 and variance (σC)² / M each, and no two alike, by 5 standard errors."""
    uploads = jnp.full((CLIENTS, 2, 3), 0.01)
    noisy = sent(client_level(sending(uploads), 0.5, 3.0, 25), uploads)
    noise = np.asarray(noisy) - 0.01
    variance = (3.0 * 0.5) ** 2 / 25
    assert abs(noise.mean()) < 5 * (variance / noise.size) ** 0.5
    assert abs(noise.var() / variance - 1) < 5 * (2 / noise.size) ** 0.5
    sums = noise.reshape(-1, 25, 6).sum(axis=1)  # of cohorts of 25
    assert abs(sums.var() / (3.0 * 0.5) ** 2 - 1) < 5 * (2 / sums.size) ** 0.5
    correlation = np.corrcoef(noise.reshape(CLIENTS, 6).T)[np.triu_indices(6, 1)]
    assert np.all(np.abs(correlation) < 5 / CLIENTS**0.5)


# Examples.


def private_decomfl(clip, multiplier, local_steps=1, count=3, rate=0.1):
    task = softmax_task()
    estimator = estimators.forward_difference(count, 1e-3, perturbations.rademacher())

    def make(private):
        return decomfl(task.loss, private(estimator), optax.sgd(rate), local_steps=local_steps)

    return task, estimator, example_level(make, clip, multiplier, 4)


def batches_of(task, local_steps):
    take = np.arange(4 * local_steps)
    return jax.tree.map(
        lambda x: jnp.asarray(x[take]).reshape(local_steps, 4, *x.shape[1:]), task.test
    )


def test_each_example_is_clipped_alone():
    """Against finite differences of single examples, in a loop."""
    task, estimator, algorithm = private_decomfl(0.8, 0.0)
    state, batches = algorithm.init(task.init(KEY)), batches_of(task, 1)
    upload = jax.jit(algorithm.client)(KEY, state, (), batches, KEY).upload[0]
    rows, clipped, step = [], 0, keys.step_key(KEY, 0)
    measure = jax.jit(lambda x, one: estimator.measure(task.loss, step, 0, x, one).scalars)
    for i in range(4):
        one = jax.tree.map(lambda x, i=i: np.asarray(x)[0, i : i + 1], batches)
        g = np.asarray(measure(state.params, one))
        clipped += np.linalg.norm(g) > 0.8
        rows.append(g * min(1, 0.8 / np.linalg.norm(g)))
    assert clipped > 0
    np.testing.assert_allclose(upload, np.mean(rows, axis=0), rtol=1e-2, atol=1e-3)


def test_wide_bounds_and_no_noise_leave_the_method_as_it_is():
    """Over local steps: a mean of examples' differences is the difference of the mean."""
    task, estimator, algorithm = private_decomfl(1e6, 0.0, local_steps=3)
    plain = decomfl(task.loss, estimator, optax.sgd(0.1), local_steps=3)
    state, batches = plain.init(task.init(KEY)), batches_of(task, 3)
    expected = jax.jit(plain.client)(KEY, state, (), batches, KEY)
    actual = jax.jit(algorithm.client)(KEY, state, (), batches, KEY)
    np.testing.assert_allclose(actual.upload, expected.upload, atol=5e-3)
    np.testing.assert_allclose(actual.stats["loss"], expected.stats["loss"], rtol=1e-4)


def test_the_noise_of_a_step_is_the_client_s_own():
    """Variance (σC/B)², between steps and clients independent."""
    task, _, algorithm = private_decomfl(0.5, 2.0, local_steps=2, rate=1e-9)
    silent = private_decomfl(0.5, 0.0, local_steps=2, rate=1e-9)[2]
    state, batches = algorithm.init(task.init(KEY)), batches_of(task, 2)
    own_keys = jax.random.split(jax.random.key(7), CLIENTS)

    @jax.jit
    def uploads(own_keys):
        return jax.vmap(lambda own: algorithm.client(KEY, state, (), batches, own).upload)(own_keys)

    mean = np.asarray(jax.jit(silent.client)(KEY, state, (), batches, KEY).upload)
    noise = (np.asarray(uploads(own_keys)) - mean).reshape(CLIENTS, 6)
    variance = (2.0 * 0.5 / 4) ** 2
    assert np.all(np.abs(noise.mean(axis=0)) < 5 * (variance / CLIENTS) ** 0.5 + 1e-3)
    assert abs(noise.var() / variance - 1) < 5 * (2 / noise.size) ** 0.5
    correlation = np.corrcoef(noise.T)[np.triu_indices(6, 1)]
    assert np.all(np.abs(correlation) < 5 / CLIENTS**0.5)


def test_a_seed_drawn_twice_has_noise_of_its_own_each_time():
    """FedKSeed with a pool of one seed: a difference of two steps would tell the data."""
    task = softmax_task()

    def make(private):
        estimator = private(estimators.forward_difference(1, 1e-3))
        return fedkseed(task.loss, estimator, 1e-9, pool_key=KEY, pool_size=1, local_steps=2)

    algorithm = example_level(make, 0.5, 20.0, 4)
    state, batches = algorithm.init(task.init(KEY)), batches_of(task, 2)
    own_keys = jax.random.split(jax.random.key(7), CLIENTS)
    one = jax.vmap(lambda own: algorithm.client(KEY, state, (), batches, own).upload["scalars"])
    scalars = np.asarray(jax.jit(one)(own_keys))
    assert abs(np.corrcoef(scalars.T)[0, 1]) < 5 / CLIENTS**0.5


def test_a_client_goes_on_with_its_noisy_scalars():
    """What it measures at its second step is at the model that its first message leads to."""
    task, estimator, algorithm = private_decomfl(0.5, 20.0, local_steps=2)
    state, batches = algorithm.init(task.init(KEY)), batches_of(task, 2)
    upload = jax.jit(algorithm.client)(KEY, state, (), batches, jax.random.key(9)).upload
    direction = jax.jit(estimator.expand)(keys.step_key(KEY, 0), state.params, upload[0])
    moved = jax.tree.map(lambda x, z: x - 0.1 * np.asarray(z), state.params, direction)
    second = jax.jit(private_decomfl(0.5, 0.0)[2].client)
    # The loss tells where it was.
    result = jax.jit(algorithm.client)(KEY, state, (), batches, jax.random.key(9))
    first, last = (
        second(
            keys.step_key(KEY, k), state._replace(params=x), (), batches_at(batches, k), KEY
        ).stats["loss"]
        for k, x in ((0, state.params), (1, moved))
    )
    np.testing.assert_allclose(result.stats["loss"], (first + last) / 2, rtol=1e-4)


def batches_at(batches, k):
    return jax.tree.map(lambda b: b[k : k + 1], batches)


# Accounting.


def reference(multiplier, sample, population, times, delta):
    dp = pytest.importorskip("dp_accounting")
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    event = dp.GaussianDpEvent(multiplier)
    if sample < population:
        event = dp.SampledWithoutReplacementDpEvent(population, sample, event)
    return accountant.compose(event, times).get_epsilon(delta)


def test_epsilon_is_the_library_s_own_figure():
    """With half the multiplier: replacing a client moves the sum by twice the clipping norm."""
    options = {"noise_multiplier": 3.0, "clients_per_round": 10, "delta": 1e-5}
    actual = accounting.client_epsilon({10: 40}, num_clients=200, **options)
    assert actual == reference(1.5, 10, 200, 40, 1e-5)
    assert accounting.client_epsilon({10: 7}, num_clients=10, **options) == reference(
        1.5, 10, 10, 7, 1e-5
    )
    # Of those asked only six were heard: less noise, but ten were in the sample.
    actual = accounting.client_epsilon({6: 40}, num_clients=200, **options)
    assert actual == reference(1.5 * math.sqrt(6 / 10), 10, 200, 40, 1e-5)
    actual = accounting.example_epsilon(
        30, noise_multiplier=2.0, batch_size=8, num_examples=400, delta=1e-6
    )
    assert actual == reference(1.0, 8, 400, 30, 1e-6)


def test_without_sampling_it_is_that_of_the_library_s_other_accountant():
    """By privacy loss distributions, which are exact; Rényi accounting is above, by little."""
    pytest.importorskip("dp_accounting")
    from dp_accounting.pld import privacy_loss_distribution as pld

    # Ten clients in all: replacing one moves the sum by 2C, and its noise is 3C, or √(6/10) of it.
    options = {"noise_multiplier": 3.0, "clients_per_round": 10, "num_clients": 10, "delta": 1e-5}
    full = pld.from_gaussian_mechanism(3.0, sensitivity=2.0).self_compose(7)
    weak = pld.from_gaussian_mechanism(3.0 * 0.6**0.5, sensitivity=2.0).self_compose(2)
    for contributors, exact in (({10: 7}, full), ({10: 7, 6: 2}, full.compose(weak))):
        least = exact.get_epsilon_for_delta(1e-5)
        assert least <= accounting.client_epsilon(contributors, **options) < 1.12 * least
    options = {"noise_multiplier": 5.0, "batch_size": 8, "num_examples": 8, "delta": 1e-6}
    exact = pld.from_gaussian_mechanism(5.0, sensitivity=2.0).self_compose(12)
    least = exact.get_epsilon_for_delta(1e-6)
    assert least <= accounting.example_epsilon(12, **options) < 1.12 * least


def test_sampling_amplifies_as_it_does_in_one_round():
    """ε' = log(1 + γ (exp ε − 1)) at δ' = γ δ for a sample of a share γ (Balle et al. 2018)."""
    pytest.importorskip("dp_accounting")
    from dp_accounting.pld import privacy_loss_distribution as pld

    share, delta = 10 / 200, 1e-5
    whole = pld.from_gaussian_mechanism(3.0, sensitivity=2.0).get_epsilon_for_delta(delta / share)
    least = math.log1p(share * math.expm1(whole))
    actual = accounting.client_epsilon(
        {10: 1}, noise_multiplier=3.0, clients_per_round=10, num_clients=200, delta=delta
    )
    assert least <= actual < 2.2 * least < whole


def test_without_sampling_it_is_below_the_closed_form_of_zero_concentrated_privacy():
    """ρ = T / 2σ², ε <= ρ + 2 √(ρ log 1/δ) (Bun and Steinke 2016), and not by much."""
    rho = 20 / (2 * 5.0**2)
    closed = rho + 2 * math.sqrt(rho * math.log(1e5))
    actual = accounting.example_epsilon(
        20, noise_multiplier=10.0, batch_size=8, num_examples=8, delta=1e-5
    )
    assert 0.8 * closed < actual <= closed


def test_rounds_with_fewer_clients_spend_more():
    options = {
        "noise_multiplier": 3.0,
        "clients_per_round": 10,
        "num_clients": 200,
        "delta": 1e-5,
    }
    full = accounting.client_epsilon({10: 20}, **options)
    assert accounting.client_epsilon({10: 10, 4: 10}, **options) > full
    assert accounting.client_epsilon({10: 20, 0: 5}, **options) == full
    assert accounting.client_epsilon({10: 10}, **options) < full
    assert accounting.client_epsilon({}, **options) == 0
    assert accounting.client_epsilon({10: 1}, **options | {"noise_multiplier": 0.0}) == math.inf


@pytest.mark.parametrize(("bits", "epsilon"), [(1, 2.0), (40, 0.5), (1000, 0.1)])
def test_private_bits_spend_what_the_library_s_other_accountant_says(bits, epsilon):
    """By the exact privacy loss of bits that are drawn at random with 2 / (1 + exp ε₀)."""
    pytest.importorskip("dp_accounting")
    from dp_accounting.pld import privacy_loss_distribution as pld

    one = pld.from_randomized_response(2 / (1 + math.exp(epsilon)), num_buckets=2)
    exact = one.self_compose(bits).get_epsilon_for_delta(1e-5)
    actual = accounting.bit_epsilon(bits, epsilon=epsilon, delta=1e-5)
    assert exact * (1 - 1e-3) <= actual < 1.15 * exact


def test_private_bits_spend_what_composition_says():
    """The sum of their ε at most, which is exact for few, and of many of them much less."""
    assert math.isclose(accounting.bit_epsilon(3, epsilon=0.1, delta=1e-9), 3 * 0.1)
    many = accounting.bit_epsilon(1000, epsilon=0.1, delta=1e-5)
    # Dwork, Rothblum, Vadhan 2010: ε √(2 n log 1/δ) + n ε (exp ε − 1).
    advanced = 0.1 * math.sqrt(2000 * math.log(1e5)) + 1000 * 0.1 * (math.exp(0.1) - 1)
    assert 0.3 * advanced < many < advanced < 100
    assert accounting.bit_epsilon(0, epsilon=0.1, delta=1e-5) == 0


def test_what_accounting_needs_is_said(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'zofl-jax\[privacy\]'"):
        accounting.example_epsilon(1, noise_multiplier=1.0, batch_size=1, num_examples=1, delta=0.1)


# Sums of integers.


def test_the_sum_of_integers_is_exact_and_the_mean_within_the_rounding():
    random = np.random.default_rng(0)
    uploads = {"a": jnp.asarray(random.uniform(-8, 8, (50, 2, 3)), jnp.float32)}
    algorithm = privacy.fixed_point(sending(uploads), 20, 10.0, 50)
    codes = sent(algorithm, uploads)
    assert codes["a"].dtype == jnp.uint32
    weights = jnp.asarray(random.integers(0, 2, 50), jnp.float32)
    mean = np.asarray(jax.jit(algorithm.aggregate)(codes, weights)["a"])
    here = np.asarray(weights) > 0
    exact = np.round(np.asarray(uploads["a"], np.float64)[here] * 2**20).sum(axis=0)
    np.testing.assert_allclose(mean, exact / 2**20 / here.sum(), rtol=3e-7)
    true = np.asarray(uploads["a"], np.float64)[here].mean(axis=0)
    assert np.all(np.abs(mean - true) <= 2**-21 + 3e-7 * np.abs(true))
    # Masks that cancel mod 2³², as in a secure sum, change nothing.
    masks = random.integers(0, 2**32, (50, 2, 3), dtype=np.uint32)
    masks[here.nonzero()[0][0]] -= masks[here].sum(axis=0, dtype=np.uint32)
    masked = {"a": codes["a"] + masks}
    assert np.array_equal(jax.jit(algorithm.aggregate)(masked, weights)["a"], mean)


def test_numbers_that_are_not_finite_add_nothing_to_a_sum():
    uploads = jnp.array([[jnp.nan, 1.0], [3.0, jnp.inf]])
    algorithm = privacy.fixed_point(sending(uploads), 16, 10.0, 2)
    assert algorithm.aggregate(sent(algorithm, uploads), jnp.ones(2)).tolist() == [1.5, 0.5]


def test_the_largest_numbers_that_fit_do_not_overflow():
    largest, bits, clients = 2.0**10, 15, 63
    uploads = jnp.full((clients, 1), -3 * largest)
    algorithm = privacy.fixed_point(sending(uploads), bits, largest, clients)
    mean = algorithm.aggregate(sent(algorithm, uploads), jnp.ones(clients))
    assert mean.tolist() == [-largest]
    with pytest.raises(ValueError, match=r"sum of 64 numbers up to 1024\.0 with 15 bits"):
        privacy.fixed_point(sending(uploads), bits, largest, 64)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: client_level(sending(0), 0.0, 1.0, 5),
            "norm must be positive",
        ),
        (
            lambda: client_level(sending(0), 1.0, -1.0, 5),
            "must be >= 0 and finite, got -1",
        ),
        (
            lambda: client_level(sending(0), 1.0, 1.0, 0),
            "clients_per_round must be >= 1",
        ),
        (
            lambda: example_level(None, math.nan, 1.0, 5),
            "norm must be positive",
        ),
        (
            lambda: example_level(None, 1.0, 1.0, 0),
            "batch_size must be >= 1, got 0",
        ),
        (lambda: privacy.fixed_point(sending(0), -1, 1.0, 5), "must be >= 0, got -1"),
        (lambda: privacy.fixed_point(sending(0), 1, 0.0, 5), "must be positive, got 0.0"),
        (lambda: accounting.bit_epsilon(1, epsilon=0.0, delta=0.1), "must be positive and finite"),
        (
            lambda: accounting.client_epsilon(
                {1: 1}, noise_multiplier=1.0, clients_per_round=1, num_clients=1, delta=1.0
            ),
            r"delta must be in \(0, 1\), got 1.0",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
