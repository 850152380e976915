"""Prompts as arrays: what padding, cutting and bucketing promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_texts

from zofl_jax.tasks import encoding


def test_every_prompt_ends_in_the_last_column_and_keeps_its_first_tokens():
    texts = [[9, 1], [9, 1, 2, 3, 4, 5], [9]]
    encoded = encoding.pad_left(texts, limit=4, pad_id=0, kept=1)
    assert encoded.tokens.tolist() == [[0, 0, 9, 1], [9, 3, 4, 5], [0, 0, 0, 9]]
    assert encoding.pad_left(texts, 4, 0).tokens.tolist()[1] == [2, 3, 4, 5]
    assert encoded.length.tolist() == [2, 4, 1]
    assert encoded.num_truncated == 1


def test_answers_are_cut_at_their_end():
    encoded = encoding.pad_right([[1, 2, 3], [4]], limit=2, pad_id=0)
    assert encoded.tokens.tolist() == [[1, 2], [4, 0]]
    assert encoded.length.tolist() == [2, 1]
    assert encoded.num_truncated == 1


@pytest.mark.parametrize(
    ("ids", "limit", "message"),
    [([], 4, "split is empty"), ([[1], []], 4, "text 1 has no tokens"), ([[1]], 1, "got 1")],
)
def test_padding_refuses(ids, limit, message):
    with pytest.raises(ValueError, match=message):
        encoding.pad_left(ids, limit, 0, kept=1)


def test_a_verbalizer_of_several_tokens_is_refused_with_its_tokens():
    words = tiny_texts.tokenizer()
    assert encoding.single_tokens(words, [" bad", " good"]).shape == (2,)
    with pytest.raises(ValueError, match=r"' xyz' is not one token but \d+ \(.*'z'\)"):
        encoding.single_tokens(words, [" bad", " xyz"])
    with pytest.raises(ValueError, match="same token"):
        encoding.single_tokens(words, [" bad", " bad"])


def pieces(tokenizer, ids):
    return [tokenizer.backend.id_to_token(i) for i in ids]


SENTENCEPIECE = ["prepend", "first", "always", "never"]


@pytest.mark.parametrize("scheme", SENTENCEPIECE)
@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("a film It was", " good", ["▁good"]),
        ("a film?\n", "Yes", ["Yes"]),
        ("a film?\n", " Yes", ["▁Yes"]),
        ("a film It was", " good\n", ["▁good", "<0x0A>"]),
        ("a film?\nYes", "\n", ["<0x0A>"]),
        ("(", "Yes", ["Yes"]),
        ("", " good", {"prepend": ["▁", "▁good"]}),
        ("", "good", {"never": ["good"]}),
    ],
)
def test_a_text_is_encoded_where_it_stands(scheme, prompt, answer, expected):
    """With SentencePiece's vocabularies, a word behind a space and one behind a line break."""
    words = tiny_texts.sentencepiece(scheme)
    if isinstance(expected, dict):
        expected = expected.get(scheme, ["▁good"])
    before, ids = encoding.continued(words, prompt, answer)
    assert before == encoding.prompt_ids(words, prompt)
    assert pieces(words, ids) == expected
    assert before + ids == [1, *words.backend.encode(prompt + answer).ids]


@pytest.mark.parametrize("scheme", SENTENCEPIECE)
def test_verbalizers_stand_behind_a_line_break_or_a_space(scheme):
    words = tiny_texts.sentencepiece(scheme)
    assert pieces(words, encoding.single_tokens(words, ["Yes", "No"]).tolist()) == ["Yes", "No"]
    behind_words = encoding.single_tokens(words, [" good", " bad"]).tolist()
    assert pieces(words, behind_words) == ["▁good", "▁bad"]


def test_whitespace_that_is_cut_in_another_way_before_a_word():
    """GPT-2 reads a line break alone before a word, and "\\n\\n" as one at the end."""
    words = tiny_texts.tokenizer(texts=["\n\nYes\n\n"] * 20)
    before, ids = encoding.continued(words, "film?\n\n", "Yes")
    assert pieces(words, ids) == ["Yes"]
    assert pieces(words, before)[-1] == "ĊĊ"
    assert pieces(words, words.encode("film?\n\nYes"))[-3:] == ["Ċ", "Ċ", "Yes"]


def test_a_prompt_that_is_joined_with_its_answer_is_refused():
    message = "joins the end of the prompt, 'A film It was ', with 'good' into one token"
    for words in (tiny_texts.tokenizer(), tiny_texts.sentencepiece("first")):
        with pytest.raises(ValueError, match=message):
            encoding.continued(words, "A film It was ", "good")


def test_buckets_are_few_increase_and_end_at_the_longest():
    random = np.random.default_rng(0)
    for longest in (5, 8, 33, 64, 500):
        lengths = random.integers(1, longest + 1, 100)
        sizes = encoding.buckets(lengths, longest)
        assert sizes[-1] == longest
        assert list(sizes) == sorted(set(sizes))
        assert len(sizes) <= encoding.NUM_BUCKETS + 1


def cells(tokens, length, sizes):
    """Returns the mean of the real tokens and the width at which it was computed."""

    def fn(tokens, mask):
        return jnp.mean(tokens, axis=1, where=mask), jnp.full(len(tokens), tokens.shape[1])

    return encoding.in_buckets(fn, tokens, length, sizes)


@pytest.mark.parametrize("longest", [1, 3, 4, 5, 8])
def test_the_shortest_bucket_that_loses_nothing_is_taken(longest):
    sizes = (4, 6, 8)
    ids = [[7] * longest, [5]]
    encoded = encoding.pad_left([*ids, [1] * 8], 8, pad_id=99)
    means, width = cells(encoded.tokens[:2], encoded.length[:2], sizes)
    assert means.tolist() == [7, 5]
    assert set(width.tolist()) == {next(size for size in sizes if size >= longest)}


def test_one_bucket_serves_all_clients_of_a_vmap():
    """A batched index would run every branch; the program has one conditional, not a select."""
    tokens = np.arange(3 * 2 * 8, dtype=np.int32).reshape(3, 2, 8)
    length = np.array([[1, 2], [3, 5], [2, 2]])
    batched = jax.vmap(lambda t, n: cells(t, n, (4, 6, 8)))
    means, width = batched(tokens, length)
    expected = [
        [row[-n:].mean() for row, n in zip(*pair, strict=True)]
        for pair in zip(tokens, length, strict=True)
    ]
    np.testing.assert_allclose(means, expected)
    assert np.all(width == 6)
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(batched)(tokens, length).eqns]
    assert "cond" in names
    nested = jax.vmap(jax.vmap(lambda t, n: cells(t, n, (4, 6, 8))[1]))
    assert np.all(nested(tokens[None].repeat(2, 0), length[None].repeat(2, 0)) == 6)


def test_buckets_can_be_differentiated():
    encoded = encoding.pad_left([[1, 2], [1, 2, 3]], 8, 0)

    def loss(x):
        found = encoding.in_buckets(
            lambda tokens, mask: jnp.sum(x * tokens * mask), encoded.tokens, encoded.length, (2, 3)
        )
        return found**2

    assert jax.grad(loss)(2.0) == pytest.approx(2 * 2 * 9 * 9)
    assert jax.jvp(loss, (2.0,), (1.0,))[1] == pytest.approx(2 * 2 * 9 * 9)
    batched = jax.vmap(jax.grad(loss))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(batched, [2 * 81, 4 * 81])
