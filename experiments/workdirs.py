"""Where runs are, and which of their flags may change when they go on."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zofl_jax.training import summaries

MAY_CHANGE = ("rounds", "eval_every")
"""Flags that may differ when a run is resumed: they change no round already done."""


def of_run(values: Mapping[str, Any], auto_lr: bool = False) -> Path:
    """Returns a folder whose name tells the run and whose digest tells its flags."""
    names = values["task"], summaries.model_name(values["model"])
    task, model = (plain(name) for name in names)
    told = digest(fixed(values) | ({"auto_lr": True} if auto_lr else {}))
    return Path("runs") / f"{task}-{model}-{values['algorithm']}-{told}"


def fixed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags that may not change."""
    return {name: value for name, value in values.items() if name not in MAY_CHANGE}


def digest(plain_json: Any) -> str:
    """Returns eight hexadecimal digits that tell flags from others."""
    return hashlib.sha256(json.dumps(plain_json, sort_keys=True).encode()).hexdigest()[:8]


def plain(name: str) -> str:
    """Returns a name as a folder's.

    >>> plain("org/a model")
    'org_a_model'
    """
    return re.sub(r"[^\w.-]+", "_", name)
