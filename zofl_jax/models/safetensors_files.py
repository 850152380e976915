"""Safetensors files, read and written one tensor at a time.

The format is the header's length (8 bytes, little endian), a JSON header with each tensor's
dtype, shape and offsets, and the raw arrays (https://github.com/huggingface/safetensors).
Reading by offset instead of mapping or gathering the whole file keeps the memory of loading
and saving a model at one tensor beyond its params.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


class Tensor(NamedTuple):
    """Where a tensor lies."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def read(self) -> np.ndarray:
        """Returns the tensor in its own dtype."""
        count = math.prod(self.shape)
        data = np.fromfile(self.path, self.dtype, count, offset=self.offset)
        return data.reshape(self.shape)


def tensors(path: str) -> dict[str, Tensor]:
    """Returns the tensors of a file by name; reads the header only.

    Raises:
      ValueError: if the file is cut short, isn't safetensors, or has a dtype of no use here; if two
        tensors have one name or share bytes, or the bytes of one aren't those of its shape.
    """
    size = os.path.getsize(path)
    problem = f"{path} is not a safetensors file, or is cut short: fetch it again"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(problem)
        try:
            entries = json.loads(file.read(length), object_pairs_hook=list)
            header = {name: dict(entry) for name, entry in entries if name != "__metadata__"}
        except (ValueError, TypeError) as error:
            raise ValueError(problem) from error
    names = sorted(name for name, _ in entries)
    if repeated := [name for name, after in itertools.pairwise(names) if name == after]:
        raise ValueError(f"{path} has two tensors called {repeated[0]!r}: fetch or save it again")
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} has dtype {entry['dtype']}, which is not supported: "
                f"convert it to one of {', '.join(_DTYPES)}"
            )
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise ValueError(f"{path} is cut short at tensor {name!r}: fetch it again")
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        if end - start != math.prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(
                f"{path}: tensor {name!r} takes {end - start} bytes, which its shape "
                f"{tuple(entry['shape'])} of {entry['dtype']} does not: fetch or save it again"
            )
        found[name] = Tensor(path, dtype, tuple(entry["shape"]), start)
    in_order = sorted(found.items(), key=lambda item: item[1].offset)
    for (name, tensor), (other, after) in itertools.pairwise(in_order):
        if tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize > after.offset:
            raise ValueError(f"{path}: tensors {name!r} and {other!r} share bytes: fetch it again")
    return found


def write(
    path: str,
    specs: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes the tensors of `specs` (name -> shape, dtype), calling read(name) for each in turn.

    The file appears under its name only when it is complete.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in specs.items():
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        entry = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape)}
        header[name] = entry | {"data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8 bytes
    try:
        with open(f"{path}.partial", "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name, (shape, dtype) in specs.items():
                tensor = np.ascontiguousarray(read(name), dtype)
                if tensor.shape != tuple(shape):
                    raise ValueError(f"tensor {name!r} must have shape {shape}, got {tensor.shape}")
                file.write(tensor.view(np.uint8).data)
    except BaseException:
        os.remove(f"{path}.partial")
        raise
    os.replace(f"{path}.partial", path)
