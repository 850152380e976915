"""Batches as a pure function of (key, client): there is no loader and no position to save."""

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax import keys, sampling
from zofl_jax.core import Array, Batch, Batches, ClientData, PRNGKey


def sample(
    key: PRNGKey,
    data: ClientData,
    client: Array | int,
    batch_size: int,
    num_batches: int,
) -> Batches:
    """Returns `num_batches` independent batches of one client, a tree [num_batches, batch_size, …].

    A batch has no example twice, and every set of `batch_size` examples of the client is equally
    likely; two batches may share examples. Batch k depends on (key, k) alone, so that a longer
    sequence starts with the shorter one. Under vmap over clients the data set isn't copied:

        jax.vmap(sample, in_axes=(0, None, 0, None, None))(keys, data, cohort, 32, 4)

    Args:
      key: `keys.batch_key(batches, round, client)`, [].
      data: the examples of all clients.
      client: in [0, num_clients), may be traced. That it owns `batch_size` examples or more is
        the caller's duty: see `partition.check_batch_size`.
      batch_size: static, >= 1.
      num_batches: static, >= 1: one a local step.

    Raises:
      ValueError: if `batch_size` or `num_batches` is below 1.
    """
    chosen = sampled_indices(key, data, client, batch_size, num_batches)
    return jax.tree.map(lambda leaf: leaf[chosen], data.examples)


def sampled_indices(
    key: PRNGKey,
    data: ClientData,
    client: Array | int,
    batch_size: int,
    num_batches: int,
) -> Array:
    """Returns which of `data.examples` are `sample`'s batches, int32 [num_batches, batch_size].

    Raises:
      ValueError: as `sample`.
    """
    if num_batches < 1:
        raise ValueError(f"num_batches must be >= 1, got {num_batches}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    start = data.offsets[client]
    count = data.offsets[client + 1] - start

    def positions(step: Array) -> Array:
        return start + sampling.subset(keys.step_key(key, step), count, batch_size)

    return data.order[jax.vmap(positions)(jnp.arange(num_batches))]


def evaluation_batches(examples: Batch, batch_size: int) -> tuple[Batches, np.ndarray]:
    """Returns all examples in order, cut into batches of one shape, and which of them are real.

    The last batch is filled up with copies of the first example: `mask` is False there.

    Args:
      examples: a tree of arrays [n, …], n >= 1.
      batch_size: B >= 1.

    Returns:
      (batches, mask): a tree [ceil(n / B), B, …], and bool [ceil(n / B), B] with n times True.

    Raises:
      ValueError: if `batch_size` < 1, there are no examples, or leaves differ in n.

    >>> batches, mask = evaluation_batches({"x": np.arange(3)}, 2)
    >>> batches["x"].tolist(), mask.tolist()
    ([[0, 1], [2, 0]], [[True, True], [True, False]])
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    lengths = sorted({leaf.shape[0] for leaf in jax.tree.leaves(examples)})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(
            f"leaves of examples must share one leading axis of at least 1, got {lengths}"
        )
    index = np.arange(-(-lengths[0] // batch_size) * batch_size).reshape(-1, batch_size)
    mask = index < lengths[0]
    filled = np.where(mask, index, 0)
    return jax.tree.map(lambda leaf: leaf[filled], examples), mask
