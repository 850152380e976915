"""The parts of a decoder-only transformer: dense, norm, embedding, attention, MLP, one layer.

Every matrix is used in one `x @ W` with W [in, out] (tables: [vocabulary, features]), in the
dtype of x, or with factors rounded to `Config.matmul_dtype`; norms, rotations, softmax and scores
are computed in float32.

Weights are dicts: {"kernel", "bias"?}, {"scale", "bias"?} or {"embedding"}. A matrix with
"lora_a", "lora_b" and "lora_scale" beside it acts as W + lora_scale A B (`lora.py`); the sum
is never formed, so W stays unbatched under a `vmap` over clients with their own A and B.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zofl_jax import platforms
from zofl_jax.core import Array, Params
from zofl_jax.models.architectures import Config

Rotary = tuple[Array, Array]
"""Cosines and sines of the positions' angles, each [B, T, 1, head_dim / 2]."""

_MASKED = -1e30  # finite: a padding query sees no key and must not turn to NaN

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class Past(NamedTuple):
    """The cache of one layer: keys and values of S slots, and the slot to write next."""

    keys: Array  # [B, S, num_kv_heads, head_dim]
    values: Array
    slot: Array  # int []


def layer(
    config: Config,
    weights: Params,
    x: Array,
    rotary: Rotary | None,
    allowed: Array,
    past: Past | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """Returns one layer's output, [B, T, D], and the keys and values of these T tokens.

    Args:
      config: the model.
      weights: one layer of params["layers"].
      x: [B, T, D].
      rotary: from `rotary`, None if positions are learned.
      allowed: bool [B, T, S], which slots a token attends to; S = T without `past`.
      past: the cache while decoding.
    """
    attention = weights["attention"]
    inputs = norm(config, x, weights["attention_norm"]) if config.pre_norm else x
    q, k, v = (
        dense(config, inputs, attention[name]).reshape(*x.shape[:2], -1, config.head_dim)
        for name in "qkv"
    )
    if config.qk_norm:
        q, k = norm(config, q, attention["q_norm"]), norm(config, k, attention["k_norm"])
    if rotary is not None:
        turns = weights.get("rope", True)  # a traced bool: this layer may have no positions
        q, k = (jnp.where(turns, rotate(x, rotary), x) for x in (q, k))
    keys, values = k, v
    if past is not None:
        keys = lax.dynamic_update_slice_in_dim(past.keys, k, past.slot, axis=1)
        values = lax.dynamic_update_slice_in_dim(past.values, v, past.slot, axis=1)
    x = x + dense(config, attend(q, keys, values, allowed), attention["o"])
    if not config.pre_norm:
        x = norm(config, x, weights["attention_norm"])
    inputs = norm(config, x, weights["mlp_norm"]) if config.pre_norm else x
    x = x + mlp(config, inputs, weights["mlp"])
    if not config.pre_norm:
        x = norm(config, x, weights["mlp_norm"])
    return x, (k, v)


def attend(q: Array, k: Array, v: Array, allowed: Array) -> Array:
    """Returns softmax(q kᵀ / √d) v, [B, T, H d].

    At the few hundred tokens of a fine-tuning prompt the scores are small beside the features,
    so they are simply formed, [B, H, T, S]. Heads come before tokens in the products, which take
    half the time of an einsum on a CPU (2.5 against 4.7 ms for 32 x 40 tokens, 9 heads of 64).

    Args:
      q: [B, T, H, d].
      k: [B, S, H / G, d]; G consecutive query heads share one of them.
      v: as k.
      allowed: bool [B, T, S].
    """
    B, T, H, d = q.shape
    S, K = k.shape[1:3]
    q = (q * d**-0.5).reshape(B, T, K, -1, d).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, d)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32).reshape(B, K, -1, T, S)
    scores = jnp.where(allowed[:, None, None], scores, _MASKED)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = (shares.reshape(B, K, -1, S) @ v).reshape(B, K, -1, T, d)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H * d)


def mlp(config: Config, x: Array, weights: Params) -> Array:
    """Returns down(f(gate(x)) * up(x)), or down(f(up(x))) if the MLP isn't gated."""
    activation = _ACTIVATIONS[config.activation]
    up = dense(config, x, weights["up"])
    inside = activation(dense(config, x, weights["gate"])) * up if config.gated else activation(up)
    return dense(config, inside, weights["down"])


def dense(config: Config, x: Array, weights: Params) -> Array:
    """Returns x W + b, [..., out], in the dtype of x: [..., in]."""
    y = _product(config, x, weights["kernel"])
    if "lora_a" in weights:
        low = _product(config, _product(config, x, weights["lora_a"]), weights["lora_b"])
        y += weights["lora_scale"].astype(x.dtype) * low
    if "bias" in weights:
        y += weights["bias"].astype(x.dtype)
    return y


def _product(config: Config, x: Array, matrix: Array) -> Array:
    """Returns x W, in the dtype of x.

    On a CPU XLA has fast products of half-precision factors only where the result is float32.
    """
    dtype = jnp.dtype(config.matmul_dtype or x.dtype)
    wide = config.matmul_dtype is not None or platforms.current().platform == "cpu"
    result = jnp.float32 if wide and dtype.itemsize == 2 else None
    product = jnp.matmul(x.astype(dtype), matrix.astype(dtype), preferred_element_type=result)
    return product.astype(x.dtype)


def lookup(config: Config, ids: Array, table: Params) -> Array:
    """Returns rows of a table, [..., features] in the compute dtype, for ids: int [...]."""
    dtype = config.compute_dtype
    rows = table["embedding"][ids].astype(dtype)
    if "lora_a" in table:
        low = _product(config, table["lora_a"][ids].astype(dtype), table["lora_b"])
        rows += table["lora_scale"].astype(dtype) * low
    return rows


def scores(config: Config, x: Array, table: Params, rows: Array | None = None) -> Array:
    """Returns x Wᵀ for a table W, or for some rows of it: float32 [..., rows]."""
    pick = (lambda leaf: leaf) if rows is None else (lambda leaf: leaf[rows])
    y = _product_transposed(config, x, pick(table["embedding"]))
    if "lora_a" in table:
        low = _product_transposed(config, x, table["lora_b"])
        y += table["lora_scale"] * _product_transposed(config, low, pick(table["lora_a"]))
    return y


def norm(config: Config, x: Array, weights: Params) -> Array:
    """Returns x with its last axis normalised: layer norm for OPT, else RMS norm."""
    y = x.astype(jnp.float32)
    if config.layer_norm:
        y -= y.mean(axis=-1, keepdims=True)
    y *= lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + config.norm_eps)
    y *= weights["scale"].astype(jnp.float32)
    if "bias" in weights:
        y += weights["bias"].astype(jnp.float32)
    return y.astype(x.dtype)


def rotary(config: Config, positions: Array) -> Rotary:
    """Returns the cosines and sines for int positions [B, T]."""
    angles = positions[..., None, None].astype(jnp.float32) * rotary_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, rotary: Rotary) -> Array:
    """Returns x [B, T, heads, d] with each pair (x_i, x_{i + d/2}) turned by its angle.

    Ref: Su et al. 2021, arXiv 2104.09864; the halves are paired as Hugging Face does.
    """
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def rotary_frequencies(config: Config) -> np.ndarray:
    """Returns the angle by which one position turns the i-th pair, float32 [head_dim / 2].

    θ^(-2i/d). Under Llama 3's scaling, pairs that turn less than `low_freq_factor` times in
    the original context are divided by `factor`, those above `high_freq_factor` are kept, and
    between the two a linear ramp mixes them (arXiv 2407.21783).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
    if config.rope_scaling is None:
        return frequencies
    s = config.rope_scaling
    turns = s.original_max_positions * frequencies / np.float32(2 * np.pi)
    ramp = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    keep = np.clip(ramp, 0.0, 1.0).astype(np.float32)
    return (keep + (1 - keep) / np.float32(s.factor)) * frequencies


def _product_transposed(config: Config, x: Array, table: Array) -> Array:
    """Returns x Wᵀ, float32."""
    dtype = config.matmul_dtype or x.dtype
    factors = x.astype(dtype), table.astype(dtype)
    return jnp.einsum("...d,vd->...v", *factors, preferred_element_type=jnp.float32)
