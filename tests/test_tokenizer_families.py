"""Ids and logits of each family from a folder, a GGUF file and an export: those of transformers."""

import json
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("torch")
pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")
import test_weights_gguf  # noqa: E402
import tiny_language_models as tiny  # noqa: E402
import tiny_texts  # noqa: E402
from tokenizers import (  # noqa: E402
    normalizers,
    pre_tokenizers,
    processors,
)

from zofl_jax.models import tokenizers as tokenizers_  # noqa: E402
from zofl_jax.models import transformer, weights  # noqa: E402
from zofl_jax.tasks import encoding, language, prompts  # noqa: E402

EMBEDDINGS = 512  # for every vocabulary, so that families of one architecture share a program
SPECIAL = ["<pad>", "<s>", "</s>"]
CORPUS = [
    "The film isn't good, it's GREAT: we'll see it 12345 times (at least).\n",
    "Ein schöner Film über Straßen und 1001 Nächte; привет, 你好，世界。\n\n",
    "good bad film was It was bad good 2024  1 2 3\n\nIt was good.\nYes\nNo\n",
] * 8
PIECES = (
    *("good", "bad", "film", "It was", "2024", "1", "22", "it's", "WE'LL", ".", "?!", "(#", "½"),
    *("🙂", "🎬🎬", "cafe\u0301", "ÄÖ", "你好", "привет", "\n", "\n\n", "\r\n", "\t", "   "),
)
SHOTS = [{"text": "A 1st film.", "label": 1}, {"text": " Bad\n", "label": 0}]


def texts(count=200):
    """Returns texts with numbers, emoji, line breaks and space before, in and behind them."""
    random = np.random.default_rng(0)
    space = ("", " ", " ", "  ", "\n")
    made = []
    for _ in range(count):
        words = random.choice(PIECES, random.integers(1, 9))
        made.append("".join(str(random.choice(space)) + str(word) for word in words))
    ends = [text + str(random.choice(("", "", " ", "\n", " \n"))) for text in made]
    return ["", " ", "good</s> film", "<s>good", *ends][:count]


class Family(NamedTuple):
    """What the files of a family say."""

    model: str  # in `tiny_language_models`
    words: Any  # how text is cut before the merges; None for SentencePiece's vocabularies
    prefix: tuple[int, ...]  # what stands before a text
    gguf: tuple[str, str] | None = None  # architecture, pre-tokenizer
    normalizer: Any = None
    whole_words: bool = False
    without_json: str = ""  # the class, where there are vocab.json and merges.txt alone


def split(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(library.Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# As in the tokenizer.json of Llama 3; that of Qwen cuts numbers into digits.
REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN = split(REGEX), split(REGEX.replace("{1,3}", ""))
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
NFC = normalizers.NFC()
FAMILIES = {
    "OPT": Family("opt", GPT2, (2,), without_json="GPT2Tokenizer"),
    "Llama 2": Family("llama-biases", None, (1,)),
    "Llama 3": Family("llama-biases", LLAMA3, (1,), ("llama", "llama-bpe"), whole_words=True),
    "Qwen 2": Family("qwen2", QWEN, (), ("qwen2", "qwen2"), NFC),
    "Qwen 3": Family("qwen3", QWEN, (), ("qwen3", "qwen2"), NFC, without_json="Qwen2Tokenizer"),
    "SmolLM": Family("llama-biases", SMOLLM, (), ("llama", "smollm")),
}


def backend_of(family):
    """Returns a tokenizer trained on CORPUS, with the rules of a family."""
    if family.words is None:
        backend = tiny_texts.sentencepiece("prepend").backend
    else:
        backend = tiny_texts.byte_level_bpe(
            family.words, CORPUS, SPECIAL, family.normalizer, ignore_merges=family.whole_words
        )
    names = [backend.id_to_token(i) for i in family.prefix]
    backend.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(zip(names, family.prefix, strict=True))
    )
    return backend


def write_tokenizer(family, backend, folder):
    first = "</s>" if family.prefix == (2,) else "<s>"
    settings = {"bos_token": first, "eos_token": "</s>", "pad_token": "</s>"}
    if family.without_json:
        backend.model.save(str(folder))
        settings |= {"tokenizer_class": family.without_json, "add_bos_token": bool(family.prefix)}
    else:
        backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def vocabulary(family, backend):
    """Returns the metadata of a GGUF file."""
    fields = json.loads(backend.to_str())["model"]
    tokens = sorted(fields["vocab"], key=fields["vocab"].get)
    found = {
        "model": "gpt2",
        "pre": family.gguf[1],
        "tokens": tokens,
        "token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in fields["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family.gguf[1] != "llama-bpe":
        found["add_bos_token"] = False
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


class Loaded(NamedTuple):
    """A model of a family, from each of its files."""

    config: Any
    params: Any
    ours: dict[str, tokenizers_.Tokenizer]  # by what they were read from
    theirs: dict[str, Any]  # transformers', of the folder and of the export
    folder: Any


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("family")
    changes = {"vocab_size": EMBEDDINGS, "num_hidden_layers": 2}
    if family.model != "opt":
        changes |= {"intermediate_size": 64, "rms_norm_eps": 1e-5}
    if family.model == "qwen3":
        changes |= {"head_dim": 8}
    model = tiny.random_model(family.model, **changes)
    model.save_pretrained(folder)
    backend = backend_of(family)
    write_tokenizer(family, backend, folder)
    config, params, tokenizer = weights.load(f"hf:{folder}")
    ours = {"folder": tokenizer}
    if family.gguf:
        path, metadata = str(folder / "x.gguf"), vocabulary(family, backend)
        test_weights_gguf.write_gguf(path, family.gguf[0], model, metadata=metadata)
        _, same, ours["gguf"] = weights.load(f"gguf:{path}")
        jax.tree.map(np.testing.assert_array_equal, same, params)
    weights.save_hf(str(folder / "export"), config, params, ours.get("gguf", tokenizer))
    ours["export"] = weights.load(f"hf:{folder / 'export'}")[2]
    auto = tiny.transformers.AutoTokenizer
    theirs = {
        "folder": auto.from_pretrained(folder),
        "export": auto.from_pretrained(folder / "export"),
    }
    return Loaded(config, params, ours, theirs, folder)


def test_prompts(loaded):
    for text in texts():
        expected = loaded.theirs["folder"](text)["input_ids"]
        assert loaded.theirs["export"](text)["input_ids"] == expected, text
        for read_from, tokenizer in loaded.ours.items():
            assert encoding.prompt_ids(tokenizer, text) == expected, (read_from, text)


@pytest.mark.parametrize("template", ["{text} It was", "{text}\nGood?\n", "{text}\n\nAnswer:"])
def test_answers_behind_their_prompts(template, loaded):
    """A prompt after two others with their answers, its verbalizers, and a written answer."""
    prompt = prompts.Prompt(template, ("bad", "good"), "label")
    theirs = loaded.theirs["folder"]
    for text in texts(40):
        whole = prompts.in_context(prompt, {"text": text}, SHOTS)
        answers = [prompts.continuation(whole, answer) for answer in prompt.answers]
        before = theirs(whole)["input_ids"]
        expected = [theirs(whole + answer)["input_ids"][len(before) :] for answer in answers]
        written = f"{answers[1]}, 12.\n"
        long = theirs(whole + written)["input_ids"][len(before) :]
        for tokenizer in loaded.ours.values():
            assert encoding.continued(tokenizer, whole, written) == (before, long)
            found = encoding.single_tokens(tokenizer, answers, whole)
            assert [[i] for i in found.tolist()] == expected


def test_written_answers_as_text(loaded):
    """A model's tokens up to its line break, and what it may write behind."""
    for tokenizer in loaded.ours.values():
        model = language.LanguageModel(loaded.config, tokenizer, {}, {})
        stops = frozenset(language.stop_ids(model))
        for text in texts(60)[4:]:  # of those before, some write the end of a text
            answer = " ".join(f"good {text}".split())
            _, ids = encoding.continued(tokenizer, "It was", f" {answer}\n")
            said = loaded.theirs["folder"].decode(ids, skip_special_tokens=True).strip()
            more = encoding.prompt_ids(tokenizer, " film\n")
            assert language.answer_text(tokenizer, [*ids, *more], stops) == said


def test_logits(loaded):
    """Of prompts padded to one length, here and there, before and after the export."""
    shown = [text[:40] for text in texts(60) if text.strip()][:8]
    tokenizer = loaded.ours["folder"]
    ids = [encoding.prompt_ids(tokenizer, text) for text in shown]
    encoded = encoding.pad_left(ids, 64, tokenizer.pad_id)
    tokens = np.pad(encoded.tokens, [(0, 0), (64 - encoded.tokens.shape[1], 0)])
    mask = np.arange(64) >= 64 - encoded.length[:, None]
    last = jax.jit(transformer.apply, static_argnums=0)(loaded.config, loaded.params, tokens, mask)
    for place, theirs in loaded.theirs.items():
        folder = loaded.folder / ("export" if place == "export" else "")
        model = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        batch = theirs(shown, padding=True, padding_side="left")
        logits = tiny.scores(model, batch["input_ids"], batch["attention_mask"])
        np.testing.assert_allclose(np.asarray(last)[:, -1], logits[:, -1], atol=1e-4)
