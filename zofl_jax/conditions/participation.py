"""Who takes part in a round, whose upload arrives, and who was last in which round.

All of it is a function of (keys, round), so it needs no log and is the same after a resume.
A client of the cohort goes through

    there?     it is available and has joined: it is brought up to date and gets the seed
    uploaded?  its upload is not lost: a dropout is one that is
    in time?   the upload arrives before the deadline: a straggler's arrives after it

and is absent from the mean unless all three hold. Whoever is there receives the broadcast,
also if its own upload was lost or late.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax import keys, sampling
from zofl_jax.core import Array, PRNGKey

NEVER = -1
"""The last round of a client that has not taken part yet."""


class Attendance(NamedTuple):
    """A round's cohort, each [clients_per_round]; of many rounds [rounds, clients_per_round]."""

    cohort: Array  # int32, distinct clients
    there: Array  # bool, whether it takes part at all
    uploaded: Array  # bool, whether it is there and its upload is not lost
    in_time: Array  # bool, whether it is uploaded before the deadline


Attend = Callable[[keys.RootKeys, Array], Attendance]
"""(root keys, round) -> who is there; what a simulation asks in each round."""


def uniform(
    key: PRNGKey, round_index: Array | int, num_clients: int, clients_per_round: int
) -> Array:
    """Returns the cohort of a round: distinct clients, uniform, int32 [clients_per_round].

    Args:
      key: `keys.RootKeys.cohort`.
      round_index: r >= 0.
      num_clients: the size of the population.
      clients_per_round: M <= num_clients.

    Raises:
      ValueError: if M is out of range.

    >>> uniform(jax.random.key(0), 3, 4, 4).tolist()
    [0, 1, 2, 3]
    """
    check_cohort_size(num_clients, clients_per_round)
    return sampling.subset(jax.random.fold_in(key, round_index), num_clients, clients_per_round)


def everyone(num_clients: int, clients_per_round: int) -> Attend:
    """Returns the participation in which a uniform cohort is there and nothing is lost."""

    def attend(root: keys.RootKeys, round_index: Array) -> Attendance:
        cohort = uniform(root.cohort, round_index, num_clients, clients_per_round)
        all_of_them = jnp.ones(clients_per_round, bool)
        return Attendance(cohort, all_of_them, all_of_them, all_of_them)

    return attend


def partial(
    num_clients: int,
    clients_per_round: int,
    *,
    dropout: float = 0.0,
    deadline: float = math.inf,
    spread: float = 0.5,
    availability: np.ndarray | None = None,
    joins: Array | np.ndarray | None = None,
) -> Attend:
    """Returns the participation of clients that come and go.

    The cohort is uniform over the clients that are available; where these are fewer than
    `clients_per_round`, the others of the cohort are not there. The round time of a client is
    exp(spread · (a_i + b_ir) / √2), in units of the median: a and b are standard normal, a_i
    the client's own for ever (its device) and b_ir of this round alone (its connection).

    Args:
      num_clients: the size of the population.
      clients_per_round: M <= num_clients.
      dropout: the chance that an upload is lost, in [0, 1).
      deadline: in units of the median round time, positive.
      spread: of the round times, >= 0.
      availability: bool [period, num_clients], who is there in round r mod period.
      joins: int [num_clients], the first round in which a client is there.

    Raises:
      ValueError: for arguments out of range or of the wrong shape.
    """
    check_cohort_size(num_clients, clients_per_round)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if not deadline > 0:
        raise ValueError(f"deadline must be positive, got {deadline}")
    if not 0 <= spread < math.inf:
        raise ValueError(f"the spread of round times must be >= 0, got {spread}")
    trace = None if availability is None else np.asarray(availability, bool)
    if trace is not None and (trace.ndim != 2 or not len(trace) or trace.shape[1] != num_clients):
        raise ValueError(
            f"an availability trace must be [rounds, num_clients = {num_clients}], "
            f"got shape {trace.shape}"
        )
    if joins is not None and np.shape(joins) != (num_clients,):
        raise ValueError(
            f"joins must be one round a client, [{num_clients}], got shape {np.shape(joins)}"
        )

    def available(round_index: Array) -> Array:
        present = jnp.ones(num_clients, bool)
        if trace is not None:
            present &= jnp.asarray(trace)[round_index % len(trace)]
        if joins is not None:
            present &= round_index >= jnp.asarray(joins)
        return present

    def attend(root: keys.RootKeys, round_index: Array) -> Attendance:
        if trace is None and joins is None:
            cohort = uniform(root.cohort, round_index, num_clients, clients_per_round)
            there = jnp.ones(clients_per_round, bool)
        else:
            present = available(round_index)
            ticket = jax.random.uniform(
                jax.random.fold_in(root.cohort, round_index), (num_clients,)
            )
            _, chosen = jax.lax.top_k(jnp.where(present, ticket, -1.0), clients_per_round)
            cohort = jnp.sort(chosen).astype(jnp.int32)
            there = present[cohort]

        def fate(client: Array) -> tuple[Array, Array]:
            lasting = keys.own_key(root.presence, keys.name_id("device"), client)
            passing = keys.own_key(root.presence, keys.name_id("round"), client)
            lost, delay = jax.random.split(jax.random.fold_in(passing, round_index))
            slowness = jax.random.normal(lasting) + jax.random.normal(delay)
            time = jnp.exp(spread * slowness / math.sqrt(2))
            return ~jax.random.bernoulli(lost, dropout), time <= deadline

        kept, quick = jax.vmap(fate)(cohort)
        return Attendance(cohort, there, there & kept, there & kept & quick)

    return attend


def late_joiners(key: PRNGKey, num_clients: int, share: float, last_round: int) -> Array:
    """Returns the first round of each client, int32 [num_clients].

    round(share · num_clients) clients join in a round uniform in 1, ..., last_round, the others
    are there from round 0 on.

    Args:
      key: `keys.RootKeys.presence`.
      num_clients: the size of the population.
      share: in [0, 1].
      last_round: >= 1.

    Raises:
      ValueError: for arguments out of range.

    >>> joins = late_joiners(jax.random.key(0), 10, 0.4, 5)
    >>> int((joins > 0).sum()), bool((joins <= 5).all())
    (4, True)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of late joiners must be in [0, 1], got {share}")
    if last_round < 1:
        raise ValueError(f"late joiners' last round must be >= 1, got {last_round}")
    who, when = jax.random.split(jax.random.fold_in(key, keys.name_id("joins")))
    rounds = jax.random.randint(when, (num_clients,), 1, last_round + 1, jnp.int32)
    late = jax.random.permutation(who, num_clients) < round(share * num_clients)
    return jnp.where(late, rounds, 0)


def day_and_night(num_clients: int, period: int, share: float) -> np.ndarray:
    """Returns a trace in which each client is there for a part of each period.

    Client c's part begins c / num_clients of a period after client 0's, like the night in
    another time zone: bool [period, num_clients].

    Raises:
      ValueError: for a period below 1 or a share outside (0, 1].

    >>> day_and_night(2, 4, 0.5).astype(int).tolist()
    [[1, 0], [1, 0], [0, 1], [0, 1]]
    """
    if period < 1:
        raise ValueError(f"the period of an availability trace must be >= 1, got {period}")
    if not 0 < share <= 1:
        raise ValueError(f"the share of a period must be in (0, 1], got {share}")
    starts = np.arange(num_clients) * period // num_clients
    phase = (np.arange(period)[:, None] - starts[None, :]) % period
    return phase < max(1, round(share * period))


def each_round(attendance: Attendance) -> list[Attendance]:
    """Returns the attendances of [rounds, clients_per_round], one a round."""
    return [Attendance(*rows) for rows in zip(*map(np.asarray, attendance), strict=True)]


def check_cohort_size(num_clients: int, clients_per_round: int) -> None:
    """Checks that a cohort of `clients_per_round` can be drawn.

    Raises:
      ValueError: unless 1 <= clients_per_round <= num_clients.

    >>> check_cohort_size(10, 10)
    """
    if not 1 <= clients_per_round <= num_clients:
        raise ValueError(
            f"clients_per_round must be in [1, num_clients = {num_clients}], "
            f"got {clients_per_round}"
        )


def first_last_round(num_clients: int) -> np.ndarray:
    """Returns the record of a population that has not started: int64 [num_clients]."""
    return np.full(num_clients, NEVER, np.int64)
