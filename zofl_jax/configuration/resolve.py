"""From the settings that a user gave to the config of a run: a pure function.

    config = resolve({"task": "digits", "algorithm": "hiso", "rounds": 100})

Values come in one order, each replacing those before: the setting's default, that of the kind of
task, that of the method, what was given. Then come what the method fixes, what is found out from
other settings (the model, the learning rate ...), and all checks.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from zofl_jax.algorithms import METHODS, Refusal, step_rules
from zofl_jax.configuration import (
    choices,
    kinds,
    messages,
    needs,
    public,
    rates,
    schedules,
    texts,
    warmups,
    wrapping,
)
from zofl_jax.configuration.config import Config, everything, general
from zofl_jax.configuration.experiment import convolutional
from zofl_jax.data import cache
from zofl_jax.data import text as text_data
from zofl_jax.models.images import MODELS
from zofl_jax.settings import Value, settings_of
from zofl_jax.tasks import objectives


def resolve(given: Mapping[str, Any], shared: Collection[str] = ()) -> Config:
    """Returns the config that settings describe, checked.

    Args:
      given: values by name, of those alone that the user gave; None takes the default.
      shared: names of those that the methods of a comparison were given together.

    Raises:
      ValueError: for values out of range, without effect, or that don't go together; the message
        names the setting as a flag, its value and the remedy.

    >>> config = resolve({"algorithm": "hiso", "rounds": 100})
    >>> config.rounds, config.momentum, config.options.hiso_nu
    (100, 0.0, 0.01)
    >>> resolve({"algorithm": "hiso", "pool_size": 100})
    Traceback (most recent call last):
    ValueError: --pool_size has no effect with --algorithm=hiso: leave it out, or choose \
fedkseed or fedkseed_pro
    """
    values = {
        name: _setting(name).checked(value) for name, value in given.items() if value is not None
    }
    config = _filled_in(_layered(values))
    needs.check(config, shared)
    checks = (_check_method, _check_cohort, _check_adversity, _check_sums, _check_privacy)
    for check in (*checks, _check_schedule, _check_groups, _check_centring):
        check(config)
    if config.learning_rate is None:
        config = config.replace(learning_rate=rates.default(config))
    if config.warmup_rounds:
        _check_warmup(config)
        rate = warmups.config_of(config).learning_rate
        config = config.replace(warmup_learning_rate=rate)
    return config


def _setting(name: str) -> Any:
    if name not in everything():
        close = difflib.get_close_matches(name, everything(), 1)
        raise ValueError(f"there is no setting {name!r}" + (f"; {close[0]}?" if close else ""))
    return everything()[name]


def _layered(given: Mapping[str, Value]) -> Config:
    """Returns the config of the layers of defaults, of what was given, and of what is fixed."""
    defaults = {name: setting.default for name, setting in general().items()}
    kind = kinds.kind_of(str(given.get("task", defaults["task"])))
    method = METHODS[str(given.get("algorithm", defaults["algorithm"]))]
    own = {name: setting.default for name, setting in settings_of(method.options).items()}
    layers = {**defaults, **own, **kind.defaults, **method.defaults, **given}
    for name, value in method.fixed.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"--{name}={given[name]} is not possible with --algorithm={method.name}, where it "
                f"is always {value}: leave it out"
            )
    layers |= method.fixed
    others = [name for name in given if name not in {**defaults, **own}]
    options = method.options(**{name: layers[name] for name in own})
    config = Config(
        **{name: layers[name] for name in defaults},
        options=options,
        given=frozenset(given),
    )
    for name in others:  # which have no place in it
        needs.check_one(config, name)
    return config


def _filled_in(config: Config) -> Config:
    """Returns the config with what follows from its other settings, checked on the way."""
    fill: dict[str, Callable[[Config], Config]] = {
        "images": _of_images,
        "texts": _of_texts,
        "quadratic": _of_the_quadratic,
    }
    config = fill[config.kind](config)
    if config.objective in objectives.WITHOUT_GRADIENT:
        _check_gradient(config)
    of_device = config.kind == "texts" or convolutional(config)  # what is fast depends on it
    if config.perturbations_at_once is None and not of_device:
        config = config.replace(perturbations_at_once=0)
    if config.dp == "example":
        if "clients_at_once" in config.given and config.clients_at_once:
            raise ValueError(
                f"--clients_at_once={config.clients_at_once} is not possible with --dp=example: "
                "leave it out"
            )
        config = config.replace(clients_at_once=0)
    elif config.clients_at_once is None and not of_device:
        config = config.replace(clients_at_once=0)
    if "num_perturbations" not in config.given | set(config.method.fixed):
        # As many as there are by default, or a few more: the groups of a batch have equal shares.
        count = math.ceil(config.num_perturbations / config.groups) * config.groups
        config = config.replace(num_perturbations=count)
    if config.attack_size is None:
        config = config.replace(attack_size=choices.ATTACK_SIZES.get(config.attack))
    return config


def _of_the_quadratic(config: Config) -> Config:
    if config.model is not None:
        raise ValueError(f"--model={config.model} has no meaning with --task={config.task}")
    return config.replace(model=kinds.QUADRATIC)


def _of_images(config: Config) -> Config:
    model = next(iter(MODELS)) if config.model is None else config.model
    if model not in MODELS:
        raise ValueError(f"--model={model} is no model of images: use one of {', '.join(MODELS)}")
    objective = config.objective or "cross_entropy"
    if objective not in objectives.CLASSIFICATION:
        raise ValueError(f"--objective={objective} is for texts, not for images")
    source = kinds.IMAGES.get(config.task)
    if source and source.place and not config.data_dir:
        raise ValueError(f"--task={config.task} needs --data_dir={source.place}")
    return config.replace(model=model, objective=objective)


def _of_texts(config: Config) -> Config:
    own = config.task == kinds.OWN_TEXTS
    model = config.model or f"gguf:{cache.language_model()}"
    if model.partition(":")[0] not in ("gguf", "hf"):
        raise ValueError(
            f"--model={model} is no language model: use gguf:FILE or hf:FOLDER_OR_NAME"
        )
    if own and config.data_dir is None:
        raise ValueError(
            f"--task={config.task} needs --data_dir=a .tsv, .csv or .jsonl file, or a folder with "
            "train.* and test.*"
        )
    config = config.replace(model=model, bos=config.bos or "auto")
    if own and config.template is None:
        config = config.replace(template=f"{{{config.text_column}}} It was")
    if config.task in text_data.SCORED and config.data_dir is None:
        config = config.replace(data_dir=str(cache.reviews()))
    for name in ("lora_pattern", "train_only"):
        try:
            re.compile(str(config.get(name) or ""))
        except re.error as error:
            raise ValueError(
                f"--{name}={config.get(name)} is no regular expression ({error})"
            ) from None
    if config.lora_rank and config.train_only:
        raise ValueError(
            f"--lora_rank={config.lora_rank} and --train_only={config.train_only} exclude each "
            "other: drop one"
        )
    return _with_objective(config)


def _with_objective(config: Config) -> Config:
    """Returns a config of texts with its objective, which must fit the kind of answers."""
    written = texts.prompt_of(config).answers is None
    objective = config.objective or ("sequence" if written else "cross_entropy")
    if written and objective not in ("sequence", "f1"):
        raise ValueError(
            f"--objective={objective} needs classes: give --verbalizers=LABEL=WORD,LABEL=WORD, or "
            "use sequence or f1 for written answers"
        )
    if config.partition in ("dirichlet", "shards") and written:
        raise ValueError(
            f"--partition={config.partition} needs classes, and written answers have none: use "
            "iid or natural"
        )
    if config.partition == "natural" and config.client_column is None:
        source = text_data.SCORED.get(config.task)
        if source and source.owner:
            return config.replace(objective=objective, client_column=source.owner)
        raise ValueError("--partition=natural needs --client_column with each example's owner")
    return config.replace(objective=objective)


def _check_gradient(config: Config) -> None:
    without = f"--objective={config.objective} has no useful gradient, which"
    if config.method.order == 1:
        able = [method.name for method in METHODS.values() if method.order == 0]
        raise ValueError(f"{without} --algorithm={config.algorithm} needs: use {', '.join(able)}")
    if config.estimator in ("projection", "jvp"):
        raise ValueError(f"{without} --estimator={config.estimator} needs: use forward or central")


def _check_method(config: Config) -> None:
    """Checks what the method itself refuses."""
    for name, refusal in config.method.refuses.items():
        value = config.get(name)
        plain = everything()[name].default
        if value != plain if refusal.values is None else value in refusal.values:
            raise ValueError(_refused(config, name, refusal))


def _check_groups(config: Config) -> None:
    """Checks that a batch can be shared out to groups, and directions to them."""
    size = config.examples_per_direction
    given = f"--examples_per_direction={size}"
    if not size:
        return
    if config.batch_size % size:
        raise ValueError(
            f"{given} does not divide --batch_size={config.batch_size}: take a divisor"
        )
    if "num_perturbations" in config.method.fixed:
        raise ValueError(
            f"{given} is not possible with --algorithm={config.algorithm}, which measures along "
            f"{config.num_perturbations}: leave it out"
        )
    if config.dp == "example":
        raise ValueError(
            f"{given} is not possible with --dp=example, which clips an example's scalars along "
            "all directions: leave one of them out"
        )
    if config.objective == "f1":
        raise ValueError(
            f"{given} is not possible with --objective=f1, which is no mean over examples: leave "
            "it out"
        )
    for change in schedules.parse_schedule(config.schedule):
        count = schedules.directions(config, change)
        if count % config.groups:
            raise ValueError(
                f"{given} makes {config.groups} groups of --batch_size={config.batch_size}, and "
                f"{count} directions can't be shared out to them: let --num_perturbations be a "
                f"multiple of {config.groups}"
            )


def _refused(config: Config, name: str, refusal: Refusal) -> str:
    return (
        f"--{name}={config.get(name)} is not possible with --algorithm={config.algorithm}, "
        f"{refusal.reason}: {refusal.instead}"
    )


def _check_cohort(config: Config) -> None:
    if config.clients_per_round > config.num_clients and config.partition != "natural":
        raise ValueError(
            f"--clients_per_round={config.clients_per_round} is more than "
            f"--num_clients={config.num_clients}"
        )
    least = 2 * config.num_byzantine + 3
    if config.aggregator in ("krum", "multi_krum") and config.clients_per_round < least:
        raise ValueError(
            f"--aggregator={config.aggregator} with --num_byzantine={config.num_byzantine} needs a "
            f"cohort of {least} or more, got --clients_per_round={config.clients_per_round}"
        )


def _check_adversity(config: Config) -> None:
    """Checks attacks, rules and late uploads against what uploads are."""
    wrapping.robust_rule(config)
    wrapping.attack(config)
    wrapping.availability(config)
    if config.attack == "label_flip" and config.kind == "quadratic":
        raise ValueError(f"--attack=label_flip needs labels, which --task={config.task} has not")
    plain = {"aggregator": "mean", "secure_sum": False, "late_weight": 0.0}
    changed = [name for name, value in plain.items() if config.get(name) != value]
    if changed and not messages.upload(config).numbers:
        refusal = Refusal("whose uploads are no numbers")
        raise ValueError(_refused(config, changed[0], refusal))
    if config.broadcast_compression != "none" and not messages.numbers_are_broadcast(config):
        refusal = Refusal("whose broadcasts are no numbers")
        raise ValueError(_refused(config, "broadcast_compression", refusal))
    if config.late_weight and config.get("step_rule") != step_rules.PLAIN:
        raise ValueError(
            f"--late_weight={config.late_weight} is not possible with "
            f"--step_rule={config.get('step_rule')}, whose steps are as long whatever an upload "
            f"weighs: use --step_rule={step_rules.PLAIN}"
        )
    moving = {
        "perturbation": config.perturbation == "subspace",
        "history": config.history > 0,
        "centre_rounds": bool(config.centre_rounds),
    }
    for name, moves in moving.items():
        if moves and config.late_weight:
            raise ValueError(
                f"--late_weight={config.late_weight} is not possible with "
                f"--{name}={config.get(name)}, whose directions of the round before nobody has: "
                "use --late_weight=0"
            )
    together = [f"--{name}={config.get(name)}" for name, moves in moving.items() if moves]
    if len(together) > 1:
        raise ValueError(
            f"{together[-1]} is not possible with {together[0]}, whose directions have a span "
            "already: leave one of them out"
        )
    if config.secure_sum and config.attack in ("nan", "inf"):
        raise ValueError(
            f"--attack={config.attack} is not possible with --secure_sum, whose uploads are "
            "integers: use --attack=sign_flip"
        )
    sent = messages.upload(config) if config.attack != "none" else None
    for kind, impossible, reason in (
        (messages.Upload.BITS, choices.UNSIGNED, "whose uploads are signs alone"),
        (messages.Upload.SEEDS, choices.COMPARING, "whose clients share no directions"),
    ):
        if sent is kind and config.attack in impossible:
            refusal = Refusal(reason, instead="use --attack=sign_flip")
            raise ValueError(_refused(config, "attack", refusal))


def _check_centring(config: Config) -> None:
    """Checks that clients may send the means of their activations, and directions heed them."""
    rounds = schedules.parse_rounds(config.centre_rounds)
    given = f"--centre_rounds={config.centre_rounds}"
    if not rounds:
        return
    if rounds[-1] >= config.rounds - 1:
        raise ValueError(
            f"{given} leaves no round of --rounds={config.rounds} after it: take earlier ones, or "
            "more --rounds"
        )
    if rounds[0] < config.warmup_rounds:
        raise ValueError(
            f"{given} is not possible with --warmup_rounds={config.warmup_rounds}, whose method "
            f"has no directions: take {config.warmup_rounds} or later ones"
        )
    if config.dp != "none" or config.method.private(config.options):
        raise ValueError(
            f"{given} is not possible with differential privacy, whose ε does not count the means "
            "that clients send: leave it out"
        )
    for name, plain, possible, reason in (
        ("mask", "none", False, "which cuts its directions"),
        ("aggregator", "mean", config.aggregator != "majority_sign", "which makes signs of means"),
    ):
        if config.get(name) != plain and not possible:
            raise ValueError(
                f"{given} is not possible with --{name}={config.get(name)}, {reason}: use "
                f"--{name}={plain}"
            )
    if config.kind == "quadratic":
        raise ValueError(
            f"{given} needs a model with products X W, which --task={config.task} has not: leave "
            "it out"
        )


def _check_sums(config: Config) -> None:
    plain = {"aggregator": "mean", "weighting": "uniform", "compression": "none", "late_weight": 0}
    for name, value in plain.items():
        if config.secure_sum and config.get(name) != value:
            raise ValueError(
                f"--{name}={config.get(name)} is not possible with --secure_sum, which tells the "
                f"server the uniform mean alone: use --{name}={value}"
            )


def _check_privacy(config: Config) -> None:
    by_itself = config.method.private(config.options)
    if config.dp == "client":
        _check_private_clients(config)
    if config.mask_data is not None:
        public.check(config)
    elif config.mask == "sensitivity" and (config.dp != "none" or by_itself):
        raise ValueError(
            "--mask=sensitivity is not possible with differential privacy: clients' own examples "
            "make it, which ε does not count; name public ones by --mask_data, or use "
            "--mask=random or --mask=magnitude"
        )
    if config.dp == "example" and by_itself:
        raise ValueError(
            f"--dp=example and the privacy of --algorithm={config.algorithm} itself are two "
            "accounts: choose one of them"
        )
    if config.dp == "example" and config.method.order == 1:
        raise ValueError(
            f"--dp=example clips each example's scalars, which --algorithm={config.algorithm} does "
            "not measure: use a zeroth-order algorithm, or --dp=client"
        )


def _check_private_clients(config: Config) -> None:
    if messages.upload(config) not in (messages.Upload.SCALARS, messages.Upload.PARAMS):
        refusal = Refusal(
            "whose uploads are more than one vector of numbers", instead="use another algorithm"
        )
        raise ValueError(_refused(config, "dp", refusal))
    for name, plain, reason in (
        ("aggregator", "mean", "the noise is that of a mean"),
        ("weighting", "uniform", "the noise is that of a uniform mean"),
        ("compression", "none", "ε is that of the noisy sum, and not of codes of its parts"),
        ("late_weight", 0.0, "a late upload has no part in a round's noise"),
        ("late_joiners", 0.0, "ε counts on cohorts from the whole population"),
        ("availability", "", "ε counts on cohorts from the whole population"),
    ):
        if config.get(name) != plain:
            raise ValueError(
                f"--{name}={config.get(name)} is not possible with --dp=client: {reason}; use "
                f"--{name}={plain}"
            )
    if config.attack not in ("none", "label_flip"):
        raise ValueError(
            f"--attack={config.attack} is not possible with --dp=client: malicious clients add no "
            "noise, and ε would be wrong; leave one of them out"
        )


def _check_warmup(config: Config) -> None:
    """Checks that both methods can do what the run asks, and go together."""
    if config.warmup_rounds >= config.rounds:
        raise ValueError(
            f"--warmup_rounds={config.warmup_rounds} leaves none of --rounds={config.rounds} to "
            f"--algorithm={config.algorithm}: take fewer, or more --rounds"
        )
    first = warmups.config_of(config)
    if config.method.private(config.options):
        raise ValueError(
            f"--warmup_rounds={config.warmup_rounds} is not possible with the privacy of "
            f"--algorithm={config.algorithm} itself, which the warm-up has not: use --dp=client"
        )
    for name, plain, possible, reason in (
        ("late_weight", 0.0, False, "whose last uploads are no uploads of the method after it"),
        ("mask", "none", first.method.order == 0, "whose gradients move all params"),
    ):
        if config.get(name) != plain and not possible:
            raise ValueError(
                f"--{name}={config.get(name)} is not possible with --warmup={config.warmup}, "
                f"{reason}: use --{name}={plain}"
            )
    if config.warmup_share < 1 and config.dp == "client":
        raise ValueError(
            f"--warmup_share={config.warmup_share} is not possible with --dp=client: ε counts on "
            "cohorts from the whole population; use --warmup_share=1"
        )
    checks: list[Callable[[Config], None]] = [_check_method, _check_adversity, _check_privacy]
    if config.objective in objectives.WITHOUT_GRADIENT:
        checks.append(_check_gradient)
    try:
        for check in checks:
            check(first)
    except ValueError as error:
        raise ValueError(f"in the rounds of --warmup={config.warmup}: {error}") from None


def _check_schedule(config: Config) -> None:
    """Checks that a schedule can be read, and changes nothing that isn't read."""
    changes = schedules.parse_schedule(config.schedule)
    for letter, name in {"mu": "smoothing", "P": "num_perturbations"}.items():
        if not schedules.changing(changes, name):
            continue
        if not needs.reads(config.method, name) or name in config.method.fixed:
            raise ValueError(
                f"--schedule: {letter} has no effect with --algorithm={config.algorithm}: leave it "
                f"out of {config.schedule!r}"
            )
        if name == "num_perturbations" and config.get("ferret_pool"):
            raise ValueError(
                f"--schedule: P is not possible with --ferret_pool={config.get('ferret_pool')}, "
                f"whose accumulators are as many in all rounds: leave it out of {config.schedule!r}"
            )
        for need in needs.NEEDS.get(name, ()):
            if not need.met(config):
                remedy = need.remedy.removeprefix("leave it out")
                raise ValueError(
                    f"--schedule: {letter} has no effect {need.otherwise(config)}: leave it out of "
                    f"{config.schedule!r}{remedy}"
                )
