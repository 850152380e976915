"""The kinds of tasks: what each has by default, and where a task's examples come from.

A new source of images is one more row of `IMAGES`; a new benchmark of texts one more of
`tasks.catalogue.CATALOGUE`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from zofl_jax.data import sources, tfds
from zofl_jax.tasks import catalogue

OWN_TEXTS = "text"
"""The task of texts in files of one's own."""

DIGITS = "digits"
QUADRATIC = "quadratic"
TFDS = "tfds:"
"""What images from TFDS begin with."""


class Images(NamedTuple):
    """Where images come from.

    Attributes:
      load: --data_dir -> the examples.
      place: what --data_dir must be; None where there is no need of it.
    """

    load: Callable[[Any], sources.Dataset]
    place: str | None


IMAGES: Mapping[str, Images] = {
    DIGITS: Images(lambda data_dir: sources.digits(), None),
    "idx": Images(sources.idx, "the folder with the IDX files"),
    "npz": Images(sources.npz, "the .npz file"),
}
"""By the name of the task; the first one is the default."""


class Kind(NamedTuple):
    """A kind of tasks.

    Attributes:
      name: for people and in tables.
      defaults: settings whose default is another here.
    """

    name: Literal["images", "texts", "quadratic"]
    defaults: Mapping[str, Any]


KINDS: Mapping[str, Kind] = {
    "images": Kind("images", {}),
    # The settings of Li et al. 2025 (arXiv 2405.15861); their rate is 5e-6 for OPT-125M.
    "texts": Kind(
        "texts",
        {
            "num_clients": 8,
            "clients_per_round": 2,
            "local_steps": 1,
            "num_perturbations": 5,
            "estimator": "forward",
            "batch_size": 16,
            "momentum": 0.0,
        },
    ),
    "quadratic": Kind("quadratic", {"batch_size": 1}),
}


def kind_of(task: str) -> Kind:
    """Returns the kind of a task.

    Raises:
      ValueError: for a task that is unknown.

    >>> kind_of("sst2").name, kind_of("tfds:mnist").name
    ('texts', 'images')
    """
    if task == QUADRATIC:
        return KINDS["quadratic"]
    if task == OWN_TEXTS or task in catalogue.CATALOGUE:
        return KINDS["texts"]
    if task in IMAGES or task.startswith(TFDS):
        return KINDS["images"]
    raise ValueError(
        f"--task={task} is unknown; use {', '.join(IMAGES)}, {TFDS}NAME, {QUADRATIC}, "
        f"{OWN_TEXTS}, or one of {', '.join(catalogue.CATALOGUE)}"
    )


def load_images(task: str, data_dir: str | None) -> sources.Dataset:
    """Returns the examples of a task of images.

    Raises:
      DataError: if they are missing or malformed.
    """
    if task.startswith(TFDS):
        return tfds.load(task.removeprefix(TFDS), data_dir)
    return IMAGES[task].load(data_dir)
