"""What a program is traced for: the kind of device, and whether params are split over several.

    with platforms.tracing(platforms.Target("tpu")):
        jax.jit(round).lower(...)

The forms that are fast on a CPU (a client at a time, loops over blocks that stay in cache) are slow
on an accelerator, and the other way round. A program may also be traced for a machine that isn't
there. So what has several forms asks `current`, and not JAX's default backend.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Target(NamedTuple):
    """What a program is traced for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      split: whether a param may be spread over several devices. Loops over parts of it would then
        have each device do them all.
    """

    platform: str
    split: bool = False

    @property
    def cached(self) -> bool:
        """Whether it pays to do large arrays block by block, so that a block stays in cache."""
        return self.platform == "cpu" and not self.split


_CHOSEN: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def current() -> Target:
    """Returns what is traced for: that of `tracing`, else JAX's default backend.

    >>> with tracing(Target("tpu")):
    ...     current().platform
    'tpu'
    """
    return _CHOSEN.get() or Target(jax.default_backend())


@contextlib.contextmanager
def tracing(target: Target) -> Iterator[None]:
    """Makes `target` the current one until the block ends."""
    token = _CHOSEN.set(target)
    try:
        yield
    finally:
        _CHOSEN.reset(token)
