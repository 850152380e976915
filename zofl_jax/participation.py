"""Who takes part in a round, and who was last in which round.

The cohort is a function of (key, round), so it needs no log and is the same after a
resume.
"""

import jax
import numpy as np

from zofl_jax import sampling
from zofl_jax.core import Array, PRNGKey

NEVER = -1
"""The last round of a client that has not taken part yet."""


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
