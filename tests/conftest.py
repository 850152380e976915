"""What all tests share."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from commands import Commands, Processes


def pytest_configure(config: pytest.Config) -> None:
    # Most of the suite's time is compilation: a second run takes it from here.
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # An entry may be cut short: by the end of a run, or while another process writes it. Then
    # JAX says so and compiles anew.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache entry"
    )


@pytest.fixture
def x64() -> Iterator[None]:
    """Computes in float64 for one test; the session stays in float32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_compile() -> Iterator[None]:
    """Halves compilation by leaving out LLVM's optimisations, for tests with a tolerance.

    Not for threefry4x32: unoptimised, XLA's fusion of it recomputes without end.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config) -> Path:
    """Where commands keep what they compile, for all tests."""
    return pytestconfig.cache.mkdir("zofl_jax")


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """The processes in which the commands of a module's tests run in turn."""
    with contextlib.closing(Processes()) as processes:
        yield processes


@pytest.fixture
def commands(tmp_path: Path, cache: Path, processes: Processes) -> Commands:
    """Runs commands in a folder of the test's own."""
    return Commands(tmp_path, cache, processes)


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
