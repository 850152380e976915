"""Public data that a mask is made from, in place of the clients' own (`--mask_data`).

--mask_data=idx:FOLDER          images of another source, of the same shape
--mask_data=reviews             texts of another task, by the loss of each next token
--mask_data=FILE.txt            the same, a text a line
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax.configuration import choices, kinds
from zofl_jax.configuration.config import Config
from zofl_jax.core import Batch, LossFn, Task
from zofl_jax.data import cache, sources
from zofl_jax.data import text as text_data
from zofl_jax.runs import fingerprints
from zofl_jax.tasks import catalogue, prompts

if TYPE_CHECKING:
    from zofl_jax.tasks.language import LanguageModel

TEXT_FILE = ".txt"
"""How the name of a file with a text a line ends."""


class Calibration(NamedTuple):
    """What the sensitivity of the params is measured by."""

    loss_fn: LossFn
    batch: Batch

    def inputs(self) -> fingerprints.Fingerprints:
        """Returns the fingerprint of the examples."""
        return {"mask's public data": fingerprints.arrays(*jax.tree.leaves(self.batch))}


def check(config: Config) -> None:
    """Checks that `--mask_data` names data that are of the run's kind and not the clients'.

    Raises:
      ValueError: otherwise.
    """
    text = str(config.mask_data)
    if text.endswith(TEXT_FILE):
        if config.kind != "texts":
            raise ValueError(
                f"--mask_data={text} is a file of texts, and --task={config.task} is not of texts: "
                "name a source of images"
            )
        return
    name, place = _named(text)
    own = config.task == name and (place is None or place == config.data_dir)
    if own:
        raise ValueError(
            f"--mask_data={text} is what the clients' own examples are from, and not public: name "
            "another source"
        )
    sources_here = {"images": kinds.IMAGES, "texts": catalogue.CATALOGUE}[config.kind]
    tfds = config.kind == "images" and name.startswith(kinds.TFDS)
    if name not in sources_here and not tfds:
        also = f" or a {TEXT_FILE} file" if config.kind == "texts" else f" or {kinds.TFDS}NAME"
        raise ValueError(
            f"--mask_data={text} is no source of {config.kind}: use "
            f"{', '.join(sources_here)}{also}, with :PLACE behind it for a folder or file"
        )


def of_images(config: Config, task: Task, num_classes: int) -> Calibration:
    """Returns the first examples of the source that `--mask_data` names, with the task's loss.

    Raises:
      ValueError: for data that are missing, or images or labels that the task's model can't take.
    """
    name, place = _named(str(config.mask_data))
    found: sources.Dataset = kinds.load_images(name, place)
    shape, wanted = found.train["image"].shape[1:], task.train.examples["image"].shape[1:]
    labels = int(np.max(found.train["label"])) + 1
    if shape != wanted or labels > num_classes:
        raise ValueError(
            f"--mask_data={config.mask_data} has images {list(shape)} of {labels} classes, and "
            f"--task={config.task} takes {list(wanted)} of {num_classes} at most: name a source "
            "like it"
        )
    few = {n: jnp.asarray(x[: choices.CALIBRATION_EXAMPLES]) for n, x in found.train.items()}
    return Calibration(task.loss, few)


def of_texts(config: Config, model: "LanguageModel") -> Calibration:
    """Returns the first texts that `--mask_data` names, with the loss of each next token.

    Raises:
      ValueError: for data that are missing or empty.
    """
    from zofl_jax.tasks import language

    texts = _texts(str(config.mask_data))[: choices.CALIBRATION_TEXTS]
    if not texts:
        raise ValueError(f"--mask_data={config.mask_data} has no texts: name another source")
    limit = min(choices.CALIBRATION_TOKENS, config.max_length or choices.CALIBRATION_TOKENS)
    batch = language.encoded_texts(model, texts, limit)
    return Calibration(language.next_token_loss(model), jax.tree.map(jnp.asarray, batch))


def _texts(text: str) -> list[str]:
    if text.endswith(TEXT_FILE):
        try:
            lines = Path(text).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise ValueError(
                f"--mask_data={text} can't be read ({error}): give a file of UTF-8 text"
            ) from None
        return [line.strip() for line in lines if line.strip()]
    name, place = _named(text)
    if name in text_data.SCORED and place is None:
        place = str(cache.reviews())
    rows = catalogue.load(name, place).train[: choices.CALIBRATION_TEXTS]
    prompt = catalogue.CATALOGUE[name].prompt
    return [prompts.render(prompt, row) for row in rows]


def _named(text: str) -> tuple[str, str | None]:
    """Returns the task's name, and where its data are if that is said."""
    if text.startswith(kinds.TFDS):
        return text, None
    name, _, place = text.partition(":")
    return name, place or None
