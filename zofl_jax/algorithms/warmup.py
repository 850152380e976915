"""A warm-up: some rounds of one method, then another one, such as scalars, goes on from its model.

    rounds 0, ..., W − 1     the first method, FedAvg say, with clients that can afford it
    rounds W, W + 1, ...     the second one, DeComFL say, from the model of round W

Both are phases of one run. Their state is one type: the params, and an optimiser's state of each,
of which only that of the phase moves. So the second method begins as it would on its own from the
model of round W, and whoever replays the broadcasts has both. A client that has missed the end of
the first phase is sent that phase's message for late clients (`core.Sync`: of FedAvg the model of
round W), and then the scalars since; the ledger counts both.
Ref: ZOWarmUp, arXiv 2509.03503, where clients of few resources join after the warm-up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from zofl_jax.core import (
    Algorithm,
    Batches,
    Broadcast,
    ClientResult,
    Params,
    Phase,
    PRNGKey,
    ServerState,
    Sync,
)


class Both(NamedTuple):
    """What the two methods keep, each its own: their `opt_state`, and their clients' memory."""

    first: Any
    second: Any


def warmed_up(
    first: Algorithm, second: Algorithm | Sequence[Phase], rounds: int
) -> tuple[Phase, ...]:
    """Returns the phases of a run that begins with `rounds` rounds of `first`.

    Args:
      first: of the warm-up, such as `fedavg` or `fedkseed`.
      second: of all rounds after it, or its phases: those of the rounds before it are left out. Its
        state is that of its `init` at the initial params, so it must not hold what hangs on them;
        schedules that count its own steps count them from the end of the warm-up.
      rounds: W >= 1.

    Raises:
      ValueError: for rounds out of range; while tracing, if the two keep params of other types.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> from zofl_jax.algorithms import decomfl, fedavg
    >>> from zofl_jax.directions import estimators
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> scalars = decomfl(f, estimators.central_difference(4, 1e-3), optax.sgd(0.1))
    >>> phases = warmed_up(fedavg(f, optax.sgd(0.5)), scalars, 20)
    >>> [phase.first_round for phase in phases]
    [0, 20]
    >>> state, key = phases[0].algorithm.init(jnp.zeros(3)), jax.random.key(0)
    >>> [phase.algorithm.client(key, state, (), jnp.ones((1, 3)), key).upload.shape
    ...  for phase in phases]
    [(3,), (1, 4)]
    """
    if rounds < 1:
        raise ValueError(f"the rounds of a warm-up must be >= 1, got {rounds}")
    later = [Phase(0, second)] if isinstance(second, Algorithm) else [*second]
    # The last phase that has begun when the warm-up ends begins there.
    begun = max(i for i, phase in enumerate(later) if phase.first_round <= rounds)
    rest = [Phase(max(phase.first_round, rounds), phase.algorithm) for phase in later[begun:]]
    pair = first, rest[0].algorithm
    # Made once, so that phases of one algorithm share its programs.
    own = {id(algorithm): _one_of(pair, "second", algorithm, rounds) for _, algorithm in rest}
    return (
        Phase(0, _one_of(pair, "first", first, 0)),
        *(Phase(r, own[id(algorithm)]) for r, algorithm in rest),
    )


def _one_of(
    pair: tuple[Algorithm, Algorithm], name: str, algorithm: Algorithm, begins: int
) -> Algorithm:
    """Returns an algorithm whose state and memory stand beside those of the other of the pair."""

    def inside(state: ServerState) -> ServerState:
        return state._replace(opt_state=getattr(state.opt_state, name))

    def beside(both: Both, own: Any) -> Both:
        return both._replace(**{name: own})

    def outside(own: ServerState, before: ServerState) -> ServerState:
        return own._replace(opt_state=beside(before.opt_state, own.opt_state))

    def init(params: Params) -> ServerState:
        first, second = (each.init(params) for each in pair)
        kept, wanted = (jax.tree.map(jax.typeof, state.params) for state in (first, second))
        if kept != wanted:
            raise ValueError(
                f"the methods of a warm-up and after it keep params of other types: {kept} and "
                f"{wanted}"
            )
        return first._replace(opt_state=Both(first.opt_state, second.opt_state))

    def init_memory(params: Params) -> Any:
        both = Both(*(each.init_memory(params) for each in pair))
        return both if jax.tree.leaves(both) else ()

    def client(
        shared_key: PRNGKey, state: ServerState, memory: Any, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        kept = isinstance(memory, Both)
        own = getattr(memory, name) if kept else memory
        result = algorithm.client(shared_key, inside(state), own, batches, own_key)
        return result._replace(memory=beside(memory, result.memory)) if kept else result

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        return outside(algorithm.server(key, inside(state), broadcast), state)

    def of_both(sync: Sync) -> Sync:
        return Sync(
            message=lambda state: sync.message(inside(state)),
            restore=lambda state, message: outside(sync.restore(inside(state), message), state),
            alone=sync.alone,
            since=max(sync.since, begins),
        )

    return algorithm._replace(
        init=init,
        init_memory=init_memory,
        client=client,
        server=server,
        sync=None if algorithm.sync is None else of_both(algorithm.sync),
    )
