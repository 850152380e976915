"""Directions in subspaces that everyone knows and that change every T rounds (SubZero, LOZO).

    rounds b T, ..., (b + 1) T − 1    directions √(m n) / r · U_b G Vᵀ_b of each matrix [m, n],
                                      U_b, V_b orthonormal, drawn from a shared key and b

Within T rounds a matrix moves in r² dimensions alone, of which P scalars say much; the next T have
others. Nothing more is sent: the bases come from the seed and the round's number.
Ref: SubZero, arXiv 2410.08989; LOZO, 2410.07698.
"""

from collections.abc import Callable
from typing import Any

import jax

from zofl_jax.core import (
    Algorithm,
    Batches,
    Broadcast,
    ClientResult,
    PRNGKey,
    ServerState,
)
from zofl_jax.directions import perturbations
from zofl_jax.directions.perturbations import Perturbation


def in_subspaces(
    make: Callable[[Perturbation], Algorithm], key: PRNGKey, rank: int, rounds: int
) -> Algorithm:
    """Returns the algorithm that `make` makes, with directions in subspaces of T rounds.

    Args:
      make: directions -> an algorithm that measures along them in the rounds they are drawn in, as
        DeComFL does; not one whose directions live on, as those of FedKSeed's pool.
      key: known to all before the first round, such as `keys.pool_key(root.shared)`.
      rank: r >= 1.
      rounds: T >= 1.

    Raises:
      ValueError: for arguments out of range.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> from zofl_jax.algorithms import decomfl
    >>> from zofl_jax.directions import estimators
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(batch @ x["w"]))
    >>> def make(z):
    ...     return decomfl(f, estimators.central_difference(4, 1e-3, z), optax.sgd(0.1))
    >>> algorithm = in_subspaces(make, jax.random.key(7), rank=1, rounds=2)
    >>> key, start = jax.random.key(0), algorithm.init({"w": jnp.ones((3, 2))})
    >>> after = algorithm.server(key, algorithm.server(key, start, jnp.ones((1, 4))),
    ...                          jnp.ones((1, 4)))
    >>> int(jnp.linalg.matrix_rank(after.params["w"] - start.params["w"], rtol=1e-4))
    1
    """
    if rounds < 1:
        raise ValueError(f"the rounds of a subspace must be >= 1, got {rounds}")

    def of_round(state: ServerState) -> Algorithm:
        own = jax.random.fold_in(key, state.round // rounds)
        # Made once, outside the loops over directions.
        return make(perturbations.subspace(perturbations.bases(own, state.params, rank)))

    def client(
        shared_key: PRNGKey, state: ServerState, memory: Any, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        return of_round(state).client(shared_key, state, memory, batches, own_key)

    def server(shared_key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        return of_round(state).server(shared_key, state, broadcast)

    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    return make(perturbations.gaussian())._replace(client=client, server=server)
