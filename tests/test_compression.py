"""Codecs: without bias where they round at random, small where they say so, and reversible."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zofl_jax import keys
from zofl_jax.algorithms import fedsgd
from zofl_jax.conditions import compression
from zofl_jax.conditions.compression import floats, integers, signs, top_k
from zofl_jax.engine import rounds

KEY = jax.random.key(0)
NUMBERS = jnp.array([0.31, -1.7, 0.004, 2.5, -0.9, 0.0, 1e-3])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 33])
def test_packed_codes_come_back(bits, n):
    codes = np.random.default_rng(n).integers(0, 2**bits, n).astype(np.uint8)
    packed = compression.pack(jnp.asarray(codes), bits)
    assert packed.nbytes == -(-n * bits // 8)
    np.testing.assert_array_equal(compression.unpack(packed, bits, n), codes)


@pytest.mark.parametrize(
    "codec",
    [
        floats(jnp.bfloat16, stochastic=True),
        floats(jnp.float16, stochastic=True),
        integers(8),
        integers(4, scale="norm"),
        integers(2, bucket=3),
    ],
)
def test_rounding_at_random_has_no_bias(codec):
    """Within 5 standard errors over 4,000 keys; exact numbers stay exact."""

    @jax.jit
    @jax.vmap
    def transfer(key):
        return codec.decode(codec.encode(key, NUMBERS), NUMBERS.size)

    got = np.asarray(transfer(jax.random.split(KEY, 4000)), np.float64)
    errors = got.std(0) / len(got) ** 0.5
    assert (abs(got.mean(0) - NUMBERS) <= 5 * errors + 1e-6).all()
    assert (errors[:2] > 0).any()
    assert (got[:, 5] == 0).all()


@pytest.mark.parametrize(
    ("codec", "error"),
    [
        (floats(jnp.bfloat16), 2.0**-8 * np.abs(NUMBERS)),
        (floats(jnp.float16), 2.0**-11 * np.abs(NUMBERS) + 1e-7),
        (floats(jnp.bfloat16, stochastic=True), 2.0**-7 * np.abs(NUMBERS)),
        (integers(8, stochastic=False), 2.5 / 127 / 2),
        (integers(8), 2.5 / 127),
        (integers(4, stochastic=False, bucket=4), np.array([2.5] * 4 + [0.9] * 3) / 7 / 2),
    ],
)
def test_the_error_of_a_code_is_bounded(codec, error):
    got = codec.decode(codec.encode(KEY, NUMBERS), NUMBERS.size)
    assert (abs(np.asarray(got - NUMBERS)) <= error + 1e-6).all()


@pytest.mark.parametrize("stochastic", [False, True])
def test_numbers_too_large_for_a_float_become_infinity(stochastic):
    codec = floats(jnp.float16, stochastic=stochastic)
    got = codec.decode(codec.encode(KEY, jnp.array([1e6, -1e6, 65504.0, -3e38])), 4)
    np.testing.assert_array_equal(got, [jnp.inf, -jnp.inf, 65504.0, -jnp.inf])


def test_top_k_keeps_the_largest_and_counts_values_and_indices():
    payload = top_k(0.3).encode(KEY, NUMBERS)
    assert sorted(payload["indices"].tolist()) == [1, 3]
    assert (payload["values"].dtype, payload["indices"].dtype) == (jnp.float32, jnp.uint16)
    large = jax.eval_shape(top_k(0.1).encode, KEY, jax.ShapeDtypeStruct((2**16 + 1,), jnp.float32))
    assert large["indices"].dtype == jnp.uint32


def test_signs_carry_one_bit_and_the_mean_magnitude():
    payload = signs().encode(KEY, NUMBERS)
    assert payload["bits"].nbytes == 1
    got = signs().decode(payload, 7)
    mean = float(abs(NUMBERS).mean())
    np.testing.assert_allclose(got, np.where(NUMBERS < 0, -mean, mean), rtol=1e-6)
    plain = signs(magnitude=False)
    assert set(plain.encode(KEY, NUMBERS)) == {"bits"}
    np.testing.assert_allclose(plain.decode(payload, 7)[:3], got[:3])


@pytest.mark.parametrize(
    "codec",
    [
        integers(8),
        top_k(0.3),
        signs(),
        floats(jnp.float16),
        floats(jnp.float16, stochastic=True),
        floats(jnp.bfloat16, stochastic=True),
    ],
)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_numbers_that_are_not_finite_are_seen_after_the_transfer(codec, bad):
    """So that a round is stopped, or a client refused, as without compression."""
    got = codec.decode(codec.encode(KEY, NUMBERS.at[0].set(bad)), 7)
    assert not jnp.isfinite(got).all()


@pytest.mark.parametrize("codec", [floats(jnp.float16), floats(jnp.bfloat16), integers(8)])
def test_the_server_rejects_what_is_out_of_range_in_any_code(codec):
    """Also what float16 can't hold, however large a message may be."""
    numbers = jnp.stack([NUMBERS, *(NUMBERS.at[0].set(x) for x in (jnp.nan, jnp.inf, 2e3, 1e7))])
    messages = jax.vmap(lambda x: codec.encode(KEY, x))(numbers)
    assert rounds._acceptable(messages, 1e3).tolist() == [True, False, False, False, False]
    assert rounds._acceptable(messages, 1e6).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: floats(jnp.float32), "must be float16 or bfloat16, got float32"),
        (lambda: integers(3), "must be 2, 4 or 8, got 3"),
        (lambda: integers(8, scale="min"), "scale must be"),
        (lambda: integers(8, bucket=0), "a bucket must hold at least 1 number, got 0"),
        (lambda: top_k(0.0), r"must be in \(0, 1\], got 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_codec_and_the_algorithm_draw_from_different_keys():
    """A client's local steps draw from the keys `step_key(own_key, k)`."""
    seen = []

    def encode(key, numbers):
        seen.append(jax.random.key_data(key))
        return numbers

    inner = fedsgd(lambda x, batch: jnp.sum(x), optax.sgd(0.1))
    algorithm = compression.compressed(inner, compression.Codec(encode, lambda sent, n: sent))
    algorithm.client(KEY, algorithm.init(jnp.zeros(2)), (), jnp.ones((1, 1)), KEY)
    steps = [jax.random.key_data(keys.step_key(KEY, k)) for k in range(8)]
    assert all((words != seen[0]).any() for words in [jax.random.key_data(KEY), *steps])
