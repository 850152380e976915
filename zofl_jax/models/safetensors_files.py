"""Safetensors files, read and written one tensor at a time.

The format is the header's length (8 bytes, little endian), a JSON header with each tensor's
dtype, shape and offsets, and the raw arrays (https://github.com/huggingface/safetensors).
Reading by offset instead of mapping or gathering the whole file keeps the memory of loading
and saving a model at one tensor beyond its params.
"""

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
      ValueError: if the file is cut short, isn't safetensors, or has a dtype of no use here.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{path} is not a safetensors file, or is cut short: fetch it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is not a safetensors file: fetch it again") from error
    header.pop("__metadata__", None)
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
                f"{path}: tensor {name!r} takes {end - start} bytes, which do not fit "
                f"{entry['dtype']} {entry['shape']}: fetch it again"
            )
        found[name] = Tensor(path, dtype, tuple(entry["shape"]), start)
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
