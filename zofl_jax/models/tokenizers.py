"""Text to token ids and back: one small interface over the `tokenizers` library.

A tokenizer comes from a Hugging Face folder (`tokenizer.json`, or `vocab.json` and `merges.txt`
of GPT-2's class, which is OPT's too, or Qwen2's) or from the vocabulary inside a GGUF file.

`tokenizer.json` is taken at its word, as transformers' PreTrainedTokenizerFast takes it. Where
`tokenizer_class` names another, transformers 5 puts that class's rules in place of some of the
file's: LlamaTokenizer drops a space in front of a text, GPT2Tokenizer doesn't cut numbers into
digits.
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

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FIELDS = ("special", "lstrip", "rstrip", "single_word", "normalized")  # of an added token
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


def fitted(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Returns a tokenizer for a model with `vocab_size` embeddings.

    A padding token for which the model has none goes, since what fills a batch is masked.

    Raises:
      ValueError: as `check_vocabulary`.
    """
    if tokenizer.pad_id == vocab_size == tokenizer.vocab_size - 1:
        fields = json.loads(tokenizer.backend.to_str())
        fields["added_tokens"] = [t for t in fields["added_tokens"] if t["id"] != vocab_size]
        backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
        tokenizer = tokenizer._replace(backend=backend, pad_id=_padding(None, tokenizer.eos_id))
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def from_folder(folder: str) -> Tokenizer | None:
    """Returns the tokenizer of a Hugging Face folder, None if the folder has none.

    Raises:
      ValueError: for files of a kind from which no tokenizer can be made here, or that don't
        agree on the id of a token; if BOS or EOS isn't in the vocabulary.
    """
    settings = _read_json(folder, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # as in transformers
        settings |= _read_json(folder, "special_tokens_map.json")
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        backend = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        backend.no_truncation()
        backend.no_padding()
        first = _prefix(backend)
    elif any(os.path.isfile(os.path.join(folder, name)) for name in _VOCABULARIES):
        backend, settings = _from_vocabulary(folder, settings)
        first = None
    else:
        return None
    _add_tokens(backend, folder, settings)
    named = {key: _content(settings.get(f"{key}_token")) for key in ("bos", "eos", "pad")}
    ids = {key: backend.token_to_id(name) for key, name in named.items() if name}
    unknown = [named[key] for key in ("bos", "eos") if named[key] and ids[key] is None]
    if unknown:
        raise ValueError(f"{folder}: the special token {unknown[0]!r} is not in its vocabulary")
    bos_id, eos_id = ids.get("bos"), ids.get("eos")
    if first is None:
        first = () if bos_id is None or not settings.get("add_bos_token") else (bos_id,)
    return Tokenizer(backend, bos_id, eos_id, _padding(ids.get("pad"), eos_id), first)


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


def _split_by(regex: str, space_first: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=space_first, use_regex=False),
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


_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_CLASS_OF_MODEL = {"opt": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
_NAMED_BY_CLASS = {  # what transformers' class calls "<|endoftext|>" where a folder says nothing
    "GPT2Tokenizer": ("bos_token", "eos_token"),
    "Qwen2Tokenizer": ("eos_token", "pad_token"),
}


def _from_vocabulary(
    folder: str, settings: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Returns a tokenizer without its added tokens, made of vocab.json and merges.txt.

    Returns also the settings, with the special tokens that its class has by default.
    """
    model = _read_json(folder, "config.json")
    by_model = _CLASS_OF_MODEL.get(str(model.get("model_type")))
    kind = settings.get("tokenizer_class") or model.get("tokenizer_class") or by_model
    if model.get("model_type") == "qwen2":
        kind = by_model  # as in transformers, whatever the folder says
    kind = kind.removesuffix("Fast") if kind else "of an unnamed class"
    files = [os.path.join(folder, name) for name in ("vocab.json", "merges.txt")]
    if kind not in _NAMED_BY_CLASS or not all(map(os.path.isfile, files)):
        raise ValueError(
            f"{folder} has no tokenizer.json, and its tokenizer, {kind}, can't be made of its "
            f"other files (only {' and '.join(_NAMED_BY_CLASS)} can, of vocab.json and "
            f"merges.txt): write one with transformers, AutoTokenizer.from_pretrained({folder!r})"
            f".save_pretrained({folder!r})"
        )
    backend = tokenizers.Tokenizer(models.BPE.from_file(*files))
    backend.decoder = decoders.ByteLevel()
    space_first = bool(settings.get("add_prefix_space"))
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = _split_by(_QWEN2_WORDS, space_first)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space_first)
    default = "<|endoftext|>"
    added = {token["content"] for token in _added_tokens(folder, settings).values()}
    known = default in added or backend.token_to_id(default) is not None
    return backend, dict.fromkeys(_NAMED_BY_CLASS[kind] if known else (), default) | {**settings}


def _added_tokens(folder: str, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Returns the tokens that a folder has beside its vocabulary, by id."""
    if "added_tokens_decoder" in settings:
        return {int(i): dict(token) for i, token in settings["added_tokens_decoder"].items()}
    special = {token["content"] for token in _special_tokens(settings)}
    return {
        i: {"content": name, "special": name in special, "normalized": name not in special}
        for name, i in _read_json(folder, "added_tokens.json").items()
    }


def _special_tokens(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the special tokens that a folder names."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    named = [settings.get(f"{key}_token") for key in _SPECIAL]
    tokens = [*named, *(more.values() if isinstance(more, dict) else more)]
    fields = [token if isinstance(token, dict) else {"content": token} for token in tokens if token]
    return [{"normalized": False} | token | {"special": True} for token in fields]


def _add_tokens(backend: tokenizers.Tokenizer, folder: str, settings: Mapping[str, Any]) -> None:
    """Adds the tokens that stand beside the vocabulary, and marks special ones that stand in it."""
    for index, fields in sorted(_added_tokens(folder, settings).items()):
        _add(backend, fields)
        by_others = backend.token_to_id(fields["content"])
        if by_others != index:
            raise ValueError(
                f"{folder}: the token {fields['content']!r} has id {index} in added_tokens_decoder "
                f"or added_tokens.json, but {by_others} by the other files: take all files from "
                "the same model"
            )
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for fields in _special_tokens(settings):
        name = fields["content"]
        # A name without an id is in no text.
        if name not in added and backend.token_to_id(name) is not None:
            _add(backend, fields)


def _add(backend: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> None:
    kept = {key: fields[key] for key in _FIELDS if key in fields}
    backend.add_tokens([tokenizers.AddedToken(fields["content"], **kept)])


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
    with open(path, encoding="utf-8") as file:
        return json.load(file)
