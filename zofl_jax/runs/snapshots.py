"""Snapshots: states of some rounds, so that a replay needn't start from the first.

A file holds magic, SHA-256, version and the leaves by their paths in the tree, in
msgpack (`flax.serialization`); `docs/log_format.md` has the bytes. A torn or altered file
is recognised by its SHA-256, and the snapshot before it serves in its place.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from zofl_jax import keys
from zofl_jax.runs.run_files import RunError, write_atomically

FORMAT_VERSION = 1
"""The version of new snapshots, and the newest that can be read."""

_MAGIC = b"zoflsnap"
_SUFFIX = ".snapshot"


def save(directory: Path, rounds_done: int, state: Any, keep: int = 2) -> None:
    """Saves `state` as the snapshot of `rounds_done`, then deletes those no longer wanted.

    Round 0 and the last `keep` up to this round stay; those of later rounds go.

    Args:
      directory: exists.
      rounds_done: rounds done, >= 0.
      state: a tree of arrays.
      keep: >= 1.

    Raises:
      ValueError: for a leaf that isn't an array of numbers, a negative round, or keep < 1.
    """
    if rounds_done < 0:
        raise ValueError(f"a snapshot's round must be >= 0, got {rounds_done}")
    if keep < 1:
        raise ValueError(f"keep must be >= 1, or the snapshot itself would go, got {keep}")
    leaves = {name: _as_numpy(name, leaf) for name, leaf in _named_leaves(state).items()}
    content = {"round": int(rounds_done), "leaves": leaves}
    version = FORMAT_VERSION.to_bytes(4, "little")
    payload = serialization.msgpack_serialize(content, in_place=True)
    path = _path(directory, rounds_done)
    write_atomically(path, _MAGIC, _digest(version, payload), version, payload)

    rounds = saved_rounds(directory)
    wanted = {0, *[r for r in rounds if r <= rounds_done][-keep:]}
    for unwanted in set(rounds) - wanted:
        _path(directory, unwanted).unlink()


def load_latest(
    directory: Path, template: Any, at_most: int
) -> tuple[tuple[int, Any] | None, str | None]:
    """Returns the last usable snapshot up to round `at_most`, and a notice for the user.

    Damaged snapshots are set aside under the suffix ".damaged".

    Args:
      directory: holds the snapshots.
      template: a tree of arrays or `jax.ShapeDtypeStruct`s that the snapshot must fit.
      at_most: the latest round wanted.

    Returns:
      (round, state) or None, and None or one sentence about damaged snapshots. Leaves are
      `jax.Array`s, or NumPy arrays where the template has those.

    Raises:
      RunError: naming the first leaf that doesn't fit, or for a newer format.
    """
    damaged: list[str] = []
    found = None
    for rounds_done in reversed([r for r in saved_rounds(directory) if r <= at_most]):
        path = _path(directory, rounds_done)
        leaves = _read(path, rounds_done)
        if leaves is not None:
            found = rounds_done, _fit(path, leaves, template)
            break
        path.replace(path.with_name(f"{path.name}.damaged"))
        damaged.append(path.name)
    if not damaged:
        return found, None
    instead = f"that of round {found[0]} is used" if found else "there is no earlier one"
    names = ", ".join(damaged)
    return found, f"Damaged and set aside in {directory}: {names}; {instead} instead."


def saved_rounds(directory: Path) -> list[int]:
    """Returns the rounds of which there are snapshots, in ascending order."""
    stems = [path.stem for path in directory.glob(f"*{_SUFFIX}")]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _digest(version: bytes, payload: bytes) -> bytes:
    digest = hashlib.sha256(version)
    digest.update(payload)
    return digest.digest()


def _path(directory: Path, rounds_done: int) -> Path:
    return directory / f"{rounds_done:08d}{_SUFFIX}"


def _read(path: Path, rounds_done: int) -> dict[str, np.ndarray] | None:
    """Returns a snapshot's leaves by name, or None if it isn't as it was written."""
    with open(path, "rb") as file:
        magic, digest, version_bytes, payload = (file.read(n) for n in (8, 32, 4, -1))
    if magic != _MAGIC or digest != _digest(version_bytes, payload):
        return None
    version = int.from_bytes(version_bytes, "little")
    if version > FORMAT_VERSION:
        raise RunError(
            f"{path} has format version {version} and this zofl_jax reads versions up to "
            f"{FORMAT_VERSION}: update zofl_jax, or choose another --workdir"
        )
    content = serialization.msgpack_restore(payload)
    return content["leaves"] if content["round"] == rounds_done else None


def _fit(path: Path, leaves: dict[str, np.ndarray], template: Any) -> Any:
    """Returns a tree like `template` with the leaves of a snapshot."""
    wanted = _named_leaves(template)
    for name in [*wanted, *leaves]:
        have, want = (
            f"{tree[name].dtype.name}{list(tree[name].shape)}" if name in tree else "absent"
            for tree in (leaves, wanted)
        )
        if have != want:
            raise RunError(
                f"{path} doesn't fit this run: leaf {name} is {have} there and {want} here; use "
                "the flags and the version it was written with, or choose another --workdir"
            )
    restored = [
        leaves[name] if isinstance(like, np.ndarray | np.generic) else jnp.array(leaves[name])
        for name, like in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), restored)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by their paths, such as "params/Dense_0/kernel"."""
    pairs = [(keys.path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError(f"two leaves of a state have the same path: {[name for name, _ in pairs]}")
    return named


def _as_numpy(name: str, leaf: Any) -> np.ndarray:
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not is_array or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.dtype.kind in "OSU":
        raise ValueError(
            f"leaf {name} of a state must be an array of numbers, got "
            f"{leaf.dtype if is_array else type(leaf).__name__}"
        )
    return np.asarray(leaf)
