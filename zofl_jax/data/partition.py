"""Partitions: which client owns which example.

Every partition is a pair (order, offsets) of int32 arrays [n] and [num_clients + 1]: client c
owns the examples `order[offsets[c]:offsets[c + 1]]`, in ascending order. Nothing here loops over
clients, so that a population of a million costs no more than its arrays.

Randomness comes from a jax key, but is drawn by NumPy on the host: a key seeds PCG64, whose raw
stream NumPy promises never to change. Permutations sort that stream, hence are integers only; the
gamma variates behind a Dirichlet draw are float64 and free of an accelerator's rounding. So a seed
gives the same partition on every machine.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax.core import Batch, ClientData, PRNGKey

Partition = tuple[np.ndarray, np.ndarray]  # order int32 [n], offsets int32 [num_clients + 1]

Missing = Literal["error", "drop", "own"]

DIRICHLET_DRAWS = 10
"""How often `dirichlet` draws before it gives up."""


def iid(key: PRNGKey, labels: np.ndarray, num_clients: int) -> Partition:
    """Deals the examples out at random; the sizes of two clients differ by at most one.

    Args:
      key: `keys.root(seed).partition`, [].
      labels: integers [n]; only their number matters.
      num_clients: 1 <= num_clients <= n.

    Raises:
      ValueError: if `num_clients` is out of range.

    >>> order, offsets = iid(jax.random.key(0), np.zeros(5, np.int32), 2)
    >>> sorted(order.tolist()), offsets.tolist()
    ([0, 1, 2, 3, 4], [0, 3, 5])
    """
    labels = _check(labels, num_clients)
    owners = np.empty(len(labels), np.int32)
    owners[_permutation(_bit_generator(key), len(labels))] = _even_parts(len(labels), num_clients)
    return _partition(owners, num_clients)


def dirichlet(
    key: PRNGKey, labels: np.ndarray, num_clients: int, alpha: float, min_size: int = 1
) -> Partition:
    """Gives every client its own mix of labels: each class is shared out by p ~ Dir(α, …, α).

    The examples of a class are shuffled and cut at ⌊n_class Σ_{j<=c} p_j⌋. A small α gives most
    of a class to few clients, α → ∞ gives equal shares. A draw that leaves a client with fewer
    than `min_size` examples is thrown away and drawn anew, `DIRICHLET_DRAWS` draws in all, each
    with a key of its own.

    Args:
      key: `keys.root(seed).partition`, [].
      labels: integers [n].
      num_clients: 1 <= num_clients <= n.
      alpha: the concentration, > 0.
      min_size: the examples every client must get at least, >= 0: say, the batch size.

    Raises:
      ValueError: if an argument is out of range or all draws leave a client short.

    Ref: Hsu, Qi and Brown 2019 (arXiv 1909.06335); by class: Yurochkin et al. 2019
    (arXiv 1905.12022), Li et al. 2022 (arXiv 2102.02079).
    """
    labels = _check(labels, num_clients)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha of a Dirichlet partition must be positive and finite, got {alpha}")
    if min_size * num_clients > len(labels):
        raise ValueError(
            f"{len(labels)} examples cannot give {num_clients} clients {min_size} each: use fewer "
            "clients or a smaller batch"
        )
    for attempt in range(DIRICHLET_DRAWS):
        owners = _dirichlet_owners(jax.random.fold_in(key, attempt), labels, num_clients, alpha)
        sizes = np.bincount(owners, minlength=num_clients)
        if np.min(sizes) >= min_size:
            return _partition(owners, num_clients)
    raise ValueError(
        f"{np.sum(sizes < min_size)} of {num_clients} clients have fewer than {min_size} examples "
        f"in the last of {DIRICHLET_DRAWS} Dirichlet draws with alpha={alpha:g} (the smallest has "
        f"{np.min(sizes)}): use a larger alpha, fewer clients or a smaller batch"
    )


def shards(
    key: PRNGKey, labels: np.ndarray, num_clients: int, shards_per_client: int = 2
) -> Partition:
    """Sorts the examples by label, cuts them into shards and deals these out to the clients.

    There are num_clients · shards_per_client shards, whose sizes differ by at most one, so that
    with two of them most clients see two labels. Examples of one label are shuffled first.

    Args:
      key: `keys.root(seed).partition`, [].
      labels: integers [n].
      num_clients: >= 1.
      shards_per_client: >= 1; num_clients · shards_per_client <= n.

    Raises:
      ValueError: if an argument is out of range.

    Ref: McMahan et al. 2017 (arXiv 1602.05629), section 3.
    """
    labels = _check(labels, num_clients)
    num_shards = num_clients * shards_per_client
    if not 1 <= shards_per_client <= len(labels) // num_clients:
        raise ValueError(
            f"{len(labels)} examples cannot be cut into shards for {num_clients} clients with "
            f"shards_per_client={shards_per_client}: it must be in "
            f"[1, {len(labels) // num_clients}]"
        )
    bits = _bit_generator(key)
    shuffled = _permutation(bits, len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    client_of_shard = _permutation(bits, num_shards) // shards_per_client
    owners = np.empty(len(labels), np.int32)
    owners[by_label] = client_of_shard[_even_parts(len(labels), num_shards)]
    return _partition(owners, num_clients)


def natural(client_ids: np.ndarray) -> Partition:
    """Gives every example to its natural owner; clients are numbered in the order of their ids.

    Args:
      client_ids: [n], n >= 1, anything that sorts; an id without examples is not a client.

    Raises:
      ValueError: if there are no ids or they aren't a vector.

    >>> order, offsets = natural(np.array([7, 3, 7]))
    >>> order.tolist(), offsets.tolist()
    ([1, 0, 2], [0, 1, 3])
    """
    client_ids = np.asarray(client_ids)
    if client_ids.ndim != 1 or client_ids.size == 0:
        raise ValueError(f"client_ids must have the shape [n] with n >= 1, got {client_ids.shape}")
    ids, owners = np.unique(client_ids, return_inverse=True)
    return _partition(owners, len(ids))


def known_owners(
    owners: Sequence[str | int | None],
    missing: Missing,
    place: Callable[[int], str],
    least: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which examples are kept, int [kept] in ascending order, and their owners, int [kept].

    Owners are numbered in the order of their names; those of examples without one come last.

    Args:
      owners: [n], who owns each example, None where that isn't known: strangers are no client.
      missing: what is done with those: "error", "drop", or "own", which makes each a client of
        its own.
      place: index -> what to call an example in a message.
      least: owners of fewer examples are left out.

    Raises:
      ValueError: if an owner is missing and that is an error, or if all are dropped.

    >>> known_owners(["b", None, "a", None], "own", str)
    (array([0, 1, 2, 3]), array([1, 2, 0, 3]))
    """
    unknown = [i for i, name in enumerate(owners) if name is None]
    if unknown and missing == "error":
        raise ValueError(
            f"{place(unknown[0])} names no owner, as {len(unknown)} of {len(owners)} examples do: "
            "complete them, or give --missing_owner=drop to leave them out, or --missing_owner=own "
            "to make each a client of its own"
        )
    kept, found = _named(owners, unknown, missing, place)
    sizes = np.bincount(found)
    enough = sizes[found] >= least
    if not enough.any():
        raise ValueError(
            f"no owner has --least_examples={least}, the largest has {np.max(sizes)}: ask for fewer"
        )
    return kept[enough], np.unique(found[enough], return_inverse=True)[1]


def _named(
    owners: Sequence[str | int | None],
    unknown: list[int],
    missing: Missing,
    place: Callable[[int], str],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `known_owners` does of owners of any size."""
    names = np.array([name for name in owners if name is not None])
    kept = np.arange(len(owners))
    if missing == "drop" and unknown:
        kept = np.delete(kept, unknown)
        if not len(kept):
            raise ValueError(
                f"{place(0)} names no owner, and no example does: there are no clients"
            )
        return kept, np.unique(names, return_inverse=True)[1]
    found = np.empty(len(owners), int)
    found[unknown] = len(np.unique(names)) + np.arange(len(unknown))
    found[np.setdiff1d(kept, unknown)] = np.unique(names, return_inverse=True)[1]
    return kept, found


def client_data(examples: Batch, order: np.ndarray, offsets: np.ndarray) -> ClientData:
    """Returns the examples on the device, with the index that says whose is which.

    Args:
      examples: a tree of arrays [n, …].
      order: the examples of client 0, then of client 1, …: integers [n].
      offsets: where each client starts in `order`, [num_clients + 1].

    Raises:
      ValueError: if `order` isn't a permutation of the examples or `offsets` don't cut it up.
    """
    order, offsets = np.asarray(order), np.asarray(offsets)
    chex.assert_rank([order, offsets], 1)
    chex.assert_type([order, offsets], int)
    lengths = sorted({np.shape(leaf)[0] for leaf in jax.tree.leaves(examples)})
    if lengths != [len(order)]:
        raise ValueError(f"order has {len(order)} entries, but leaves of examples have {lengths}")
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ValueError(f"order must hold every integer in [0, {len(order)}) once")
    if offsets[0] != 0 or offsets[-1] != len(order) or np.any(np.diff(offsets) < 0):
        raise ValueError(
            f"offsets must rise from 0 to {len(order)}, the number of examples, but run from "
            f"{offsets[0]} to {offsets[-1]} with a smallest step of {np.diff(offsets).min()}"
        )
    return ClientData(
        examples=jax.tree.map(jnp.asarray, examples),
        order=jnp.asarray(order, jnp.int32),
        offsets=jnp.asarray(offsets, jnp.int32),
    )


def check_batch_size(offsets: np.ndarray, batch_size: int) -> None:
    """Checks that every client can fill a batch.

    Raises:
      ValueError: naming how many clients can't, and the smallest of them.

    >>> check_batch_size(np.array([0, 4, 9]), 4)
    """
    sizes = np.diff(np.asarray(offsets))
    short = int(np.sum(sizes < batch_size))
    if short:
        raise ValueError(
            f"{short} of {len(sizes)} clients have fewer examples than batch_size={batch_size} "
            f"(the smallest, client {np.argmin(sizes)}, has {np.min(sizes)}): use a smaller batch, "
            "fewer clients or a more even partition; of natural clients, --least_examples="
            f"{batch_size} leaves out the smaller"
        )


def label_counts(
    labels: np.ndarray, order: np.ndarray, offsets: np.ndarray, num_classes: int
) -> np.ndarray:
    """Returns how many examples of each label each client has, int [num_clients, num_classes].

    >>> label_counts(np.array([0, 2, 2]), np.array([2, 0, 1]), np.array([0, 2, 3]), 3).tolist()
    [[1, 0, 1], [0, 0, 1]]
    """
    chex.assert_equal_shape([labels, order])
    sizes = np.diff(offsets)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    cells = owners * num_classes + np.asarray(labels)[order]
    return np.bincount(cells, minlength=len(sizes) * num_classes).reshape(-1, num_classes)


def _check(labels: np.ndarray, num_clients: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels must have the shape [n], got {labels.shape}")
    if not 1 <= num_clients <= len(labels):
        raise ValueError(
            f"num_clients must be in [1, {len(labels)}], the number of examples, got {num_clients}"
        )
    return labels


def _dirichlet_owners(
    key: PRNGKey, labels: np.ndarray, num_clients: int, alpha: float
) -> np.ndarray:
    bits = _bit_generator(key)
    generator = np.random.Generator(bits)
    shuffled = _permutation(bits, len(labels))
    owners = np.empty(len(labels), np.int32)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        shares = generator.dirichlet(np.full(num_clients, alpha))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        counts = np.diff(cuts, prepend=0, append=len(members))
        owners[members] = np.repeat(np.arange(num_clients, dtype=np.int32), counts)
    return owners


def _partition(owners: np.ndarray, num_clients: int) -> Partition:
    sizes = np.bincount(owners, minlength=num_clients)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return np.argsort(owners, kind="stable").astype(np.int32), offsets.astype(np.int32)


def _even_parts(n: int, num_parts: int) -> np.ndarray:
    """Returns the part of each of n positions when cut into parts of n / num_parts, int64 [n]."""
    return np.arange(n) * num_parts // n


def _bit_generator(key: PRNGKey) -> np.random.PCG64:
    return np.random.PCG64(np.asarray(jax.random.key_data(key)).tolist())


def _permutation(bits: np.random.PCG64, n: int) -> np.ndarray:
    """Returns a uniform permutation of range(n): two of n 64-bit words tie with chance n²/2⁶⁵."""
    return np.argsort(bits.random_raw(n), kind="stable")
