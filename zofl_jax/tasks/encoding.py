"""From texts to arrays of token ids in a few shapes.

Prompts are padded on the left, so that every prompt ends in the last column, and cut on the
left where they are too long. `in_buckets` evaluates a function on the shortest of a few
lengths that holds all prompts of a batch: shapes stay few, and padding costs little.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax.core import Array
from zofl_jax.models.tokenizers import Tokenizer

NUM_BUCKETS = 3
_MULTIPLE = 8  # bucket lengths are multiples of it


class Encoded(NamedTuple):
    """Token ids of n texts, padded to the longest."""

    tokens: np.ndarray  # int32 [n, T]
    length: np.ndarray  # int32 [n], how many of them are real
    num_truncated: int  # texts that lost tokens


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text that starts a sequence and goes on: see `Tokenizer.prefix`."""
    return tokenizer.encode(text)


def continued(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[list[int], list[int]]:
    r"""Returns the ids of a prompt, and those of a text as it stands behind the prompt.

    A tokenizer in the style of SentencePiece puts a space before a text, so that "Yes" alone
    becomes "▁Yes", which is another token than "Yes" after a line break. So both are encoded
    together, and the prompt alone, as a model reads it that writes what follows. Where
    whitespace at its end is cut in another way once a word follows (GPT-2's "\n\n"), the text
    begins where the same characters have been read.

    Raises:
      ValueError: if one token holds the end of the prompt and the beginning of the text.
    """
    before, whole = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + text)
    pairs = enumerate(itertools.zip_longest(before, whole))
    same = next((i for i, (ours, theirs) in pairs if ours != theirs), len(before))
    if same == len(before):
        return before, whole[same:]
    first = max(same - 1, 0)  # decoders leave out a space before the first token alone
    end = tokenizer.decode(before[first:], special=True)
    for begin in range(same, len(whole) + 1):
        read = tokenizer.decode(whole[first:begin], special=True)
        if read == end:
            return before, whole[begin:]
        if len(read) > len(end):
            break
    raise ValueError(
        f"the tokenizer joins the end of the prompt, {prompt[-20:]!r}, with {text!r} into one "
        "token: let the template end in a word or a mark, not in a space"
    )


def single_tokens(tokenizer: Tokenizer, answers: Sequence[str], prompt: str = "\n") -> np.ndarray:
    """Returns the ids of answers that are one token each behind a prompt, int32 [C].

    Raises:
      ValueError: for an answer of several tokens (they are listed), or two with the same token,
        or as `continued`.
    """
    found: dict[int, str] = {}
    for answer in answers:
        _, ids = continued(tokenizer, prompt, answer)
        if len(ids) != 1:
            pieces = ", ".join(repr(tokenizer.decode([i], special=True)) for i in ids)
            raise ValueError(
                f"the verbalizer {answer!r} is not one token but {len(ids)} ({pieces}): choose "
                "another word"
            )
        if ids[0] in found:
            raise ValueError(
                f"the verbalizers {found[ids[0]]!r} and {answer!r} are the same token: choose "
                "different words"
            )
        found[ids[0]] = answer
    return np.array(list(found), np.int32)


def pad_left(ids: Sequence[Sequence[int]], limit: int, pad_id: int, kept: int = 0) -> Encoded:
    """Returns ids padded on the left to the longest; those over `limit` lose their beginning.

    Args:
      ids: of each text.
      limit: the longest allowed.
      pad_id: the filling.
      kept: tokens that stay at the front where a text is cut: see `Tokenizer.prefix`.

    >>> pad_left([[1, 5], [1, 6, 7, 8]], limit=3, pad_id=0, kept=1).tokens.tolist()
    [[0, 1, 5], [1, 7, 8]]

    Raises:
      ValueError: if there are no texts or one is empty, or for a limit that leaves no text.
    """
    if limit < kept + 1:
        raise ValueError(f"the longest prompt must have at least {kept + 1} tokens, got {limit}")
    _check(ids)
    cut = [[*x[:kept], *x[len(x) - limit + kept :]] if len(x) > limit else x for x in ids]
    length = np.array([len(x) for x in cut], np.int32)
    tokens = np.full((len(cut), np.max(length)), pad_id, np.int32)
    for row, x in zip(tokens, cut, strict=True):
        row[len(row) - len(x) :] = x
    return Encoded(tokens, length, sum(len(x) > limit for x in ids))


def pad_right(ids: Sequence[Sequence[int]], limit: int, pad_id: int) -> Encoded:
    """Returns ids padded on the right to the longest; those over `limit` lose their end.

    Raises:
      ValueError: if there are no texts or one is empty.
    """
    _check(ids)
    length = np.minimum([len(x) for x in ids], limit).astype(np.int32)
    tokens = np.full((len(ids), np.max(length)), pad_id, np.int32)
    for row, x, n in zip(tokens, ids, length, strict=True):
        row[:n] = x[:n]
    return Encoded(tokens, length, sum(len(x) > limit for x in ids))


def buckets(lengths: np.ndarray, longest: int) -> tuple[int, ...]:
    """Returns up to `NUM_BUCKETS` increasing lengths, the last one `longest`.

    They are spread between the median and the longest: a batch is as long as its longest text.

    Args:
      lengths: int [n], of the texts.
      longest: columns of the padded array, at least the largest of them.

    >>> buckets(np.array([20, 24, 28, 64]), 64)
    (40, 56, 64)
    """
    shortest = min(int(np.median(lengths)), longest)
    steps = np.linspace(shortest, longest, NUM_BUCKETS + 1)[1:]
    rounded = {min(-(-int(step) // _MULTIPLE) * _MULTIPLE, longest) for step in steps}
    return tuple(sorted(rounded | {longest}))


def in_buckets(
    fn: Callable[[Array, Array], Any], tokens: Array, length: Array, sizes: Sequence[int]
) -> Any:
    """Returns fn(tokens [B, L], mask [B, L]) at the shortest L of `sizes` that loses nothing.

    The result must not depend on L: that is what the mask is for. Under a `vmap` one L is
    chosen for all elements, so that one branch runs and not all of them.

    Args:
      fn: any traceable function.
      tokens: int32 [B, T], padded on the left.
      length: int32 [B].
      sizes: from `buckets`, the last one T.
    """

    def branch(size: int) -> Callable[[Array, Array], Any]:
        def evaluate(tokens: Array, length: Array) -> Any:
            mask = jnp.arange(size) >= size - length[:, None]
            return fn(tokens[:, tokens.shape[1] - size :], mask)

        return evaluate

    if len(sizes) == 1:
        return branch(sizes[0])(tokens, length)
    longest = _largest(jnp.max(length))
    index = jnp.sum(longest > np.array(sizes[:-1]))
    return jax.lax.switch(index, [branch(size) for size in sizes], tokens, length)


@jax.custom_batching.custom_vmap
def _largest(x: Array) -> Array:
    """Returns x; under a vmap, the largest of all elements' x, for all of them."""
    return x


@_largest.def_vmap
def _largest_of_all(axis_size: int, in_batched: list[bool], x: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _largest(jnp.max(x, axis=0)), False


def _check(ids: Sequence[Sequence[int]]) -> None:
    if not ids:
        raise ValueError("there are no texts to encode: the split is empty")
    for i, x in enumerate(ids):
        if not len(x):
            raise ValueError(f"text {i} has no tokens: remove it from the data")
