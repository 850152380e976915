"""The run log: one SQLite file from which every round of a run can be replayed.

A row a round holds the shared seed and the broadcast, which is all that a replay needs,
with the train loss and the ledger beside them: K·P scalars a round, so that 1,000 rounds
take some 80 KB. Every row ends with a checksum. `docs/log_format.md` describes the file for
readers in other languages, `run_repair.py` opens it.

The rollback journal (`journal_mode=DELETE`) was chosen over write-ahead logging by
measurement: a commit takes 1 ms in place of 0.3 ms, but 1,000 rounds never hold more than
85 KB of disk, where a write-ahead log grows to 1 MB.
"""

import contextlib
import json
import math
import operator
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zofl_jax
from zofl_jax.runs.run_files import RunError, temporary_path

FORMAT_VERSION = 1
"""The version of new logs, and the newest that can be read."""

APPLICATION_ID = int.from_bytes(b"zofl", "big")
PAGE_SIZE = 1024

SCHEMA = (
    "CREATE TABLE rounds (round INTEGER PRIMARY KEY, key BLOB, broadcast BLOB, train_loss REAL, "
    "bytes_up INTEGER, seed_down INTEGER, broadcast_down INTEGER, catch_up_down INTEGER, "
    "first_sync_down INTEGER, crc INTEGER)",
    "CREATE TABLE metrics (round INTEGER, name TEXT, value REAL, crc INTEGER, "
    "PRIMARY KEY (round, name)) WITHOUT ROWID",
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT, crc INTEGER) WITHOUT ROWID",
)
RESERVED_META = ("format_version", "library_version")

_BUSY_SECONDS = 60.0
# Errors of the surroundings, which say nothing about the file's content.
_ENVIRONMENT_ERRORS = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM,
)


class RoundRow(NamedTuple):
    """One round as it is logged; the ledger's columns are bytes, summed over the cohort."""

    round: int  # from 0
    key: bytes  # the shared seed: raw little-endian words
    broadcast: bytes  # the leaves in the order of the tree: raw little-endian numbers
    train_loss: float  # NaN if there is none
    bytes_up: int
    seed_down: int
    broadcast_down: int
    catch_up_down: int
    first_sync_down: int

    @property
    def bytes_down(self) -> int:
        """All bytes that the server sent in this round."""
        return self.seed_down + self.broadcast_down + self.catch_up_down + self.first_sync_down


class RunLog:
    """An open run log, made by `run_repair.open_log`; every writing method is one transaction.

    All methods raise RunError if the file can't be read or written.
    """

    def __init__(self, path: Path):
        self._path = path
        self._connection = connect(path)

    @property
    def last_round(self) -> int:
        """The last logged round, -1 if there is none."""
        with errors_reported(self._path):
            (last,) = self._connection.execute("SELECT max(round) FROM rounds").fetchone()
        return -1 if last is None else last

    def append(
        self,
        rounds: Sequence[RoundRow],
        metrics: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """Appends rounds, and metrics with them, in one transaction: all or nothing.

        Args:
          rounds: the rounds after `last_round`, in order and without a gap.
          metrics: rounds done -> name -> value, as for `write_metrics`.

        Raises:
          ValueError: for a round that isn't the next one, or a key or broadcast that isn't bytes.
        """
        for expected, row in enumerate(rounds, start=self.last_round + 1):
            if row.round != expected:
                raise ValueError(
                    f"round {row.round} can't be logged where round {expected} is due: append "
                    "rounds in order, or truncate the log first"
                )
            if not (isinstance(row.key, bytes) and isinstance(row.broadcast, bytes)):
                raise ValueError(
                    f"key and broadcast of round {row.round} must be bytes, got "
                    f"{type(row.key).__name__} and {type(row.broadcast).__name__}"
                )
        with self._transaction() as connection:
            insert_rounds(connection, rounds)
            for rounds_done, values in (metrics or {}).items():
                insert_metrics(connection, rounds_done, values)

    def rounds(self, start: int = 0, stop: int | None = None) -> list[RoundRow]:
        """Returns the rounds start, ..., stop - 1; without `stop`, all from start on.

        Raises:
          ValueError: if one of them isn't in the log.
        """
        end = self.last_round + 1
        stop = end if stop is None else stop
        if not 0 <= start <= stop <= end:
            raise ValueError(
                f"rounds {start} <= r < {stop} are not all in the log: choose them from its "
                f"{end} rounds"
            )
        query = f"{select('rounds')} WHERE round >= ? AND round < ? ORDER BY round"
        with errors_reported(self._path):
            rows = self._connection.execute(query, (start, stop)).fetchall()
        return [to_row(values) for *values, _ in rows]

    def train_losses(self) -> list[float]:
        """Returns the training loss of each round, NaN where there is none."""
        with errors_reported(self._path):
            rows = self._connection.execute(
                "SELECT train_loss FROM rounds ORDER BY round"
            ).fetchall()
        return [math.nan if loss is None else loss for (loss,) in rows]

    def truncate_after(self, round_index: int) -> None:
        """Drops the rounds after `round_index` (-1: all) and the metrics of later states."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM rounds WHERE round > ?", (round_index,))
            connection.execute("DELETE FROM metrics WHERE round > ?", (round_index + 1,))

    def write_metrics(self, rounds_done: int, values: Mapping[str, float]) -> None:
        """Writes metrics of the state after `rounds_done` rounds, over values written before.

        Rounds are counted as in `ServerState.round`, so 0 is the initial state. A checksum of
        the params is a metric too: a float64 holds every integer up to 2**53.
        """
        with self._transaction() as connection:
            insert_metrics(connection, rounds_done, values)

    def metrics(self) -> dict[int, dict[str, float]]:
        """Returns rounds done -> name -> value, in the order of rounds."""
        with errors_reported(self._path):
            rows = self._connection.execute(f"{select('metrics')} ORDER BY round, name").fetchall()
        found: dict[int, dict[str, float]] = {}
        for rounds_done, name, value, _ in rows:
            found.setdefault(rounds_done, {})[name] = math.nan if value is None else value
        return found

    def write_meta(self, values: Mapping[str, Any]) -> None:
        """Writes facts about the run, any JSON under any name, over values written before.

        Raises:
          ValueError: for a value that JSON can't hold, or a name that the log uses itself.
        """
        for name in RESERVED_META:
            if name in values:
                raise ValueError(f"meta {name!r} is written by the log itself: use another name")
        with self._transaction() as connection:
            insert_meta(connection, values)

    def meta(self) -> dict[str, Any]:
        """Returns all facts about the run, `format_version` and `library_version` among them."""
        with errors_reported(self._path):
            rows = self._connection.execute(select("meta")).fetchall()
        return {key: json.loads(value) for key, value, _ in rows}

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with errors_reported(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.rollback()
                raise


def checksum(values: Iterable[int | float | str | bytes | None]) -> int:
    """Returns the CRC-32 of a row's values, its column `crc` left out.

    A value counts as the letter of its type and its bytes, little-endian: "i" and 8 bytes of
    an integer, "r" and 8 bytes of a real, "t" (text, in UTF-8) or "b" (blob) with 8 bytes of
    length and the data, "n" alone for NULL.

    >>> checksum([0, "loss", 0.5])
    1061676419
    """
    crc = 0
    for value in values:
        data = b""
        if value is None:
            head = b"n"
        elif isinstance(value, int):
            head = struct.pack("<cq", b"i", value)
        elif isinstance(value, float):
            head = struct.pack("<cd", b"r", value)
        else:
            kind, data = (b"t", value.encode()) if isinstance(value, str) else (b"b", value)
            head = struct.pack("<cq", kind, len(data))
        crc = zlib.crc32(data, zlib.crc32(head, crc))
    return crc


def connect(path: Path) -> sqlite3.Connection:
    """Opens a log for reading and writing, with a commit on disk when it returns."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_SECONDS)
    try:
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:  # the file is none of SQLite's, or is locked
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def new_log(path: Path) -> Iterator[sqlite3.Connection]:
    """Prepares a log at `temporary_path(path)`, empty at first; committed when the block ends."""
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)
    with errors_reported(path), contextlib.closing(connect(temporary)) as connection:
        # Unfinished, it is thrown away: no journal on disk is needed.
        connection.execute("PRAGMA journal_mode = MEMORY")
        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute("BEGIN")
        for statement in SCHEMA:
            connection.execute(statement)
        versions = (FORMAT_VERSION, zofl_jax.__version__)
        insert_meta(connection, dict(zip(RESERVED_META, versions, strict=True)))
        yield connection
        connection.execute("COMMIT")


def select(table: str) -> str:
    """Returns the query for all rows of a table, the checksum last."""
    columns = {
        "rounds": ", ".join(RoundRow._fields),
        "metrics": "round, name, value",
        "meta": "key, value",
    }
    return f"SELECT {columns[table]}, crc FROM {table}"


def to_row(values: Sequence[Any]) -> RoundRow:
    """Returns what is stored in a row of `rounds`, less the checksum, as a RoundRow."""
    row = RoundRow(*values)
    return row if row.train_loss is not None else row._replace(train_loss=math.nan)


def insert_rounds(connection: sqlite3.Connection, rounds: Iterable[RoundRow]) -> None:
    """Inserts rounds with their checksums."""
    marks = ", ".join("?" * (len(RoundRow._fields) + 1))
    connection.executemany(f"INSERT INTO rounds VALUES ({marks})", map(_from_row, rounds))


def insert_metrics(
    connection: sqlite3.Connection, rounds_done: int, values: Mapping[str, float | None]
) -> None:
    """Inserts or overwrites metrics with their checksums."""
    for name, value in values.items():
        row = (operator.index(rounds_done), name, _real(value))
        connection.execute("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)", _signed(row))


def insert_meta(connection: sqlite3.Connection, values: Mapping[str, Any]) -> None:
    """Inserts or overwrites facts about the run with their checksums."""
    for key, value in values.items():
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"meta {key!r} must be plain, finite JSON, got {value!r}") from error
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", _signed((key, text)))


@contextlib.contextmanager
def errors_reported(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into RunErrors about the log at `path`."""
    try:
        yield
    except sqlite3.Error as error:
        if is_environment_error(error):
            raise RunError(
                f"{path} can't be used now ({error}): close other programs that hold it, make "
                "sure that its disk is writable and not full, and start the same command again"
            ) from error
        raise RunError(
            f"{path} can't be read ({error}): start the same command again, which repairs it"
        ) from error


def is_environment_error(error: sqlite3.Error) -> bool:
    """Returns whether an error comes from the surroundings and not from the file's content."""
    # The low byte is the kind of error; errors of Python's own have no code.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _ENVIRONMENT_ERRORS


def _from_row(row: RoundRow) -> tuple[Any, ...]:
    ledger = [operator.index(count) for count in row[4:]]
    return _signed((row.round, row.key, row.broadcast, _real(row.train_loss), *ledger))


def _signed(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*values, checksum(values))


def _real(value: float | None) -> float | None:
    """Returns a value as SQLite keeps it: it has no NaN, so NULL stands for one."""
    return None if value is None or math.isnan(value) else float(value)
