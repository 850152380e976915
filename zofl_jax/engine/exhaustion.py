"""A device that has too little memory: told in one sentence that names what to change."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax

KNOBS = (
    "fewer --clients_at_once or --perturbations_at_once, a smaller --batch_size, --mesh=model:M "
    "over M devices, or for language models --dtype=bfloat16"
)
"""What lowers the memory of a round, for the end of a sentence."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The TPU's compiler says "Used 20.1G of 15.75G hbm", or "required for HLO temporaries (20.1G)
# exceeds available HBM (15.75G)"; allocators say "allocate 1234 bytes" or "allocating 1.5GiB".
_COMPILER = re.compile(
    r"(?:Used |required for [\w ]+\()([\d.]+)([KMGT]?)\)? "
    r"(?:of|exceeds available HBM) \(?([\d.]+)([KMGT]?)",
    re.IGNORECASE,
)
_ALLOCATOR = re.compile(r"(?:allocate|allocating) ([\d.]+) ?([KMGT]?)i?(?:B|b)")


class OutOfMemoryError(RuntimeError):
    """The rounds need more memory than a device has.

    Attributes:
      needed: bytes that a device needs, or that could not be had in the end; None if not known.
      limit: bytes of a device, None if not known.
    """

    def __init__(self, needed: int | None = None, limit: int | None = None):
        """Makes the sentence."""
        self.needed, self.limit = needed, limit
        size = f" ({in_words(needed)} more)" if needed and limit is None else ""
        if needed and limit:
            size = f" ({in_words(needed)} of {in_words(limit)})"
        super().__init__(f"the device has too little memory for a round{size}: try {KNOBS}")


def in_words(size: float) -> str:
    """Returns a number of bytes for people.

    >>> in_words(1_500_000), in_words(2.5e9), in_words(12)
    ('1.5 MB', '2.5 GB', '12 bytes')
    """
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= least:
            return f"{size / least:.3g} {unit}"
    return f"{size:.0f} bytes"


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turns JAX's error of exhausted memory into `OutOfMemoryError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = of_message(str(error))
        if found is None:
            raise
        raise found from error


def of_message(message: str) -> OutOfMemoryError | None:
    """Returns the error that a message of XLA tells of, None for other messages.

    What such messages look like isn't promised; the numbers are left out where they aren't found.

    >>> str(of_message("RESOURCE_EXHAUSTED: ... Used 20.00G of 15.75G hbm. Exceeded"))[:63]
    'the device has too little memory for a round (21.5 GB of 16.9 G'
    >>> of_message("INVALID_ARGUMENT: shapes") is None
    True
    """
    if "RESOURCE_EXHAUSTED" not in message and "Out of memory" not in message:
        return None
    told = _COMPILER.search(message)
    if told:
        size, unit, limit, of_limit = told.groups()
        return OutOfMemoryError(
            int(float(size) * _UNITS[unit]), int(float(limit) * _UNITS[of_limit])
        )
    asked = _ALLOCATOR.search(message)
    return OutOfMemoryError(int(float(asked[1]) * _UNITS[asked[2]]) if asked else None)


def consumed(tree: Any) -> bool:
    """Returns whether some array has been handed over to a program and is gone."""
    return any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(tree))
