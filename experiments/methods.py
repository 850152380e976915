"""The flags of a federated algorithm, and the algorithm that they describe.

Each algorithm of the library is one function of `BUILDERS`. Flags of this file are refused where
they would have no effect; in a comparison those of `MAY_BE_SHARED` are let pass, if all methods
are given them.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags

from experiments import conditions, schedules
from zofl_jax import algorithms, keys
from zofl_jax.algorithms.local_training import ClientOptimizer
from zofl_jax.conditions import compression
from zofl_jax.core import Algorithm, LossFn, Params, Phase, Task
from zofl_jax.directions import estimators, perturbations, scaling
from zofl_jax.directions.estimators import Estimator
from zofl_jax.directions.perturbations import Perturbation

Values = Mapping[str, Any]

PERTURBATIONS = ("gaussian", "rademacher", "sphere", "low_rank")
CALIBRATION_EXAMPLES = 256  # of the sensitivity mask

ZEROTH_ORDER = ("decomfl", "hiso", "fedkseed", "fedkseed_pro", "feedsign", "fedzo", "mezo")
ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")
FIRST_ORDER = ("fedavg", "fedprox", "fedsgd", *ADAPTIVE, "scaffold")
ALGORITHMS = (*ZEROTH_ORDER, *FIRST_ORDER)
CODECS = ("none", "float16", "bfloat16", "int8", "int4", "qsgd", "top_k", "sign")

DEFAULTS: dict[str, dict[str, Any]] = {
    "feedsign": {"num_perturbations": 1, "momentum": 0.0},
    "fedkseed": {"local_steps": 200, "momentum": 0.0},
    "fedkseed_pro": {"local_steps": 200, "momentum": 0.0},
    "mezo": {"num_perturbations": 1, "momentum": 0.0, "num_clients": 1, "clients_per_round": 1},
    **{name: {"momentum": 0.0} for name in ("hiso", "fedzo", *FIRST_ORDER)},
}
"""What algorithms have by default where it differs from the flags' own defaults."""

FIXED: dict[str, dict[str, Any]] = {
    "feedsign": {"local_steps": 1},
    "fedsgd": {"local_steps": 1},
    "mezo": {"local_steps": 1, "estimator": "central", "clients_per_round": 1},
    "fedkseed": {"num_perturbations": 1, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0},
    "scaffold": {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0},
}
FIXED["fedkseed_pro"] = FIXED["fedkseed"]
"""What algorithms have always."""

READ_BY: dict[str, tuple[str, ...]] = {
    "hiso_nu": ("hiso",),
    "hiso_epsilon": ("hiso",),
    "hiso_learn_from": ("hiso",),
    "pool_size": ("fedkseed", "fedkseed_pro"),
    "feedsign_epsilon": ("feedsign",),
    "proximal": ("fedprox",),
    "server_learning_rate": (*ADAPTIVE, "scaffold"),
    "server_beta1": ADAPTIVE,
    "server_beta2": ("fedadam", "fedyogi"),
    "tau": ADAPTIVE,
    "shared_directions": ("fedzo",),
    "mask": ZEROTH_ORDER,
    "mask_density": ZEROTH_ORDER,
    "compression": tuple(set(ALGORITHMS) - {"feedsign"}),
    "estimator": ZEROTH_ORDER,
    "perturbation": ZEROTH_ORDER,
    "rank": ZEROTH_ORDER,
    "num_perturbations": ZEROTH_ORDER,
    "smoothing": ZEROTH_ORDER,
    "perturbations_at_once": ZEROTH_ORDER,
}
"""Flags that only some algorithms read."""

READ_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "top_k_fraction": ("compression", ("top_k",)),
    "stochastic_rounding": ("compression", ("float16", "bfloat16", "int8", "int4", "qsgd")),
    "mask_density": ("mask", ("random", "magnitude", "sensitivity")),
    "rank": ("perturbation", ("low_rank",)),
    "smoothing": ("estimator", ("forward", "central")),
    "perturbations_at_once": ("estimator", ("forward", "central")),
    "momentum": ("optimizer", ("sgd",)),
}
"""Flags that are read with some values of another one alone."""

MAY_BE_SHARED = (
    *("estimator", "perturbation", "rank", "num_perturbations", "smoothing"),
    *("perturbations_at_once", "momentum"),
)
"""Flags that a comparison may give to all methods, though some don't read them."""

flags.DEFINE_enum("algorithm", "decomfl", ALGORITHMS, "Federated algorithm.")
flags.DEFINE_enum(
    "estimator",
    "central",
    ["forward", "central", "projection", "jvp"],
    "Finite differences, or exact directional derivatives by one backward pass (projection) "
    "or by forward mode (jvp).",
)
flags.DEFINE_enum(
    "perturbation", "gaussian", list(PERTURBATIONS), "Distribution of the directions."
)
flags.DEFINE_integer("rank", 1, "Rank of low_rank directions.", lower_bound=1)
flags.DEFINE_integer(
    "local_steps",
    4,
    "K, local steps of a client in a round; 200 for fedkseed unless given.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "num_perturbations",
    20,
    "P, directions of a local step; 1 for feedsign and mezo unless given.",
    lower_bound=1,
)
flags.DEFINE_float("smoothing", 1e-3, "μ, the length of a perturbation in units of z.")
flags.DEFINE_enum(
    "optimizer",
    "sgd",
    ["sgd", "adam"],
    "Optimiser: the one that everyone replays, of methods with dense uploads the clients' own.",
)
flags.DEFINE_float(
    "learning_rate",
    None,
    "Learning rate; unless given, one that suits the task, the model and the method, see "
    "experiments/rates.py.",
)
flags.DEFINE_float(
    "momentum",
    0.9,
    "Momentum of sgd; 0 for all algorithms but decomfl unless given.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_float(
    "weight_decay",
    0.0,
    "Weight decay: added to the direction (sgd), decoupled (adam).",
    lower_bound=0.0,
)
flags.DEFINE_string(
    "schedule",
    "",
    "Factors on learning rate (lr), smoothing (mu) and perturbations (P) from a round on, "
    "relative to the start, as in '500:lr=0.8,P=2;1000:lr=0.5,P=4'; 'authors' is "
    f"'{schedules.AUTHORS}'.",
)
flags.DEFINE_float("hiso_nu", 0.01, "ν of hiso, the newest step's share in the curvature.")
flags.DEFINE_float("hiso_epsilon", 1e-3, "ε of hiso, the floor of the curvature.")
flags.DEFINE_enum(
    "hiso_learn_from", "all", ["first", "last", "all"], "Local steps that hiso learns from."
)
flags.DEFINE_integer("pool_size", 4096, "Seeds in the pool of fedkseed.", lower_bound=1)
flags.DEFINE_float(
    "feedsign_epsilon",
    None,
    "ε of a bit in the private form of feedsign; not private unless given.",
)
flags.DEFINE_float("proximal", 0.01, "λ of fedprox.", lower_bound=0.0)
flags.DEFINE_float(
    "server_learning_rate",
    None,
    "Server's rate; of fedadam and fedyogi 0.01, of fedadagrad 0.1, of scaffold 1 unless given.",
)
flags.DEFINE_float(
    "server_beta1",
    None,
    "β₁ of the server's first moment; of fedadam and fedyogi 0.9, of fedadagrad 0 unless given.",
)
flags.DEFINE_float("server_beta2", 0.99, "β₂ of the second moment of fedadam and fedyogi.")
flags.DEFINE_float("tau", 1e-3, "τ of fedadam, fedyogi and fedadagrad.")
flags.DEFINE_bool(
    "shared_directions", False, "Whether fedzo's clients draw directions from the round's key."
)
flags.DEFINE_enum(
    "mask",
    "none",
    ["none", "random", "magnitude", "sensitivity"],
    "Perturb some params alone: random ones, the smallest, or those that the loss of a "
    f"calibration batch ({CALIBRATION_EXAMPLES} training examples) reacts to most.",
)
flags.DEFINE_float("mask_density", 0.1, "Share of the params that a mask keeps.")
flags.DEFINE_enum(
    "compression",
    "none",
    list(CODECS),
    "What uploads are written as: int8 and int4 with a scale a message, qsgd in 4 bits with a "
    "norm for 512 numbers, top_k and sign with error feedback where uploads are like the params.",
)
flags.DEFINE_float("top_k_fraction", 0.01, "Share of an upload that top_k sends.")
flags.DEFINE_bool(
    "stochastic_rounding", True, "Round at random, without bias; to the nearest otherwise."
)

FLAGS = flags.FLAGS

NAMES = tuple(flag.name for flag in FLAGS.flags_by_module_dict()[__name__])
"""The flags of this file."""


class Parts(NamedTuple):
    """What the builders put together."""

    loss_fn: LossFn
    optimizer: optax.GradientTransformation  # whose state everyone keeps
    client_optimizer: ClientOptimizer  # whose state starts anew in every round
    learning_rate: jax.Array
    estimator: Callable[[Perturbation], Estimator]
    perturbation: Perturbation
    pool_key: jax.Array
    num_clients: int  # of the task: a natural partition has its own


def fill_in(values: dict[str, Any], given: set[str], shared: Collection[str] = ()) -> None:
    """Fills in the defaults of the algorithm.

    Args:
      values: of all flags; a learning rate of None stays, see `rates.default`.
      given: those that the user gave.
      shared: those among them that the methods of a comparison were given together.

    Raises:
      ValueError: for flags out of range, or without effect on this algorithm.
    """
    name = values["algorithm"]
    checked = given - (set(shared) & set(MAY_BE_SHARED))
    for flag, readers in READ_BY.items():
        if flag in checked and name not in readers:
            raise ValueError(
                f"--{flag} has no effect with --algorithm={name}: leave it out, or choose "
                f"{' or '.join(a for a in ALGORITHMS if a in readers)}"
            )
    for flag, value in FIXED.get(name, {}).items():
        if flag in given and values[flag] != value:
            raise ValueError(
                f"--{flag}={values[flag]} is not possible with --algorithm={name}, where it is "
                f"always {value}: leave it out"
            )
    for flag, (other, readers) in READ_WITH.items():
        if flag in checked and values[other] not in readers:
            raise ValueError(
                f"--{flag} has no effect with --{other}={values[other]}: leave it out, or choose "
                f"{' or '.join(readers)}"
            )
    for flag, value in {**DEFAULTS.get(name, {}), **FIXED.get(name, {})}.items():
        if flag not in given:
            values[flag] = value
    if values["server_learning_rate"] is None:
        rates = {"fedadagrad": 0.1, "scaffold": 1.0}
        values["server_learning_rate"] = rates.get(name, 0.01)
    if values["server_beta1"] is None:
        values["server_beta1"] = 0.0 if name == "fedadagrad" else 0.9
    for flag in ("smoothing", "learning_rate", "server_learning_rate"):
        if values[flag] is not None and values[flag] <= 0:
            raise ValueError(f"--{flag} must be positive, got {values[flag]}")
    for flag in ("momentum", "server_beta1", "server_beta2"):
        if not 0 <= values[flag] < 1:
            raise ValueError(f"--{flag} must be in [0, 1), got {values[flag]}")
    if name == "mezo" and values["num_clients"] != 1:
        raise ValueError(
            f"--num_clients={values['num_clients']}: mezo has all data in one place; leave it "
            "out, or choose --algorithm=decomfl"
        )
    if name == "mezo" and values["partition"] == "natural":
        raise ValueError(
            "--partition=natural: mezo has all data in one place; leave it out, or choose "
            "--algorithm=decomfl"
        )
    if name in ("fedkseed", "fedkseed_pro") and values["compression"] in ("top_k", "sign"):
        raise ValueError(
            f"--compression={values['compression']} is not possible with --algorithm={name}, all "
            f"of whose scalars are needed: use {', '.join(READ_WITH['stochastic_rounding'][1])}"
        )
    _check_schedule(values)


def _check_schedule(values: Values) -> None:
    """Raises ValueError if a schedule can't be read, or changes what the algorithm doesn't read."""
    name, changes = values["algorithm"], schedules.parse_schedule(values["schedule"])
    for letter, flag in {"mu": "smoothing", "P": "num_perturbations"}.items():
        if not schedules.changing(changes, flag):
            continue
        if name not in READ_BY[flag] or flag in FIXED.get(name, {}):
            raise ValueError(
                f"--schedule: {letter} has no effect with --algorithm={name}: leave it out of "
                f"{values['schedule']!r}"
            )
        other, readers = READ_WITH.get(flag, ("algorithm", ALGORITHMS))
        if values[other] not in readers:
            raise ValueError(
                f"--schedule: {letter} has no effect with --{other}={values[other]}: leave it out "
                f"of {values['schedule']!r}, or choose {' or '.join(readers)}"
            )


def build_phases(values: Values, task: Task) -> list[Phase]:
    """Returns the algorithm of each phase of the schedule.

    Phases differ in their number of perturbations alone; learning rate and smoothing
    follow the round within them.

    Args:
      values: flags, as `fill_in` leaves them.
      task: whose loss is lowered; its initial params and its data make the masks.

    Raises:
      ValueError: for values out of range.
    """
    changes = schedules.parse_schedule(values["schedule"])
    smoothing = schedules.piecewise(changes, "smoothing", values["smoothing"])
    root = keys.root(values["seed"], values["prng_impl"])
    optimizer, perturbation = schedules.make_optimizer(values), _perturbation(values)
    client_optimizer = schedules.make_client_optimizer(values)
    mask = _mask(values, task, root)
    if mask is not None:
        optimizer, client_optimizer, perturbation = (
            scaling.masked(optimizer, mask),
            _masked(client_optimizer, mask),
            scaling.scaled(perturbation, mask),
        )
    # An array, not a constant of the program: runs at another rate share its compilation.
    rate, pool_key = jnp.asarray(values["learning_rate"]), keys.pool_key(root.shared)

    def algorithm(count: int) -> Algorithm:
        def make(private: Callable[[Estimator], Estimator]) -> Algorithm:
            def estimator(directions: Perturbation) -> Estimator:
                return private(_estimator(values, count, smoothing, directions))

            parts = Parts(
                task.loss,
                optimizer,
                client_optimizer,
                rate,
                estimator,
                perturbation,
                pool_key,
                task.train.num_clients,
            )
            return BUILDERS[values["algorithm"]](values, parts)

        guarded = conditions.guarded(values, conditions.make_private(values, make))
        return conditions.with_late_uploads(values, _compressed(values, guarded))

    phases: list[Phase] = []
    previous = 0
    for change in changes:
        count = max(1, round(values["num_perturbations"] * change.num_perturbations))
        if count != previous:
            phases.append(Phase(change.first_round, algorithm(count)))
        previous = count
    return phases


def _decomfl(values: Values, parts: Parts) -> Algorithm:
    return algorithms.decomfl(
        parts.loss_fn,
        parts.estimator(parts.perturbation),
        parts.optimizer,
        local_steps=values["local_steps"],
    )


def _hiso(values: Values, parts: Parts) -> Algorithm:
    return algorithms.hiso(
        parts.loss_fn,
        parts.estimator,
        parts.optimizer,
        nu=values["hiso_nu"],
        epsilon=values["hiso_epsilon"],
        learn_from=values["hiso_learn_from"],
        perturbation=parts.perturbation,
        local_steps=values["local_steps"],
    )


def _fedkseed(values: Values, parts: Parts) -> Algorithm:
    return algorithms.fedkseed(
        parts.loss_fn,
        parts.estimator(parts.perturbation),
        parts.learning_rate,
        pool_key=parts.pool_key,
        pool_size=values["pool_size"],
        local_steps=values["local_steps"],
        pro=values["algorithm"] == "fedkseed_pro",
        codec=_codec(values),
        factor=schedules.rate_factor(values),
    )


def _feedsign(values: Values, parts: Parts) -> Algorithm:
    return algorithms.feedsign(
        parts.loss_fn,
        parts.estimator(parts.perturbation),
        parts.optimizer,
        epsilon=values["feedsign_epsilon"],
        delta=None if values["feedsign_epsilon"] is None else values["dp_delta"],
    )


def _fedzo(values: Values, parts: Parts) -> Algorithm:
    return algorithms.fedzo(
        parts.loss_fn,
        parts.estimator(parts.perturbation),
        parts.client_optimizer,
        local_steps=values["local_steps"],
        shared_directions=values["shared_directions"],
    )


def _fedavg(values: Values, parts: Parts) -> Algorithm:
    return algorithms.fedavg(
        parts.loss_fn,
        parts.client_optimizer,
        proximal=values["proximal"] if values["algorithm"] == "fedprox" else 0.0,
        local_steps=values["local_steps"],
        clients_at_once=values["clients_at_once"] or None,
    )


def _fedsgd(values: Values, parts: Parts) -> Algorithm:
    at_once = values["clients_at_once"] or None
    return algorithms.fedsgd(parts.loss_fn, parts.optimizer, clients_at_once=at_once)


def _adaptive(values: Values, parts: Parts) -> Algorithm:
    name = values["algorithm"]
    second = {} if name == "fedadagrad" else {"b2": values["server_beta2"]}
    return getattr(algorithms, name)(
        parts.loss_fn,
        parts.client_optimizer,
        values["server_learning_rate"],
        b1=values["server_beta1"],
        **second,
        tau=values["tau"],
        local_steps=values["local_steps"],
        clients_at_once=values["clients_at_once"] or None,
    )


def _scaffold(values: Values, parts: Parts) -> Algorithm:
    return algorithms.scaffold(
        parts.loss_fn,
        schedules.learning_rate(values),
        share=values["clients_per_round"] / parts.num_clients,
        local_steps=values["local_steps"],
        server_rate=values["server_learning_rate"],
        aggregate=conditions.robust_rule(values),
        clients_at_once=values["clients_at_once"] or None,
    )


BUILDERS: dict[str, Callable[[Values, Parts], Algorithm]] = {
    "decomfl": _decomfl,
    "hiso": _hiso,
    "fedkseed": _fedkseed,
    "fedkseed_pro": _fedkseed,
    "feedsign": _feedsign,
    "fedzo": _fedzo,
    "mezo": _decomfl,  # with one client, one direction and one step
    "fedavg": _fedavg,
    "fedprox": _fedavg,
    "fedsgd": _fedsgd,
    **dict.fromkeys(ADAPTIVE, _adaptive),
    "scaffold": _scaffold,
}


def _perturbation(values: Values) -> Perturbation:
    if values["perturbation"] == "low_rank":
        return perturbations.low_rank(values["rank"])
    return getattr(perturbations, values["perturbation"])()


def _mask(values: Values, task: Task, root: keys.RootKeys) -> Params | None:
    if values["mask"] == "none":
        return None
    params, density = task.init(root.init), values["mask_density"]
    if values["mask"] == "random":
        return scaling.random_mask(keys.pool_key(root.shared), params, density)
    if values["mask"] == "magnitude":
        return scaling.magnitude_mask(params, density)
    batch = jax.tree.map(lambda x: x[:CALIBRATION_EXAMPLES], task.train.examples)
    return scaling.sensitivity_mask(task.loss, params, batch, density)


def _masked(optimizer: ClientOptimizer, mask: Params) -> ClientOptimizer:
    if callable(optimizer):
        return lambda round_index: scaling.masked(optimizer(round_index), mask)
    return scaling.masked(optimizer, mask)


def _estimator(
    values: Values, count: int, smoothing: optax.Schedule, perturbation: Perturbation
) -> Estimator:
    at_once = values["clients_at_once"] or None
    if values["estimator"] == "projection":
        return estimators.projection(count, perturbation, at_once)
    if values["estimator"] == "jvp":
        return estimators.forward_gradient(count, perturbation, at_once)
    kinds = {"forward": estimators.forward_difference, "central": estimators.central_difference}
    together = values["perturbations_at_once"] or None
    return kinds[values["estimator"]](count, smoothing, perturbation, at_once, together)


def _compressed(values: Values, algorithm: Algorithm) -> Algorithm:
    codec, name = _codec(values), values["algorithm"]
    if codec is None or name in ("fedkseed", "fedkseed_pro"):  # which write their own scalars
        return algorithm
    like_params = name in ("fedzo", *FIRST_ORDER[:-1])
    feedback = values["compression"] in ("top_k", "sign") and like_params
    return compression.compressed(algorithm, codec, error_feedback=feedback)


def _codec(values: Values) -> compression.Codec | None:
    stochastic = values["stochastic_rounding"]
    codecs: dict[str, Callable[[], compression.Codec | None]] = {
        "none": lambda: None,
        "float16": lambda: compression.floats(jnp.float16, stochastic=stochastic),
        "bfloat16": lambda: compression.floats(jnp.bfloat16, stochastic=stochastic),
        "int8": lambda: compression.integers(8, stochastic=stochastic),
        "int4": lambda: compression.integers(4, stochastic=stochastic),
        "qsgd": lambda: compression.integers(4, scale="norm", stochastic=stochastic, bucket=512),
        "top_k": lambda: compression.top_k(values["top_k_fraction"]),
        "sign": compression.signs,
    }
    return codecs[values["compression"]]()
