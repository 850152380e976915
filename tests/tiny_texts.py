"""A language model, a tokenizer and texts small enough for every test."""

import numpy as np
import pytest

from zofl_jax.data.text import TextData

tokenizers = pytest.importorskip("tokenizers")

GOOD = ("lovely", "bright", "funny", "warm", "clever")
BAD = ("dull", "bleak", "stale", "cold", "clumsy")
THINGS = ("film", "story", "ending", "cast", "score", "scene")


def sentences(count, seed=0):
    """Returns rows {"text", "label"} whose adjective tells the label."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = int(random.integers(2))
        words = (GOOD if label else BAD)[random.integers(5)], THINGS[random.integers(6)]
        more = " and so on" * int(random.integers(4))
        rows.append({"text": f"A {words[0]} {words[1]}{more}.", "label": label})
    return rows


def data(train=64, test=24):
    return TextData(sentences(train), sentences(test, 1), "sentences")


def tokenizer(vocabulary=400, texts=()):
    """Returns a byte-level BPE in which a word of the texts, and of more of them, is one token."""
    from zofl_jax.models.tokenizers import Tokenizer

    words = " ".join([*GOOD, *BAD, *THINGS, "bad good It was terrible great Yes No Maybe"])
    alone = ["Yes", "No", "Maybe"] * 8
    made = [row["text"] + " It was bad good" for row in sentences(50)] + [words] * 8 + alone
    backend = byte_level_bpe(
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        [*made, *texts],
        ["<s>", "</s>"],
        vocabulary=vocabulary,
    )
    return Tokenizer(backend, bos_id=0, eos_id=1, pad_id=1, prefix=(0,))


def byte_level_bpe(words, corpus, special, normalizer=None, vocabulary=420, **options):
    """Returns a byte-level BPE of the `tokenizers` library, trained on `corpus`.

    Args:
      words: the pre-tokenizer, which cuts a text.
      corpus: texts.
      special: special tokens, the first ids.
      normalizer: what is done to a text first.
      vocabulary: how many tokens there are.
      options: of the model.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    backend.pre_tokenizer = words
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def sentencepiece(scheme):
    """Returns a tokenizer in the style of Llama 2's, with words of the texts.

    Args:
      scheme: how the space before a text is made: "prepend", a normaliser, as in Llama 2's
        file, or Metaspace's "first", "always", "never".
    """
    from zofl_jax.models.tokenizers import Tokenizer

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = []
    alone = ["Yes", "No", "good", "bad", "film", "It", "was", "a"]
    for word in [f"▁{word}" for word in alone] + alone + ["▁▁"]:
        for i, character in enumerate(word):
            vocabulary.setdefault(character, len(vocabulary))
            if i and word[: i + 1] not in vocabulary:
                vocabulary[word[: i + 1]] = len(vocabulary)
                merges.append((word[:i], character))
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    decode = tokenizers.decoders
    steps = [decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse()]
    if scheme == "prepend":
        normalise = tokenizers.normalizers
        backend.normalizer = normalise.Sequence(
            [normalise.Prepend("▁"), normalise.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme=scheme, split=False
        )
    if scheme != "never":
        steps.append(decode.Strip(content=" ", left=1))
    backend.decoder = decode.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, bos_id=1, eos_id=2, pad_id=2, prefix=(1,))


def model(seed=0, **changes):
    """Returns (config, params, tokenizer) of a Llama of two layers with random weights."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from zofl_jax.models import transformer
    from zofl_jax.models.architectures import Config

    words = tokenizer()
    config = Config(
        family="llama",
        vocab_size=words.vocab_size,
        width=16,
        mlp_width=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=512,
        bos_id=0,
        eos_ids=(1,),
        pad_id=1,
    )
    config = dataclasses.replace(config, **changes)
    random = np.random.default_rng(seed)

    def leaf(spec):
        if len(spec.shape) == 1:
            return jnp.ones(spec.shape, spec.dtype)
        values = random.normal(size=spec.shape) / np.sqrt(spec.shape[-2])
        return jnp.asarray(values, spec.dtype)

    params = jax.tree.map(leaf, transformer.shapes(config))
    return config, params, words


def save(folder, **changes):
    """Writes the model as a Hugging Face folder and returns the flag for it."""
    from zofl_jax.models import weights

    weights.save_hf(str(folder), *model(**changes))
    return f"--model=hf:{folder}"
