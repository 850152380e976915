"""The run directory: the flags, the log, the snapshots, the summary and the figures of a run.

    with runs.open_run("runs/digits", flags, may_change=("rounds",)) as run:
        run.save_snapshot(0, state)
        run.log.append(rows)

    runs/digits/
      flags.json           the resolved flags
      inputs.json          fingerprints of data and base model
      log.sqlite           the run log: see `run_log.py`
      snapshots/           states of some rounds, round 0 among them
      summary.json         results
      *.png                figures
      lock                 held by the process that has the run open

Nothing here knows of algorithms: flags, rows and trees of arrays are plain values. A kill
at any moment leaves a directory that opens again. `docs/log_format.md` has the formats.
"""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np

from zofl_jax.runs import fingerprints, snapshots
from zofl_jax.runs.run_files import (
    RunError,
    remove_temporary_files,
    save_figure,
    temporary_path,
    write_atomically,
)
from zofl_jax.runs.run_log import RoundRow, RunLog
from zofl_jax.runs.run_repair import open_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Flag", "RoundRow", "Run", "RunError", "RunLog", "open_run", "read_flags"]

Flag = str | int | float | bool | None

_FLAGS, _INPUTS, _LOG, _SNAPSHOTS, _SUMMARY, _LOCK = (
    "flags.json",
    "inputs.json",
    "log.sqlite",
    "snapshots",
    "summary.json",
    "lock",
)


class Run:
    """An open run directory, made by `open_run`; close it, or use it in a `with` statement.

    Attributes:
      path: the directory.
      flags: the resolved flags.
      log: rounds, metrics and meta.
      notice: None, or what had to be repaired, in sentences for the user.
    """

    def __init__(
        self,
        path: Path,
        flags: dict[str, Flag],
        log: RunLog,
        notice: str | None,
        resources: contextlib.ExitStack,
    ):
        self.path = path
        self.flags = flags
        self.log = log
        self.notice = notice
        self._resources = resources

    @property
    def snapshot_rounds(self) -> list[int]:
        """The rounds of which there are snapshots, in ascending order."""
        return snapshots.saved_rounds(self.path / _SNAPSHOTS)

    def save_snapshot(self, rounds_done: int, state: Any, keep: int = 2) -> None:
        """Saves the state after `rounds_done` rounds, and deletes older snapshots.

        The snapshot of round 0 stays for ever, as the start of every replay; of the others
        the last `keep` stay, and none of a later round than this.

        Args:
          rounds_done: as in `ServerState.round`.
          state: a tree of arrays; no typed keys.
          keep: >= 1.

        Raises:
          ValueError: for a leaf that isn't an array of numbers, a negative round, or keep < 1.
          RunError: if it can't be written.
        """
        with _os_errors_reported(self.path):
            snapshots.save(self.path / _SNAPSHOTS, rounds_done, state, keep)

    def latest_snapshot(self, template: Any, at_most: int | None = None) -> tuple[int, Any] | None:
        """Returns the last usable snapshot, (rounds done, state), or None if there is none.

        A damaged snapshot is set aside as `<name>.damaged` and the one before it is taken;
        `notice` then says so.

        Args:
          template: a tree like the state: arrays or `jax.ShapeDtypeStruct`s.
          at_most: the latest round wanted; without it the end of the log, since a later state
            can't be continued from.

        Raises:
          RunError: if the snapshot doesn't fit the template; the message names the leaf.
        """
        if at_most is None:
            at_most = self.log.last_round + 1
        with _os_errors_reported(self.path):
            found, notice = snapshots.load_latest(self.path / _SNAPSHOTS, template, at_most)
        self._report(notice)
        return found

    def check_inputs(self, inputs: Mapping[str, fingerprints.Plain]) -> None:
        """Checks that the run goes on with the data and the base model it began with.

        A run that has noted none of them notes these; if it has rounds already, `notice` says so.

        Args:
          inputs: see `fingerprints`. Those that the run has not noted are noted, and those it
            has noted and that are missing here are not checked.

        Raises:
          RunError: if one has changed; the message names it.
        """
        path = self.path / _INPUTS
        try:
            noted = json.loads(path.read_text())
            if not isinstance(noted, dict):
                raise ValueError("it holds no table of fingerprints")
        except FileNotFoundError:
            noted = {}
            if inputs and self.log.last_round >= 0:
                self._report(
                    f"{self.path} has rounds but no {_INPUTS}, so whether its data and base model "
                    "are those it began with can't be checked; those of now are noted."
                )
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} can't be read ({error}): restore it from a copy, or delete it to go on "
                "with the data and the base model of now"
            ) from error
        if changed := fingerprints.changes(noted, inputs):
            raise RunError(
                f"{fingerprints.listed(changed)} changed since the run in {self.path} began: "
                "choose another --workdir for a new run, or restore what it began with to go on "
                "with this one"
            )
        if set(inputs) - set(noted):
            with _os_errors_reported(self.path):
                _write_json(path, {**noted, **inputs})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes the results as strict JSON; what is not a finite number becomes null.

        Raises:
          ValueError: for a value that JSON can't hold.
          RunError: if it can't be written.
        """
        plain = _to_json("summary", summary)
        with _os_errors_reported(self.path):
            _write_json(self.path / _SUMMARY, plain)

    def read_summary(self) -> dict[str, Any] | None:
        """Returns the results, or None if they haven't been written or can't be read."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((self.path / _SUMMARY).read_text())
        return None

    def save_figure(self, name: str, figure: "Figure") -> Path:
        """Saves a figure under a file name such as "accuracy.png"; returns the path.

        Raises:
          ValueError: for a name that isn't a plain file name.
          RunError: if it can't be written.
        """
        if Path(name).name != name:
            raise ValueError(f"a figure's name must be a plain file name, got {name!r}")
        path = self.path / name
        with _os_errors_reported(self.path):
            save_figure(path, figure)
        return path

    def close(self) -> None:
        """Closes the log and lets other processes open the run."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _report(self, notice: str | None) -> None:
        self.notice = " ".join(filter(None, (self.notice, notice))) or None


def open_run(
    workdir: str | os.PathLike[str], flags: Mapping[str, Flag], may_change: Collection[str] = ()
) -> Run:
    """Creates the run directory `workdir`, or opens the run that is there.

    Args:
      workdir: the directory; "~" is the home directory.
      flags: the resolved flags. In an existing run they must be those it was started with; a flag
        that is None and one that isn't there are the same, so that later releases may have more.
      may_change: names of flags that may differ; their new values are kept.

    Raises:
      ValueError: for a flag that isn't plain: str, finite number, bool or None.
      RunError: if a flag differs, another process has the run open, the directory is
        something else than a run or can't be used, or the log is of a newer format.
    """
    for name, value in flags.items():
        plain = value is None or isinstance(value, str | int | float)
        if not plain or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"flag {name} must be a str, finite number, bool or None: {value!r}")
    path = _directory(workdir)
    with contextlib.ExitStack() as resources, _os_errors_reported(path):
        _refuse_foreign(path)
        path.mkdir(parents=True, exist_ok=True)
        resources.enter_context(_locked(path))
        if not (path / _FLAGS).exists():
            _write_json(path / _FLAGS, dict(flags))
        elif (stored := read_flags(path)) != dict(flags):
            _refuse_changed(path, stored, flags, may_change)
            _write_json(path / _FLAGS, dict(flags))
        (path / _SNAPSHOTS).mkdir(exist_ok=True)
        for directory in (path, path / _SNAPSHOTS):
            remove_temporary_files(directory)
        # The log is there before the first snapshot is.
        lost = not (path / _LOG).exists() and snapshots.saved_rounds(path / _SNAPSHOTS)
        log, notice = open_log(path / _LOG)
        resources.callback(log.close)
        if lost:
            notice = f"{path / _LOG} is missing: the run starts again from round 0."
        return Run(path, dict(flags), log, notice, resources.pop_all())


def read_flags(workdir: str | os.PathLike[str]) -> dict[str, Flag]:
    """Returns the flags a run was started with.

    Raises:
      RunError: if `workdir` is not a run, or its flags can't be read.
    """
    path = _directory(workdir)
    try:
        flags = json.loads((path / _FLAGS).read_text())
        if not isinstance(flags, dict):
            raise ValueError("it holds no table of flags")
    except FileNotFoundError:
        raise RunError(
            f"{path} is not a run (it has no {_FLAGS}): choose the --workdir of a run"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path / _FLAGS} can't be read ({error}): restore it from a copy, or choose another "
            "--workdir"
        ) from error
    return flags


def _directory(workdir: str | os.PathLike[str]) -> Path:
    if not os.fspath(workdir):
        raise RunError("--workdir is empty: name a directory for the run")
    return Path(workdir).expanduser()


def _refuse_foreign(path: Path) -> None:
    """Raises RunError if something is at `path` that is no run, nor the beginning of one."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} is not a directory: choose another --workdir")
    entries = {entry.name for entry in path.iterdir()}
    begun = {_LOCK, temporary_path(path / _FLAGS).name}
    if _FLAGS not in entries and not entries <= begun:
        raise RunError(
            f"{path} holds files but no run (it has no {_FLAGS}): choose another --workdir, or an "
            "empty directory"
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the directory's lock; the system releases it however the process ends."""
    with open(path / _LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RunError(
                f"{path} is in use by another process (id {holder}): wait for it or stop it, or "
                "choose another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _refuse_changed(
    path: Path,
    stored: Mapping[str, Flag],
    flags: Mapping[str, Flag],
    may_change: Collection[str],
) -> None:
    """Raises RunError for the first flag that differs and may not; None is a flag not set."""
    changed = [
        name
        for name in {**stored, **flags}
        if name not in may_change and stored.get(name) != flags.get(name)
    ]
    if not changed:
        return
    name, *others = changed
    old, new = (
        "not set" if table.get(name) is None else repr(table[name]) for table in (stored, flags)
    )
    also = f" (also different: {', '.join(f'--{other}' for other in others)})" if others else ""
    raise RunError(
        f"--{name} is {new} but the run in {path} was started with {old}{also}: choose another "
        "--workdir for a new run, or the old value to go on with this one"
    )


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, allow_nan=False)
    write_atomically(path, text.encode(), b"\n")


def _to_json(name: str, value: Any) -> Any:
    """Returns a value as plain JSON: arrays as lists, and null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(f"{name}/{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(f"{name}/{index}", item) for index, item in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _to_json(name, value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise ValueError(f"{name} must be plain JSON, got {type(value).__name__}")


@contextlib.contextmanager
def _os_errors_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} can't be used ({error}): make sure that it is writable and its disk is not "
            "full, or choose another --workdir"
        ) from error
