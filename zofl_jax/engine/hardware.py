"""Peak rates and memory of accelerators, as their makers publish them.

A round is never faster than these allow; `planning.plans` tells which of them it meets first.

Sources, read in November 2026:

- TPUs: Google Cloud, pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of
  cloud.google.com/tpu/docs, tables of key specifications. They give the interconnect of a chip over
  all its links (300, 200, 600 and 400 GB/s each way); a ring along one axis of the torus has that
  over the axes, 3 for v4 and v5p, 2 for v5e and v6e.
- H100: NVIDIA, "H100 Tensor Core GPU" data sheet, the SXM form without sparsity. NVLink has 900
  GB/s both ways together, so 450 each way.

It needs no JAX, and so `experiments.launch_local` needs none.
"""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

GiB, GB = 2**30, 10**9


class Chip(NamedTuple):
    """What one device has.

    Attributes:
      name: as people call it.
      kind: what JAX's `Device.device_kind` begins with.
      bfloat16: FLOP/s of products of bfloat16 factors, sums in float32.
      float32: FLOP/s of products of float32 arrays at JAX's default precision, which rounds factors
        to bfloat16 on TPUs and to TF32 on GPUs.
      memory: bytes.
      memory_rate: bytes/s between it and the chip.
      link_rate: bytes/s that a device can send, and receive, along one axis of the interconnect.
    """

    name: str
    kind: str
    bfloat16: float
    float32: float
    memory: int
    memory_rate: float
    link_rate: float

    def over(self, cores: int) -> "Chip":
        """Returns a device that is one of so many cores of the chip."""
        if cores == 1:
            return self
        return self._replace(
            name=f"a core of {self.name}",
            bfloat16=self.bfloat16 / cores,
            float32=self.float32 / cores,
            memory=self.memory // cores,
            memory_rate=self.memory_rate / cores,
            link_rate=self.link_rate / cores,
        )


CHIPS: tuple[Chip, ...] = (
    Chip("v4", "TPU v4", 275e12, 275e12, 32 * GiB, 1228 * GB, 100 * GB),
    Chip("v5e", "TPU v5 lite", 197e12, 197e12, 16 * GiB, 819 * GB, 100 * GB),
    Chip("v5p", "TPU v5", 459e12, 459e12, 95 * GiB, 2765 * GB, 200 * GB),
    Chip("v6e", "TPU v6 lite", 918e12, 918e12, 32 * GiB, 1638 * GB, 200 * GB),
    Chip("H100", "NVIDIA H100", 989.4e12, 494.7e12, 80 * GB, 3350 * GB, 450 * GB),
)
"""The longest kind that fits is taken."""


def of(devices: Iterable[Any]) -> Chip | None:
    """Returns what a device of these has, None where it is not in the table.

    Args:
      devices: JAX's, all alike. Several at one place are the cores of a chip.
    """
    listed = list(devices)
    found = [chip for chip in CHIPS if listed[0].device_kind.startswith(chip.kind)]
    if not found:
        return None
    places = {
        tuple(getattr(d, "coords", None) or (getattr(d, "id", at),)) for at, d in enumerate(listed)
    }
    return max(found, key=lambda chip: len(chip.kind)).over(max(1, len(listed) // len(places)))


def named(name: str) -> Chip:
    """Returns the row of a name.

    Raises:
      ValueError: for another name.

    >>> named("v5e").memory == 16 * GiB
    True
    """
    for chip in CHIPS:
        if chip.name.lower() == name.lower():
            return chip
    raise ValueError(f"{name!r} is not in the table: use {', '.join(c.name for c in CHIPS)}")


def counts_cpu_devices() -> bool:
    """Returns whether a flag of XLA says how many devices a CPU is: JAX refuses its own beside."""
    return "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
