"""Decoder-only language models of the OPT and the Llama family, as pure functions.

`apply(config, params, tokens, mask)` is the whole model; `hidden` and `logits` are its two
halves, so that a loss evaluates the head only at the positions and for the tokens it needs.
`generation.py` decodes.

Params are a nested dict; the leaves under "layers" carry all layers on their leading axis and
`lax.scan` runs through them, so that compile time doesn't grow with depth. These are plain
functions and not flax modules: one layer serves both this pass and decoding with a cache, and
runs on params that a caller has perturbed, in a scan or a `vmap`; lifted modules would only
wrap that.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zofl_jax import keys
from zofl_jax.core import Array, Params, PRNGKey
from zofl_jax.models import blocks
from zofl_jax.models.architectures import Config

OPT_POSITION_OFFSET = 2
"""Rows of OPT's position table before position 0, kept from fairseq's padding id."""

_INIT_STD = 0.02


def shapes(config: Config) -> Params:
    """Returns the tree of `jax.ShapeDtypeStruct`s that the params of `config` have.

    >>> from zofl_jax.models.architectures import named
    >>> shapes(named("opt-1.3b"))["layers"]["mlp"]["up"]["kernel"].shape
    (24, 2048, 8192)
    """
    L, D = config.num_layers, config.width
    E = config.embed_width or D
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, config.param_dtype)

    def dense(fan_in: int, fan_out: int, bias: bool) -> Params:
        weights = {"kernel": array(L, fan_in, fan_out)}
        return weights | {"bias": array(L, fan_out)} if bias else weights

    def norm(*shape: int) -> Params:
        weights = {"scale": array(*shape)}
        return weights | {"bias": array(*shape)} if config.layer_norm else weights

    attention = {
        "q": dense(D, q_width, config.qkv_bias),
        "k": dense(D, kv_width, config.qkv_bias),
        "v": dense(D, kv_width, config.qkv_bias),
        "o": dense(q_width, D, config.out_bias),
    }
    if config.qk_norm:
        attention |= {name: {"scale": array(L, config.head_dim)} for name in ("q_norm", "k_norm")}
    mlp = {name: dense(D, config.mlp_width, config.mlp_bias) for name in ("gate", "up")}
    if not config.gated:
        del mlp["gate"]
    mlp["down"] = dense(config.mlp_width, D, config.mlp_bias)

    params: Params = {
        "embed": {"tokens": {"embedding": array(config.vocab_size, E)}},
        "layers": {
            "attention_norm": norm(L, D),
            "attention": attention,
            "mlp_norm": norm(L, D),
            "mlp": mlp,
        },
    }
    if not config.rotary:
        rows = config.max_positions + OPT_POSITION_OFFSET
        params["embed"]["positions"] = {"embedding": array(rows, D)}
    if config.embed_width:
        params["project_in"] = {"kernel": array(E, D)}
        params["project_out"] = {"kernel": array(D, E)}
    if config.final_norm:
        params["final_norm"] = norm(D)
    if not config.tied:
        params["head"] = {"embedding": array(config.vocab_size, E)}
    return params


def init(config: Config, key: PRNGKey) -> Params:
    """Returns random params: N(0, 0.02²) for matrices, 1 for scales, 0 for biases."""

    def leaf(path: tuple[Any, ...], key: PRNGKey, spec: jax.ShapeDtypeStruct) -> Array:
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.full(spec.shape, float(name == "scale"), spec.dtype)
        return _INIT_STD * jax.random.normal(key, spec.shape, spec.dtype)

    spec = shapes(config)
    return jax.tree.map_with_path(leaf, keys.leaf_keys(key, spec), spec)


def layout(config: Config, params: Params, size: int) -> Any:
    """Returns the axis of each param that `size` devices split, a tree like params of int or None.

    Heads and hidden units are shared out: a device has the columns of its own in q, k, v, gate and
    up, and their rows in o and down, so that what a layer exchanges is two sums of its outputs
    (Shoeybi et al. 2019, arXiv 1909.08053). Tables are split by words. Where heads can't be shared
    out evenly a matrix is split along its other axis, which takes more traffic.

    >>> from zofl_jax.models.architectures import named
    >>> config = named("opt-1.3b")
    >>> split = layout(config, shapes(config), 4)["layers"]
    >>> split["attention"]["q"]["kernel"], split["attention"]["o"]["kernel"]
    (2, 1)
    """
    whole = {
        "q": config.num_heads % size == 0,
        "o": config.num_heads % size == 0,
        "k": config.num_kv_heads % size == 0,
        "v": config.num_kv_heads % size == 0,
    }

    def axis(path: Any, leaf: Any) -> int | None:
        *_, module, name = keys.path_name(path).split("/")
        out, into = leaf.ndim - 1, leaf.ndim - 2
        if name == "bias":
            own = module in ("q", "k", "v", "gate", "up") and whole.get(module, True)
            order = [out] if own else []
        elif name == "embedding":
            order = [into, out] if module != "positions" else []
        elif name == "kernel":
            order = [into, out] if module in ("o", "down") else [out, into]
            order = order if whole.get(module, True) else order[::-1]
        else:  # norms, adapters
            order = []
        return next((i for i in order if leaf.shape[i] % size == 0), None)

    return jax.tree_util.tree_map_with_path(axis, params)


def hidden(config: Config, params: Params, tokens: Array, mask: Array) -> Array:
    """Returns the features after the last layer and its norm, [B, T, D] in the compute dtype.

    Args:
      config: the model.
      params: as `shapes` says.
      tokens: int [B, T].
      mask: [B, T], False or 0 at padding, which may stand left or right. Features at padding
        mean nothing.

    Raises:
      ValueError: if T exceeds `config.max_positions`.
    """
    mask = mask.astype(bool)
    x, rotary = embed(config, params, tokens, positions(mask))
    allowed = causal(mask)

    def body(x: Array, weights: Params) -> tuple[Array, None]:
        return blocks.layer(config, weights, x, rotary, allowed)[0], None

    x, _ = lax.scan(body, x, stack(config, params))
    return final_norm(config, params, x)


def last(features: Array, mask: Array) -> Array:
    """Returns the features at each row's last real token, [B, D].

    Args:
      features: [B, T, D].
      mask: [B, T], true somewhere in each row.
    """
    index = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(features, index[:, None, None], axis=1)[:, 0]


def logits(
    config: Config, params: Params, features: Array, candidates: Array | Sequence[int] | None = None
) -> Array:
    """Returns the scores of the next token, float32 [..., V], or [..., C] for C candidates.

    Args:
      config: the model.
      params: as `shapes` says.
      features: [..., D], from `hidden`, at just the positions that are needed.
      candidates: int [C], the only tokens to score; None scores the whole vocabulary.
    """
    if config.embed_width:
        features = blocks.dense(config, features, params["project_out"])
    table = params["embed"]["tokens"] if config.tied else params["head"]
    rows = None if candidates is None else jnp.asarray(candidates)
    return blocks.scores(config, features, table, rows)


def apply(config: Config, params: Params, tokens: Array, mask: Array) -> Array:
    """Returns the scores of the next token at every position, float32 [B, T, V]."""
    return logits(config, params, hidden(config, params, tokens, mask))


def embed(
    config: Config, params: Params, tokens: Array, positions: Array
) -> tuple[Array, blocks.Rotary | None]:
    """Returns the first layer's input, [B, T, D], and the rotations of its positions, if any.

    Raises:
      ValueError: if T exceeds `config.max_positions`.
    """
    check_length(config, tokens.shape[1])
    x = blocks.lookup(config, tokens, params["embed"]["tokens"])
    if config.embed_width:
        x = blocks.dense(config, x, params["project_in"])
    if config.rotary:
        return x, blocks.rotary(config, positions)
    rows = positions + OPT_POSITION_OFFSET
    return x + blocks.lookup(config, rows, params["embed"]["positions"]), None


def stack(config: Config, params: Params) -> Params:
    """Returns the layers as a scan takes them, [L, ...]: with a flag where some don't rotate."""
    if config.rope_layers is None or all(config.rope_layers):
        return params["layers"]
    return params["layers"] | {"rope": jnp.asarray(config.rope_layers)}


def final_norm(config: Config, params: Params, x: Array) -> Array:
    """Returns x after the norm that follows the last layer, where there is one."""
    return blocks.norm(config, x, params["final_norm"]) if config.final_norm else x


def positions(mask: Array) -> Array:
    """Returns how many real tokens stand before each one, int [B, T]."""
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def causal(mask: Array) -> Array:
    """Returns which tokens each may attend to, bool [B, T, T]: real ones, not later than it."""
    return mask[:, None, :] & np.tril(np.ones((mask.shape[1],) * 2, bool))


def check_length(config: Config, length: int) -> None:
    """Raises ValueError if a sequence of `length` tokens passes `config.max_positions`."""
    if length > config.max_positions:
        raise ValueError(
            f"{length} tokens exceed the model's {config.max_positions} positions: truncate them"
        )
