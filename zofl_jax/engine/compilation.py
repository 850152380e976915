"""Ahead-of-time compilation, in which the arrays a function closes over are arguments; memory."""

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from zofl_jax.core import Array, Batch, Params
from zofl_jax.directions import jaxprs
from zofl_jax.engine import exhaustion, hardware, placement


class Lowered(NamedTuple):
    """A function as it goes to the compiler.

    Attributes:
      program: as JAX traces it, of the leaves of its arguments.
      arrays: what it closes over, as it is handed over: arrays, or their shapes on devices that
        aren't there.
      lowered: a `jax.stages.Lowered` of (arrays, *args).
    """

    program: jaxprs.Program
    arrays: list[Any]
    lowered: Any


def lower(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    donate: tuple[int, ...] = (),
    where: placement.Placement = placement.ONE_DEVICE,
) -> Lowered:
    """Returns `fn` for arguments like `args`, before it is compiled; see `compiled`."""
    with where.tracing():
        program, treedef = jaxprs.trace(fn, *args)
    arrays = [where.closed_over(x) for x in program.consts]

    def with_arrays(arrays: list[Array], *args: Any) -> Any:
        with_them = program._replace(consts=arrays)
        return jax.tree.unflatten(treedef, jaxprs.run(with_them, jax.tree.leaves(args)))

    jitted = jax.jit(with_arrays, donate_argnums=tuple(1 + i for i in donate))
    return Lowered(program, arrays, jitted.lower(arrays, *args))


def compiled(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    donate: tuple[int, ...] = (),
    where: placement.Placement = placement.ONE_DEVICE,
) -> Callable[..., Any]:
    """Returns `fn` compiled for arguments like `args`.

    What `fn` closes over, such as the frozen weights of a language model, is handed over at
    each call. As constants these arrays would be copied into the program, and the compiler
    would spend seconds folding them (400 MB: 6 s and as much memory again).

    Args:
      fn: a traceable function; an inner `jax.jit` keeps what it closes over itself.
      args: trees of arrays, or of `jax.ShapeDtypeStruct`s.
      donate: which of `args` may be overwritten.
      where: the devices that `args` are on.

    >>> import jax.numpy as jnp
    >>> weights = jnp.ones((2, 2))
    >>> compiled(lambda x: x @ weights, (jnp.ones(2),))(jnp.arange(2.0)).tolist()
    [1.0, 1.0]
    """
    made = lower(fn, args, donate, where)
    return functools.partial(made.lowered.compile(), made.arrays)


def memory_bytes(function: Callable[..., Any]) -> int:
    """Returns the device memory that a function from `compiled` needs, in bytes.

    Arguments, results and temporaries by the compiler's account; what is overwritten counts
    once. Its own figure for the peak leaves out the temporaries on CPU. 0 where the compiler
    gives no account, which JAX doesn't promise.

    Raises:
      ValueError: for a function that `compiled` did not return.

    >>> import jax.numpy as jnp
    >>> memory_bytes(compiled(lambda x: x + 1, (jnp.ones(1000),)))
    8000
    """
    if not isinstance(function, functools.partial):
        raise ValueError(f"{function} does not come from `compiled`")
    account = function.func.memory_analysis()  # type: ignore[attr-defined]
    names = ("argument", "output", "temp", "alias")
    sizes = [getattr(account, f"{name}_size_in_bytes", None) for name in names]
    known = [size for size in sizes if size is not None]
    if len(known) < len(names):
        return 0
    arguments, results, temporaries, overwritten = known
    return arguments + results + temporaries - overwritten


class Compiler:
    """Compiles each function once, ahead of its first call, and times that."""

    def __init__(self) -> None:
        self.seconds: list[float] = []  # of each compilation
        self._compiled: dict[Any, Callable] = {}

    def call(
        self,
        name: Any,
        fn: Callable,
        args: tuple,
        donate: tuple[int, ...] = (),
        where: placement.Placement = placement.ONE_DEVICE,
    ) -> Any:
        """Returns fn(*args); `name` stands for `fn` and for the shapes of `args`."""
        if name not in self._compiled:
            began = time.perf_counter()
            self._compiled[name] = compiled(fn, args, donate, where)
            self.seconds.append(time.perf_counter() - began)
        return self._compiled[name](*args)

    def forget(self, kind: str) -> None:
        """Drops the functions named (kind, ...)."""
        self._compiled = {name: f for name, f in self._compiled.items() if kind not in name}

    def memory_bytes(self, kind: str) -> int:
        """Returns the most that a function named (kind, ...) needs, 0 before its compilation."""
        needed = [memory_bytes(f) for name, f in self._compiled.items() if kind in name]
        return max(needed, default=0)


def memory_available(where: placement.Placement = placement.ONE_DEVICE) -> int:
    """Returns the free memory of a device in bytes, 0 if it is not known.

    It is that of the first local device, and the published one of devices that aren't there.
    """
    if where.mesh is not None and not where.is_there:
        chip = hardware.of(where.devices())
        return chip.memory if chip else 0
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def clients_that_fit(
    fn: Callable[..., Any],
    params: Params,
    batch: Batch,
    room: int,
    where: placement.Placement = placement.ONE_DEVICE,
) -> int:
    """Returns how many clients may be evaluated at once, at least 1; 1 if that can't be known.

    Args:
      fn: (params, batch) -> what a client computes: the loss, or loss and gradient.
      params: arrays or their shapes. Twice their size is set aside, for them and their update.
      batch: of one client, arrays or their shapes.
      room: bytes for all that, such as a share of `memory_available`.
      where: the devices that `params` are on; a share of them is on each.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    >>> clients_that_fit(lambda w, x: jnp.sort(w * x).sum(), x, x, 10**6) > 10
    True
    >>> clients_that_fit(lambda w, x: jnp.sort(w * x).sum(), x, x, 0)
    1
    """
    on_devices = where.shapes(params, params)
    size = bytes_on_a_device(on_devices)
    if 2 * size >= room:
        return 1
    shared = where.shapes(batch, {}) if where.mesh is not None else batch
    try:
        with exhaustion.told():
            needed = memory_bytes(compiled(fn, (on_devices, shared), where=where))
    except exhaustion.OutOfMemoryError:
        return 1
    return max(1, (room - 2 * size) // max(needed - size, 1)) if needed else 1


def bytes_on_a_device(tree: Any) -> int:
    """Returns how much of arrays, or of shapes with shardings, is on each device, in bytes.

    >>> bytes_on_a_device({"w": jax.ShapeDtypeStruct((2, 3), "float32")})
    24
    """

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
