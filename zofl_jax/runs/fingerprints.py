"""What the inputs of a run are known by: short digests of what is used of them, in plain JSON.

    now = rows("training", {"text": texts, "label": labels}) | {"partition": arrays(order, offsets)}
    changes(noted, now)  # ["order of training column 'text'"]

Digests are of values and not of files: a file that was moved, copied or touched is the same
input, and another file format with the same values too. They are the first 128 bits of
SHA-256, which most processors compute themselves, at a gigabyte a second and core.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

Plain = str | int | float | bool | None
Fingerprints = dict[str, Plain]
"""The name of an input, for people, to a digest or to a value that says more than one."""

_CHUNK = 1 << 24  # bytes hashed at a time by each core
_HEX_DIGITS = 32
_MOST_NAMED = 3
_ORDER = "order of "


def array(values: Any) -> str:
    """Returns the digest of an array's dtype, shape and elements.

    Args:
      values: an array of numbers, on the host or on a device.

    >>> array(np.arange(3)) == array(np.arange(3)), array(np.arange(3)) == array(np.arange(3.0))
    (True, False)
    """
    host = np.asarray(values)
    data = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
    chunks = [data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK)]
    if len(chunks) > 1:  # hashing lets other threads run
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(_sha256, chunks))
    else:
        parts = [_sha256(chunk) for chunk in chunks]
    return text(f"{host.dtype.name}{host.shape}", *parts)


def arrays(*several: Any) -> str:
    """Returns the digest of several arrays in their order."""
    return text(*(array(values) for values in several))


def text(*parts: str | bytes) -> str:
    """Returns the digest of texts or bytes one after the other.

    >>> text("ab", "c") == text("a", "bc")
    False
    """
    digests = [_sha256(part if isinstance(part, bytes) else part.encode()) for part in parts]
    return _sha256(b"".join(digests)).hex()[:_HEX_DIGITS]


def plain(value: Any) -> Plain:
    """Returns a value as it is, or its text where it isn't plain JSON."""
    return value if value is None or isinstance(value, str | int | float) else str(value)


def rows(split: str, columns: Mapping[str, Any]) -> Fingerprints:
    """Returns the digests of a table's columns, without regard to order and in order.

    Args:
      split: its name, such as "training".
      columns: name -> array [n, ...] of numbers, or a sequence of n plain JSON values.
    """
    found: Fingerprints = {}
    for name, values in columns.items():
        found[f"number of {split} examples"] = len(values)
        unordered, ordered = _column(values)
        found[f"{split} column {name!r}"] = unordered
        found[f"{_ORDER}{split} column {name!r}"] = ordered
    return found


def changes(before: Mapping[str, Plain], now: Mapping[str, Plain]) -> list[str]:
    """Returns the names of the inputs in both that differ, a number with both its values.

    The order of what has changed itself is left out.

    >>> changes({"base": "a0", "number of rows": 3}, {"base": "a0", "number of rows": 4, "x": 1})
    ['number of rows (4, was 3)']
    """
    differing = [name for name in before if name in now and before[name] != now[name]]
    return [
        _shown(name, before[name], now[name])
        for name in differing
        if not (name.startswith(_ORDER) and name.removeprefix(_ORDER) in differing)
    ]


def listed(names: Sequence[str]) -> str:
    """Returns the first names of several, and how many more there are.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _shown(name: str, before: Plain, now: Plain) -> str:
    digests = all(isinstance(x, str) and len(x) == _HEX_DIGITS for x in (before, now))
    return name if digests else f"{name} ({now}, was {before})"


def _column(values: Any) -> tuple[str, str]:
    """Returns the digest of a column's values in any order, and in theirs."""
    if isinstance(values, np.ndarray) and values.ndim == 1:
        return array(np.sort(values)), array(values)
    if isinstance(values, np.ndarray):
        digests = [_sha256(row) for row in np.ascontiguousarray(values)]
        kind = f"{values.dtype.name}{values.shape}"
    else:
        digests = [_sha256(json.dumps(value, sort_keys=True).encode()) for value in values]
        kind = ""
    # A sum has no order; unlike that of an exclusive or, two equal values don't cancel in it.
    total = sum(int.from_bytes(digest, "big") for digest in digests)
    return text(kind, str(total)), text(kind, b"".join(digests))


def _sha256(data: Any) -> bytes:
    return hashlib.sha256(data).digest()
