"""Files that survive a crash: at any moment the old content is there, or the new."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunError(Exception):
    """A run can't be opened, read or written; the message is for the user, with the remedy."""


def write_atomically(path: Path, *parts: bytes) -> None:
    """Writes a file so that a crash, of the machine too, leaves its old or its new content."""
    with open(temporary_path(path), "wb") as file:
        for part in parts:
            file.write(part)
    replace(temporary_path(path), path)


def save_figure(path: Path, figure: "Figure") -> None:
    """Saves a figure, likewise, in the format of the file's ending."""
    figure.savefig(temporary_path(path), format=path.suffix.removeprefix("."))
    replace(temporary_path(path), path)


def temporary_path(path: Path) -> Path:
    """Returns where the next content of `path` is prepared: a hidden file beside it."""
    return path.with_name(f".{path.name}.tmp")


def remove_temporary_files(directory: Path) -> None:
    """Removes what a crash left unfinished."""
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink()


def replace(temporary: Path, path: Path) -> None:
    """Puts a finished file in its place, and both content and name on the disk."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
