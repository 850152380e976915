"""The flags of language models and their data, and what is built from them.

`config.py` hands over what concerns texts; this module needs the extra `[language]` when it
builds, not when it is imported.
"""

import dataclasses
import json
import random
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import flags

from experiments import fetch, partitions
from zofl_jax import keys
from zofl_jax.data import partition
from zofl_jax.data import text as text_data
from zofl_jax.runs import fingerprints
from zofl_jax.tasks import catalogue, objectives, prompts

if TYPE_CHECKING:
    from zofl_jax.tasks.language import LanguageModel, LanguageTask

Values = Mapping[str, Any]

OWN_DATA = "text"
DEFAULTS = {
    "num_clients": 8,
    "clients_per_round": 2,
    "local_steps": 1,
    "num_perturbations": 5,
    "estimator": "forward",
    "batch_size": 16,
    "momentum": 0.0,
}
"""Of flags that are not given, on texts: the settings of Li et al. 2025 (arXiv 2405.15861). The
learning rate is that of `rates.py`; theirs is 5e-6 for OPT-125M."""

flags.DEFINE_enum(
    "objective",
    None,
    [*objectives.CLASSIFICATION, "sequence"],
    "What is improved: the cross-entropy of the classes (unless given), that of the answer in the "
    "whole vocabulary (sequence; for written answers unless given), accuracy, or F1 (of the "
    "tokens, for written answers).",
)
flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16", "float16"],
    "What a language model computes in, and its weights are kept in: those that are trained are "
    "kept in float32, or small updates would round away.",
)
flags.DEFINE_enum(
    "matmul_dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "What the factors of a language model's products with weights are rounded to; sums stay "
    "float32. bfloat16 is two to three times as fast on CPUs with AMX, and what TPUs do anyway.",
)
flags.DEFINE_enum(
    "bos",
    None,
    ["auto", "always", "never"],
    "Whether the token that starts a text (BOS) stands before every prompt: as the model's files "
    "say (auto, unless given), always or never.",
)
flags.DEFINE_integer("lora_rank", 0, "Rank of LoRA adapters; 0 trains the weights.", lower_bound=0)
flags.DEFINE_float("lora_alpha", 16.0, "α of LoRA: adapters are scaled by α / rank.")
flags.DEFINE_string(
    "lora_pattern", "attention/(q|v)/kernel", "Regular expression: weights that get adapters."
)
flags.DEFINE_string(
    "train_only", None, "Regular expression: the only params of a language model to train."
)
flags.DEFINE_integer(
    "max_length",
    None,
    "Longest text in tokens, cut on the left; the model's limit unless given.",
    lower_bound=8,
)
flags.DEFINE_integer(
    "max_new_tokens", 32, "Longest written answer in tokens, of the data and of the model.", 1
)
flags.DEFINE_integer(
    "shots", 0, "Training examples shown with their answers before each text.", lower_bound=0
)
flags.DEFINE_integer("train_examples", 0, "Training examples used, 0 for all.", lower_bound=0)
flags.DEFINE_integer("test_examples", 0, "Test examples used, 0 for all.", lower_bound=0)
flags.DEFINE_string("text_column", "text", f"Column of the text (--task={OWN_DATA}).")
flags.DEFINE_string("label_column", "label", f"Column of the label (--task={OWN_DATA}).")
flags.DEFINE_string(
    "client_column", None, f"Column that names an example's owner (--task={OWN_DATA})."
)
flags.DEFINE_float(
    "held_out",
    0.1,
    f"Share of the rows held out for testing (--task={OWN_DATA} with a single file).",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_string(
    "template",
    None,
    "Prompt with columns in braces, as '{text} It was'; that of the task unless given.",
)
flags.DEFINE_string(
    "verbalizers",
    None,
    "A word for each label, as 'negative=bad,positive=good'; those of the task unless given.",
)

_ENCODED = "tokens of the"

FLAGS = flags.FLAGS

NAMES = tuple(flag.name for flag in FLAGS.flags_by_module_dict()[__name__])


def is_language_task(name: str) -> bool:
    """Returns whether a task is about texts."""
    return name == OWN_DATA or name in catalogue.CATALOGUE


def fill_in(values: dict[str, Any], given: set[str]) -> None:
    """Sets the flags that were not given to what suits texts, and checks the others.

    Raises:
      ValueError: for flags that don't fit each other.
    """
    task = values["task"]
    values.update({name: value for name, value in DEFAULTS.items() if name not in given})
    values["bos"] = values["bos"] or "auto"
    if values["model"] is None:
        values["model"] = f"gguf:{fetch.default_model_path()}"
    if values["model"].partition(":")[0] not in ("gguf", "hf"):
        raise ValueError(
            f"--model={values['model']} is no language model: use gguf:FILE or hf:FOLDER_OR_NAME"
        )
    if task == OWN_DATA:
        if values["data_dir"] is None:
            raise ValueError(
                f"--task={OWN_DATA} needs --data_dir=a .tsv, .csv or .jsonl file, or a folder with "
                "train.* and test.*"
            )
        if values["template"] is None:
            values["template"] = f"{{{values['text_column']}}} It was"
    if task == "reviews" and values["data_dir"] is None:
        values["data_dir"] = str(fetch.default_reviews_folder())
    for name in ("lora_pattern", "train_only"):
        try:
            re.compile(values[name] or "")
        except re.error as error:
            raise ValueError(
                f"--{name}={values[name]} is no regular expression ({error})"
            ) from None
    if values["lora_rank"] and values["train_only"]:
        raise ValueError(
            f"--lora_rank={values['lora_rank']} and --train_only={values['train_only']} exclude "
            "each other: drop one"
        )
    if values["lora_alpha"] <= 0:
        raise ValueError(f"--lora_alpha must be positive, got {values['lora_alpha']}")
    prompt = _prompt(values)
    objective = values["objective"] or ("cross_entropy" if prompt.answers else "sequence")
    if prompt.answers is None and objective not in ("sequence", "f1"):
        raise ValueError(
            f"--objective={objective} needs classes: give --verbalizers=LABEL=WORD,LABEL=WORD, or "
            "use sequence or f1 for written answers"
        )
    values["objective"] = objective
    if values["partition"] in ("dirichlet", "shards") and prompt.answers is None:
        raise ValueError(
            f"--partition={values['partition']} needs classes, and written answers have none: use "
            "iid or natural"
        )
    if values["partition"] == "natural" and values["client_column"] is None:
        raise ValueError("--partition=natural needs --client_column with each example's owner")


def resumed(values: Values, recorded: Values) -> dict[str, Any]:
    """Returns the flags with which a command goes on with a run.

    Runs from before `--bos` put the token first wherever there was one, whatever the model's
    files said. They go on so unless told otherwise, and then a flag differs from theirs.

    Args:
      values: of the command.
      recorded: the run's.
    """
    given = values["bos"] != "auto" or not FLAGS["bos"].using_default_value
    return dict(values) if given or recorded.get("bos") else {**values, "bos": None}


def build(
    values: Values, root: keys.RootKeys
) -> tuple["LanguageTask", np.ndarray | None, Callable[[], fingerprints.Fingerprints]]:
    """Returns the task, for classes how many examples of each a client has, and its inputs.

    The inputs are functions of no arguments, since telling them takes as long as hashing the
    model does.

    Raises:
      ValueError: for a model or data that can't be read, or that don't fit each other.
      ImportError: without the extra `[language]`.
    """
    from zofl_jax.tasks import language

    everything = _read(values)
    data = _chosen(everything, values)
    prompt = _prompt(values)
    prompts.check(prompt, data.train, f"{data.name}, train")
    data, client_ids = _owned(values, data)
    if prompt.answers is None:
        labels, num_classes = np.zeros(len(data.train), np.int32), 1
    else:
        labels, num_classes = prompts.class_ids(prompt, data.train), len(prompt.answers)
    order, offsets = partitions.share_out(values, labels, root, client_ids)
    model = load_model(values, root)
    shots = random.Random(values["seed"]).sample(data.train, min(values["shots"], len(data.train)))
    given = (model, data, prompt, order, offsets)
    settings: dict[str, Any] = {
        "objective": values["objective"],
        "max_length": values["max_length"],
        "shots": shots,
    }
    counts = None
    if prompt.answers is None:
        built = language.generation(*given, max_new_tokens=values["max_new_tokens"], **settings)
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


def load_model(values: Values, root: keys.RootKeys) -> "LanguageModel":
    """Returns the model of `--model`, split into what is trained and what isn't."""
    from zofl_jax.models import weights
    from zofl_jax.tasks import language

    default = fetch.default_model_path()
    if values["model"] == f"gguf:{default}" and not default.is_file():
        raise ValueError(
            f"--task={values['task']} needs --model=gguf:FILE or --model=hf:FOLDER_OR_NAME; make "
            "smollm2 fetches the one that is used unless another is given"
        )
    config, params, tokenizer = weights.load(values["model"], values["dtype"])
    if tokenizer is not None:
        older = "auto" if tokenizer.bos_id is None else "always"  # see `resumed`
        tokenizer = tokenizer.with_bos(values.get("bos") or older)
    pattern = values["train_only"]
    return language.adapt(
        dataclasses.replace(config, matmul_dtype=values["matmul_dtype"]),
        params,
        tokenizer,
        train_only=(lambda path: bool(re.search(pattern, path))) if pattern else None,
        lora_rank=values["lora_rank"],
        lora_alpha=values["lora_alpha"],
        lora_pattern=values["lora_pattern"],
        key=jax.random.fold_in(root.init, keys.name_id("lora")),
    )


def _read(values: Values) -> text_data.TextData:
    """Returns the texts of `--task`."""
    if values["task"] == OWN_DATA:
        return text_data.table(values["data_dir"], values["held_out"])
    return catalogue.load(values["task"], values["data_dir"])


def _chosen(data: text_data.TextData, values: Values) -> text_data.TextData:
    """Returns as many texts as asked for."""
    return data._replace(
        train=_some(data.train, values["train_examples"]),
        test=_some(data.test, values["test_examples"]),
    )


def _some(rows: list[text_data.Row], count: int) -> list[text_data.Row]:
    if not count or count >= len(rows):
        return rows
    chosen = random.Random(0).sample(range(len(rows)), count)
    return [rows[i] for i in sorted(chosen)]


def _prompt(values: Values) -> prompts.Prompt:
    if values["task"] == OWN_DATA:
        prompt = prompts.Prompt(values["template"], None, values["label_column"])
    else:
        prompt = catalogue.CATALOGUE[values["task"]].prompt
        if values["template"] is not None:
            prompt = prompt._replace(template=values["template"])
    if values["verbalizers"] is not None:
        labels, answers = prompts.parse_verbalizers(values["verbalizers"])
        if values["task"] != OWN_DATA and prompt.answers is not None:
            classes = [str(i) for i in range(len(prompt.answers))]
            if sorted(labels) != classes:
                raise ValueError(
                    f"--verbalizers={values['verbalizers']}: the labels of --task="
                    f"{values['task']} are {', '.join(classes)}"
                )
        prompt = prompt._replace(labels=labels, answers=answers)
    return prompt


def _owned(
    values: Values, data: text_data.TextData
) -> tuple[text_data.TextData, np.ndarray | None]:
    """Returns the data with the rows to keep, and who owns each; None where nobody asks."""
    if values["partition"] != "natural":
        return data, None
    column = values["client_column"]
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

    kept, client_ids = partition.known_owners(owners, values.get("missing_owner") or "error", place)
    return data._replace(train=[data.train[i] for i in kept]), client_ids
