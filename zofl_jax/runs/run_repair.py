"""Opening a run log: create it, check it, and salvage a damaged one.

A log may have been cut short or overwritten by a failing disk. What can be trusted is a
prefix: a round can be replayed only if all rounds before it can.
"""

import contextlib
import json
import os
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zofl_jax.runs import run_log
from zofl_jax.runs.run_files import RunError, replace, temporary_path
from zofl_jax.runs.run_log import FORMAT_VERSION, PAGE_SIZE, RESERVED_META, RunLog

_TABLES = ("rounds", "metrics", "meta")
# The first bytes of every log: magic, page size, rollback journal, fixed fractions.
_HEADER = b"SQLite format 3\0" + struct.pack(">HBBBBBB", PAGE_SIZE, 1, 1, 0, 64, 32, 32)


def open_log(path: Path) -> tuple[RunLog, str | None]:
    """Opens the log at `path`, or creates it, and says what had to be repaired.

    The file is checked: structure, every row's checksum, rounds contiguous from 0. If it is
    damaged, the sound rounds from 0 on are salvaged into a new log, with the sound metrics of
    the states they lead to, and the damaged file is kept beside it as `<name>.damaged-<N>`.

    Returns:
      The log, and None or one sentence for the user that names the last good round.

    Raises:
      RunError: for a log of a newer format, or one that can't be read or written.
    """
    if not path.exists():
        with run_log.new_log(path):
            pass
        # A journal that outlived its log would be played back into the new one.
        _journal(path).unlink(missing_ok=True)
        replace(temporary_path(path), path)
        return RunLog(path), None
    _refuse_newer(path)
    notice = None if _is_sound(path) else _salvage(path)
    return RunLog(path), notice


def _refuse_newer(path: Path) -> None:
    """Raises RunError if header and meta agree that the log's format is newer than ours."""
    with open(path, "rb") as file:
        version = int.from_bytes(file.read(64)[60:], "big")
    if version <= FORMAT_VERSION:
        return
    try:
        with _open_unchanged(path) as connection:
            query = "SELECT value FROM meta WHERE key = 'format_version'"
            confirmed = connection.execute(query).fetchone() == (str(version),)
    except sqlite3.Error:
        confirmed = False
    if confirmed:
        raise RunError(
            f"{path} has format version {version} and this zofl_jax reads versions up to "
            f"{FORMAT_VERSION}: update zofl_jax, or choose another --workdir"
        )


def _is_sound(path: Path) -> bool:
    """Returns whether structure, schema, checksums and order are as they were written."""
    with open(path, "rb") as file:
        if file.read(len(_HEADER)) != _HEADER:
            return False
    try:
        with contextlib.closing(run_log.connect(path)) as connection:
            return (
                connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]
                and connection.execute("PRAGMA user_version").fetchone() == (FORMAT_VERSION,)
                and ["format_version", str(FORMAT_VERSION)] in _good_rows(connection, "meta")
                and all(_is_complete(connection, table) for table in _TABLES)
            )
    except sqlite3.Error as error:
        if run_log.is_environment_error(error):
            with run_log.errors_reported(path):
                raise
        return False


def _salvage(path: Path) -> str:
    """Puts a new log with all that is sound in the place of a damaged one; returns the notice."""
    image = temporary_path(path.with_name(f"{path.name}.image"))
    with run_log.new_log(path) as target:
        _write_readable_image(path, image)
        with _open_unchanged(image) as source:
            rows = (run_log.to_row(values) for values in _good_rows(source, "rounds"))
            run_log.insert_rounds(target, rows)
            num_rounds = _count(target, "rounds")
            for rounds_done, name, value in _good_rows(source, "metrics"):
                if rounds_done <= num_rounds:
                    run_log.insert_metrics(target, rounds_done, {name: value})
            lost = (
                "" if _is_complete(source, "metrics") else " (some metrics before it may be lost)"
            )
            for key, value in _good_rows(source, "meta"):
                if key not in RESERVED_META:
                    run_log.insert_meta(target, {key: json.loads(value)})
    image.unlink()

    kept = _first_free(path)
    # Copied, not moved: at no moment is there no log.
    shutil.copyfile(path, kept)
    with contextlib.suppress(FileNotFoundError):
        os.replace(_journal(path), _journal(kept))
    replace(temporary_path(path), path)
    if num_rounds == 0:
        return (
            f"{path} was damaged and no round in it could be read: the run starts again from "
            f"round 0, and {kept.name} keeps the damaged file."
        )
    return (
        f"{path} was damaged: the run resumes after round {num_rounds - 1}, the last good "
        f"one{lost}, and {kept.name} keeps the damaged file."
    )


def _write_readable_image(path: Path, image: Path) -> None:
    """Writes a copy of a damaged log with a header and a schema that SQLite accepts.

    Both lie on the first page, of which only counters change after creation: so the first
    page of a new log, told the true number of pages, serves any log of this format.
    """
    shutil.copyfile(path, image)
    pages = max(1, -(-image.stat().st_size // PAGE_SIZE))
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        for statement in run_log.SCHEMA:
            connection.execute(statement)
        first_page = connection.serialize()[:PAGE_SIZE]
    with open(image, "r+b") as file:
        file.write(first_page[:28] + pages.to_bytes(4, "big") + first_page[32:])
        file.truncate(pages * PAGE_SIZE)


@contextlib.contextmanager
def _open_unchanged(path: Path) -> Iterator[sqlite3.Connection]:
    """Opens a file for reading as it lies there: no lock, no journal, no repair."""
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        yield connection


def _good_rows(connection: sqlite3.Connection, table: str) -> Iterator[list[Any]]:
    """Yields rows, less the checksum: rounds up to the first that is missing or has a bad
    checksum, of other tables all with a good one. Ends where the file can't be read.
    """
    try:
        rows = connection.execute(f"{run_log.select(table)} ORDER BY 1, 2")
        for index, (*values, crc) in enumerate(rows):
            sound = run_log.checksum(values) == crc
            if table == "rounds" and not (sound and values[0] == index):
                return
            if sound:
                yield values
    except sqlite3.Error as error:
        if run_log.is_environment_error(error):
            raise


def _is_complete(connection: sqlite3.Connection, table: str) -> bool:
    """Returns whether all rows of a table can be read and are good."""
    try:
        return sum(1 for _ in _good_rows(connection, table)) == _count(connection, table)
    except sqlite3.Error as error:
        if run_log.is_environment_error(error):
            raise
        return False


def _count(connection: sqlite3.Connection, table: str) -> int:
    return connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def _first_free(path: Path) -> Path:
    n = 1
    while (kept := path.with_name(f"{path.name}.damaged-{n}")).exists():
        n += 1
    return kept


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")
