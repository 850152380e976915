"""Hugging Face folders: which files hold the weights, what the tensors are called there.

A folder means what it means to transformers 5: `model.safetensors`, else the shards that
`model.safetensors.index.json` lists, unless `transformers_weights` in `config.json` names another
file. Torch's own checkpoints (`pytorch_model.bin`) are pickles and are not read, nor are adapters
beside the weights, which transformers would add to them. Of `generation_config.json` only the
tokens that end a text are taken: what is generated is the likeliest, or drawn, without penalties.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from zofl_jax.models import safetensors_files
from zofl_jax.models.architectures import Config
from zofl_jax.models.config_hf import config_from_fields, config_to_fields
from zofl_jax.models.config_keys import listed, some

FILES: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""What `download` fetches."""

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_GENERATION = "generation_config.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_IGNORED = ("rotary_emb.inv_freq", "decoder.version")  # what old files keep beside the weights

_OPT_MODULES = {
    "embed/tokens": "model.decoder.embed_tokens",
    "embed/positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "layers/attention_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "layers/attention/q": "model.decoder.layers.{}.self_attn.q_proj",
    "layers/attention/k": "model.decoder.layers.{}.self_attn.k_proj",
    "layers/attention/v": "model.decoder.layers.{}.self_attn.v_proj",
    "layers/attention/o": "model.decoder.layers.{}.self_attn.out_proj",
    "layers/mlp_norm": "model.decoder.layers.{}.final_layer_norm",
    "layers/mlp/up": "model.decoder.layers.{}.fc1",
    "layers/mlp/down": "model.decoder.layers.{}.fc2",
    "final_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}
_LLAMA_MODULES = {
    "embed/tokens": "model.embed_tokens",
    "layers/attention_norm": "model.layers.{}.input_layernorm",
    "layers/attention/q": "model.layers.{}.self_attn.q_proj",
    "layers/attention/k": "model.layers.{}.self_attn.k_proj",
    "layers/attention/v": "model.layers.{}.self_attn.v_proj",
    "layers/attention/o": "model.layers.{}.self_attn.o_proj",
    "layers/attention/q_norm": "model.layers.{}.self_attn.q_norm",
    "layers/attention/k_norm": "model.layers.{}.self_attn.k_norm",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "layers/mlp/up": "model.layers.{}.mlp.up_proj",
    "layers/mlp/down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}


def module_names(config: Config) -> Mapping[str, str]:
    """Returns the module that each of our paths has in transformers; "{}" is the layer."""
    return _OPT_MODULES if config.family == "opt" else _LLAMA_MODULES


def open_folder(folder: str) -> tuple[Config, dict[str, safetensors_files.Tensor]]:
    """Returns the configuration and the tensors, by name, of a Hugging Face folder.

    A head that differs from the embedding table isn't tied to it, whatever `config.json` says,
    and of two that should be tied one is enough: as in transformers.

    Raises:
      ValueError: if there is no `config.json` or no safetensors, or a shard is missing; if the
        index and the shards differ; for adapters beside the weights; for ends of texts that are
        no ids; for what `config_from_fields` refuses.
    """
    path = os.path.join(folder, "config.json")
    _check_whole(folder)
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} holds no config.json: pass a Hugging Face model folder, and save the model "
            "again if saving was cut short"
        )
    with open(path) as file:
        fields = json.load(file)
    config = config_from_fields(fields)
    config = dataclasses.replace(config, eos_ids=_ends(folder, config.eos_ids))
    found = _tensors(folder, fields.get("transformers_weights"))
    if not any(name.startswith("model.") for name in found):  # saved without the head
        found = {
            name if name == "lm_head.weight" else f"model.{name}": found[name] for name in found
        }
    return _tie(config, found)


def save_folder(
    folder: str,
    config: Config,
    specs: Mapping[str, tuple[tuple[int, ...], Any]],
    read: Callable[[str], np.ndarray],
    save_tokenizer: Callable[[str], None] | None = None,
) -> None:
    """Writes `config.json`, `model.safetensors` and what `save_tokenizer` writes.

    The shards of an older model in the folder go with their index, as when transformers saves, and
    so do its settings of generation, which would say where texts end in place of `config.json`.
    The weights are written beside the old ones first. While files change places there is no
    `config.json`, so what a kill leaves then is refused, and is never a mixture of two models.

    Args:
      folder: made if it doesn't exist.
      config: the model.
      specs: name -> (shape, dtype) of each tensor.
      read: name -> tensor; called once for each, in order.
      save_tokenizer: writes a tokenizer into the folder it is given.

    Raises:
      ValueError: if the folder holds an adapter or a distributed checkpoint, which transformers
        would load instead; for what `config_to_fields` refuses.
    """
    fields = config_to_fields(config)
    _check_whole(folder)
    os.makedirs(folder, exist_ok=True)
    weights, settings = (os.path.join(folder, name) for name in (_WEIGHTS, "config.json"))
    safetensors_files.write(f"{weights}.new", specs, read)
    with open(f"{settings}.new", "w") as file:
        json.dump(fields, file, indent=2)
    _remove(settings)
    os.replace(f"{weights}.new", weights)
    for name in (_INDEX, _GENERATION):
        _remove(os.path.join(folder, name))
    for name in filter(_SHARD.fullmatch, os.listdir(folder)):
        _remove(os.path.join(folder, name))
    if save_tokenizer is not None:
        save_tokenizer(folder)
    os.replace(f"{settings}.new", settings)


def download(name: str) -> str:
    """Returns the local folder of the model `name` ("owner/model" or "owner/model@revision").

    Files that are in the cache of huggingface_hub are not fetched again.

    Raises:
      ValueError: if it is neither in the cache nor to be had, or huggingface_hub is missing.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"downloading {name!r} needs huggingface_hub: pip install zofl-jax[language]"
        ) from error
    repository, _, revision = name.partition("@")
    try:
        return huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(FILES)
        )
    except (OSError, ValueError) as error:  # offline, unknown, gated, or not a valid name
        raise ValueError(
            f"{name!r} is not a folder here and could not be downloaded "
            f"({type(error).__name__}): check the name, or pass hf:FOLDER when offline"
        ) from error


def _ends(folder: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the tokens that end a text.

    `generation_config.json` wins over `config.json`, as in transformers. Where it names none,
    transformers goes on without an end, and `config.json` is taken here.
    """
    path = os.path.join(folder, _GENERATION)
    if not os.path.isfile(path):
        return default
    with open(path) as file:
        named = json.load(file).get("eos_token_id")
    if named is None:
        return default
    ids = named if isinstance(named, list) else [named]
    if not all(type(i) is int for i in ids):
        raise ValueError(
            f"{path} has {listed({'eos_token_id': named})}, which is no id: fetch it again"
        )
    return tuple(ids)


def _check_whole(folder: str) -> None:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if "adapter_config.json" in names and "config.json" in names:
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json) beside a model: merge it into the "
            "weights, or move it to a folder of its own"
        )
    if any(_DISTRIBUTED.fullmatch(name) for name in names):
        raise ValueError(
            f"{folder} holds a distributed checkpoint (shard-*.safetensors): save it as one model "
            "with transformers' save_pretrained, in another folder"
        )


def _tensors(folder: str, named: str | None) -> dict[str, safetensors_files.Tensor]:
    """Returns the tensors of the file or the shards that hold the weights, by name."""
    present = [name for name in (_WEIGHTS, _INDEX) if os.path.isfile(os.path.join(folder, name))]
    if named is not None:
        if named not in os.listdir(folder):
            raise ValueError(
                f"config.json names {named!r} as its weights (transformers_weights), which is no "
                f"file in {folder}: fetch it, or remove the key"
            )
        present = [named]
    if not present:
        names = os.listdir(folder)
        if any(name.endswith(".bin") for name in names):
            raise ValueError(
                f"{folder} holds torch .bin weights only, which are not read: save it once more "
                "with transformers' save_pretrained, or download a revision with safetensors"
            )
        others = sorted(name for name in names if name.endswith(".safetensors"))
        raise ValueError(
            f"{folder} holds no {_WEIGHTS}{f', only {some(others)}' if others else ''}: pass a "
            "Hugging Face model folder"
        )
    path = os.path.join(folder, present[0])
    found = safetensors_files.tensors(path) if path.endswith(".safetensors") else _sharded(path)
    return {name: t for name, t in found.items() if not name.endswith(_IGNORED)}


def _sharded(index: str) -> dict[str, safetensors_files.Tensor]:
    """Returns the tensors of all shards, which the index must list as they are."""
    with open(index) as file:
        places = json.load(file).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index} has no weight_map: fetch it again")
    folder = os.path.dirname(index)
    shards = sorted(set(places.values()))
    missing = [name for name in shards if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: fetch all shards")
    held = {
        (name, shard): tensor
        for shard in shards
        for name, tensor in safetensors_files.tensors(os.path.join(folder, shard)).items()
    }
    odd = sorted({name for name, _ in held.keys() ^ places.items()})
    odd = [name for name in odd if not name.endswith(_IGNORED)]
    if odd:
        raise ValueError(
            f"{index} and the shards do not agree where {some(odd)} lies: fetch all files of one "
            "revision"
        )
    return {name: tensor for (name, _), tensor in held.items()}


def _tie(
    config: Config, found: dict[str, safetensors_files.Tensor]
) -> tuple[Config, dict[str, safetensors_files.Tensor]]:
    """Returns a model whose head is tied where its tensors allow it."""
    if not config.tied or "lm_head.weight" not in found:
        return config, found
    table = f"{module_names(config)['embed/tokens']}.weight"
    if table in found and not _equal(found[table], found["lm_head.weight"]):
        return dataclasses.replace(config, tied=False), found
    head = found.pop("lm_head.weight")
    return config, {table: head} | found


def _equal(a: safetensors_files.Tensor, b: safetensors_files.Tensor) -> bool:
    return a.shape == b.shape and np.array_equal(a.read(), b.read())


def _remove(path: str) -> None:
    if os.path.lexists(path):
        os.remove(path)
