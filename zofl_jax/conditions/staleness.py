"""Uploads that missed a round's deadline, used in the next one with a smaller weight.

    algorithm = with_late_uploads(decomfl(...), weight=0.5)
    conditions = Conditions(attend=partial(..., deadline=2.0))

The algorithm says by `Algorithm.late_uploads` that it is given them, and a simulation hands them
over; late uploads to any other algorithm are lost.

A late upload belongs to the state and, for scalars, to the directions of the round it was made
in. So the broadcast has two parts, each the aggregate of its own uploads times its share of
the weight:

    fresh = F / (F + s·L) · aggregate(uploads of round r)
    late  = s·L / (F + s·L) · aggregate(late uploads of round r − 1)

and everyone does the server's step with `late` and the key of round r − 1, if any of it is not
zero, and then that with `fresh` and the key of round r. F and L are the sums of the weights, s
is the staleness weight. For a method whose server is linear in the broadcast, such as DeComFL
with one local step and plain SGD, the two steps are one step along the weighted mean. Both are
at the learning rate of round r.
Everything that enters is in the broadcasts, so they replay as always; a broadcast is twice as
long. A client whose upload is late keeps its new memory, such as what a codec left out of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofl_jax.core import (
    Algorithm,
    Array,
    Batches,
    Broadcast,
    ClientResult,
    Params,
    PRNGKey,
    ServerState,
    Sync,
    Upload,
)


class Delayed(NamedTuple):
    """An optimiser's state, and the words of the last round's key."""

    inner: optax.OptState
    words: Array  # uint32 [words]


def with_late_uploads(
    algorithm: Algorithm, weight: float, prng_impl: str = "threefry2x32"
) -> Algorithm:
    """Returns the algorithm that also takes the late uploads of the round before.

    Its `aggregate` is given the cohort's uploads and then the late ones, [2C, ...].

    Args:
      algorithm: its broadcast is of floating point numbers, and zero where nothing was uploaded.
        What its server does with a round's broadcast must not hang on state that has moved on
        since, as HiSo's directions do, nor on the sum of the uploads, as SCAFFOLD's control does.
      weight: s in (0, 1], of a late upload relative to one in time.
      prng_impl: the generator of the run's shared keys.

    Raises:
      ValueError: for a weight out of range, for an algorithm that is given late uploads already
        or was made for a uniform mean, or (while tracing) for a run with another generator.
    """
    if not 0 < weight <= 1:
        raise ValueError(f"the weight of late uploads must be in (0, 1], got {weight}")
    if algorithm.late_uploads:
        raise ValueError("the algorithm is given late uploads already: use with_late_uploads once")
    if algorithm.expects.weighting == "uniform":
        raise ValueError(
            "the algorithm was made for a uniform mean of one round's uploads, as private clients "
            "and secure sums are, and late uploads would be weighed: leave with_late_uploads out"
        )

    def inside(state: ServerState) -> ServerState:
        return state._replace(opt_state=state.opt_state.inner)

    def init(params: Params) -> ServerState:
        state = algorithm.init(params)
        words = jax.random.key_data(jax.random.key(0, impl=prng_impl))
        return state._replace(opt_state=Delayed(state.opt_state, jnp.zeros_like(words)))

    def client(
        shared_key: PRNGKey, state: ServerState, memory: Params, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        return algorithm.client(shared_key, inside(state), memory, batches, own_key)

    def aggregate(uploads: Upload, weights: Array) -> Broadcast:
        half = (len(weights) + 1) // 2
        fresh = algorithm.aggregate(jax.tree.map(lambda u: u[:half], uploads), weights[:half])
        if half == len(weights):  # one upload alone, of which only the shape is asked
            return fresh, jax.tree.map(jnp.zeros_like, fresh)
        late = algorithm.aggregate(jax.tree.map(lambda u: u[half:], uploads), weights[half:])
        in_time, delayed = jnp.sum(weights[:half]), weight * jnp.sum(weights[half:])
        total = jnp.maximum(in_time + delayed, jnp.finfo(jnp.float32).tiny)
        return _scaled(fresh, in_time / total), _scaled(late, delayed / total)

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        fresh, late = broadcast
        _check_generator(key, prng_impl)
        before = jax.random.wrap_key_data(state.opt_state.words, impl=prng_impl)

        def step_back(state: ServerState) -> ServerState:
            after = algorithm.server(before, state, late)
            return ServerState(
                after.params, _schedules_of(state.opt_state, after.opt_state), state.round
            )

        moves = jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(late)]))
        stepped = jax.lax.cond(moves, step_back, lambda state: state, inside(state))
        after = algorithm.server(key, stepped, fresh)
        return after._replace(opt_state=Delayed(after.opt_state, jax.random.key_data(key)))

    def delayed(sync: Sync) -> Sync:
        def restore(initial: ServerState, message: Any) -> ServerState:
            state = sync.restore(inside(initial), message)
            return state._replace(opt_state=Delayed(state.opt_state, initial.opt_state.words))

        return Sync(lambda state: sync.message(inside(state)), restore, sync.alone)

    sync = None if algorithm.sync is None else delayed(algorithm.sync)
    return algorithm._replace(
        init=init,
        client=client,
        aggregate=aggregate,
        server=server,
        sync=sync,
        late_uploads=True,
    )


def _check_generator(key: PRNGKey, prng_impl: str) -> None:
    """Checks that keys of the last round can be made again from their words."""
    if key.dtype != jax.eval_shape(lambda: jax.random.key(0, impl=prng_impl)).dtype:
        raise ValueError(
            f"with_late_uploads was given prng_impl={prng_impl!r}, and the run's shared keys are "
            f"of {str(jax.random.key_impl(key))!r}: give it the run's"
        )


def _schedules_of(before: optax.OptState, after: optax.OptState) -> optax.OptState:
    """Returns `after` with the counts of optax's schedules as before: they count rounds."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(lambda b, a: b if is_schedule(b) else a, before, after, is_leaf=is_schedule)


def _scaled(broadcast: Broadcast, share: Array) -> Broadcast:
    for leaf in jax.tree.leaves(broadcast):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"late uploads need broadcasts of floating point numbers, got {leaf.dtype}: "
                "discard late uploads with this algorithm"
            )
    return jax.tree.map(lambda b: (share * b).astype(b.dtype), broadcast)
