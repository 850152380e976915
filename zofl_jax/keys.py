"""The key schedule: every random number is a pure function of (seed, name, indices).

    seed -> shared  -> round r -> local step k -> direction p -> leaf (by its path) -> block
                   -> pool -> seed j
         -> cohort  -> round r
         -> batches -> round r -> client i -> local step k
         -> own     -> round r -> client i
         -> adversary, presence -> round r
         -> init, partition

Only `shared` is known to server and clients alike: its round keys are the seeds that
DeComFL sends (Li et al. 2025, Algorithm 3). The generator may be chosen for it alone, so
that two generators are compared on the same cohorts and batches.
"""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax.core import Array, Params, PRNGKey

IMPLEMENTATIONS = ("threefry2x32", "threefry4x32")
"""Generators whose bits are the same under jit, vmap, scan and sharding."""

_REFUSED = {
    "rbg": "under vmap it takes the whole batch from the first key, so clients would not "
    "rebuild the directions of the others",
    "philox4x32": "it does not compile once arrays are sharded over devices",
}
_REFUSED["unsafe_rbg"] = _REFUSED["rbg"]


class RootKeys(NamedTuple):
    """The roots of the independent streams of one run; each a key, []."""

    shared: PRNGKey
    cohort: PRNGKey
    batches: PRNGKey
    own: PRNGKey
    adversary: PRNGKey
    presence: PRNGKey
    init: PRNGKey
    partition: PRNGKey


def root(seed: int, impl: str = "threefry2x32") -> RootKeys:
    """Returns the root keys of a run.

    Args:
      seed: 0 <= seed < 2**32.
      impl: generator of the shared directions, one of `IMPLEMENTATIONS`; all other
        streams use threefry2x32.

    Raises:
      ValueError: for a seed out of range or a generator that can't be trusted here.

    >>> root(0).shared.shape
    ()
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if impl not in IMPLEMENTATIONS:
        reason = _REFUSED.get(impl, "it is not a generator of this library")
        raise ValueError(
            f"prng_impl {impl!r} is refused: {reason}; use one of {', '.join(IMPLEMENTATIONS)}"
        )
    base = jax.random.key(np.uint32(seed), impl="threefry2x32")
    streams = {name: jax.random.fold_in(base, name_id(name)) for name in RootKeys._fields}
    shared = jax.random.key(np.uint32(seed), impl=impl)
    return RootKeys(**{**streams, "shared": jax.random.fold_in(shared, name_id("shared"))})


def round_key(shared: PRNGKey, round_index: Array | int) -> PRNGKey:
    """Returns the key that server and clients share in one round."""
    return _settle(jax.random.fold_in(shared, round_index))


def step_key(key: PRNGKey, step: Array | int) -> PRNGKey:
    """Returns the key of local step `step` of the round with key `key`."""
    return _settle(jax.random.fold_in(key, step))


def group_key(key: PRNGKey, group: Array | int) -> PRNGKey:
    """Returns what a group of clients with directions of its own has for the round's key `key`."""
    own = _settle(jax.random.fold_in(key, name_id("group")))
    return _settle(jax.random.fold_in(own, group))


def direction_keys(key: PRNGKey, num_perturbations: int) -> PRNGKey:
    """Returns the keys of all directions of the local step with key `key`, [P]."""
    return _settle(jax.vmap(lambda p: jax.random.fold_in(key, p))(jnp.arange(num_perturbations)))


def directions_of_steps(key: PRNGKey, steps: int, num_perturbations: int) -> PRNGKey:
    """Returns the keys of all directions of a round's first `steps` local steps, [steps · P]."""
    each = jax.vmap(lambda k: direction_keys(step_key(key, k), num_perturbations))
    return each(jnp.arange(steps)).reshape(-1)


def leaf_keys(key: PRNGKey, params: Params) -> Params:
    """Returns a tree like `params` with one key a leaf, derived from the leaf's path.

    So a leaf's random numbers don't depend on which other leaves there are.

    Raises:
      ValueError: if the 32-bit ids of two paths collide (chance n²/2³³ for n leaves).
    """
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [path_name(path) for path, _ in paths_and_leaves]
    ids = [name_id(path) for path in paths]
    if len(set(ids)) < len(ids):
        twins = [path for path in paths if ids.count(name_id(path)) > 1]
        raise ValueError(f"params {twins} would share their directions: rename one of them")
    keys = _settle(jax.vmap(lambda i: jax.random.fold_in(key, i))(np.asarray(ids, np.uint32)))
    return jax.tree.unflatten(treedef, [keys[i] for i in range(len(ids))])


def block_key(leaf_key: PRNGKey, block: Array | int) -> PRNGKey:
    """Returns the key of a block of a leaf, such as one of its layers."""
    return _settle(jax.random.fold_in(leaf_key, block))


def batch_key(batches: PRNGKey, round_index: Array | int, client: Array | int) -> PRNGKey:
    """Returns the key from which client `client` draws its batches of a round."""
    return jax.random.fold_in(jax.random.fold_in(batches, round_index), client)


def own_key(own: PRNGKey, round_index: Array | int, client: Array | int) -> PRNGKey:
    """Returns the private key of client `client` in a round: for its noise and its rounding."""
    return jax.random.fold_in(jax.random.fold_in(own, round_index), client)


def pool_key(shared: PRNGKey) -> PRNGKey:
    """Returns the key of a pool of directions that are the same in all rounds."""
    return _settle(jax.random.fold_in(shared, name_id("pool")))


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a tree path as text, such as "Dense_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def name_id(name: str) -> int:
    """Returns the first 32 bits of SHA-256 of a name, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def key_bytes(key: PRNGKey) -> int:
    """Returns the size of a key as a message, in bytes."""
    return int(jax.eval_shape(jax.random.key_data, key).size) * 4


def _settle(key: PRNGKey) -> PRNGKey:
    # Keeps XLA from fusing one derivation into the next. Each word of a threefry4x32 key
    # needs all four of the key before, and fused it computes them anew: four links took 44 s.
    words = jax.lax.optimization_barrier(jax.random.key_data(key))
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))
