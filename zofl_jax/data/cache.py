"""Where what was fetched, compiled and read is kept: the user's cache folder."""

import os
from pathlib import Path


def folder() -> Path:
    """Returns the library's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zofl_jax"


def compiled() -> Path:
    """Returns the folder of compiled functions."""
    return folder() / "xla"


def digits(version: str) -> Path:
    """Returns where the digits of a version of scikit-learn are kept."""
    return folder() / f"digits-{version}.npz"


def language_model() -> Path:
    """Returns where `make smollm2` puts its model."""
    return folder() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def reviews() -> Path:
    """Returns the folder where `make reviews` puts its texts."""
    return folder() / "data"
