"""The flags of what goes wrong around a method, and of what is done about it.

Malicious clients and robust aggregation, privacy, secure sums, and who is there. `fill_in`
refuses flags that don't go together or would have no effect; the other functions build the
library's objects.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from zofl_jax import keys
from zofl_jax.conditions import aggregation, attacks, participation, privacy, staleness
from zofl_jax.core import Algorithm, Task
from zofl_jax.directions.estimators import Estimator
from zofl_jax.engine.rounds import Conditions
from zofl_jax.runs import fingerprints

Values = Mapping[str, Any]
Make = Callable[[Callable[[Estimator], Estimator]], Algorithm]

AGGREGATORS = (
    "mean",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "geometric_median",
    "clipped_mean",
    "majority_sign",
)
ATTACK_SIZES = {
    "gaussian": 10.0,
    "sign_flip": 1.0,
    "scaling": 10.0,
    "inner_product": 2.0,
    "trim": 2.0,
    "out_of_range": 1e30,
}
"""Attacks that have a size, and what it is unless given."""

ATTACKS = ("none", *ATTACK_SIZES, "alie", "krum", "label_flip", "nan", "inf")

ENCODED = ("feedsign", "fedkseed", "fedkseed_pro")
"""Algorithms whose uploads are bits or seeds, with an aggregation of their own."""

NEVER_LATE = {
    "hiso": "which keeps no curvature of the round before to draw its directions in",
    "scaffold": "whose c would no longer be the mean of the clients' c_i",
}
"""Algorithms that can't use late uploads, and why."""

UNSIGNED = ("scaling", "out_of_range", "nan", "inf")
"""Attacks that leave signs as they are."""

FIRST_ORDER = ("fedavg", "fedprox", "fedsgd", "fedadam", "fedyogi", "fedadagrad", "scaffold")

flags.DEFINE_enum(
    "aggregator", "mean", AGGREGATORS, "How the server makes one broadcast of the uploads."
)
flags.DEFINE_float("trimmed_share", 0.2, "Share that trimmed_mean drops at each end.")
flags.DEFINE_integer(
    "num_byzantine", 1, "Bad clients in a cohort that krum and multi_krum count on.", lower_bound=0
)
flags.DEFINE_float(
    "aggregator_size", 1.0, "Norm that clipped_mean clips to; magnitude that majority_sign sends."
)
flags.DEFINE_enum("attack", "none", ATTACKS, "What malicious clients do.")
flags.DEFINE_float("malicious_share", 0.2, "Share of the population that is malicious.")
flags.DEFINE_float(
    "attack_size",
    None,
    "Size of the attack: times the honest root mean square (gaussian), the own upload (scaling "
    "10, sign_flip 1) or the honest mean (inner_product 2), stretch (trim 2), the number itself "
    "(out_of_range 1e30).",
)
flags.DEFINE_float(
    "max_message", 1e6, "Messages with a number larger than this in size are rejected."
)
flags.DEFINE_enum(
    "dp",
    "none",
    ["none", "client", "example"],
    "Differential privacy of a whole client, or of each example of a client.",
)
flags.DEFINE_float("dp_clip", 1.0, "Norm that an upload, or an example's scalars, is clipped to.")
flags.DEFINE_float("dp_noise", 1.0, "Noise multiplier σ: the noise over the clipping norm.")
flags.DEFINE_float("dp_delta", 1e-5, "δ at which ε is reported.")
flags.DEFINE_bool("secure_sum", False, "Upload integers of which the server needs the sum alone.")
flags.DEFINE_integer("secure_bits", 16, "Bits of the fraction in a secure sum.", lower_bound=0)
flags.DEFINE_float("secure_largest", 100.0, "Largest number that a secure sum takes.")
flags.DEFINE_float("dropout", 0.0, "Chance that an upload is lost.")
flags.DEFINE_float(
    "deadline", None, "When uploads are too late, in median round times; none unless given."
)
flags.DEFINE_float("time_spread", 0.5, "Spread of the log of clients' round times.")
flags.DEFINE_float("late_weight", 0.0, "Weight of a late upload in the next round; 0 discards it.")
flags.DEFINE_float("late_joiners", 0.0, "Share of the population that joins late.")
flags.DEFINE_integer("join_by", 100, "Round by which the late joiners have joined.", lower_bound=1)
flags.DEFINE_string(
    "availability",
    "",
    "When clients are there: PERIOD:SHARE (each for a share of a period, by its time zone), or "
    "a .npy file of booleans [rounds, clients]. Always unless given.",
)

FLAGS = flags.FLAGS

NAMES = tuple(flag.name for flag in FLAGS.flags_by_module_dict()[__name__])
"""The flags of this file."""

_NEEDS: dict[str, tuple[str, Callable[[Values], bool]]] = {
    "trimmed_share": ("--aggregator=trimmed_mean", lambda v: v["aggregator"] == "trimmed_mean"),
    "num_byzantine": ("--aggregator=krum or multi_krum", lambda v: "krum" in v["aggregator"]),
    "aggregator_size": (
        "--aggregator=clipped_mean or majority_sign",
        lambda v: v["aggregator"] in ("clipped_mean", "majority_sign"),
    ),
    "malicious_share": ("an --attack", lambda v: v["attack"] != "none"),
    "attack_size": (
        f"--attack={' or '.join(ATTACK_SIZES)}, on uploads that are more than signs",
        lambda v: v["attack"] in ATTACK_SIZES and v["algorithm"] != "feedsign",
    ),
    "dp_clip": ("--dp", lambda v: v["dp"] != "none"),
    "dp_noise": ("--dp", lambda v: v["dp"] != "none"),
    "dp_delta": (
        "--dp or --feedsign_epsilon",
        lambda v: v["dp"] != "none" or v["feedsign_epsilon"] is not None,
    ),
    "max_message": (
        "uploads of floating point numbers",
        lambda v: not v["secure_sum"] and v["algorithm"] != "feedsign",
    ),
    "secure_bits": ("--secure_sum", lambda v: v["secure_sum"]),
    "secure_largest": ("--secure_sum", lambda v: v["secure_sum"]),
    "time_spread": ("a --deadline", lambda v: v["deadline"] is not None),
    "late_weight": ("a --deadline", lambda v: v["deadline"] is not None),
    "join_by": ("--late_joiners", lambda v: v["late_joiners"] > 0),
}
"""What a flag needs to have an effect."""


def fill_in(values: dict[str, Any], given: set[str]) -> None:
    """Fills in defaults and checks the flags of this file; `given` are those the user gave.

    Raises:
      ValueError: for flags out of range, without effect, or that don't go together.
    """
    for flag, (need, met) in _NEEDS.items():
        if flag in given and not met(values):
            raise ValueError(f"--{flag} has no effect without {need}: leave it out")
    for flag in ("max_message", "dp_clip", "secure_largest", "aggregator_size"):
        if values[flag] <= 0:
            raise ValueError(f"--{flag} must be positive, got {values[flag]}")
    for flag in ("malicious_share", "late_joiners", "late_weight"):
        if not 0 <= values[flag] <= 1:
            raise ValueError(f"--{flag} must be in [0, 1], got {values[flag]}")
    if values["attack_size"] is None:
        values["attack_size"] = ATTACK_SIZES.get(values["attack"])
    _check_algorithm(values)
    _check_privacy(values, given)
    robust_rule(values)
    _attack(values)
    _availability(values)
    if "krum" in values["aggregator"]:
        least = 2 * values["num_byzantine"] + 3
        if values["clients_per_round"] < least:
            raise ValueError(
                f"--aggregator={values['aggregator']} with --num_byzantine="
                f"{values['num_byzantine']} needs a cohort of {least} or more, got "
                f"--clients_per_round={values['clients_per_round']}"
            )
    if values["deadline"] is not None and values["deadline"] <= 0:
        raise ValueError(f"--deadline must be positive, got {values['deadline']}")
    if not 0 <= values["dropout"] < 1:
        raise ValueError(f"--dropout must be in [0, 1), got {values['dropout']}")
    if values["time_spread"] < 0:
        raise ValueError(f"--time_spread must be >= 0, got {values['time_spread']}")


def make_private(values: Values, make: Make) -> Algorithm:
    """Returns the algorithm that `make` makes, its examples private if `--dp=example`."""
    if values["dp"] != "example":
        return make(lambda estimator: estimator)
    return privacy.example_level(
        make,
        values["dp_clip"],
        values["dp_noise"],
        values["batch_size"],
        delta=values["dp_delta"],
    )


def robust_rule(values: Values) -> aggregation.Rule:
    """Returns the rule that `--aggregator` names."""
    name, bad = values["aggregator"], values["num_byzantine"]
    kept = max(1, values["clients_per_round"] - bad - 2)
    rules: dict[str, Callable[[], aggregation.Rule]] = {
        "mean": lambda: aggregation.mean,
        "median": lambda: aggregation.median,
        "trimmed_mean": lambda: aggregation.trimmed_mean(values["trimmed_share"]),
        "krum": lambda: aggregation.krum(bad),
        "multi_krum": lambda: aggregation.multi_krum(bad, kept),
        "geometric_median": aggregation.geometric_median,
        "clipped_mean": lambda: aggregation.clipped_mean(values["aggregator_size"]),
        "majority_sign": lambda: aggregation.majority_sign(values["aggregator_size"]),
    }
    return rules[name]()


def guarded(values: Values, algorithm: Algorithm) -> Algorithm:
    """Returns the algorithm with the aggregation, the privacy and the sums that flags ask for."""
    # SCAFFOLD has been given its rule: it also counts who is heard.
    if values["aggregator"] != "mean" and values["algorithm"] != "scaffold":
        algorithm = algorithm._replace(aggregate=robust_rule(values))
    cohort = values["clients_per_round"]
    if values["dp"] == "client":
        algorithm = privacy.client_level(
            algorithm, values["dp_clip"], values["dp_noise"], cohort, delta=values["dp_delta"]
        )
    if values["secure_sum"]:
        algorithm = privacy.fixed_point(
            algorithm, values["secure_bits"], values["secure_largest"], cohort
        )
    return algorithm


def with_late_uploads(values: Values, algorithm: Algorithm) -> Algorithm:
    """Returns the algorithm that uses late uploads if `--late_weight` says so."""
    if not values["late_weight"]:
        return algorithm
    return staleness.with_late_uploads(algorithm, values["late_weight"], values["prng_impl"])


def build(values: Values, task: Task, root: keys.RootKeys) -> Conditions:
    """Returns the conditions of the rounds.

    Raises:
      ValueError: for data that they don't fit.
    """
    num_clients = task.train.num_clients
    for flag, asked, cause in (
        ("malicious_share", values["attack"] != "none", "attack"),
        ("late_joiners", values["late_joiners"] > 0, "late_joiners"),
    ):
        if asked and not round(values[flag] * num_clients):
            raise ValueError(
                f"--{flag}={values[flag]} of {num_clients} clients is nobody: take a share of "
                f"{1 / num_clients:.3g} or more, or leave out --{cause}"
            )
    adversary = None
    if values["attack"] != "none":
        malicious = attacks.drawn(root.adversary, num_clients, values["malicious_share"])
        if values["attack"] == "label_flip":
            flip = attacks.label_flip(_num_classes(task))
            adversary = attacks.Adversary(malicious, data_attack=flip)
        else:
            adversary = attacks.Adversary(malicious, _attack(values))
    attend = None
    trace = _availability(values)
    if values["dropout"] or values["deadline"] or values["late_joiners"] or trace is not None:
        joins = None
        if values["late_joiners"]:
            joins = participation.late_joiners(
                root.presence, num_clients, values["late_joiners"], values["join_by"]
            )
        if isinstance(trace, tuple):
            trace = participation.day_and_night(num_clients, *trace)
        attend = participation.partial(
            num_clients,
            values["clients_per_round"],
            dropout=values["dropout"],
            deadline=values["deadline"] or math.inf,
            spread=values["time_spread"],
            availability=trace,
            joins=joins,
        )
    return Conditions(attend, adversary, values["max_message"])


def _check_algorithm(values: Values) -> None:
    name, attack = values["algorithm"], values["attack"]
    if name in ENCODED:
        for flag, plain in (("aggregator", "mean"), ("secure_sum", False), ("late_weight", 0.0)):
            if values[flag] != plain:
                raise ValueError(
                    f"--{flag}={values[flag]} is not possible with --algorithm={name}, whose "
                    "uploads are no numbers: leave it out"
                )
    if name in NEVER_LATE and values["late_weight"]:
        raise ValueError(
            f"--late_weight={values['late_weight']} is not possible with --algorithm={name}, "
            f"{NEVER_LATE[name]}: leave it out"
        )
    compares = ("alie", "inner_product", "trim", "krum")
    for there, setting, impossible, reason in (
        (name == "feedsign", f"algorithm={name}", UNSIGNED, "whose uploads are signs alone"),
        ("fedkseed" in name, f"algorithm={name}", compares, "whose clients share no directions"),
        (values["secure_sum"], "secure_sum", ("nan", "inf"), "whose uploads are integers"),
    ):
        if there and attack in impossible:
            raise ValueError(
                f"--attack={attack} is not possible with --{setting}, {reason}: use "
                "--attack=sign_flip"
            )
    if attack == "label_flip" and values["task"] == "quadratic":
        raise ValueError("--attack=label_flip needs labels, which --task=quadratic has not")
    if values["secure_sum"]:
        for flag, plain in (
            ("aggregator", "mean"),
            ("weighting", "uniform"),
            ("compression", "none"),
            ("late_weight", 0.0),
        ):
            if values[flag] != plain:
                raise ValueError(
                    f"--{flag}={values[flag]} is not possible with --secure_sum, which tells the "
                    f"server the uniform mean alone: use --{flag}={plain}"
                )


def _check_privacy(values: dict[str, Any], given: set[str]) -> None:
    dp, name = values["dp"], values["algorithm"]
    if not 0 < values["dp_delta"] < 1:
        raise ValueError(f"--dp_delta must be in (0, 1), got {values['dp_delta']}")
    if values["dp_noise"] < 0:
        raise ValueError(f"--dp_noise must be >= 0, got {values['dp_noise']}")
    if dp == "client":
        if name in (*ENCODED, "scaffold"):
            raise ValueError(
                f"--dp=client is not possible with --algorithm={name}, whose uploads are more than "
                "one vector of numbers: use another algorithm"
            )
        for flag, plain, reason in (
            ("aggregator", "mean", "the noise is that of a mean"),
            ("weighting", "uniform", "the noise is that of a uniform mean"),
            ("compression", "none", "ε is that of the noisy sum, and not of codes of its parts"),
            ("late_weight", 0.0, "a late upload has no part in a round's noise"),
            ("late_joiners", 0.0, "ε counts on cohorts from the whole population"),
            ("availability", "", "ε counts on cohorts from the whole population"),
        ):
            if values[flag] != plain:
                raise ValueError(
                    f"--{flag}={values[flag]} is not possible with --dp=client: {reason}; use "
                    f"--{flag}={plain}"
                )
        if values["attack"] not in ("none", "label_flip"):
            raise ValueError(
                f"--attack={values['attack']} is not possible with --dp=client: malicious clients "
                "add no noise, and ε would be wrong; leave one of them out"
            )
    if values["mask"] == "sensitivity" and (dp != "none" or values["feedsign_epsilon"] is not None):
        raise ValueError(
            "--mask=sensitivity is not possible with differential privacy: clients' own examples "
            "make it, which ε does not count; use --mask=random or --mask=magnitude"
        )
    if dp == "example" and values["feedsign_epsilon"] is not None:
        raise ValueError("--dp=example and --feedsign_epsilon are two accounts: choose one of them")
    if dp == "example":
        if name in FIRST_ORDER:
            raise ValueError(
                f"--dp=example clips scalars, which --algorithm={name} has not: use a "
                "zeroth-order algorithm, or --dp=client"
            )
        if "clients_at_once" in given and values["clients_at_once"]:
            raise ValueError(
                f"--clients_at_once={values['clients_at_once']} is not possible with --dp=example: "
                "leave it out"
            )
        values["clients_at_once"] = 0


def _attack(values: Values) -> attacks.Attack | None:
    name, size = values["attack"], values["attack_size"]
    made: dict[str, Callable[[], attacks.Attack]] = {
        "gaussian": lambda: attacks.gaussian(size),
        "sign_flip": lambda: attacks.sign_flip(size),
        "scaling": lambda: attacks.scaling(size),
        "inner_product": lambda: attacks.inner_product(size),
        "trim": lambda: attacks.trim(size),
        "out_of_range": lambda: attacks.constant(size),
        "alie": attacks.alie,
        "krum": attacks.krum,
        "nan": lambda: attacks.constant(math.nan),
        "inf": lambda: attacks.constant(math.inf),
    }
    return made[name]() if name in made else None


def _availability(values: Values) -> tuple[int, float] | np.ndarray | None:
    """Returns the period and the share, or the trace in the file."""
    text = values["availability"]
    if not text:
        return None
    if text.endswith(".npy"):
        try:
            trace = np.load(Path(text).expanduser(), allow_pickle=False)
            if trace.dtype != bool and not np.isin(trace, (0, 1)).all():
                raise ValueError(f"it holds {trace.dtype} beside 0 and 1")
            return trace.astype(bool)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--availability={text} can't be read ({error}): give a .npy file of booleans "
                "[rounds, clients]"
            ) from error
    period, _, share = text.partition(":")
    try:
        found = int(period), float(share)
    except ValueError:
        raise ValueError(
            f"--availability={text} is neither PERIOD:SHARE, as in 24:0.5, nor a .npy file"
        ) from None
    participation.day_and_night(1, *found)
    return found


def inputs(values: Values) -> fingerprints.Fingerprints:
    """Returns the fingerprint of the file that `--availability` names, if it names one."""
    trace = _availability(values)
    return {"availability": fingerprints.array(trace)} if isinstance(trace, np.ndarray) else {}


def _num_classes(task: Task) -> int:
    if not isinstance(task.train.examples, dict) or "label" not in task.train.examples:
        raise ValueError("--attack=label_flip needs a task whose examples have a label")
    return int(jnp.max(jnp.asarray(task.train.examples["label"]))) + 1
