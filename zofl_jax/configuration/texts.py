"""Language models and their data, from a config.

The extra `[language]` is needed when something is built, not when this module is imported.
"""

import dataclasses
import json
import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from zofl_jax import keys
from zofl_jax.configuration import kinds, partitions
from zofl_jax.configuration.config import Config
from zofl_jax.core import Params, PRNGKey
from zofl_jax.data import cache, partition
from zofl_jax.data import text as text_data
from zofl_jax.models import lora
from zofl_jax.runs import fingerprints
from zofl_jax.tasks import catalogue, prompts

if TYPE_CHECKING:
    from zofl_jax.tasks.language import LanguageModel, LanguageTask

_ENCODED = "tokens of the"


def build(
    config: Config, root: keys.RootKeys
) -> tuple["LanguageTask", np.ndarray | None, Callable[[], fingerprints.Fingerprints]]:
    """Returns the task, for classes how many examples of each a client has, and its inputs.

    The inputs are functions of no arguments, since telling them takes as long as hashing the
    model does.

    Raises:
      ValueError: for a model or data that can't be read, or that don't fit each other.
      ImportError: without the extra `[language]`.
    """
    from zofl_jax.tasks import language

    everything = _read(config)
    data = _chosen(everything, config)
    prompt = prompt_of(config)
    prompts.check(prompt, data.train, f"{data.name}, train")
    data, client_ids = _owned(config, data)
    if prompt.answers is None:
        labels, num_classes = np.zeros(len(data.train), np.int32), 1
    else:
        labels, num_classes = prompts.class_ids(prompt, data.train), len(prompt.answers)
    order, offsets = partitions.share_out(config, labels, root, client_ids)
    model = load_model(config, root)
    shots = random.Random(config.seed).sample(data.train, min(config.shots, len(data.train)))
    given = (model, data, prompt, order, offsets)
    settings: dict[str, Any] = {
        "objective": config.objective,
        "max_length": config.max_length,
        "shots": shots,
    }
    counts = None
    if prompt.answers is None:
        built = language.generation(*given, max_new_tokens=config.max_new_tokens, **settings)
    else:
        built = language.classification(*given, **settings)
        counts = partition.label_counts(labels, order, offsets, num_classes)
    return built, counts, lambda: _inputs(built, everything, order, offsets)


def without_encoding(inputs: fingerprints.Fingerprints) -> fingerprints.Fingerprints:
    """Returns inputs without those that follow from flags of the prompt and its length too."""
    return {name: value for name, value in inputs.items() if not name.startswith(_ENCODED)}


def _inputs(
    built: "LanguageTask", data: text_data.TextData, order: np.ndarray, offsets: np.ndarray
) -> fingerprints.Fingerprints:
    """Returns the fingerprints of a task: of its rows, clients, tokenizer and base model."""
    from flax.traverse_util import flatten_dict

    found: fingerprints.Fingerprints = {}
    for split, rows in (("training", data.train), ("test", data.test)):
        found |= fingerprints.rows(split, {name: [row[name] for row in rows] for name in rows[0]})
    found["partition"] = fingerprints.arrays(order, offsets)
    tokenizer = built.model.tokenizer
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    found["tokenizer's vocabulary"] = fingerprints.text(json.dumps(sorted(vocabulary.items())))
    for name in ("bos_id", "eos_id"):
        found[f"tokenizer's {name}"] = getattr(tokenizer, name)
    for split, examples in (("training", built.task.train.examples), ("test", built.task.test)):
        found[f"{_ENCODED} {split} texts"] = fingerprints.arrays(*jax.tree.leaves(examples))
    for name, value in dataclasses.asdict(built.model.config).items():
        if name != "pad_id":  # padding is masked
            found[f"base model's {name}"] = fingerprints.plain(value)
    params = flatten_dict(built.model.params(built.model.trainable), sep="/")
    for path, leaf in params.items():
        if not path.split("/")[-1].startswith("lora_"):  # drawn, not read
            found[f"base model's weights {path}"] = fingerprints.array(leaf)
    return found


def notices(built: "LanguageTask") -> tuple[str, ...]:
    """Returns what a person should know of a task before it is used."""
    if not built.num_truncated:
        return ()
    longest = built.task.test["tokens"].shape[1]
    return (
        f"{built.num_truncated} texts are longer than {longest} tokens and lost their beginning; "
        "--max_length sets the limit",
    )


def load_model(config: Config, root: keys.RootKeys) -> "LanguageModel":
    """Returns the model of `--model`, split into what is trained and what isn't."""
    from zofl_jax.models import weights
    from zofl_jax.tasks import language

    default = cache.language_model()
    if config.model == f"gguf:{default}" and not default.is_file():
        raise ValueError(
            f"--task={config.task} needs --model=gguf:FILE or --model=hf:FOLDER_OR_NAME; make "
            "smollm2 fetches the one that is used unless another is given"
        )
    architecture, params, tokenizer = weights.load(str(config.model), config.dtype)
    if tokenizer is not None:
        older = "auto" if tokenizer.bos_id is None else "always"  # see `experiment.resumed`
        tokenizer = tokenizer.with_bos(config.bos or older)
    pattern = config.train_only
    return language.adapt(
        dataclasses.replace(architecture, matmul_dtype=config.matmul_dtype),
        params,
        tokenizer,
        train_only=(lambda path: bool(re.search(pattern, path))) if pattern else None,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_pattern=config.lora_pattern,
        key=_adapters_key(root),
    )


def divided(config: Config, root: keys.RootKeys, params: Params) -> tuple[Params, Params]:
    """Returns (trained, frozen) as `--lora_rank` or `--train_only` says, one of which is given.

    Raises:
      ValueError: for a pattern that matches nothing, or a rank larger than a matrix.
    """
    if config.lora_rank:
        given = (config.lora_pattern, config.lora_rank, config.lora_alpha, _adapters_key(root))
        return lora.add(params, *given)
    pattern = str(config.train_only)
    return lora.split(params, lambda path: bool(re.search(pattern, path)))


def _adapters_key(root: keys.RootKeys) -> PRNGKey:
    return jax.random.fold_in(root.init, keys.name_id("lora"))


def _read(config: Config) -> text_data.TextData:
    """Returns the texts of `--task`."""
    if config.task == kinds.OWN_TEXTS:
        return text_data.table(str(config.data_dir), config.held_out)
    return catalogue.load(config.task, config.data_dir)


def _chosen(data: text_data.TextData, config: Config) -> text_data.TextData:
    """Returns as many texts as asked for."""
    return data._replace(
        train=_some(data.train, config.train_examples),
        test=_some(data.test, config.test_examples),
    )


def _some(rows: list[text_data.Row], count: int) -> list[text_data.Row]:
    if not count or count >= len(rows):
        return rows
    chosen = random.Random(0).sample(range(len(rows)), count)
    return [rows[i] for i in sorted(chosen)]


def prompt_of(config: Config) -> prompts.Prompt:
    """Returns the prompt of a task of texts.

    Raises:
      ValueError: for verbalizers that can't be read or don't fit the task.
    """
    if config.task == kinds.OWN_TEXTS:
        prompt = prompts.Prompt(str(config.template), None, config.label_column)
    else:
        prompt = catalogue.CATALOGUE[config.task].prompt
        if config.template is not None:
            prompt = prompt._replace(template=config.template)
    if config.verbalizers is not None:
        labels, answers = prompts.parse_verbalizers(config.verbalizers)
        if config.task != kinds.OWN_TEXTS and prompt.answers is not None:
            classes = [str(i) for i in range(len(prompt.answers))]
            if sorted(labels) != classes:
                raise ValueError(
                    f"--verbalizers={config.verbalizers}: the labels of --task="
                    f"{config.task} are {', '.join(classes)}"
                )
        prompt = prompt._replace(labels=labels, answers=answers)
    return prompt


def _owned(
    config: Config, data: text_data.TextData
) -> tuple[text_data.TextData, np.ndarray | None]:
    """Returns the data with the rows to keep, and who owns each; None where nobody asks."""
    if config.partition != "natural":
        return data, None
    column = str(config.client_column)
    lacking = sum(column not in row for row in data.train)
    if lacking:
        raise ValueError(
            f"--client_column={column} is missing in {lacking} rows of {data.name}, which has "
            f"{', '.join(data.train[0])}"
        )
    places = [f"{data.name}, train, row {i}" for i in range(len(data.train))]
    owners = [
        text_data.owner(row, column, place) for row, place in zip(data.train, places, strict=True)
    ]

    def place(i: int) -> str:
        return text_data.place(data.train[i], places[i])

    kept, client_ids = partition.known_owners(
        owners, config.missing_owner or "error", place, config.least_examples
    )
    return data._replace(train=[data.train[i] for i in kept]), client_ids
