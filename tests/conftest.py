"""What all tests share."""

import contextlib
import gc
import importlib.util
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import extent
import grouping
import jax
import programs
import pytest
from commands import Commands, Processes


def cache_folder() -> Path:
    """Returns where compiled programs are kept from one run of the tests to the next.

    `ZOFL_JAX_TEST_CACHE` names another folder: an empty one measures a cold start.
    """
    if named := os.environ.get("ZOFL_JAX_TEST_CACHE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zofl_jax" / "tests"


def leave_tpus_alone() -> None:
    """Has JAX use the CPU where libtpu is installed, for this process and those it starts.

    Without a TPU it would look for one for seconds, and complain.
    """
    if importlib.util.find_spec("libtpu"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def pytest_configure(config: pytest.Config) -> None:
    leave_tpus_alone()
    programs.compile_quickly()
    # Tracing makes many objects and no garbage: collected as seldom, that takes a twentieth less.
    gc.set_threshold(100_000, 20, 20)
    # A second run takes from here what takes long to compile; the rest isn't worth the writing.
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # Where in the code each operation comes from is written into each program: a twentieth of all
    # that the tests take. Commands that they start inherit it.
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
    jax.config.update("jax_traceback_in_locations_limit", 0)
    # An entry may be cut short: by the end of a run, or while another process writes it. Then
    # JAX says so and compiles anew.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache entry"
    )
    config.addinivalue_line(
        "markers", "thorough: a further case of what other tests see: left out by `make test`"
    )
    config.addinivalue_line(
        "markers", "optimized: the test is of programs with all of LLVM's optimisations"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    extent.mark(items)
    grouping.long_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return grouping.make_scheduler(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Leaves out LLVM's optimisations, half of a compilation, but for tests marked `optimized`.

    Those promise bits, measure time or use threefry4x32: unoptimised, XLA's fusion of that
    generator recomputes without end.
    """
    quick = not programs.AS_USERS_RUN_THEM and item.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    try:
        return (yield)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64() -> Iterator[None]:
    """Computes in float64 for one test; the session stays in float32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def cache() -> Path:
    """Where commands keep what they compile, for all tests."""
    return cache_folder()


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """The processes in which the commands of tests run in turn."""
    with contextlib.closing(Processes()) as processes:
        yield processes


@pytest.fixture
def commands(tmp_path: Path, cache: Path, processes: Processes) -> Commands:
    """Runs commands in a folder of the test's own, compiled as users have them."""
    return Commands(tmp_path, cache, processes)


@pytest.fixture
def quickly(tmp_path: Path, cache: Path, processes: Processes) -> Commands:
    """Runs commands in a folder of the test's own, compiled as quickly as tests are."""
    return Commands(tmp_path, cache, processes, quick=True)


@pytest.fixture(autouse=True)
def logs_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test that leaves a connection to an SQLite database open.

    Python warns of one from 3.13 on, and only when it collects the connection: in a later test.
    """
    opened = []
    connect = sqlite3.connect

    def noted(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", noted)
    yield
    for connection in opened:
        with contextlib.suppress(sqlite3.ProgrammingError):  # as it is once it is closed
            connection.cursor()
            pytest.fail("the test has left a connection to an SQLite database open: close it")
