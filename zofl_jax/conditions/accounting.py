"""The ε that rounds of a private algorithm have spent, by the package dp-accounting.

An algorithm that is private carries an accountant (`core.Accountant`), which is told the cohort,
the population and the batches of the simulation that it is put in, and how often clients took
part. So ε is that of what runs.

It is by Rényi accounting, for one client (or example) *replaced* by another: the sampling is
without replacement and of fixed size, and replacing moves a clipped sum by 2C, twice the clipping
norm. The cohort must be unknown to the adversary for its sampling to count.

Ref: Wang, Balle, Kasiviswanathan, AISTATS 2019 for the sampling.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from zofl_jax.core import Accountant, Algorithm, Exposure


class ClientAccountant(NamedTuple):
    """Counts the ε of `privacy.client_level`, see `client_epsilon`."""

    noise_multiplier: float
    delta: float

    def __call__(self, exposure: Exposure) -> float:
        """Returns ε for one client replaced."""
        return client_epsilon(
            exposure.contributors,
            noise_multiplier=self.noise_multiplier,
            clients_per_round=exposure.clients_per_round,
            num_clients=exposure.num_clients,
            delta=self.delta,
        )


class ExampleAccountant(NamedTuple):
    """Counts the ε of `privacy.example_level`, see `example_epsilon`.

    It is an upper bound for all clients: that of the smallest one, had it taken part as often as
    the busiest.
    """

    noise_multiplier: float
    delta: float

    def __call__(self, exposure: Exposure) -> float:
        """Returns ε for one example replaced."""
        return example_epsilon(
            exposure.local_steps * exposure.participations,
            noise_multiplier=self.noise_multiplier,
            batch_size=exposure.batch_size,
            num_examples=exposure.fewest_examples,
            delta=self.delta,
        )


class BitAccountant(NamedTuple):
    """Counts the ε of private bits, see `bit_epsilon`: that of the busiest client."""

    bits: int  # that a client sends in a round
    epsilon: float  # of each
    delta: float

    def __call__(self, exposure: Exposure) -> float:
        """Returns ε for one answer replaced."""
        sent = self.bits * exposure.participations
        return bit_epsilon(sent, epsilon=self.epsilon, delta=self.delta)


def accounted(algorithm: Algorithm, accountant: Accountant | None) -> Algorithm:
    """Returns the algorithm with an accountant, as it is for None.

    Raises:
      ValueError: for a δ out of range, or if it has one: two would account for different things.
    """
    if accountant is None:
        return algorithm
    _check_delta(accountant.delta)
    if algorithm.accountant is not None:
        raise ValueError(
            f"the algorithm is private already ({algorithm.accountant}), and the ε of both "
            "together is not accounted for: use one of them, or give the inner one delta=None"
        )
    return algorithm._replace(accountant=accountant)


def client_epsilon(
    contributors: Mapping[int, int],
    *,
    noise_multiplier: float,
    clients_per_round: int,
    num_clients: int,
    delta: float,
) -> float:
    """Returns the ε that rounds of `privacy.client_level` have spent, for one client replaced.

    Args:
      contributors: how many rounds had how many clients in their mean; rounds without any
        release nothing.
      noise_multiplier: σ.
      clients_per_round: M, the cohort's size.
      num_clients: N, the population; M of N are drawn without replacement.
      delta: δ in (0, 1).

    Raises:
      ValueError: for numbers out of range.
      ImportError: without the package dp-accounting.
    """
    _check_delta(delta)
    parts = []
    for count, rounds in sorted(contributors.items()):
        if not count:
            continue
        # The noise of m clients' shares, against a sum that one client moves by 2C.
        effective = noise_multiplier * math.sqrt(count / clients_per_round) / 2
        parts.append((effective, clients_per_round, num_clients, rounds))
    return _epsilon(parts, delta)


def example_epsilon(
    steps: int, *, noise_multiplier: float, batch_size: int, num_examples: int, delta: float
) -> float:
    """Returns the ε that steps of one client have spent, for one of its examples replaced.

    Args:
      steps: local steps that the client has done: K a round that it took part in.
      noise_multiplier: σ.
      batch_size: B, drawn without replacement from
      num_examples: n, what the client owns.
      delta: δ in (0, 1).

    Raises:
      ValueError: for numbers out of range.
      ImportError: without the package dp-accounting.
    """
    _check_delta(delta)
    return _epsilon([(noise_multiplier / 2, batch_size, num_examples, steps)], delta)


def bit_epsilon(bits: int, *, epsilon: float, delta: float) -> float:
    """Returns the ε at δ that private bits of one client have spent, see `feedsign`.

    Each bit is flipped with probability 1 / (1 + exp ε₀), randomised response, and is known to
    the server: sampling does not help.

    Args:
      bits: that the client has sent: P a round that it took part in.
      epsilon: ε₀ > 0 of each.
      delta: δ in (0, 1).

    Raises:
      ValueError: for numbers out of range.
      ImportError: without the package dp-accounting.
    """
    _check_delta(delta)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"the epsilon of a bit must be positive and finite, got {epsilon}")
    if not bits:
        return 0.0
    # The library's parameter: how often the answer is drawn at random, half of which are flips.
    event = _library().RandomizedResponseDpEvent(2 / (1 + math.exp(epsilon)), 2)
    return min(bits * epsilon, _composed([(event, bits)], delta))


def _epsilon(parts: list[tuple[float, int, int, int]], delta: float) -> float:
    """Returns ε of (noise multiplier, sample, population, times), each of sensitivity 1."""
    dp = _library()
    if any(times and not multiplier for multiplier, _, _, times in parts):
        return math.inf
    events = []
    for multiplier, sample, population, times in parts:
        event = dp.GaussianDpEvent(multiplier)
        if sample < population:
            event = dp.SampledWithoutReplacementDpEvent(population, sample, event)
        if times:
            events.append((event, times))
    return _composed(events, delta)


def _composed(events: list[tuple[Any, int]], delta: float) -> float:
    """Returns ε of events of dp-accounting, each so many times."""
    if not events:
        return 0.0
    dp = _library()
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    for event, times in events:
        accountant.compose(event, times)
    return float(accountant.get_epsilon(delta))


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise ImportError(
            "accounting for privacy needs the package dp-accounting; "
            "pip install 'zofl-jax[privacy]'"
        ) from None
    return dp_accounting


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
