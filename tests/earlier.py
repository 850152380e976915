"""What is told of a run in `earlier_runs/`, and of the machine that made it."""

import hashlib
import importlib.metadata
import os
import platform
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import jax
import jaxlib

RUNS = Path(__file__).parent / "earlier_runs"
STOPPED, ROUNDS = 12, 20
"""Rounds that a run has as it is kept, and those that it has once it has gone on."""


def machine() -> dict[str, str | int]:
    """Returns what the bits of a run depend on beside its flags and the code."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    named = re.search(r"^model name\s*: (.*)$", text, re.M)
    features = re.search(r"^flags\s*: (.*)$", text, re.M)
    digest = hashlib.sha256(" ".join(sorted(features[1].split() if features else ())).encode())
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        # What an optimiser's step is traced to, and what draws partitions.
        **{name: importlib.metadata.version(name) for name in ("optax", "flax", "numpy")},
        "platform": jax.default_backend(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": named[1] if named else platform.processor(),
        "cpu_features": digest.hexdigest()[:16],
        "cores": os.cpu_count() or 0,
    }


def facts(workdir: Path) -> dict[str, list]:
    """Returns what the log of a run says: losses, bytes of each round by kind, metrics."""
    with closing(sqlite3.connect(workdir / "log.sqlite")) as log:
        rounds = log.execute(
            "SELECT train_loss, bytes_up, seed_down, broadcast_down, catch_up_down, "
            "first_sync_down FROM rounds ORDER BY round"
        ).fetchall()
        metrics = log.execute(
            "SELECT round, name, value FROM metrics WHERE name != 'run_seconds' "
            "ORDER BY round, name"
        ).fetchall()
    return {
        "losses": [loss for loss, *_ in rounds],
        "bytes": [counts for _, *counts in rounds],
        "metrics": [list(row) for row in metrics],
    }
