"""Random words, normals and signs from a key, fast enough for a direction each evaluation.

The words are those of `jax.random.bits`. JAX computes threefry2x32 on CPU round by round, with
arrays that go through memory; here the rounds are one expression and the loop is over the numbers,
fused with what takes them. Normals are the function of the words that `jax.random.normal` is, by
one polynomial without branches: the same numbers to 2e-5 of each.

`benchmarks/generators.py` measures the rates.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax.core import Array, PRNGKey

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_ONE = np.float32(1).view(np.uint32)

# √2 erfinv(x) = x Σ_i _QUANTILE[i] (t - 2)^i with t = √(-log(1 - x²)), to 5e-6 for t <= 4, and
# log(1 + m) = m Σ_i _LOG[i] m^i, to 8e-6 for 0 <= m < 1: the best polynomials of their degrees.
_QUANTILE = (
    *(2.6286988, 1.2917826, 0.15985101, -0.10019729, 0.017724931, 0.017102281, -0.0073983325),
    *(-0.00299000414, 0.00171346834, 0.000362960156, -0.000217852823, -2.14424217e-05),
    1.17201726e-05,
)
_LOG = (0.99999291, -0.49942625, 0.32572407, -0.21149418, 0.10287161, -0.024528069)


def words(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    """Returns uniform uint32 words, those of `jax.random.bits`.

    Ref: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    >>> key = jax.random.key(0)
    >>> bool((words(key, (3, 5)) == jax.random.bits(key, (3, 5))).all())
    True
    """
    if str(jax.random.key_impl(key)) != "threefry2x32" or math.prod(shape) >= 2**32:
        return jax.random.bits(key, shape, jnp.uint32)
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    first, second = _threefry2x32(jax.random.key_data(key), jnp.zeros_like(index), index)
    return first ^ second


def normal(key: PRNGKey, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns standard normals, those of `jax.random.normal` to 2e-5 of each; float64 are its own.

    Half precision is rounded from float32: its own normals would take few distinct values.

    >>> key = jax.random.key(0)
    >>> ratio = normal(key, (1000,), jnp.float32) / jax.random.normal(key, (1000,))
    >>> bool(jnp.all(jnp.abs(ratio - 1) < 2e-5))
    True
    """
    if jnp.promote_types(dtype, jnp.float32) != jnp.float32:
        return jax.random.normal(key, shape, dtype)
    uniform = jax.lax.bitcast_convert_type((words(key, shape) >> 9) | _ONE, jnp.float32) - 1
    lowest = np.nextafter(np.float32(-1), np.float32(0))
    x = jnp.maximum(lowest, uniform * np.float32(2) + lowest)  # in (-1, 1)
    t = jnp.sqrt(jnp.maximum(-_log((1 - x) * (1 + x)), 0))
    return (x * _polynomial(_QUANTILE, t - 2)).astype(dtype)


def signs(key: PRNGKey, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns independent signs, +1 or -1, 32 from each word.

    >>> signs(jax.random.key(0), (4,), jnp.float32).tolist()
    [-1.0, -1.0, -1.0, 1.0]
    """
    size = math.prod(shape)
    stored = _stored(words(key, (-(-size // 32),)))
    sign_bits = (stored[:, None] << jnp.arange(31, -1, -1, dtype=jnp.uint32)) & np.uint32(1 << 31)
    drawn = jax.lax.bitcast_convert_type(sign_bits | _ONE, jnp.float32)
    return drawn.reshape(-1)[:size].reshape(shape).astype(dtype)


def _stored(x: Array) -> Array:
    """Returns the integers x [n], held in memory.

    XLA fuses what it can into the readers, barrier or not: each word would be drawn anew for each
    of its bits. What goes through a loop is not fused, and complements keep the loop.
    """
    halves = jnp.pad(x, (0, x.size % 2)).reshape(2, -1)
    return ~jax.lax.map(jnp.bitwise_not, halves).reshape(-1)[: x.size]


@functools.partial(jax.jit, inline=True)
def _threefry2x32(key: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Returns the two words of each block: twenty rounds of threefry2x32.

    Its two hundred operations are traced once for each shape, and stand in a program as if they
    were not in a function: a round draws its directions in many places.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    first, second = first + schedule[0], second + schedule[1]
    for i in range(5):
        for distance in _ROTATIONS[i % 2]:
            first = first + second
            second = first ^ ((second << distance) | (second >> (32 - distance)))
        first = first + schedule[(i + 1) % 3]
        second = second + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return first, second


def _log(x: Array) -> Array:
    """Returns log x of positive normal float32, to 1e-5."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    one = np.float32(1).view(np.int32)
    m = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | one, jnp.float32) - 1
    exponent = (bits >> 23) - 127
    return exponent.astype(jnp.float32) * np.float32(math.log(2)) + m * _polynomial(_LOG, m)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    """Returns Σ_i coefficients[i] x^i."""
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        # Not by jnp, through which each operation takes several times as long to trace.
        total = jax.lax.add(jax.lax.mul(total, x), np.float32(coefficient))
    return total
