"""Text to token ids and back: one small interface over the `tokenizers` library.

A tokenizer comes from a Hugging Face folder (`tokenizer.json`, or GPT-2's `vocab.json` and
`merges.txt`, which OPT uses) or from the vocabulary inside a GGUF file.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

try:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
except ImportError as error:
    raise ImportError("language models need tokenizers: pip install zofl-jax[language]") from error

PADDING_ROWS = 1024
"""How many rows an embedding table may have beyond the vocabulary, to round its size up."""

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


class Tokenizer(NamedTuple):
    """A vocabulary with its rules.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      bos_id: the token that starts a text, None if there is none.
      eos_id: the token that ends a text, None if there is none.
      pad_id: what fills a batch; masked wherever it stands.
      prefix: what stands before a text, as the model's files say: BOS, for most. What a file
        puts behind a text (EOS, SEP) is left out, since every text here is gone on with.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int = 0
    prefix: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Returns the ids of a text.

        Args:
          text: any text; special tokens written out in it become their ids.
          special: puts `prefix` first, such as OPT's "</s>". False for a part of a text.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [*self.prefix, *ids] if special else ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Returns the text of ids, without special tokens unless `special`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def with_bos(self, choice: str) -> "Tokenizer":
        """Returns the tokenizer with another choice of when BOS stands before a text.

        Args:
          choice: "auto" as the model's files say, "always" or "never".

        Raises:
          ValueError: for another choice, or "always" where the files name no such token.
        """
        if choice == "auto":
            return self
        if choice not in ("always", "never"):
            raise ValueError(f"bos={choice!r} is not understood: use auto, always or never")
        others = tuple(i for i in self.prefix if i != self.bos_id)
        if choice == "never":
            return self._replace(prefix=others)
        if self.bos_id is None:
            raise ValueError(
                "bos='always' needs a token that starts a text, and the model's files name none: "
                "use auto or never"
            )
        return self._replace(prefix=(self.bos_id, *others))

    def save(self, folder: str) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, as transformers reads them.

        There a text gets the ids that `encode` gives it.
        """
        os.makedirs(folder, exist_ok=True)
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        _put_first(backend, self.prefix)
        backend.save(os.path.join(folder, "tokenizer.json"))
        fields: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        fields |= {k: self.backend.id_to_token(i) for k, i in ids.items() if i is not None}
        with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
            json.dump(fields, file, indent=2)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer isn't one for a model with `vocab_size` embeddings.

    Models may have up to `PADDING_ROWS` embeddings that no token uses.
    """
    size = tokenizer.vocab_size
    if not size <= vocab_size <= size + PADDING_ROWS:
        raise ValueError(
            f"vocabularies differ: the tokenizer has {size} tokens and the model {vocab_size} "
            "embeddings: take both from the same model"
        )


def from_folder(folder: str) -> Tokenizer | None:
    """Returns the tokenizer of a Hugging Face folder, None if the folder has none.

    Raises:
      ValueError: if a special token named in its configuration isn't in the vocabulary.
    """
    settings = _read_json(folder, "special_tokens_map.json")
    settings |= _read_json(folder, "tokenizer_config.json")
    special = {key: _content(settings.get(f"{key}_token")) for key in ("bos", "eos", "pad", "unk")}
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        backend = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        backend.no_truncation()
        backend.no_padding()
    elif os.path.isfile(os.path.join(folder, "merges.txt")):
        backend = _gpt2(folder, settings, special)
    else:
        return None
    ids = {key: backend.token_to_id(token) for key, token in special.items() if token}
    unknown = [special[key] for key, token_id in ids.items() if token_id is None]
    if unknown:
        raise ValueError(f"{folder}: the special token {unknown[0]!r} is not in its vocabulary")
    bos_id, eos_id = ids.get("bos"), ids.get("eos")
    return Tokenizer(backend, bos_id, eos_id, _padding(ids.get("pad"), eos_id), _prefix(backend))


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """Returns the tokenizer described by a GGUF file's metadata, None if there is none.

    Args:
      metadata: the values of the keys "tokenizer.ggml.*".

    Raises:
      ValueError: for a vocabulary that isn't byte-level BPE or a pre-tokenizer that isn't known.
    """
    get = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}.get
    kind = get("model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind != "gpt2":
        raise ValueError(
            f"GGUF vocabulary {kind!r} is not supported: only byte-level BPE (gpt2) is; load the "
            "model's Hugging Face folder instead"
        )
    rules = get("pre", "default")
    if rules not in _PRE_TOKENIZERS:
        raise ValueError(
            f"GGUF pre-tokenizer {rules!r} is not supported: use one of "
            f"{', '.join(_PRE_TOKENIZERS)}, or load the model's Hugging Face folder"
        )
    tokens: list[str] = get("tokens", [])
    pre_tokenizer, normalizer, whole_words, starts_with_bos = _PRE_TOKENIZERS[rules]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in get("merges", [])],
            ignore_merges=whole_words,
        )
    )
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    for token, token_type in zip(tokens, get("token_type", []), strict=False):
        if token_type in (_CONTROL, _USER_DEFINED):
            special = token_type == _CONTROL
            backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    bos_id, eos_id = get("bos_token_id"), get("eos_token_id")
    prefix = () if bos_id is None or not get("add_bos_token", starts_with_bos) else (bos_id,)
    return Tokenizer(backend, bos_id, eos_id, _padding(get("padding_token_id"), eos_id), prefix)


class _PreTokenizer(NamedTuple):
    """How text is cut into words before the merges, by the value of tokenizer.ggml.pre."""

    words: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    whole_words: bool = False  # a word that is a token needs no merges
    starts_with_bos: bool = False  # unless the file says otherwise


def _split_by(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = _PreTokenizer(_split_by(_LLAMA3_WORDS), whole_words=True, starts_with_bos=True)
_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(_BYTE_LEVEL),
    "smollm": _PreTokenizer(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL])
    ),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "smaug-bpe": _LLAMA3._replace(starts_with_bos=False),  # what SmolLM3's files say
    "qwen2": _PreTokenizer(_split_by(_QWEN2_WORDS), normalizers.NFC()),
    "deepseek-r1-qwen": _PreTokenizer(_split_by(_QWEN2_WORDS), normalizers.NFC()),
}


def _gpt2(
    folder: str, settings: Mapping[str, Any], special: Mapping[str, str | None]
) -> tokenizers.Tokenizer:
    """Builds GPT-2's tokenizer; OPT sets add_bos_token, which puts "</s>" first."""
    files = (os.path.join(folder, name) for name in ("vocab.json", "merges.txt"))
    backend = tokenizers.Tokenizer(models.BPE.from_file(*files))
    prefix = settings.get("add_prefix_space", False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token in special.values() if token])
    bos = special["bos"]
    if bos and settings.get("add_bos_token", False):
        _put_first(backend, [backend.get_vocab()[bos]])
    return backend


def _put_first(backend: tokenizers.Tokenizer, ids: Sequence[int]) -> None:
    """Lets the backend put these tokens, and nothing else, around a text."""
    names = [backend.id_to_token(i) for i in ids]
    backend.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"],
        pair=[*names, "$A", *names, "$B"],
        special_tokens=list(dict(zip(names, ids, strict=True)).items()),
    )


def _prefix(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Returns what the backend's post-processor puts before a text."""
    added = set(backend.encode("").ids)
    for text in ("a", *backend.get_vocab()):
        ids = backend.encode(text, add_special_tokens=False).ids
        if ids and added.isdisjoint(ids):
            whole = backend.encode(text).ids
            starts = range(len(whole) - len(ids) + 1)
            return tuple(whole[: next(i for i in starts if whole[i : i + len(ids)] == ids)])
    return ()


def _padding(pad_id: int | None, eos_id: int | None) -> int:
    return next((i for i in (pad_id, eos_id) if i is not None), 0)


def _content(token: Any) -> str | None:
    """A special token is written as text or as {"content": text, ...}."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    with open(path) as file:
        return json.load(file)
