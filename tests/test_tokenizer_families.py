"""Each family from a folder, a GGUF file and an export, beside transformers.

Ids of texts, logits, and what is written greedily are the same.
"""

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

from zofl_jax.models import generation, transformer, weights  # noqa: E402
from zofl_jax.models import tokenizers as tokenizers_  # noqa: E402
from zofl_jax.tasks import encoding, language, prompts  # noqa: E402

apply = jax.jit(transformer.apply, static_argnums=0)
EMBEDDINGS = 512  # for every vocabulary, so that families of one architecture share a program
SPECIAL = ["<pad>", "<s>", "</s>", "<|end|>"]
CORPUS = [
    "The film isn't good, it's GREAT: we'll see it 12345 times (at least).\n",
    "Ein schöner Film über Straßen und 1001 Nächte; привет, 你好，世界。\n\n",
    "good bad film was It was bad good 2024  1 2 3\n\nIt was good.\nYes\nNo\n",
] * 8
PIECES = (
    *("good", "bad", "film", "It was", "2024", "1", "22", "it's", "WE'LL", ".", "?!", "(#", "½"),
    *("🙂", "🎬🎬", "cafe\u0301", "ÄÖ", "你好", "привет", "\n", "\n\n", "\r\n", "\t", "   "),
)
WRITTEN = 12  # tokens behind a prompt
OPENINGS = (
    *("It was", "A good film\nGood?\n", " 2024 1 22 12345", "\U0001f642 good \U0001f3ac", "bad "),
    *("\n\n good  ", "Yes\r\n\tNo", "\u043f\u0440\u0438\u0432\u0435\u0442 \u00bd"),
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
    ends: tuple[int, ...] = (2,)  # of a text; the first alone stands in config.json
    pad: int | None = None
    likely: float = 4.5  # how far the ends' rows of the head are stretched, so that some texts end


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
QWEN2 = Family("qwen2", QWEN, (), ("qwen2", "qwen2"), NFC, ends=(2, 0), pad=0, likely=2.5)
FAMILIES = {
    "OPT": Family("opt", GPT2, (2,), without_json="GPT2Tokenizer", pad=1, likely=1.3),
    "Llama 2": Family("llama-biases", None, (1,), pad=0),
    "Llama 3": Family(
        "llama-biases", LLAMA3, (1,), ("llama", "llama-bpe"), whole_words=True, ends=(2, 3)
    ),
    "Qwen 2": QWEN2,
    "Qwen 3": QWEN2._replace(
        model="qwen3", gguf=("qwen3", "qwen2"), without_json="Qwen2Tokenizer", likely=2.4
    ),
    "SmolLM": Family("llama-biases", SMOLLM, (), ("llama", "smollm"), pad=2),
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
    pad = backend.id_to_token(2 if family.pad is None else family.pad)
    settings = {"bos_token": first, "eos_token": "</s>", "pad_token": pad}
    if family.without_json:
        backend.model.save(str(folder))
        settings |= {"tokenizer_class": family.without_json, "add_bos_token": bool(family.prefix)}
        settings["additional_special_tokens"] = SPECIAL[3:]
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
    if len(family.ends) > 1:
        found["eot_token_id"] = family.ends[1]
    if family.pad is not None:
        found["padding_token_id"] = family.pad
    if family.gguf[1] != "llama-bpe":
        found["add_bos_token"] = False
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


class Loaded(NamedTuple):
    """A model of a family, from each of its files."""

    family: Family
    config: Any
    params: Any
    configs: dict[str, Any]  # by what they were read from
    ours: dict[str, tokenizers_.Tokenizer]  # likewise
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
    ids = {"bos_token_id": (family.prefix or (None,))[0], "pad_token_id": family.pad}
    model = tiny.random_model(family.model, **changes, **ids)
    with tiny.torch.no_grad():
        model.get_output_embeddings().weight[list(family.ends)] *= family.likely
    model.generation_config.eos_token_id = list(family.ends)
    model.save_pretrained(folder)
    backend = backend_of(family)
    write_tokenizer(family, backend, folder)
    config, params, tokenizer = weights.load(f"hf:{folder}")
    ours, configs = {"folder": tokenizer}, {"folder": config}
    if family.gguf:
        path, metadata = str(folder / "x.gguf"), vocabulary(family, backend)
        test_weights_gguf.write_gguf(path, family.gguf[0], model, metadata=metadata)
        configs["gguf"], same, ours["gguf"] = weights.load(f"gguf:{path}")
        jax.tree.map(np.testing.assert_array_equal, same, params)
    weights.save_hf(str(folder / "export"), config, params, ours.get("gguf", tokenizer))
    configs["export"], same, ours["export"] = weights.load(f"hf:{folder / 'export'}")
    jax.tree.map(np.testing.assert_array_equal, same, params)
    auto = tiny.transformers.AutoTokenizer
    theirs = {
        "folder": auto.from_pretrained(folder),
        "export": auto.from_pretrained(folder / "export"),
    }
    return Loaded(family, config, params, configs, ours, theirs, folder)


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
    last = apply(loaded.config, loaded.params, tokens, mask)
    for place, theirs in loaded.theirs.items():
        folder = loaded.folder / ("export" if place == "export" else "")
        model = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        batch = theirs(shown, padding=True, padding_side="left")
        logits = tiny.scores(model, batch["input_ids"], batch["attention_mask"])
        np.testing.assert_allclose(np.asarray(last)[:, -1], logits[:, -1], atol=1e-4)


def ended(row, ends):
    """Returns what was written up to its end, and with it."""
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row)) + 1]


def test_what_is_written(loaded):
    """Greedily, in a batch and alone; some texts end, at ends that generation_config.json names."""
    family, tokenizer = loaded.family, loaded.theirs["folder"]
    batch = tokenizer(list(OPENINGS), padding=True, padding_side="left", return_tensors="pt")
    length = batch["input_ids"].shape[1]
    greedy = {"do_sample": False, "max_new_tokens": WRITTEN}
    by_place = []
    for folder in (loaded.folder / "export", loaded.folder):
        model = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        whole = model.generate(**batch, **greedy).numpy()
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        by_place.append([ended(row, ends) for row in whole[:, length:].tolist()])
    again, expected = by_place
    assert again == expected
    assert {row[-1] for row in expected if len(row) < WRITTEN} == set(family.ends)
    for text, row in zip(OPENINGS, expected, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        written = model.generate(**alone, **greedy)[0, alone["input_ids"].shape[1] :].tolist()
        assert ended(written, ends) == row, text

    # The scores that each was written from, and that no other token is nearly as likely.
    read = np.pad(batch["attention_mask"].numpy(), [(0, 0), (0, WRITTEN)], constant_values=1)
    read = read[:, : whole.shape[1]].astype(bool)
    scores = tiny.scores(model, whole, read)
    steps = np.arange(whole.shape[1] - length) < np.array([[len(row)] for row in expected])
    best = np.sort(scores[:, length - 1 : -1][steps])
    assert (best[:, -1] - best[:, -2]).min() > 2e-3
    ours = apply(loaded.config, loaded.params, whole, read)
    np.testing.assert_allclose(ours[read], scores[read], atol=1e-4)

    said = [tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    for read_from, config in loaded.configs.items():
        ids = [encoding.prompt_ids(loaded.ours[read_from], text) for text in OPENINGS]
        encoded = encoding.pad_left(ids, 64, loaded.ours[read_from].pad_id)
        mask = np.arange(length) >= length - encoded.length[:, None]
        np.testing.assert_array_equal(mask, read[:, :length])
        for rows in (slice(None), slice(1)):
            given = (encoded.tokens[rows], mask[rows], WRITTEN)
            found = generation.generate(config, loaded.params, *given, eos=config.eos_ids)
            found = [ended(row, config.eos_ids) for row in found.tolist()]
            assert found == expected[rows], read_from
            assert [loaded.ours[read_from].decode(row) for row in found] == said[rows]
