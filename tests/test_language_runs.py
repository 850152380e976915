"""Language models from the command line: train, stop, resume, evaluate, export."""

import json
import signal
import time

import jax
import numpy as np
import pytest
import tiny_texts
from commands import TIMEOUT_SECONDS, Commands, num_logged, stray_lines, summary_of
from flag_lines import resolve

from zofl_jax import keys
from zofl_jax.configuration.texts import load_model
from zofl_jax.models import transformer, weights

SHARED = [
    "--task=text",
    "--data_dir=train_and_test.tsv",
    "--held_out=0.25",
    "--verbalizers=negative=bad,positive=good",
    "--text_column=sentence",
    "--label_column=mood",
    "--num_clients=4",
    "--batch_size=8",
    "--num_perturbations=2",
    "--eval_every=30",
]
ADAPTERS = ["--lora_rank=2", "--learning_rate=1e-3", "--workdir=adapted", "--rounds=60"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory, cache, processes):
    """A folder with a model, a table of sentences, and a run of adapters on them."""
    folder = tmp_path_factory.mktemp("texts")
    tiny_texts.save(folder / "model")
    moods = ("negative", "positive")
    lines = [f"{row['text']}\t{moods[row['label']]}" for row in tiny_texts.sentences(96)]
    (folder / "train_and_test.tsv").write_text("\n".join(["sentence\tmood", *lines]) + "\n")
    owners = [f"{line}\t{'ann' if i < 90 else ''}" for i, line in enumerate(lines)]
    (folder / "owners.tsv").write_text("\n".join(["sentence\tmood\twho", *owners]) + "\n")
    lines[6] += "?"
    (folder / "typo.tsv").write_text("\n".join(["sentence\tmood", *lines]) + "\n")
    return Commands(folder, cache, processes, quick=True)


@pytest.fixture(scope="module")
def trained(commands):
    ended = commands.train(*SHARED, "--model=hf:model", *ADAPTERS)
    assert ended.code == 0, ended.err
    return commands.folder / "adapted", ended


apply = jax.jit(transformer.apply, static_argnums=0)


def logits(folder, tokens):
    config, params, _ = weights.load(f"hf:{folder}")
    return np.asarray(apply(config, params, tokens, np.ones_like(tokens)))


def test_a_run_shows_progress_and_counts_adapters_only(trained):
    workdir, ended = trained
    assert stray_lines(ended.err) == []
    summary = summary_of(workdir)
    assert ended.out.startswith(f"decomfl on text: model, {summary['num_params']} params")
    # Two layers, q and v, rank 2: A [16, 2] and B [2, 16] for q, B [2, 8] for v.
    assert summary["num_params"] == 2 * (2 * 16 * 2 + 2 * 16 + 2 * 8)
    assert summary["rounds"] == 60
    # 2 float32 up; a seed of 8 bytes and 2 float32 down; adapters once to each client.
    assert summary["bytes_up_per_client"] == 60 * 2 * 8 / 4
    assert summary["bytes_first_sync_per_client"] == 4 * summary["num_params"]
    assert (workdir / "labels.png").is_file()


def test_a_killed_run_ends_with_the_same_bits(trained, commands):
    flags = [*SHARED, "--model=hf:model", *ADAPTERS[:-2], "--workdir=killed", "--rounds=60"]
    process = commands.start("-m", "experiments.train", *flags)
    while process.poll() is None and num_logged(commands.folder / "killed") < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == -signal.SIGKILL
    ended = commands.in_turn("train", *flags)
    assert ended.code == 0 and "resuming killed" in ended.err
    one, other = (summary_of(commands.folder / name) for name in ("adapted", "killed"))
    assert one["history"] == other["history"]
    name = "snapshots/00000060.snapshot"
    assert (trained[0] / name).read_bytes() == (commands.folder / "killed" / name).read_bytes()


def test_evaluation_of_a_run_and_of_the_model_alone(trained, commands):
    ended = commands.evaluate("--workdir=adapted", "--out=tuned.json")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("adapted after 60 rounds, train_and_test, 24 test examples")
    found = json.loads((commands.folder / "tuned.json").read_text())
    assert set(found) == {
        "accuracy",
        "accuracy_median_threshold",
        "loss",
        "num_examples",
        "seconds",
    }
    last = summary_of(trained[0])["history"][-1]
    assert found["accuracy"] == pytest.approx(last["test_accuracy"])
    assert found["loss"] == pytest.approx(last["test_loss"], abs=1e-5)
    assert found["num_examples"] == 24

    ended = commands.in_turn(
        "evaluate", *SHARED, "--model=hf:model", "--shots=2", "--out=shots.json"
    )
    assert ended.code == 0, ended.err
    assert ended.out.startswith("hf:model, 2 shots")
    shown = json.loads((commands.folder / "shots.json").read_text())
    assert shown["loss"] != found["loss"]


def test_exports_compute_what_the_run_computes(trained, commands):
    for ended in (
        commands.export("--workdir=adapted", "--out=merged"),
        commands.in_turn("export", "--workdir=adapted", "--out=start", "--round=0"),
    ):
        assert ended.code == 0, ended.err
    tokens = np.array([[0, 40, 41, 42, 43]], np.int32)
    start, plain = (logits(commands.folder / name, tokens) for name in ("start", "model"))
    np.testing.assert_allclose(start, plain, atol=1e-6)
    merged = logits(commands.folder / "merged", tokens)
    assert np.abs(merged - plain).max() > 1e-4
    ended = commands.in_turn("evaluate", *SHARED, "--model=hf:merged", "--out=merged.json")
    assert ended.code == 0, ended.err
    found = json.loads((commands.folder / "merged.json").read_text())
    assert found["loss"] == pytest.approx(
        summary_of(trained[0])["history"][-1]["test_loss"], abs=1e-4
    )


# peft calls what transformers deprecates.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("adapters", [True, False])
def test_transformers_loads_an_export_to_the_same_logits(trained, commands, adapters):
    """LoRA adapters through peft, and a fully trained model."""
    torch = pytest.importorskip("torch")
    hugging_face = pytest.importorskip("transformers")
    workdir = "adapted"
    if not adapters:
        workdir = "whole"
        ended = commands.in_turn(
            *("train", *SHARED, "--model=hf:model"),
            *("--workdir=whole", "--rounds=4", "--learning_rate=1e-3"),
        )
        assert ended.code == 0, ended.err
    out = f"{workdir}-exported"
    assert commands.in_turn("export", f"--workdir={workdir}", f"--out={out}").code == 0
    tokens = np.array([[0, 40, 41, 42, 43]], np.int32)
    ours = logits(commands.folder / out, tokens)
    model = hugging_face.AutoModelForCausalLM.from_pretrained(commands.folder / out)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(tokens)).logits, ours, atol=1e-4)
    if adapters:
        peft = pytest.importorskip("peft")
        ended = commands.in_turn("export", "--workdir=adapted", "--out=peft", "--adapter")
        assert ended.code == 0, ended.err
        base = hugging_face.AutoModelForCausalLM.from_pretrained(commands.folder / "model")
        model = peft.PeftModel.from_pretrained(base, commands.folder / "peft")
        with torch.no_grad():
            np.testing.assert_allclose(model(torch.tensor(tokens)).logits, ours, atol=1e-4)


def test_a_trained_part_and_half_precision(commands):
    ended = commands.in_turn(
        "train",
        *SHARED,
        "--model=hf:model",
        "--train_only=norm",
        "--dtype=bfloat16",
        "--matmul_dtype=float16",
        "--workdir=norms",
        "--rounds=3",
    )
    assert ended.code == 0, ended.err
    assert summary_of(commands.folder / "norms")["num_params"] == 5 * 16


def test_the_dtype_of_products_is_the_models(commands):
    run = resolve(*SHARED, f"--model=hf:{commands.folder / 'model'}")
    assert load_model(run, keys.root(0)).config.matmul_dtype is None
    run = run.replace(matmul_dtype="bfloat16")
    assert load_model(run, keys.root(0)).config.matmul_dtype == "bfloat16"


def test_bos_stands_where_the_run_says(commands):
    run = resolve(*SHARED, f"--model=hf:{commands.folder / 'model'}")

    def first(bos):
        return load_model(run.replace(bos=bos), keys.root(0)).tokenizer.prefix

    assert first("auto") == first("always") == first(None) == (0,)
    assert first("never") == ()
    config_file = commands.folder / "model" / "tokenizer_config.json"
    text = config_file.read_text()
    config_file.write_text(text.replace('"bos_token": "<s>",', ""))
    try:
        assert first(None) == (0,)  # as tokenizer.json says
        with pytest.raises(ValueError, match="name none: use auto or never"):
            first("always")
    finally:
        config_file.write_text(text)


def test_a_run_from_before_bos_was_a_flag_goes_on(trained, commands):
    path = trained[0] / "flags.json"
    text = path.read_text()
    recorded = json.loads(text)
    assert recorded.pop("bos") == "auto"
    flags = ("train", *SHARED, "--model=hf:model", *ADAPTERS)
    path.write_text(json.dumps(recorded))
    try:
        ended = commands.in_turn(*flags)
        assert ended.code == 0 and "is complete" in ended.out, ended.err
        ended = commands.in_turn(*flags, "--bos=auto")
        assert ended.code == 1 and "--bos is 'auto' but the run in adapted" in ended.err
    finally:
        path.write_text(text)


REFUSED = {
    "--model=softmax": "--model=softmax is no language model: use gguf:FILE or hf:FOLDER_OR_NAME",
    "--model=hf:nowhere": "nowhere",
    "--text_column=words": "names the column 'words', which train_and_test, train lacks; it has "
    "sentence, mood",
    "--template={sentence} It was": "--text_column has no effect with a --template",
    "--verbalizers=negative=bad,positive=marvellous": "' marvellous' is not one token but",
    "--verbalizers=bad": "must be two or more LABEL=WORD",
    "--label_column=feeling": "has no label column 'feeling'",
    "--data_dir=nothing.tsv": "nothing.tsv",
    "--lora_rank=3 --train_only=norm": "exclude each other",
    "--lora_rank=3 --lora_pattern=(": "--lora_pattern=( is no regular expression",
    "--max_length=600": "600 is over the model's 512 positions",
    "--estimator=jvp --objective=accuracy": "--objective=accuracy has no useful gradient",
    "--partition=natural": "--partition=natural needs --client_column",
    "--data_dir=typo.tsv": "error: typo.tsv, line 8 has mood='",
    "--data_dir=owners.tsv --partition=natural --client_column=who": "error: owners.tsv, line 9",
    "--missing_owner=drop": "--missing_owner has no effect with --partition=iid",
    "--partition=natural --client_column=who": "--client_column=who is missing in 72 rows",
    "--partition=natural --client_column=mood --num_clients=3": "--num_clients has no effect with",
}


def test_what_does_not_fit_is_one_sentence(commands):
    several = [[*SHARED, "--model=hf:model", *change.split(" -")] for change in REFUSED]
    several = [[a if a.startswith("--") else f"-{a}" for a in flags] for flags in several]
    for flags in several:
        if "--partition=natural" in flags:
            flags.remove("--num_clients=4")
    for flags, (change, message) in zip(several, REFUSED.items(), strict=True):
        ended = commands.in_turn("train", *flags)
        assert ended.code == 1, change
        assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, change
        assert message in ended.err, change
    assert not (commands.folder / "runs").exists()


def test_evaluation_and_export_refuse(trained, commands):
    for command, message in [
        (("evaluate", "--workdir=adapted", "--lora_rank=3"), "--lora_rank=3 differs from 2"),
        (("evaluate", "--task=digits"), "nothing to evaluate before a run: give --workdir"),
        (("evaluate", "--workdir=adapted", "--out=no/file.json"), "there is no folder no"),
        (("export", "--workdir=adapted", "--out=model"), "not an empty folder"),
    ]:
        ended = commands.in_turn(*command)
        assert ended.code == 1
        assert ended.err.startswith("error: ") and message in ended.err


def test_a_run_knows_its_data_and_its_base_model(trained, commands):
    """Of a complete run, of one that goes on, and of one that is read."""
    folder = commands.folder
    table, weights_file = folder / "train_and_test.tsv", folder / "model" / "model.safetensors"
    train = ("train", *SHARED, "--model=hf:model", *ADAPTERS)
    noted = json.loads((trained[0] / "inputs.json").read_text())
    assert {"partition", "training column 'mood'", "tokenizer's vocabulary"} <= set(noted)
    for path, change, name, several in (
        (
            table,
            lambda data: data.replace(b"\tpositive", b"\tnegative", 1),
            "column 'mood'",
            (train, (*train, "--rounds=70")),
        ),
        (
            weights_file,
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            "base model's weights",
            (("evaluate", "--workdir=adapted", "--shots=1"),),
        ),
    ):
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        for command in several:
            ended = commands.in_turn(*command)
            assert ended.code == 1, command
            assert ended.err.count("\n") == 1 and ended.out == "", command
            assert name in ended.err and "changed since the run in adapted began: " in ended.err
        path.write_bytes(whole)
    (trained[0] / "inputs.json").unlink()  # as before this release
    ended = commands.in_turn("replay", "--workdir=adapted")
    assert ended.code == 0 and "adapted has rounds but no inputs.json" in ended.err
    assert json.loads((trained[0] / "inputs.json").read_text()) == noted


def test_params_of_a_run_are_those_of_its_replay(trained, commands):
    ended = commands.in_turn("replay", "--workdir=adapted", "--out=adapters.npz")
    assert ended.code == 0 and "bit-identical" in ended.out
    with np.load(commands.folder / "adapters.npz") as arrays:
        assert sum(array.size for array in arrays.values()) == summary_of(trained[0])["num_params"]
        assert all(np.isfinite(array).all() for array in jax.tree.leaves(dict(arrays)))
