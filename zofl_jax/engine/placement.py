"""Where a round runs: the cohort's clients shared out to devices.

    mesh = placement.clients_mesh()             # all local devices
    simulator = simulation.make_simulator(..., mesh=mesh)

Each device evaluates its own clients with no word to the others; what they send is gathered
for the aggregation. The shared state is on every device, and each draws the directions itself,
as real clients do. The data are on every device too, unless the mesh spans several processes
(`processes.py`): then each holds a block of clients, and the batches of a cohort go from the
device that holds a client to the one that evaluates it.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zofl_jax.core import Array, Batch, ClientData

CLIENTS = "clients"
"""The mesh axis that clients are shared out over."""


def use_cpu_devices(count: int | None = None) -> int:
    """Makes JAX see the CPU as several devices; returns how many.

    A convolution uses one thread, so clients on two devices run on two cores at once. It must be
    called before JAX is used for the first time; later, or where there is an accelerator, it
    changes nothing.

    Args:
      count: >= 1; as many as there are cores unless given.

    Raises:
      ValueError: if `count` < 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"the CPU must be at least 1 device, got {count}")
    wanted = count or _num_cores()
    # JAX refuses both this flag and its own setting.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX runs already
            jax.config.update("jax_num_cpu_devices", wanted)
    return len(jax.local_devices())


def clients_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """Returns a mesh of one axis over devices, all local ones unless given; None for only one."""
    chosen = list(jax.local_devices() if devices is None else devices)
    if len(chosen) < 2:
        return None
    return jax.make_mesh((len(chosen),), (CLIENTS,), axis_types=(AxisType.Auto,), devices=chosen)


def devices_of_each_process(count: int) -> list[jax.Device]:
    """Returns the first `count` devices of every process, those of process 0 first."""
    owned: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        owned.setdefault(device.process_index, []).append(device)
    return [device for _, devices in sorted(owned.items()) for device in devices[:count]]


def spans_processes(mesh: Mesh | None) -> bool:
    """Returns whether some devices of the mesh are another process's."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def own_part(mesh: Mesh | None) -> Mesh | None:
    """Returns the mesh of those devices that are this process's own."""
    if mesh is None or not spans_processes(mesh):
        return mesh
    here = jax.process_index()
    return clients_mesh([device for device in mesh.devices.flat if device.process_index == here])


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """Returns the tree with every array on every device of the mesh.

    Over several processes each gives its own copy, and that they are equal is the caller's duty.
    """
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    if not spans_processes(mesh):
        return jax.device_put(tree, everywhere)

    def place(leaf: Any) -> Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        # `device_put` would compare the hosts' values, and wait for processes that don't come.
        return jax.make_array_from_callback(host.shape, everywhere, lambda index: host[index])

    return jax.tree.map(place, tree)


def own_copy(tree: Any) -> Any:
    """Returns the tree with replicated arrays of several processes as this process's own."""
    return jax.tree.map(
        lambda x: (
            x if not isinstance(x, jax.Array) or x.is_fully_addressable else x.addressable_data(0)
        ),
        tree,
    )


def place_client_data(data: ClientData, mesh: Mesh | None) -> ClientData:
    """Returns the clients' data on the devices of the mesh, for `take`.

    Over several processes each device gets the examples of a block of clients, and a process
    hands over those of its own devices only. Blocks have about equally many examples.
    """
    if mesh is None or not spans_processes(mesh):
        return replicated(jax.device_put(data), mesh)
    offsets, order = np.asarray(data.offsets), np.asarray(data.order)
    bounds = np.linspace(0, len(order), mesh.size + 1)
    begins = offsets[np.searchsorted(offsets, bounds)]  # of each block, and the end
    size = int(np.diff(begins).max())

    def spread(leaf: Any) -> Array:
        def block(index: Any) -> np.ndarray:
            number = (index[0].start or 0) // size
            rows = order[begins[number] : begins[number + 1]]
            return np.asarray(leaf)[np.resize(rows, size) if len(rows) else np.zeros(size, int)]

        apart = NamedSharding(mesh, PartitionSpec(CLIENTS))
        return jax.make_array_from_callback((mesh.size * size, *leaf.shape[1:]), apart, block)

    within = [np.arange(end - begin) for begin, end in itertools.pairwise(begins)]
    moved = np.concatenate([size * number + at for number, at in enumerate(within)])
    index = replicated((moved.astype(np.int32), offsets), mesh)
    return ClientData(jax.tree.map(spread, data.examples), *index)


def take(examples: Batch, rows: Array, mesh: Mesh | None) -> Batch:
    """Returns examples[rows] on every device, a tree of arrays [*rows.shape, ...].

    Where each device holds a part of the examples, it adds those that it holds to zeros for the
    others: so the sum is exact, and no device sees more than the batches of a cohort.

    Args:
      examples: of `place_client_data`.
      rows: int32, any shape.
      mesh: that `place_client_data` was given.
    """
    if mesh is None or not spans_processes(mesh):
        return jax.tree.map(lambda leaf: leaf[rows], examples)

    def held(examples: Batch, rows: Array) -> Batch:
        size = jax.tree.leaves(examples)[0].shape[0]
        at = rows - jax.lax.axis_index(CLIENTS) * size
        mine = (at >= 0) & (at < size)

        def share(leaf: Array) -> Array:
            found = leaf[jnp.where(mine, at, 0)]
            mask = mine.reshape(*mine.shape, *[1] * (found.ndim - mine.ndim))
            zero = jnp.zeros((), leaf.dtype)
            return jax.lax.psum(jnp.where(mask, found, zero), CLIENTS).astype(leaf.dtype)

        return jax.tree.map(share, examples)

    return jax.shard_map(
        held,
        mesh=mesh,
        in_specs=(PartitionSpec(CLIENTS), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(examples, rows)


def over_devices(fn: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Returns fn(shared, each) in which each device takes a part of the clients.

    Where the clients can't be shared out evenly, the first ones are evaluated twice and one
    result is dropped.

    Args:
      fn: (shared, each) -> a tree of arrays [C, ...]; `each` is a tree of arrays [C, ...] and
        results of one client must not depend on the others.
      mesh: from `clients_mesh`; None changes nothing.
    """
    if mesh is None:
        return fn
    apart = PartitionSpec(CLIENTS)
    spread = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(PartitionSpec(), apart),
        out_specs=apart,
        check_vma=False,  # a client's state starts as what all share
    )

    def evaluate(shared: Any, each: Any) -> Any:
        size = jax.tree.leaves(each)[0].shape[0]
        padded = math.ceil(size / mesh.size) * mesh.size
        out = spread(shared, jax.tree.map(lambda x: _cycle(x, padded), each))
        together = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, together)[:size], out)

    return evaluate


def _num_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cycle(x: Array, size: int) -> Array:
    return x if len(x) == size else x[jnp.arange(size) % len(x)]
