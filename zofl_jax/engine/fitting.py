"""Whether algorithms fit the simulation that they are put in, and what ε it spends on them.

Both hang on what really runs: its cohort, population, batches and weighting, not on what the
algorithm was told of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from zofl_jax.core import Algorithm, Exposure, Phase, Weighting
from zofl_jax.engine import ledger


class Setting(NamedTuple):
    """What a simulation really has."""

    clients_per_round: int
    num_clients: int
    batch_size: int
    weighting: Weighting
    fewest_examples: int  # of the smallest client


def check(phases: Sequence[Phase], setting: Setting) -> None:
    """Checks that all phases fit the setting and each other.

    Raises:
      ValueError: if one expects another cohort, population, share, batch size or weighting, or if
        phases differ in whether they take late uploads or are private.
    """
    for phase in phases:
        _check_expectations(phase.algorithm, setting)
    algorithms = [phase.algorithm for phase in phases]
    if len({algorithm.late_uploads for algorithm in algorithms}) > 1:
        raise ValueError(
            "some phases use late uploads and others lose them: put with_late_uploads around the "
            "algorithm of every phase, or of none"
        )
    accountants = [algorithm.accountant for algorithm in algorithms]
    kinds = {(type(a), None if a is None else a.delta) for a in accountants}
    if len(kinds) > 1:
        raise ValueError(
            "phases differ in their privacy, and ε is not accounted for across kinds or δ: give "
            "the algorithm of every phase the same privacy and the same delta, or none of them"
        )


def epsilon(phases: Sequence[Phase], setting: Setting) -> Callable[[ledger.Ledger], float] | None:
    """Returns ledger -> ε spent so far; None where nobody accounts for it.

    Where phases differ in what a round costs, it is an upper bound: all rounds count as the
    dearest phase of those that have begun.

    Raises:
      ImportError: without a package that the accountants need.
    """
    if phases[0].algorithm.accountant is None:
        return None

    costs: list[tuple[int, Algorithm]] = []
    for first_round, algorithm in phases:
        if not any(_same_cost(algorithm, other) for _, other in costs):
            costs.append((first_round, algorithm))

    def spent(book: ledger.Ledger) -> float:
        seen = book.contributors, int(np.max(book.times))
        begun = [algorithm for first, algorithm in costs if first < max(book.num_rounds, 1)]
        return max(_epsilon(algorithm, setting, *seen) for algorithm in begun)

    _epsilon(phases[0].algorithm, setting, {1: 1}, 1)  # says now what is missing
    return spent


def _same_cost(one: Algorithm, other: Algorithm) -> bool:
    return (one.accountant, one.local_steps) == (other.accountant, other.local_steps)


def _epsilon(
    algorithm: Algorithm, setting: Setting, contributors: Mapping[int, int], participations: int
) -> float:
    assert algorithm.accountant is not None
    return algorithm.accountant(
        Exposure(
            contributors=contributors,
            participations=participations,
            clients_per_round=setting.clients_per_round,
            num_clients=setting.num_clients,
            batch_size=setting.batch_size,
            fewest_examples=setting.fewest_examples,
            local_steps=algorithm.local_steps,
        )
    )


def _check_expectations(algorithm: Algorithm, setting: Setting) -> None:
    expected = algorithm.expects
    for name in ("clients_per_round", "num_clients", "batch_size", "weighting"):
        wanted, real = getattr(expected, name), getattr(setting, name)
        if wanted is not None and wanted != real:
            raise ValueError(
                f"the algorithm was made for {name}={wanted!r}, and this simulation has "
                f"{name}={real!r}: give both the same"
            )
    share = setting.clients_per_round / setting.num_clients
    if expected.share is not None and not math.isclose(expected.share, share, rel_tol=1e-6):
        raise ValueError(
            f"the algorithm was made for share={expected.share:.6g} of the population in a cohort, "
            f"and this simulation has {setting.clients_per_round} / {setting.num_clients} = "
            f"{share:.6g}: give both the same"
        )
