"""What settings need to have an effect: one table, and one check.

A setting that was given and has no effect with the others is refused, with the reason. What
methods read is told by their own declarations.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from zofl_jax.algorithms import METHODS, Method
from zofl_jax.configuration import choices, kinds, messages, texts
from zofl_jax.configuration.config import Config, Directions, Quadratic, Texts, everything
from zofl_jax.settings import settings_of


class Need(NamedTuple):
    """What a setting needs.

    Attributes:
      met: config -> whether it has an effect.
      otherwise: config -> why it has none, the end of "--name has no effect ".
      remedy: what to do about it.
    """

    met: Callable[[Config], bool]
    otherwise: Callable[[Config], str]
    remedy: str = "leave it out"


def _with(other: str, *values: str) -> Need:
    """Returns the need of another setting to have one of some values."""
    return Need(
        lambda config: config.get(other) in values,
        lambda config: f"with --{other}={config.get(other)}",
        f"leave it out, or choose {' or '.join(values)}",
    )


def _without(what: str, met: Callable[[Config], bool]) -> Need:
    """Returns the need of something, in words."""
    return Need(met, lambda config: f"without {what}")


def _but_with(what: Callable[[Config], str], met: Callable[[Config], bool]) -> Need:
    """Returns the need of not being together with something, in words."""
    return Need(met, lambda config: f"with {what(config)}")


def _task(config: Config) -> str:
    return f"--task={config.task}"


_DATA_AND_MODEL = _but_with(_task, lambda config: config.kind != "quadratic")
_OWN_TEXTS = _with("task", kinds.OWN_TEXTS)
_DIFFERENCES = _with("estimator", "forward", "central")
_PRIVATE = _without("--dp", lambda config: config.dp != "none")
_SECURE = _without("--secure_sum", lambda config: config.secure_sum)
_WARMED = _without("--warmup_rounds", lambda config: config.warmup_rounds > 0)
_LATE = _without("a --deadline", lambda config: config.deadline is not None)
_ADAPTERS = _without("a --lora_rank", lambda config: config.lora_rank > 0)

NEEDS: Mapping[str, tuple[Need, ...]] = {
    # Data.
    "data_dir": (
        _DATA_AND_MODEL,
        _but_with(
            lambda config: f"{_task(config)}, which comes with the package it needs",
            lambda config: config.task != kinds.DIGITS,
        ),
    ),
    "objective": (_DATA_AND_MODEL,),
    "partition": (_DATA_AND_MODEL,),
    "dirichlet_alpha": (_with("partition", "dirichlet"),),
    "shards_per_client": (_with("partition", "shards"),),
    "missing_owner": (_with("partition", "natural"),),
    "least_examples": (_with("partition", "natural"),),
    "client_column": (_with("partition", "natural"),),
    "num_clients": (
        _but_with(
            lambda config: "--partition=natural, where owners are the clients",
            lambda config: config.partition != "natural",
        ),
    ),
    # Texts.
    "text_column": (
        _OWN_TEXTS,
        _but_with(
            lambda config: "a --template, which names its columns",
            lambda config: "template" not in config.given,
        ),
    ),
    "label_column": (_OWN_TEXTS,),
    "held_out": (
        _OWN_TEXTS,
        _but_with(
            lambda config: f"--data_dir={config.data_dir}, a folder with files of its own for it",
            lambda config: not Path(str(config.data_dir)).expanduser().is_dir(),
        ),
    ),
    "lora_alpha": (_ADAPTERS,),
    "lora_pattern": (_ADAPTERS,),
    "max_new_tokens": (
        _but_with(
            lambda config: "classes, whose answers are chosen and not written",
            lambda config: texts.prompt_of(config).answers is None,
        ),
    ),
    # Learning and directions.
    "momentum": (_with("optimizer", "sgd"),),
    "rank": (_with("perturbation", *choices.FACTORED),),
    "subspace_rounds": (_with("perturbation", "subspace"),),
    "history_share": (_without("a --history", lambda config: config.history > 0),),
    "smoothing": (_DIFFERENCES,),
    "perturbations_at_once": (_DIFFERENCES,),
    "mask_density": (_with("mask", "random", "magnitude", "sensitivity"),),
    "mask_data": (_with("mask", "sensitivity"), _DATA_AND_MODEL),
    "step_rule": (_with("optimizer", "sgd"),),
    "step_decay": (_with("step_rule", "meazo"),),
    "ferret_rank": (
        _but_with(
            lambda config: "--ferret_remainder, where the step is that of the least error",
            lambda config: not config.get("ferret_remainder"),
        ),
    ),
    # Warm-up.
    "warmup": (_WARMED,),
    "warmup_learning_rate": (_WARMED,),
    "warmup_local_steps": (_WARMED,),
    "warmup_share": (_WARMED,),
    # Compression.
    "top_k_fraction": (_with("compression", "top_k"),),
    "stochastic_rounding": (_with("compression", "float16", "bfloat16", "int8", "int4", "qsgd"),),
    # Adversity.
    "trimmed_share": (
        _without("--aggregator=trimmed_mean", lambda config: config.aggregator == "trimmed_mean"),
    ),
    "num_byzantine": (
        _without(
            "--aggregator=krum or multi_krum",
            lambda config: config.aggregator in ("krum", "multi_krum"),
        ),
    ),
    "aggregator_size": (
        _without(
            "--aggregator=clipped_mean or majority_sign",
            lambda config: config.aggregator in ("clipped_mean", "majority_sign"),
        ),
    ),
    "malicious_share": (_without("an --attack", lambda config: config.attack != "none"),),
    "attack_size": (
        _without(
            f"--attack={' or '.join(choices.ATTACK_SIZES)}, on uploads that are more than signs",
            lambda config: (
                config.attack in choices.ATTACK_SIZES
                and messages.upload(config) is not messages.Upload.BITS
            ),
        ),
    ),
    "max_message": (
        _without(
            "uploads of floating point numbers",
            lambda config: (
                not config.secure_sum and messages.upload(config) is not messages.Upload.BITS
            ),
        ),
    ),
    # Privacy.
    "dp_clip": (_PRIVATE,),
    "dp_noise": (_PRIVATE,),
    "dp_delta": (
        _without(
            "--dp or a method that is private by itself",
            lambda config: config.dp != "none" or config.method.private(config.options),
        ),
    ),
    "secure_bits": (_SECURE,),
    "secure_largest": (_SECURE,),
    # Presence.
    "time_spread": (_LATE,),
    "late_weight": (_LATE,),
    "join_by": (_without("--late_joiners", lambda config: config.late_joiners > 0),),
}
"""By setting, all that it needs."""

MAY_BE_SHARED = (
    *("estimator", "perturbation", "rank", "num_perturbations", "smoothing"),
    *("perturbations_at_once", "momentum"),
)
"""What a comparison may give to all methods, though some don't read it."""


def check(config: Config, shared: Collection[str] = ()) -> None:
    """Checks that every setting that was given has an effect.

    Args:
      config: resolved.
      shared: settings that the methods of a comparison were given together.

    Raises:
      ValueError: for the first that has none.
    """
    for name in everything():  # in the order of the declarations
        if name in config.given and not (name in shared and name in MAY_BE_SHARED):
            check_one(config, name)


def check_one(config: Config, name: str) -> None:
    """Checks that a setting has an effect; arguments and errors as `check`."""
    for need in (*_of_methods(name), *_of_kinds(name), *NEEDS.get(name, ())):
        if not need.met(config):
            raise ValueError(f"--{name} has no effect {need.otherwise(config)}: {need.remedy}")


def reads(method: Method, name: str) -> bool:
    """Returns whether a method reads a setting of directions, or one that is its own."""
    directions = (*settings_of(Directions), "perturbations_at_once")
    of_order = directions if method.order == 0 else method.reads
    return name in settings_of(method.options) or name in of_order


def _of_methods(name: str) -> Iterator[Need]:
    """What only some methods read."""
    readers = [method.name for method in METHODS.values() if reads(method, name)]
    if readers:
        yield _with("algorithm", *readers)
    if name == "compression":
        yield _but_with(
            lambda config: f"--algorithm={config.algorithm}, whose uploads are bits",
            lambda config: messages.upload(config) is not messages.Upload.BITS,
        )


def _of_kinds(name: str) -> Iterator[Need]:
    """What only some kinds of tasks read."""
    for group, kind in ((Texts, "texts"), (Quadratic, "quadratic")):
        if name in settings_of(group):
            yield Need(
                lambda config, kind=kind: config.kind == kind,  # type: ignore[misc]
                lambda config, kind=kind: f"with {_task(config)}, it is for {kind}",  # type: ignore[misc]
            )
