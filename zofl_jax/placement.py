"""Where a round runs: the cohort's clients shared out to devices.

    mesh = placement.clients_mesh()             # all local devices
    simulator = simulation.make_simulator(..., mesh=mesh)

Each device evaluates its own clients with no word to the others; what they send is gathered
for the aggregation. The shared state and the data are on every device, and each draws the
directions itself, as real clients do.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zofl_jax.core import Array

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


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """Returns the tree with every array on every device of the mesh."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


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
