"""Where a round runs: clients shared out over devices, and params over those of a group.

    mesh = placement.make_mesh(clients=4, model=2)  # eight devices
    simulator = simulation.make_simulator(..., mesh=mesh)

A mesh has an axis of clients and may have one of the model. Each group of `model` devices holds the
params once, split as `core.Task.layout` says, and evaluates its own clients with no word to the
others; what they send, a few scalars, is gathered for the aggregation. Within a group XLA adds the
products' parts (the activations of a layer); directions are drawn where they are used, each
device its own part, since a number of theirs is a function of the key and its place alone.

The devices need not be there: on those of a topology (`planning.topologies`) arrays are their
shapes with shardings, from which a round is compiled all the same. On an abstract mesh, whose
devices are known by their kind alone, it can be traced.

The data are on every device, unless the mesh spans several processes (`processes.py`): then each
holds a block of clients, and the batches of a cohort go from the device that holds a client to the
one that evaluates it.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from zofl_jax import keys, platforms
from zofl_jax.core import Array, Batch, ClientData, Layout, Params
from zofl_jax.directions import perturbations
from zofl_jax.engine import hardware

CLIENTS = "clients"
"""The mesh axis that clients are shared out over."""

MODEL = "model"
"""The mesh axis that params are split over."""

LARGE = 2**20
"""Numbers of an array beside the params that is split as well."""


class Shape(NamedTuple):
    """How many devices each axis of a mesh has.

    Attributes:
      clients: None for as many groups as there are devices for.
      model: devices that hold the params together.
    """

    clients: int | None = None
    model: int = 1


def parse(text: str) -> Shape:
    """Returns the shape that a text says.

    Raises:
      ValueError: for another axis, or a size that is no whole number >= 1.

    >>> parse("clients:32,model:4"), parse("model:2")
    (Shape(clients=32, model=4), Shape(clients=None, model=2))
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        if name not in (CLIENTS, MODEL) or name in sizes:
            raise ValueError(
                f"a mesh is given as {CLIENTS}:N,{MODEL}:M, each once at most, got {text!r}"
            )
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"{name} must have a whole number of devices >= 1, got {size!r}")
        sizes[name] = int(size)
    return Shape(sizes.get(CLIENTS), sizes.get(MODEL, 1))


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
    if not hardware.counts_cpu_devices():
        with contextlib.suppress(RuntimeError):  # JAX runs already
            jax.config.update("jax_num_cpu_devices", wanted)
    return len(jax.local_devices())


def make_mesh(
    clients: int | None = None, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """Returns a mesh of `clients` groups of `model` devices; None for a single device.

    Neighbours in `devices` are a group, so give those with fast links to each other in a row.

    Args:
      clients: groups; as many as there are devices for unless given.
      model: devices of a group.
      devices: all local ones unless given; the first clients x model are used.

    Raises:
      ValueError: if there are too few devices.
    """
    chosen = list(jax.local_devices() if devices is None else devices)
    mesh = mesh_of(chosen, clients, model)
    return None if mesh.size == 1 else mesh


def mesh_of(chosen: Sequence[Any], clients: int | None, model: int) -> Mesh:
    """Returns `make_mesh` of these devices, also where it is a single one."""
    sizes, names = axes_of(len(chosen), clients, model)
    # Not `jax.make_mesh`, which may order them otherwise: who computes what is to be told by rank.
    grid = np.array(chosen[: math.prod(sizes)]).reshape(sizes)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def axes_of(count: int, clients: int | None, model: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns the sizes and the names of a mesh's axes on `count` devices.

    Raises:
      ValueError: if there are too few devices.

    >>> axes_of(8, None, 2)
    ((4, 2), ('clients', 'model'))
    """
    groups = count // model if clients is None else clients
    if not 1 <= groups * model <= count:
        raise ValueError(
            f"a mesh of {CLIENTS}:{groups or 1},{MODEL}:{model} needs {(groups or 1) * model} "
            f"devices, and there are {count}"
        )
    return ((groups,), (CLIENTS,)) if model == 1 else ((groups, model), (CLIENTS, MODEL))


def clients_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """Returns a mesh of clients over devices, all local ones unless given; None for only one."""
    return make_mesh(devices=devices)


def devices_of_each_process(count: int) -> list[jax.Device]:
    """Returns the first `count` devices of every process, those of process 0 first."""
    owned: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        owned.setdefault(device.process_index, []).append(device)
    return [device for _, devices in sorted(owned.items()) for device in devices[:count]]


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and where on it params, state, data and messages are.

    Attributes:
      mesh: None for one device. Of an abstract one `abstract_device` says what its devices are.
      layout: how params are split over the axis `model`; by their largest axis unless given.
    """

    mesh: Mesh | AbstractMesh | None = None
    layout: Layout | None = None

    @property
    def groups(self) -> int:
        """Between how many groups of devices clients are shared out."""
        return 1 if self.mesh is None else self.mesh.shape[CLIENTS]

    @property
    def split(self) -> int:
        """Over how many devices the params are split."""
        return 1 if self.mesh is None else self.mesh.shape.get(MODEL, 1)

    @property
    def num_devices(self) -> int:
        """Of all groups."""
        return self.groups * self.split

    @property
    def platform(self) -> str:
        """Of its devices: "cpu", "gpu" or "tpu"."""
        if self.mesh is None:
            return jax.default_backend()
        kind = self.devices()[0].platform
        return "gpu" if kind in ("cuda", "rocm") else kind

    def devices(self) -> list[Any]:
        """Returns the devices, those of a group in a row; of an abstract mesh one and the same."""
        if self.mesh is None:
            return jax.local_devices()[:1]
        if isinstance(self.mesh, AbstractMesh):
            return [self.mesh.abstract_device] * self.num_devices
        return list(self.mesh.devices.flat)

    @functools.cached_property
    def is_there(self) -> bool:
        """Whether its devices can be used; those of a topology can't."""
        if self.mesh is None:
            return True
        if isinstance(self.mesh, AbstractMesh):
            return False
        first = self.mesh.devices.flat[0]
        try:
            return first in jax.devices(first.platform)
        except RuntimeError:  # no such platform here
            return False

    @property
    def spans_processes(self) -> bool:
        """Whether some devices are another process's; those of an abstract mesh are taken to be."""
        mesh = self.mesh
        if isinstance(mesh, AbstractMesh):
            return mesh.size > 1
        return mesh is not None and len({d.process_index for d in mesh.devices.flat}) > 1

    @property
    def splits_processes(self) -> bool:
        """Whether params are split over devices of several processes: none has them all."""
        if self.mesh is None or self.split == 1 or isinstance(self.mesh, AbstractMesh):
            return False
        return any(len({d.process_index for d in group}) > 1 for group in self.mesh.devices)

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which programs for these devices are traced."""
        return platforms.tracing(platforms.Target(self.platform, self.split > 1))

    def starting(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which params are made that may be too large for one device.

        Where they are split, they are made in the host's memory.
        """
        if self.split == 1 or self.platform == "cpu":
            return contextlib.nullcontext()
        try:
            return jax.default_device(jax.local_devices(backend="cpu")[0])
        except RuntimeError:  # JAX was told to use the accelerator alone
            return contextlib.nullcontext()

    def own_part(self) -> "Placement":
        """Returns the placement on those devices that are this process's own.

        Where these don't hold the whole params, it is all of them: what is done is done by all
        processes together.
        """
        if self.mesh is None or not self.spans_processes or self.splits_processes:
            return self
        if isinstance(self.mesh, AbstractMesh):
            return self
        here = jax.process_index()
        owned = [d for d in self.mesh.devices.flat if d.process_index == here]
        return dataclasses.replace(self, mesh=make_mesh(model=self.split, devices=owned))

    def specs(self, tree: Any, params: Params) -> Any:
        """Returns a tree of `PartitionSpec`s: where the leaves of a state or a message lie.

        A leaf that is one of the params, or has one's place in a tree like theirs (a momentum, an
        upload of a dense method), lies as that one does; behind more axes in front (of clients, of
        rounds) too. All others are on every device.

        Args:
          tree: of arrays or their shapes.
          params: arrays or their shapes.
        """
        if self.split == 1:
            return jax.tree.map(lambda _: PartitionSpec(), tree)
        known = self._layout_of(params)

        def spec(path: Any, leaf: Any) -> PartitionSpec:
            words = keys.path_name(path).split("/")
            for at in range(len(words)):
                shape, found = known.get("/".join(words[at:]), ((), None))
                ahead = len(leaf.shape) - len(shape)
                if found is not None and ahead >= 0 and tuple(leaf.shape[ahead:]) == shape:
                    return PartitionSpec(*[None] * ahead, *found)
            return PartitionSpec()

        return jax.tree_util.tree_map_with_path(spec, tree)

    def shardings(self, tree: Any, params: Params) -> Any:
        """Returns the specs as `NamedSharding`s; there must be a mesh."""
        assert self.mesh is not None
        mesh = self.mesh
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            self.specs(tree, params),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    def placed(self, tree: Any, params: Params) -> Any:
        """Returns the tree with its leaves where `specs` says."""
        return tree if self.mesh is None else self._put(tree, self.shardings(tree, params))

    def shapes(self, tree: Any, params: Params) -> Any:
        """Returns shapes, with shardings where there is a mesh: what stands for `placed`."""
        if self.mesh is None:
            return jax.tree.map(_shape, tree)
        return jax.tree.map(_shape, tree, self.shardings(tree, params))

    def replicated(self, tree: Any) -> Any:
        """Returns the tree with every array on every device.

        Over several processes each gives its own copy, and that they are equal is the caller's
        duty.
        """
        if self.mesh is None:
            return tree
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return self._put(tree, jax.tree.map(lambda _: everywhere, tree))

    def constrained(self, tree: Any, params: Params) -> Any:
        """Returns a traced tree whose leaves are put where `specs` says."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree, params))

    def settled(self, tree: Any, params: Params) -> Any:
        """Returns a traced tree that stays as `constrained` says, where params are split.

        Without, XLA might gather in a loop what needs not be whole.
        """
        return self.constrained(tree, params) if self.split > 1 else tree

    def closed_over(self, array: Array) -> Any:
        """Returns an array that a program closes over, such as frozen weights, on the devices.

        It has no path, so a large one is split along its largest axis.
        """
        large = self.split > 1 and array.size >= LARGE
        axis = _largest_axis(array.shape, self.split) if large else None
        if self.mesh is None or axis is None:
            return array if self.is_there else self.replicated(array)
        return self._put(array, NamedSharding(self.mesh, PartitionSpec(*[None] * axis, MODEL)))

    def client_data(self, data: ClientData) -> ClientData:
        """Returns the clients' data on the devices, for `take`.

        Over several processes each group gets the examples of a block of clients, and a process
        hands over those of its own devices only. Blocks have about equally many examples.
        """
        if self.mesh is None or not self.spans_processes:
            return self.replicated(jax.device_put(data) if self.is_there else data)
        offsets, order = np.asarray(data.offsets), np.asarray(data.order)
        bounds = np.linspace(0, len(order), self.groups + 1)
        begins = offsets[np.searchsorted(offsets, bounds)]  # of each block, and the end
        size = int(np.diff(begins).max())
        apart = NamedSharding(self.mesh, PartitionSpec(CLIENTS))

        def spread(leaf: Any) -> Any:
            whole = (self.groups * size, *leaf.shape[1:])
            if not self.is_there:
                return jax.ShapeDtypeStruct(whole, leaf.dtype, sharding=apart)

            def block(index: Any) -> np.ndarray:
                number = (index[0].start or 0) // size
                rows = order[begins[number] : begins[number + 1]]
                return np.asarray(leaf)[np.resize(rows, size) if len(rows) else np.zeros(size, int)]

            return jax.make_array_from_callback(whole, apart, block)

        within = [np.arange(end - begin) for begin, end in itertools.pairwise(begins)]
        moved = np.concatenate([size * number + at for number, at in enumerate(within)])
        index = self.replicated((moved.astype(np.int32), offsets))
        return ClientData(jax.tree.map(spread, data.examples), *index)

    def take(self, examples: Batch, rows: Array) -> Batch:
        """Returns examples[rows] on every device, a tree of arrays [*rows.shape, ...].

        Where each group holds a part of the examples, it adds those that it holds to zeros for the
        others: so the sum is exact, and no device sees more than the batches of a cohort.

        Args:
          examples: of `client_data`.
          rows: int32, any shape.
        """
        if self.mesh is None or not self.spans_processes:
            return jax.tree.map(lambda leaf: leaf[rows], examples)

        def held(examples: Batch, rows: Array) -> Batch:
            size = jax.tree.leaves(examples)[0].shape[0]
            at = rows - jax.lax.axis_index(CLIENTS) * size
            mine = (at >= 0) & (at < size)

            def share(leaf: Array) -> Array:
                found = leaf[jnp.where(mine, at, 0)]
                mask = mine.reshape(*mine.shape, *[1] * (found.ndim - mine.ndim))
                flat = jnp.where(mask, found, jnp.zeros((), leaf.dtype)).reshape(-1)
                # In a row, since a TPU fills up the last axis of what it sends to 128 numbers; the
                # barriers keep XLA from sending the images as they were.
                total = jax.lax.psum(jax.lax.optimization_barrier(flat), CLIENTS)
                whole = jax.lax.optimization_barrier(total.astype(leaf.dtype))
                return whole.reshape(found.shape)

            return jax.tree.map(share, examples)

        return jax.shard_map(
            held,
            mesh=self.mesh,
            in_specs=(PartitionSpec(CLIENTS), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(examples, rows)

    def over_devices(self, fn: Callable[..., Any], params: Params) -> Callable[..., Any]:
        """Returns fn(shared, each) in which each group of devices takes a part of the clients.

        Where the clients can't be shared out evenly, the first ones are evaluated twice and one
        result is dropped.

        Args:
          fn: (shared, each) -> a tree of arrays [C, ...]; `each` is a tree of arrays [C, ...] and
            results of one client must not depend on the others.
          params: of the model, arrays or their shapes; results like them stay split.
        """
        if self.mesh is None:
            return fn
        apart = PartitionSpec(CLIENTS)
        # Over the axis of the model XLA itself splits the products, as the params are.
        spread = jax.shard_map(
            fn,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), apart),
            out_specs=apart,
            axis_names={CLIENTS},
            check_vma=False,  # a client's state starts as what all share
        )

        def evaluate(shared: Any, each: Any) -> Any:
            size = jax.tree.leaves(each)[0].shape[0]
            padded = math.ceil(size / self.groups) * self.groups
            out = spread(shared, jax.tree.map(lambda x: _cycle(x, padded), each))
            return jax.tree.map(lambda x: x[:size], self.constrained(out, params))

        return evaluate

    def _put(self, tree: Any, shardings: Any) -> Any:
        """Returns the tree with its leaves where a tree of shardings says."""
        if not self.is_there:
            return jax.tree.map(_shape, tree, shardings)
        if not self.spans_processes:
            return jax.device_put(tree, shardings)
        return jax.tree.map(_enter, tree, shardings)

    def _layout_of(self, params: Params) -> dict[str, tuple[tuple[int, ...], PartitionSpec]]:
        """Returns the shape and the spec of each param that is split, by its path."""
        chosen = (self.layout or by_largest_axis)(params, self.split)
        shapes = jax.tree_util.tree_leaves_with_path(params)
        axes = jax.tree.leaves(chosen, is_leaf=lambda x: x is None)
        found = {}
        for (path, leaf), axis in zip(shapes, axes, strict=True):
            if axis is None:
                continue
            if leaf.shape[axis] % self.split:
                raise ValueError(
                    f"{keys.path_name(path)} {tuple(leaf.shape)} can't be split evenly over "
                    f"{self.split} devices along axis {axis}: mend the task's layout"
                )
            spec = PartitionSpec(*[None] * axis, MODEL)
            found[keys.path_name(path)] = (tuple(leaf.shape), spec)
        return found


ONE_DEVICE = Placement()
"""All on one device, JAX's default."""


def by_largest_axis(params: Params, size: int) -> Any:
    """Returns a `core.Layout`: each matrix is split along the largest axis that `size` divides.

    >>> by_largest_axis({"w": jnp.zeros((6, 8)), "b": jnp.zeros(8)}, 4)
    {'b': None, 'w': 1}
    """

    def axis(path: Any, leaf: Any) -> int | None:
        first = int(perturbations.is_stacked(keys.path_name(path)))
        return _largest_axis(leaf.shape, size, first) if leaf.ndim - first > 1 else None

    return jax.tree_util.tree_map_with_path(axis, params)


def _largest_axis(shape: Sequence[int], size: int, first: int = 0) -> int | None:
    """Returns the largest axis from `first` on that `size` divides, None if there is none."""
    fitting = [i for i in range(first, len(shape)) if shape[i] % size == 0]
    return max(fitting, key=lambda i: shape[i], default=None)


def own_copy(tree: Any) -> Any:
    """Returns the tree with replicated arrays of several processes as this process's own."""
    return jax.tree.map(
        lambda x: x.addressable_data(0) if _elsewhere_too(x) and x.is_fully_replicated else x, tree
    )


def gathered(tree: Any) -> Any:
    """Returns a tree with what is split over processes as NumPy arrays, in process 0; all call it.

    The others give their parts, a leaf at a time, and keep no leaf that is whole.
    """

    def whole(x: Any) -> Any:
        if not _elsewhere_too(x):
            return x
        found = multihost_utils.process_allgather(x, tiled=True)
        return found if jax.process_index() == 0 else x

    return jax.tree.map(whole, tree)


def _elsewhere_too(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _enter(leaf: Any, where: NamedSharding) -> Array:
    """Returns this process's copy of an array as one of all processes."""
    if _elsewhere_too(leaf):
        return leaf
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = _enter(jax.random.key_data(leaf), where)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    # `device_put` would compare the hosts' values, and wait for processes that don't come.
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def _shape(leaf: Any, where: NamedSharding | None = None) -> Any:
    """Returns the shape of an array, which may be one already, on these devices."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype, sharding=where)


def _num_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cycle(x: Array, size: int) -> Array:
    return x if len(x) == size else x[jnp.arange(size) % len(x)]
