import contextlib
import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tokenizers")
from zofl_jax.models import (
    architectures,
    config_hf,
    safetensors_files,
    transformer,
    weights,
    weights_hf,
)
from zofl_jax.models import tokenizers as tokenizers_

apply = jax.jit(transformer.apply, static_argnums=0)
FAMILIES = ["opt", "opt-post-norm", "llama", "llama-biases", "qwen2", "qwen3", "smollm3"]
MASK = np.arange(7) >= np.array([[0], [3]])
TOKENS = np.where(MASK, np.arange(14).reshape(2, 7) * 5 + 3, 0)


@pytest.fixture
def tiny():
    return pytest.importorskip("tiny_language_models")


@pytest.fixture
def llama_folder(tiny, tmp_path):
    """A folder with a random Llama and the model itself."""
    model = tiny.random_model("llama")
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), model


def edit_config(folder, **changes):
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        fields = json.load(file) | changes
    with open(path, "w") as file:
        json.dump({k: v for k, v in fields.items() if v is not None}, file)


def rewrite(folder, change):
    """Replaces the tensors of a folder by change({name: array})."""
    path = os.path.join(folder, "model.safetensors")
    found = {name: tensor.read() for name, tensor in safetensors_files.tensors(path).items()}
    found = change(found)
    specs = {name: (array.shape, array.dtype) for name, array in found.items()}
    safetensors_files.write(path, specs, found.__getitem__)


@pytest.mark.parametrize("name", FAMILIES)
def test_export_is_read_by_transformers_with_the_same_logits(name, tiny, tmp_path):
    model = tiny.random_model(name)
    model.save_pretrained(tmp_path / "theirs")
    config, params, tokenizer = weights.load(f"hf:{tmp_path / 'theirs'}")
    assert tokenizer is None
    params = jax.tree.map(lambda leaf: 1.1 * leaf, params)  # as fine-tuning would change them
    weights.save_hf(str(tmp_path / "ours"), config, params)
    again = tiny.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(model) and again.dtype == tiny.torch.float32
    theirs = tiny.scores(again, TOKENS, MASK)
    ours = np.asarray(apply(config, params, TOKENS, MASK))
    np.testing.assert_allclose(ours[MASK], theirs[MASK], atol=1e-4)
    config2, params2, _ = weights.load(f"hf:{tmp_path / 'ours'}")
    assert config2 == config
    jax.tree.map(np.testing.assert_array_equal, params2, params)


@pytest.mark.parametrize("name", ["opt", "qwen2"])
def test_folder_saved_without_the_head(name, tiny, tmp_path):
    model = tiny.random_model(name)
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "body")
    _, whole, _ = weights.load(f"hf:{tmp_path / 'whole'}")
    _, body, _ = weights.load(f"hf:{tmp_path / 'body'}")
    jax.tree.map(np.testing.assert_array_equal, body, whole)


def test_sharded_folder(llama_folder):
    folder, model = llama_folder
    _, whole, _ = weights.load(f"hf:{folder}")
    os.remove(os.path.join(folder, "model.safetensors"))
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    assert len(shards) > 2
    _, params, _ = weights.load(f"hf:{folder}")
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    os.remove(os.path.join(folder, sorted(shards)[1]))
    with pytest.raises(ValueError, match=f"lacks {sorted(shards)[1]}: fetch all shards"):
        weights.load(f"hf:{folder}")


TINY = architectures.Config("llama", 12, 8, 16, 2, 2, 1, 4, 16)


def tiny_params(scale):
    random = np.random.default_rng(0)

    def leaf(spec):
        return jnp.asarray(scale * (1 + 0.02 * random.normal(size=spec.shape)), spec.dtype)

    return jax.tree.map(leaf, transformer.shapes(TINY))


def shard(folder):
    """Cuts model.safetensors in two, with an index; returns the index."""
    whole = os.path.join(folder, "model.safetensors")
    found = safetensors_files.tensors(whole)
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    places = {name: names[i % 2] for i, name in enumerate(sorted(found))}
    for file in names:
        specs = {name: (found[name].shape, found[name].dtype) for name in found}
        specs = {name: spec for name, spec in specs.items() if places[name] == file}
        safetensors_files.write(os.path.join(folder, file), specs, lambda n: found[n].read())
    os.remove(whole)
    write_index(folder, places)
    return places


def write_index(folder, places):
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {}, "weight_map": places}, file)


def table_and_head(folder):
    """Returns the embedding table and the head that we read, the table if it is tied."""
    config, params, _ = weights.load(f"hf:{folder}")
    table = params["embed"]["tokens"]["embedding"]
    return table, table if config.tied else params["head"]["embedding"]


def their_table_and_head(tiny, folder):
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.get_input_embeddings().weight.detach(), model.lm_head.weight.detach()


@pytest.mark.parametrize("case", ["other", "equal", "head only", "OPT's other"])
def test_a_head_beside_a_tied_table_is_what_transformers_takes(case, tiny, tmp_path):
    tiny.random_model("opt" if case == "OPT's other" else "qwen2").save_pretrained(tmp_path)
    table = "model.decoder.embed_tokens" if case == "OPT's other" else "model.embed_tokens"

    def change(found):
        head = found[f"{table}.weight"] * (1 if case == "equal" else 2)
        if case == "head only":
            del found[f"{table}.weight"]
        return found | {"lm_head.weight": head}

    rewrite(tmp_path, change)
    for ours, theirs in zip(
        table_and_head(tmp_path), their_table_and_head(tiny, tmp_path), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs.numpy())


def test_the_file_that_holds_the_weights_is_that_of_transformers(tiny, tmp_path):
    """Both read the whole file where an index of other shards is beside it."""
    tiny.random_model("qwen2").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda found: {k: 2 * v for k, v in found.items()})
    shard(tmp_path)
    tiny.random_model("qwen2").save_pretrained(tmp_path / "new")
    os.replace(tmp_path / "new" / "model.safetensors", tmp_path / "model.safetensors")
    both = table_and_head(tmp_path)[0], their_table_and_head(tiny, tmp_path)[0].numpy()
    np.testing.assert_array_equal(*both)
    edit_config(tmp_path, transformers_weights="model.safetensors.index.json")
    named = table_and_head(tmp_path)[0], their_table_and_head(tiny, tmp_path)[0].numpy()
    np.testing.assert_array_equal(*named)
    np.testing.assert_array_equal(named[0], 2 * both[0])
    edit_config(tmp_path, transformers_weights="../x.safetensors")
    with pytest.raises(ValueError, match=r"names '\.\./x\.safetensors' as its weights"):
        weights.load(f"hf:{tmp_path}")


def test_an_index_that_its_shards_do_not_bear_out_is_refused(tmp_path):
    folder = str(tmp_path)
    weights.save_hf(folder, TINY, tiny_params(1))
    places = shard(folder)
    weights.load(f"hf:{folder}")
    first, second = sorted(set(places.values()))
    name = next(name for name in places if places[name] == first)
    for wrong in (places | {name: second}, places | {"model.extra.weight": second}):
        write_index(folder, wrong)
        odd = {*wrong.items()} ^ {*places.items()}
        with pytest.raises(ValueError, match=f"do not agree where {next(iter(odd))[0]} lies: fet"):
            weights.load(f"hf:{folder}")
    write_index(folder, {k: v for k, v in places.items() if k != name})
    with pytest.raises(ValueError, match=f"do not agree where {name} lies"):
        weights.load(f"hf:{folder}")
    write_index(folder, places)
    held = safetensors_files.tensors(os.path.join(folder, first))[name].read()
    twice = {name: (held.shape, held.dtype)}
    safetensors_files.write(os.path.join(folder, second), twice, lambda _: held)  # in both
    with pytest.raises(ValueError, match=r"do not agree where .* lies: fetch all files of one"):
        weights.load(f"hf:{folder}")
    write_index(folder, None)
    with pytest.raises(ValueError, match=r"has no weight_map: fetch it again"):
        weights.load(f"hf:{folder}")


def test_saving_replaces_an_older_model_and_nothing_else(tmp_path):
    folder = str(tmp_path)
    weights.save_hf(folder, TINY, tiny_params(1))
    shard(folder)
    kept = ["notes-00001-of-00002.safetensors", "pytorch_model.bin"]
    for name in [*kept, "generation_config.json"]:  # the last says where texts end
        (tmp_path / name).write_text("{}")
    weights.save_hf(folder, TINY, tiny_params(3))
    assert sorted(os.listdir(folder)) == sorted([*kept, "config.json", "model.safetensors"])
    _, params, _ = weights.load(f"hf:{folder}")
    jax.tree.map(np.testing.assert_array_equal, params, tiny_params(3))


@pytest.mark.parametrize(
    ("said", "ends"), [([4, 5], (4, 5)), (6, (6,)), ([], ()), (None, (2,)), ("</s>", None)]
)
def test_generation_config_says_where_texts_end(tmp_path, said, ends):
    config = dataclasses.replace(TINY, eos_ids=(2,))
    weights.save_hf(str(tmp_path), config, tiny_params(1))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said, "top_k": 9}))
    if ends is None:
        with pytest.raises(ValueError, match=r"generation_config.json has eos_token_id = '</s>'"):
            weights.load(f"hf:{tmp_path}")
    else:
        assert weights.load(f"hf:{tmp_path}")[0].eos_ids == ends


def test_a_kill_while_saving_leaves_no_mixture(tmp_path, monkeypatch):
    """Every file that changes its name is a place to die; what is left is whole or refused."""
    other = dataclasses.replace(TINY, rope_theta=77.0)
    library = pytest.importorskip("tokenizers")
    backend = library.Tokenizer(library.models.BPE({chr(97 + i): i for i in range(12)}, []))
    tokenizer = tokenizers_.Tokenizer(backend, 0, 1, 1)
    found = []
    for deadly in range(9):
        folder = str(tmp_path / str(deadly))
        weights.save_hf(folder, TINY, tiny_params(1))
        shard(folder)
        calls = iter(range(99))

        def dying(call):
            def run(*arguments):
                if next(calls) == deadly:  # noqa: B023
                    raise KeyboardInterrupt
                return call(*arguments)

            return run

        with monkeypatch.context() as patch:
            for name in ("replace", "remove"):
                patch.setattr(os, name, dying(getattr(os, name)))
            patch.setattr(tokenizers_.Tokenizer, "save", dying(tokenizers_.Tokenizer.save))
            with contextlib.suppress(KeyboardInterrupt):
                weights.save_hf(folder, other, tiny_params(3), tokenizer)
        try:
            config, params, _ = weights.load(f"hf:{folder}")
        except ValueError as error:
            assert "holds no config.json" in str(error)
            found.append("refused")
            continue
        scale = {10000.0: 1, 77.0: 3}[config.rope_theta]
        jax.tree.map(np.testing.assert_array_equal, params, tiny_params(scale))
        found.append(scale)
    assert found[0] == 1 and "refused" in found and found[-1] == 3


def test_adapters_and_distributed_checkpoints_are_not_passed_over(tmp_path):
    folder = str(tmp_path)
    weights.save_hf(folder, TINY, tiny_params(1))
    for name, message in {
        "adapter_config.json": "holds an adapter .* merge it into the weights, or move it",
        "shard-00001-model-00001-of-00002.safetensors": "holds a distributed checkpoint",
    }.items():
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=message):
            weights.load(f"hf:{folder}")
        with pytest.raises(ValueError, match=message):
            weights.save_hf(folder, TINY, tiny_params(1))
        os.remove(tmp_path / name)
    os.replace(tmp_path / "model.safetensors", tmp_path / "model.fp16.safetensors")
    with pytest.raises(ValueError, match=r"no model\.safetensors, only model\.fp16\.safetensors:"):
        weights.load(f"hf:{folder}")


def test_half_precision_files(tiny, tmp_path):
    model = tiny.random_model("qwen3").to(tiny.torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    config, params, _ = weights.load(f"hf:{tmp_path / 'half'}", dtype="bfloat16")
    assert config.param_dtype == config.compute_dtype == "bfloat16"
    exact = model.model.layers[1].mlp.up_proj.weight.detach().float().numpy().T
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel[1].astype(jnp.float32), exact)
    config, params, _ = weights.load(f"hf:{tmp_path / 'half'}", compute_dtype="bfloat16")
    assert (config.param_dtype, config.compute_dtype) == ("float32", "bfloat16")
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"]["kernel"][1], exact)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    weights.save_hf(str(tmp_path / "again"), config, half)
    stored = safetensors_files.tensors(str(tmp_path / "again" / "model.safetensors"))
    assert {tensor.dtype.name for tensor in stored.values()} == {"bfloat16"}
    load = tiny.transformers.AutoModelForCausalLM.from_pretrained
    assert load(tmp_path / "again").dtype == tiny.torch.bfloat16


def test_safetensors_agree_with_the_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.float16([1.5]),
        "c": np.arange(3),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = str(tmp_path / "x.safetensors")
    specs = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    safetensors_files.write(path, specs, arrays.__getitem__)
    jax.tree.map(np.testing.assert_array_equal, library.load_file(path), arrays)
    library.save_file(arrays, path)
    ours = {name: tensor.read() for name, tensor in safetensors_files.tensors(path).items()}
    jax.tree.map(np.testing.assert_array_equal, ours, arrays)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_damaged_safetensors_are_refused(tmp_path):
    path = str(tmp_path / "x.safetensors")
    safetensors_files.write(path, {"a": ((64,), np.dtype(np.float32))}, lambda _: np.ones(64))
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(content[:-1])
    with pytest.raises(ValueError, match="is cut short at tensor 'a': fetch it again"):
        safetensors_files.tensors(path)
    with open(path, "wb") as file:
        file.write(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="not a safetensors file, or is cut short"):
        safetensors_files.tensors(path)
    with open(path, "wb") as file:
        file.write(content.replace(b"[64]", b"[16]"))
    with pytest.raises(
        ValueError, match=r"'a' takes 256 bytes, which its shape \(16,\) of F32 does not: fetch"
    ):
        safetensors_files.tensors(path)
    with open(path, "wb") as file:
        file.write(content[:8] + b"!" + content[9:])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        safetensors_files.tensors(path)
    with pytest.raises(ZeroDivisionError):
        safetensors_files.write(path, {"a": ((1,), np.dtype(np.float32))}, lambda _: 1 // 0)
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[1]", "not a safetensors file"),
        ('{"a": 1}', "not a safetensors file"),
        ('{"a": X(0, 8), "b": X(8, 16), "a": X(8, 16)}', "has two tensors called 'a'"),
        ('{"a": X(0, 8), "b": X(8, 12)}', r"'b' takes 4 bytes, which its shape \(2,\) of F32 does"),
        ('{"b": X(4, 12), "a": X(0, 8)}', "tensors 'a' and 'b' share bytes"),
    ],
)
def test_safetensors_whose_header_says_two_things_are_refused(tmp_path, header, message):
    header = re.sub(
        r"X\((\d+), (\d+)\)", r'{"dtype": "F32", "shape": [2], "data_offsets": [\1, \2]}', header
    ).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match=message):
        safetensors_files.tensors(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda found: {k: v for k, v in found.items() if "layers.1.mlp.up" not in k},
            r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight: they",
        ),
        (
            lambda found: found | {"model.layers.0.mlp.router.weight": np.zeros((2, 2))},
            r"hold the unexpected model\.layers\.0\.mlp\.router\.weight: they",
        ),
        (
            lambda found: {k.replace("self_attn", "attn"): v for k, v in found.items()},
            r"lack model\.layers\.0\.self_attn\.k_proj\.weight, .* and 7 more and hold the unexp",
        ),
        (
            lambda found: found | {"model.norm.weight": np.zeros(31, np.float32)},
            r"model\.norm\.weight has shape \(31,\), but the configuration asks for \(32,\)",
        ),
    ],
)
def test_wrong_tensors_are_named(change, message, llama_folder):
    folder, _ = llama_folder
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        weights.load(f"hf:{folder}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported: use one of opt, llama"),
        ({"hidden_size": None}, "config.json of a llama model lacks 'hidden_size'"),
        ({"hidden_size": 16}, "has shape .* but the configuration asks for"),
    ],
)
def test_wrong_configurations_are_refused(changes, message, llama_folder):
    folder, _ = llama_folder
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        weights.load(f"hf:{folder}")


def test_what_is_not_a_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'opt-125m' is not understood: use gguf:PATH or hf:PATH"):
        weights.load("opt-125m")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        weights.load(f"hf:{tmp_path}")
    fields = config_hf.config_to_fields(architectures.named("opt-125m"))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        weights.load(f"hf:{tmp_path}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"torch .bin weights only, .* save it once more"):
        weights.load(f"hf:{tmp_path}")
    (tmp_path / "x.gguf").write_bytes(b"GGML")
    with pytest.raises(ValueError, match="not a GGUF file"):
        weights.load(f"gguf:{tmp_path / 'x.gguf'}")
    with pytest.raises(ValueError, match="is not a file"):
        weights.load(f"gguf:{tmp_path / 'y.gguf'}")
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"'a/b' is not a folder here .* when offline"):
        weights.load("hf:a/b")


def test_download_passes_the_revision(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def snapshot(repository, revision, allow_patterns):
        calls.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert weights_hf.download("facebook/opt-125m@refs/pr/12") == str(tmp_path)
    assert weights_hf.download("facebook/opt-125m") == str(tmp_path)
    assert [call[:2] for call in calls] == [
        ("facebook/opt-125m", "refs/pr/12"),
        ("facebook/opt-125m", None),
    ]
    assert "*.safetensors" in calls[0][2]


def test_saving_refuses_params_of_another_model(tmp_path):
    config = architectures.named("opt-125m")
    params = transformer.shapes(config)
    params["layers"]["mlp"]["up"]["lora_a"] = params["layers"]["mlp"]["up"]["kernel"]
    with pytest.raises(ValueError, match="at layers/mlp/up/lora_a: merge adapters first"):
        weights.save_hf(str(tmp_path), config, params)
    with pytest.raises(ValueError, match="do not fit the configuration at embed/positions/emb"):
        weights.save_hf(str(tmp_path), architectures.named("opt-1.3b"), transformer.shapes(config))


def test_vocabularies_that_differ_are_refused(llama_folder):
    folder, _ = llama_folder
    library = pytest.importorskip("tokenizers")
    vocabulary = {chr(0x100 + i): i for i in range(97)}
    backend = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[]))
    tokenizers_.Tokenizer(backend, 0, 1, 1).save(folder)
    with pytest.raises(ValueError, match="the tokenizer has 97 tokens and the model 96 embeddings"):
        weights.load(f"hf:{folder}")
