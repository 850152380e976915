import json

import numpy as np
import pytest

library = pytest.importorskip("tokenizers")
import tiny_texts  # noqa: E402
from tokenizers import models, pre_tokenizers, processors, trainers  # noqa: E402

from zofl_jax.models import tokenizers as tokenizers_  # noqa: E402

CORPUS = [
    "The film isn't good, it's GREAT: we'll see it 12345 times (at least).",
    "Ein schöner Film über Straßen, Äpfel und 1001 Nächte; il était une fois…",
    "def f(x):\n    return x + 1\n\n\n# the end\r\n",
    "привет мир, как дела? 你好，世界。 これは映画です",
    "good good bad bad the the film film was was  1 2 3 42 2024",
] * 4
TEXTS = [
    "The film was good",
    " It was",
    "it's 12345 apples, we'll see; I'D SAY",
    "a  1  22   333 x",
    "line\n\n  next\r\n\tend   ",
    "ÄÖÜ straße café cafe\u0301 über",
    "привет 你好世界 🙂🎬 ½ ²",
    "unknown \u0000 bytes \uffff",
    "",
    "   ",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def train(words):
    """A byte-level BPE whose words are cut as `words` says, trained on CORPUS."""
    return tiny_texts.byte_level_bpe(words, CORPUS, SPECIAL)


def parts(backend):
    """Returns (tokens by id, merges as pairs)."""
    fields = json.loads(backend.to_str())["model"]
    tokens = sorted(fields["vocab"], key=fields["vocab"].get)
    return tokens, [tuple(merge) for merge in fields["merges"]]


def metadata(backend, pre="gpt-2", **changes):
    tokens, merges = parts(backend)
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()}


def byte_level():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def check(tokenizer, reference):
    """reference: text -> ids."""
    for text in TEXTS + CORPUS[:5]:
        assert tokenizer.encode(text, special=False) == reference(text), text
    assert tokenizer.encode("good</s>film", special=False).count(2) == 1


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def without_special(theirs):
    return lambda text: theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("pre", "kind"), [("gpt-2", "GPT2"), ("qwen2", "Qwen2")])
def test_gguf_vocabulary_equals_transformers(pre, kind, transformers):
    backend = train(byte_level())
    tokens, merges = parts(backend)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    theirs = getattr(transformers, f"{kind}Tokenizer")(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, **names
    )
    ours = tokenizers_.from_gguf(metadata(backend, pre))
    check(ours, without_special(theirs))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (420, 1, 2, 2)
    assert ours.encode("film") == ours.encode("film", special=False)


@pytest.mark.parametrize(
    ("pre", "said", "first"),
    [
        # What llama.cpp does where the file says nothing.
        *(("llama-bpe", None, True), ("smaug-bpe", None, False), ("smollm", None, False)),
        *(("qwen2", None, False), ("gpt-2", None, False)),
        *(("llama-bpe", False, False), ("qwen2", True, True), ("smollm", False, False)),
    ],
)
def test_bos_stands_first_where_the_gguf_file_says_so(pre, said, first):
    changes = {} if said is None else {"add_bos_token": said}
    ours = tokenizers_.from_gguf(metadata(train(byte_level()), pre, **changes))
    assert ours.bos_id == 1
    assert ours.encode("good") == [1] * first + ours.encode("good", special=False)


@pytest.mark.parametrize("around", [(), ("<s>",), ("<s>", "</s>"), (None, "</s>"), ("<s>", "<s>")])
@pytest.mark.parametrize("said", [True, False])
def test_bos_stands_first_where_tokenizer_json_says_so(around, said, transformers, tmp_path):
    """`add_bos_token` counts for nothing beside it, and what it puts behind a text is left out."""
    backend = train(byte_level())
    before, after = [[name] * (name is not None) for name in (*around, None, None)[:2]]
    if around:
        special = [(name, SPECIAL.index(name)) for name in {*before, *after}]
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=special
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": said}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = tokenizers_.from_folder(str(tmp_path))
    for text in ("good film", ""):
        assert [*ours.encode(text), *map(SPECIAL.index, after)] == theirs(text)["input_ids"]
    assert ours.encode("film").count(1) == len(before)


@pytest.mark.parametrize(("choice", "first"), [("auto", [2]), ("always", [2, 1]), ("never", [])])
def test_another_choice_of_bos_is_saved(choice, first, transformers, tmp_path):
    backend = train(byte_level())
    ours = tokenizers_.Tokenizer(backend, 2, 1, 1, prefix=(2,) if choice == "auto" else (1,))
    if choice == "never":
        ours = ours._replace(prefix=(2,))
    ours = ours.with_bos(choice)
    assert ours.encode("film") == [*first, *backend.encode("film").ids]
    ours.save(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("film")["input_ids"] == ours.encode("film")
    assert backend.post_processor is None
    assert tokenizers_.from_folder(str(tmp_path))[1:] == ours[1:]


def test_bos_that_no_file_names_cannot_stand_first():
    ours = tokenizers_.Tokenizer(train(byte_level()))
    assert ours.with_bos("never") == ours
    with pytest.raises(ValueError, match="the model's files name none: use auto or never"):
        ours.with_bos("always")
    with pytest.raises(ValueError, match="bos='yes' is not understood: use auto, always or never"):
        ours.with_bos("yes")


def test_gguf_file_of_llama3_equals_transformers(transformers, tmp_path):
    gguf = pytest.importorskip("gguf")
    backend = train(byte_level())
    fields = metadata(backend, "llama-bpe", add_bos_token=True)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for key in ("block_count", "attention.head_count", "embedding_length"):
        writer.add_uint32(f"llama.{key}", 2)
    writer.add_tensor("token_embd.weight", np.zeros((420, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    read = {key: field.contents() for key, field in reader.fields.items() if "tokenizer" in key}
    assert read == fields
    ours = tokenizers_.from_gguf(read)
    check(ours, without_special(theirs))
    assert ours.encode("good film") == theirs("good film")["input_ids"]
    assert ours.encode("good film")[0] == 1


def test_gguf_vocabulary_of_smollm_cuts_digits_one_by_one():
    words = [pre_tokenizers.Digits(individual_digits=True), byte_level()]
    backend = train(pre_tokenizers.Sequence(words))
    ours = tokenizers_.from_gguf(metadata(backend, "smollm"))
    check(ours, lambda text: backend.encode(text).ids)
    plain = tokenizers_.from_gguf(metadata(backend, "gpt-2"))
    assert ours.encode("a  1") != plain.encode("a  1")  # the space belongs to the words


def test_words_that_are_tokens_need_no_merges_in_llama3():
    tokens = [*"abc", "bc", "abc"]
    fields = {"tokens": tokens, "merges": ["b c"], "token_type": [1] * 5}
    fields = {"model": "gpt2", "pre": "llama-bpe", "add_bos_token": False} | fields
    ours = tokenizers_.from_gguf({f"tokenizer.ggml.{k}": v for k, v in fields.items()})
    assert ours.encode("abc") == [4]


def test_user_defined_tokens_stay_whole():
    backend = train(byte_level())
    fields = metadata(backend, "gpt-2")
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "<think>", "<|end|>"]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], 4, 3]
    ours = tokenizers_.from_gguf(fields)
    ids = ours.encode("good<think>film<|end|>")
    assert 420 in ids and ids[-1] == 421
    assert ours.decode(ids) == "good<think>film"
    assert ours.decode(ids, special=True) == "good<think>film<|end|>"
    assert ours.vocab_size == 422


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "GGUF vocabulary 'llama' is not supported: only byte-level BPE"),
        ({"pre": "tekken"}, "GGUF pre-tokenizer 'tekken' is not supported: use one of gpt-2"),
    ],
)
def test_other_gguf_vocabularies_are_refused(changes, message):
    fields = metadata(train(byte_level()), **changes)
    with pytest.raises(ValueError, match=message):
        tokenizers_.from_gguf(fields)


def test_gguf_without_a_vocabulary():
    assert tokenizers_.from_gguf({}) is None


@pytest.fixture
def opt_folder(tmp_path):
    """The files that OPT's repositories hold: GPT-2's, with "</s>" to be put first."""
    backend = train(byte_level())
    backend.model.save(str(tmp_path))
    token = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": True}
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "bos_token": token | {"__type": "AddedToken"},
        "eos_token": token | {"__type": "AddedToken"},
        "unk_token": "</s>",
        "pad_token": "<unk>",
        "errors": "replace",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    return tmp_path


def test_opt_puts_its_end_token_first(opt_folder, transformers):
    ours = tokenizers_.from_folder(str(opt_folder))
    theirs = transformers.AutoTokenizer.from_pretrained(opt_folder)
    check(ours, without_special(theirs))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (2, 2, 0)
    assert ours.encode("good film") == theirs("good film")["input_ids"]
    assert ours.encode("good film") == [2, *ours.encode("good film", special=False)]


def test_saved_tokenizer_is_read_by_transformers_and_again(opt_folder, transformers, tmp_path):
    ours = tokenizers_.from_folder(str(opt_folder))
    ours.save(str(tmp_path / "saved"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    again = tokenizers_.from_folder(str(tmp_path / "saved"))
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"] == again.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 2, 0)
    assert again[1:] == ours[1:]


def test_text_survives(opt_folder):
    ours = tokenizers_.from_folder(str(opt_folder))
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text


def test_truncation_and_padding_of_the_file_are_off(opt_folder, tmp_path):
    ours = tokenizers_.from_folder(str(opt_folder))
    ours.backend.enable_truncation(4)
    ours.backend.enable_padding(length=8)
    ours.save(str(tmp_path / "saved"))
    again = tokenizers_.from_folder(str(tmp_path / "saved"))
    assert len(again.encode(CORPUS[0])) > 8
    assert len(again.encode("good")) < 4


def test_tokens_that_are_named_but_not_in_the_vocabulary(opt_folder):
    """Padding is masked, so it can do without; what starts and ends a text can't."""
    tokenizers_.from_folder(str(opt_folder)).save(str(opt_folder))
    path = opt_folder / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": "</s>", "pad_token": "<nothing>"}))
    ours = tokenizers_.from_folder(str(opt_folder))
    assert (ours.pad_id, ours.vocab_size) == (2, 420)
    assert len(ours.encode("<nothing>")) > 3
    path.write_text(json.dumps({"eos_token": "<nothing>"}))
    with pytest.raises(ValueError, match="the special token '<nothing>' is not in its vocabulary"):
        tokenizers_.from_folder(str(opt_folder))


def test_a_padding_token_without_an_embedding_goes(opt_folder):
    tokenizers_.from_folder(str(opt_folder)).save(str(opt_folder))
    settings = {"eos_token": "</s>", "pad_token": "<pad>"}
    settings["added_tokens_decoder"] = {"420": {"content": "<pad>", "special": True}}
    (opt_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = tokenizers_.from_folder(str(opt_folder))
    assert ours.encode("<pad>")[1:] == [ours.pad_id] == [420]
    assert tokenizers_.fitted(ours, 421) == ours
    fitted = tokenizers_.fitted(ours, 420)
    assert (fitted.pad_id, fitted.vocab_size) == (2, 420)
    assert fitted.encode("good</s>")[-1] == 2 and max(fitted.encode("<pad>")) < 420
    with pytest.raises(ValueError, match="has 421 tokens and the model 419 embeddings"):
        tokenizers_.fitted(ours, 419)


CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary_folder(folder, kind, model_type, **settings):
    """Writes vocab.json and merges.txt, with a class's settings, and returns the size."""
    backend = library.Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([*CORPUS, "# # 1234 ## 12 23"] * 2, trainer)
    backend.model.save(str(folder))
    if kind:
        settings["tokenizer_class"] = kind
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return backend.get_vocab_size()


def decoder_of(size, tokens, **fields):
    fields = {"special": True, "normalized": False, "lstrip": False, "rstrip": False} | fields
    return {str(size + i): {"content": token} | fields for i, token in enumerate(tokens)}


@pytest.mark.parametrize(
    ("kind", "model_type", "settings", "ids"),
    [
        ("Qwen2Tokenizer", "qwen2", {"bos_token": None, "eos_token": CHAT[2]}, (None, 2, 0)),
        ("GPT2Tokenizer", "qwen2", {"add_prefix_space": True}, (None, 0, 0)),
        ("Qwen2TokenizerFast", "qwen3", {"add_bos_token": True, "bos_token": CHAT[1]}, (1, 0, 0)),
        (None, "qwen3", {"eos_token": CHAT[2], "pad_token": CHAT[1]}, (None, 2, 1)),
        ("GPT2Tokenizer", "qwen3", {"add_prefix_space": True}, (0, 0, 0)),
        ("GPT2TokenizerFast", "llama", {"add_bos_token": True, "pad_token": "[PAD]"}, (0, 0, 0)),
        (None, "opt", {"bos_token": CHAT[2], "add_bos_token": True}, (2, 0, 0)),
    ],
)
@pytest.mark.parametrize("older", [False, True])
def test_folders_without_tokenizer_json_equal_transformers(
    kind, model_type, settings, ids, older, transformers, tmp_path
):
    size = vocabulary_folder(tmp_path, kind, model_type, **settings)
    if older:
        added = {token: size + i for i, token in enumerate([*CHAT, "<tool>"])}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        named = {"additional_special_tokens": CHAT[1:]}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    else:
        added = decoder_of(size, CHAT) | decoder_of(
            size + 3, ["<tool>"], special=False, rstrip=True
        )
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
        # which counts for nothing beside it
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": CHAT[1]}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenizers_.from_folder(str(tmp_path))
    for text in [*TEXTS, *CORPUS[:5], "<|im_start|>user\n 2024 <tool> x<|im_end|>\n", "## # # 1"]:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        if not older:  # whose special tokens transformers only half takes note of
            said = theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
            assert ours.decode(ours.encode(text)) == said
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert [i - size if i is not None else None for i in ours[1:4]] == list(ids)
    assert ours.pad_id == theirs.pad_token_id or settings.get("pad_token") in (None, "[PAD]")


@pytest.mark.parametrize(
    ("files", "settings", "model_type", "message"),
    [
        (
            {"tokenizer.model": "x"},
            {"tokenizer_class": "LlamaTokenizer"},
            "llama",
            "LlamaTokenizer",
        ),
        ({"vocab.txt": "x"}, {"tokenizer_class": "BertTokenizer"}, "opt", "BertTokenizer"),
        ({"vocab.json": "{}"}, {"tokenizer_class": "GPT2Tokenizer"}, "opt", "GPT2Tokenizer"),
        ({"vocab.json": "{}", "merges.txt": ""}, {}, "llama", "of an unnamed class"),
        ({"vocab.json": "{}", "merges.txt": ""}, {"tokenizer_class": "CTRLTokenizer"}, "", "CTRL"),
    ],
)
def test_folders_of_which_no_tokenizer_can_be_made(files, settings, model_type, message, tmp_path):
    files["tokenizer_config.json"] = json.dumps(settings)
    files["config.json"] = json.dumps({"model_type": model_type})
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    message = (
        rf"no tokenizer.json, and its tokenizer, {message}.*, can't be made .* write one with "
    )
    with pytest.raises(ValueError, match=message.replace(".*,", "[a-zA-Z]*,")):
        tokenizers_.from_folder(str(tmp_path))


def test_tokens_in_the_settings_alone_count_beside_tokenizer_json(transformers, tmp_path):
    backend = train(byte_level())
    backend.add_tokens([library.AddedToken("<tool>", lstrip=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    added = decoder_of(420, ["<tool>", "<|im_end|>"])
    settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": added}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(settings))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = tokenizers_.from_folder(str(tmp_path))
    text = "good <tool> film<|im_end|>"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert (ours.encode(text)[-1], ours.eos_id, ours.vocab_size) == (421, 421, 422)
    assert ours.decode(ours.encode(text)) == "good  film"
    settings["added_tokens_decoder"] = decoder_of(425, ["<|im_end|>"])
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' has id 425 in added_tokens_decoder"):
        tokenizers_.from_folder(str(tmp_path))


def test_special_tokens_of_the_vocabulary_are_marked(opt_folder, transformers):
    """A file may hold them as plain tokens, and name them in its settings alone."""
    backend = train(byte_level())
    fields = json.loads(backend.to_str())
    fields["added_tokens"] = []
    (opt_folder / "tokenizer.json").write_text(json.dumps(fields))
    ours = tokenizers_.from_folder(str(opt_folder))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(opt_folder)
    assert ours.encode("good</s>film") == theirs("good</s>film")["input_ids"]
    assert ours.encode("good</s>film").count(2) == 1
    assert ours.decode(ours.encode("good</s>film")) == "goodfilm"


def test_a_folder_without_a_tokenizer(tmp_path):
    assert tokenizers_.from_folder(str(tmp_path)) is None


def test_embeddings_may_be_padded_but_not_be_another_models(opt_folder):
    ours = tokenizers_.from_folder(str(opt_folder))
    for size in (420, 512, 420 + tokenizers_.PADDING_ROWS):
        tokenizers_.check_vocabulary(ours, size)
    for size in (419, 50272):
        with pytest.raises(ValueError, match=f"has 420 tokens and the model {size} embeddings"):
            tokenizers_.check_vocabulary(ours, size)
