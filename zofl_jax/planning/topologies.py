"""The devices of a pod that isn't there.

For TPUs there is a compiler without a TPU, in the package libtpu of the extra `[plan]`. GPUs' needs
a GPU, so theirs are an abstract mesh, on which a round is traced and estimated (`paper`).
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies as jax_topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, SingleDeviceSharding

from zofl_jax.engine import hardware, placement

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # asks no cloud what this machine is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes compile at a time
    # What it would ask the cloud for, and complain of to stderr.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
"""What libtpu and JAX read."""

ABSTRACT = {"h100": "cuda"}
"""JAX's platform of chips, in small letters, for which there is no compiler without one of them."""


def is_abstract(name: str) -> bool:
    """Returns whether a topology is of devices that there is no compiler for, such as "h100:64"."""
    return name.partition(":")[0].lower() in ABSTRACT


def prepare() -> None:
    """Lets JAX compile here, on the CPU alone. It must be called before JAX is first used."""
    _set_environment()
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    # Programs for devices that aren't there can be written to the cache, but not read from it.
    jax.config.update("jax_enable_compilation_cache", False)


def _set_environment() -> None:
    for name, value in ENVIRONMENT.items():
        # libtpu may have found no value when JAX was imported, and have written that down.
        if os.environ.get(name, "WARNING").startswith("WARNING"):
            os.environ[name] = value


def is_installed() -> bool:
    """Returns whether the compiler for TPUs is there."""
    return importlib.util.find_spec("libtpu") is not None


@functools.lru_cache
def devices(name: str) -> Sequence[Any]:
    """Returns the devices of a topology such as "v5e:4x4", those of a host in a row.

    Raises:
      ValueError: for a topology that the compiler doesn't know.
      ImportError: without libtpu.
    """
    if not is_installed():
        raise ImportError(
            f"--topology={name} needs the TPU's compiler: pip install 'zofl-jax[plan]', or leave "
            "--topology out for this machine's devices"
        )
    _set_environment()
    # The two cores of a v4 or v5p chip are one device.
    cores = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        with _without_xla_flags():
            found = jax_topologies.get_topology_desc(name, "tpu", **cores)
            _warm_up(found.devices[0])
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].partition(": ")[2]
        raise ValueError(
            f"--topology={name} is none that the TPU's compiler knows ({reason}): use one such as "
            "v4:2x2x4, v5e:4x4, v5p:4x4x8 or v6e:16x16"
        ) from error
    return tuple(found.devices)


@contextlib.contextmanager
def _without_xla_flags() -> Iterator[None]:
    """Hides XLA's flags from libtpu, which ends the process for one that it doesn't know."""
    jax.devices()  # for which they are: they are read once
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        yield
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


def _warm_up(device: Any) -> None:
    """Compiles next to nothing, when libtpu reads XLA's flags."""
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    jax.jit(jnp.sin).lower(x).compile()


def mesh(name: str, shape: placement.Shape) -> Mesh | AbstractMesh:
    """Returns a mesh of a topology's devices, one of a single device too.

    Args:
      name: see `devices`; or a chip and how many, "h100:64", whose mesh is abstract.
      shape: as many groups as there are devices for unless it says.

    Raises:
      ValueError: for too few devices, or another topology.
      ImportError: without libtpu, where its compiler is needed.

    >>> mesh("h100:64", placement.Shape(model=8)).axis_sizes
    (8, 8)
    """
    try:
        if is_abstract(name):
            return _abstract(name, shape)
        return placement.mesh_of(devices(name), *shape)
    except ValueError as error:
        if "--topology" in str(error):
            raise
        raise ValueError(f"--mesh on --topology={name}: {error}") from error


def _abstract(name: str, shape: placement.Shape) -> AbstractMesh:
    chip, _, count = name.lower().partition(":")
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(
            f"--topology={name}: a chip is given with how many there are, a whole number >= 1, as "
            f"{chip}:64"
        )
    kind = AbstractDevice(hardware.named(chip).kind, num_cores=None, platform=ABSTRACT[chip])
    sizes, names = placement.axes_of(int(count), *shape)
    types = (AxisType.Auto,) * len(names)
    return AbstractMesh(sizes, names, axis_types=types, abstract_device=kind)
