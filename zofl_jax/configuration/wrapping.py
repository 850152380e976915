"""What is put around a method: privacy, robust rules, secure sums, codecs, late uploads.

And the conditions of its rounds: who is there, who is malicious. Which settings go together is
checked in `resolve`.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax import keys
from zofl_jax.conditions import (
    aggregation,
    attacks,
    compression,
    participation,
    privacy,
    staleness,
)
from zofl_jax.configuration import messages
from zofl_jax.configuration.config import Config
from zofl_jax.core import Algorithm, Array, Task
from zofl_jax.directions.estimators import Estimator
from zofl_jax.engine.rounds import Conditions
from zofl_jax.runs import fingerprints

Make = Callable[[Callable[[Estimator], Estimator]], Algorithm]


def make_private(config: Config, make: Make) -> Algorithm:
    """Returns the algorithm that `make` makes, its examples private if `--dp=example`."""
    if config.dp != "example":
        return make(lambda estimator: estimator)
    return privacy.example_level(
        make, config.dp_clip, config.dp_noise, config.batch_size, delta=config.dp_delta
    )


def robust_rule(config: Config) -> aggregation.Rule:
    """Returns the rule that `--aggregator` names."""
    name, bad = config.aggregator, config.num_byzantine
    kept = max(1, config.clients_per_round - bad - 2)
    rules: dict[str, Callable[[], aggregation.Rule]] = {
        "mean": lambda: aggregation.mean,
        "median": lambda: aggregation.median,
        "trimmed_mean": lambda: aggregation.trimmed_mean(config.trimmed_share),
        "krum": lambda: aggregation.krum(bad),
        "multi_krum": lambda: aggregation.multi_krum(bad, kept),
        "geometric_median": aggregation.geometric_median,
        "clipped_mean": lambda: aggregation.clipped_mean(config.aggregator_size),
        "majority_sign": lambda: aggregation.majority_sign(config.aggregator_size),
    }
    return rules[name]()


def guarded(config: Config, algorithm: Algorithm) -> Algorithm:
    """Returns the algorithm with the aggregation, the privacy and the sums that are asked for."""
    if config.aggregator != "mean" and "rule" not in config.method.takes:
        algorithm = algorithm._replace(aggregate=robust_rule(config))
    cohort = config.clients_per_round
    if config.dp == "client":
        algorithm = privacy.client_level(
            algorithm, config.dp_clip, config.dp_noise, cohort, delta=config.dp_delta
        )
    if config.secure_sum:
        algorithm = privacy.fixed_point(
            algorithm, config.secure_bits, config.secure_largest, cohort
        )
    return algorithm


def codec(config: Config) -> compression.Codec | None:
    """Returns what uploads are written as, None for plain numbers."""
    return _codec(config, config.compression, config.stochastic_rounding)


def _codec(config: Config, name: str, stochastic: bool) -> compression.Codec | None:
    codecs: dict[str, Callable[[], compression.Codec | None]] = {
        "none": lambda: None,
        "float16": lambda: compression.floats(jnp.float16, stochastic=stochastic),
        "bfloat16": lambda: compression.floats(jnp.bfloat16, stochastic=stochastic),
        "int8": lambda: compression.integers(8, stochastic=stochastic),
        "int4": lambda: compression.integers(4, stochastic=stochastic),
        "qsgd": lambda: compression.integers(4, scale="norm", stochastic=stochastic, bucket=512),
        "top_k": lambda: compression.top_k(config.top_k_fraction),
        "sign": compression.signs,
    }
    return codecs[name]()


def compressed(config: Config, algorithm: Algorithm) -> Algorithm:
    """Returns the algorithm with its uploads written as `--compression` says.

    Where they are like the params, clients keep what a lossy codec left out.
    """
    chosen = codec(config)
    if chosen is None or "codec" in config.method.takes:
        return algorithm
    lossy = config.compression in ("top_k", "sign")
    feedback = lossy and messages.upload(config) is messages.Upload.PARAMS
    return compression.compressed(algorithm, chosen, error_feedback=feedback)


def compressed_broadcast(config: Config, algorithm: Algorithm) -> Algorithm:
    """Returns the algorithm with its broadcasts written as `--broadcast_compression` says."""
    chosen = _codec(config, config.broadcast_compression, stochastic=False)
    return algorithm if chosen is None else compression.compressed_broadcast(algorithm, chosen)


def with_late_uploads(config: Config, algorithm: Algorithm) -> Algorithm:
    """Returns the algorithm that uses late uploads if `--late_weight` says so."""
    if not config.late_weight:
        return algorithm
    return staleness.with_late_uploads(algorithm, config.late_weight, config.prng_impl)


def build(config: Config, task: Task, root: keys.RootKeys) -> Conditions:
    """Returns the conditions of the rounds.

    Raises:
      ValueError: for data that they don't fit.
    """
    num_clients = task.train.num_clients
    for flag, asked, cause in (
        ("malicious_share", config.attack != "none", "attack"),
        ("late_joiners", config.late_joiners > 0, "late_joiners"),
        ("warmup_share", config.warmup_share < 1, "warmup_share"),
    ):
        share = getattr(config, flag)
        if asked and not round(share * num_clients):
            raise ValueError(
                f"--{flag}={share} of {num_clients} clients is nobody: take a share of "
                f"{1 / num_clients:.3g} or more, or leave out --{cause}"
            )
    adversary = None
    if config.attack != "none":
        malicious = attacks.drawn(root.adversary, num_clients, config.malicious_share)
        if config.attack == "label_flip":
            flip = attacks.label_flip(_num_classes(task))
            adversary = attacks.Adversary(malicious, data_attack=flip)
        else:
            adversary = attacks.Adversary(malicious, attack(config))
    attend = None
    trace = availability(config)
    joins = _joins(config, root, num_clients)
    if config.dropout or config.deadline or joins is not None or trace is not None:
        if isinstance(trace, tuple):
            trace = participation.day_and_night(num_clients, *trace)
        attend = participation.partial(
            num_clients,
            config.clients_per_round,
            dropout=config.dropout,
            deadline=config.deadline or math.inf,
            spread=config.time_spread,
            availability=trace,
            joins=joins,
        )
    return Conditions(attend, adversary, config.max_message)


def _joins(config: Config, root: keys.RootKeys, num_clients: int) -> Array | None:
    """Returns the first round of each client, [num_clients]; None where all start at 0."""
    found = []
    if config.late_joiners:
        found.append(
            participation.late_joiners(
                root.presence, num_clients, config.late_joiners, config.join_by
            )
        )
    if config.warmup_share < 1:
        key = jax.random.fold_in(root.presence, keys.name_id("warmup"))
        at = jax.random.permutation(key, num_clients)
        able = at < round(config.warmup_share * num_clients)
        found.append(jnp.where(able, 0, config.warmup_rounds))
    return functools.reduce(jnp.maximum, found) if found else None


def attack(config: Config) -> attacks.Attack | None:
    """Returns what malicious clients make of uploads, None if they change nothing but data."""
    name, size = config.attack, config.attack_size or 0.0  # of those that have one
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


def availability(config: Config) -> tuple[int, float] | np.ndarray | None:
    """Returns the period and the share, or the trace in the file."""
    text = config.availability
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


def inputs(config: Config) -> fingerprints.Fingerprints:
    """Returns the fingerprint of the file that `--availability` names, if it names one."""
    trace = availability(config)
    return {"availability": fingerprints.array(trace)} if isinstance(trace, np.ndarray) else {}


def _num_classes(task: Task) -> int:
    if not isinstance(task.train.examples, dict) or "label" not in task.train.examples:
        raise ValueError("--attack=label_flip needs a task whose examples have a label")
    return int(jnp.max(jnp.asarray(task.train.examples["label"]))) + 1
