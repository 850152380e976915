"""Greedy and sampled decoding with a cache of keys and values, in one compiled loop."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zofl_jax.core import Array, Params, PRNGKey
from zofl_jax.models import blocks, transformer
from zofl_jax.models.architectures import Config


def generate(
    config: Config,
    params: Params,
    tokens: Array,
    mask: Array,
    max_new_tokens: int,
    key: PRNGKey | None = None,
    temperature: float = 0.0,
    eos: int | Sequence[int] | None = None,
) -> Array:
    """Returns the continuation of each prompt, int32 [B, max_new_tokens].

    Temperature 0 takes the likeliest token, otherwise tokens are drawn from
    softmax(logits / temperature). Jitted; compiled once for each prompt shape.

    Args:
      config: the model.
      params: as `shapes` says.
      tokens: int [B, T], the prompts, padded left or right.
      mask: bool [B, T], False at padding.
      max_new_tokens: how many tokens to write, >= 1.
      key: needed when temperature > 0.
      temperature: >= 0.
      eos: tokens after which a row holds `config.pad_id` (the eos itself where that is None).

    Raises:
      ValueError: for a number out of range, a missing key, or a continuation that would pass
        `config.max_positions`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature {temperature} draws tokens: pass a key")
    transformer.check_length(config, tokens.shape[1] + max_new_tokens)
    eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    if key is None:
        key = jax.random.key(0)  # unused
    return _generate(
        config, params, tokens, mask.astype(bool), key, max_new_tokens, float(temperature), eos_ids
    )


class _Decoding(NamedTuple):
    step: Array  # int []: tokens written
    written: Array  # int [B, max_new_tokens]
    done: Array  # bool [B]
    keys: Array  # [L, B, S, kv_heads, head_dim]
    values: Array


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "temperature", "eos_ids"))
def _generate(
    config: Config,
    params: Params,
    tokens: Array,
    mask: Array,
    key: PRNGKey,
    max_new_tokens: int,
    temperature: float,
    eos_ids: tuple[int, ...],
) -> Array:
    batch, length = tokens.shape
    stack = transformer.stack(config, params)
    pad = config.pad_id if config.pad_id is not None else next(iter(eos_ids), 0)

    def choose(features: Array, step: Array, done: Array) -> tuple[Array, Array]:
        scores = transformer.logits(
            config, params, transformer.final_norm(config, params, features)
        )
        if temperature > 0:
            drawn = jax.random.categorical(jax.random.fold_in(key, step), scores / temperature)
        else:
            drawn = jnp.argmax(scores, axis=-1)
        token = jnp.where(done, pad, drawn).astype(jnp.int32)
        return token, done | jnp.isin(token, np.asarray(eos_ids, np.int32))

    x, rotary = transformer.embed(config, params, tokens, transformer.positions(mask))
    allowed = transformer.causal(mask)

    def prefill(x: Array, weights: Params) -> tuple[Array, tuple[Array, Array]]:
        return blocks.layer(config, weights, x, rotary, allowed)

    x, past = lax.scan(prefill, x, stack)
    room = [(0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0)]
    cached_keys, cached_values = (jnp.pad(p, room) for p in past)
    token, done = choose(transformer.last(x, mask), jnp.int32(0), jnp.zeros(batch, bool))
    written = jnp.full((batch, max_new_tokens), pad, jnp.int32).at[:, 0].set(token)

    def unfinished(state: _Decoding) -> Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    def advance(state: _Decoding) -> _Decoding:
        slot = length + state.step - 1
        previous = lax.dynamic_slice_in_dim(state.written, state.step - 1, 1, axis=1)
        positions = mask.sum(axis=1, keepdims=True) + state.step - 1
        x, rotary = transformer.embed(config, params, previous, positions)
        slots = jnp.arange(length + max_new_tokens)
        prompt = jnp.pad(mask, [(0, 0), (0, max_new_tokens)])
        seen = (prompt | ((slots >= length) & (slots <= slot)))[:, None, :]

        def one(x: Array, layer: Any) -> tuple[Array, tuple[Array, Array]]:
            weights, keys, values = layer
            past = blocks.Past(keys, values, slot)
            return blocks.layer(config, weights, x, rotary, seen, past)

        x, new = lax.scan(one, x, (stack, state.keys, state.values))
        token, done = choose(x[:, 0], state.step, state.done)
        return _Decoding(
            state.step + 1,
            lax.dynamic_update_slice_in_dim(state.written, token[:, None], state.step, axis=1),
            done,
            lax.dynamic_update_slice_in_dim(state.keys, new[0], slot, axis=2),
            lax.dynamic_update_slice_in_dim(state.values, new[1], slot, axis=2),
        )

    start = _Decoding(jnp.int32(1), written, done, cached_keys, cached_values)
    return lax.while_loop(unfinished, advance, start).written
