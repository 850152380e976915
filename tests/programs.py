"""How the tests compile: quickly, since compilation is most of their time.

XLA compiles each fused loop in two steps. Without LLVM's optimisations the first one (its "fusion
emitters") takes longer than everything else. jaxlib 0.10 can do without, which takes two fifths off
the compilation; newer ones can't.

`ZOFL_JAX_TEST_PROGRAMS=users` compiles everything as users have it.
"""

import os
import subprocess
import sys

AS_USERS_RUN_THEM = os.environ.get("ZOFL_JAX_TEST_PROGRAMS") == "users"
QUICK_FLAG = "--xla_cpu_use_fusion_emitters=false"

_ASK = "import jax; jax.devices()"


def compile_quickly() -> None:
    """Adds `QUICK_FLAG` to XLA's flags, for this process and those it starts, if XLA knows it.

    A flag that it doesn't know ends a process, so one of its own is asked. To be called before
    anything is computed.
    """
    if AS_USERS_RUN_THEM or "PYTEST_XDIST_WORKER" in os.environ:  # a worker inherits the answer
        return
    flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_FLAG}".strip()
    asked = subprocess.run(
        [sys.executable, "-c", _ASK], env={**os.environ, "XLA_FLAGS": flags}, capture_output=True
    )
    if asked.returncode == 0:
        os.environ["XLA_FLAGS"] = flags


def users_flags() -> str:
    """Returns XLA's flags without `QUICK_FLAG`, for commands that run as a user's do."""
    return os.environ.get("XLA_FLAGS", "").replace(QUICK_FLAG, "").strip()
