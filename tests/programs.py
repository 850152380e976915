"""How the tests compile: quickly, since compilation is most of their time.

XLA compiles each fused loop in two steps. Without LLVM's optimisations the first one (its "fusion
emitters") takes longer than everything else. jaxlib 0.10 can do without, which takes two fifths off
the compilation; newer ones can't. And it shares a program out over threads, each with an LLVM of
its own: where every core runs tests, what that takes is lost, an eighth of all a test takes (with
jaxlib 0.12 nothing any more).

`ZOFL_JAX_TEST_PROGRAMS=users` compiles everything as users have it.
"""

import os
import subprocess
import sys

AS_USERS_RUN_THEM = os.environ.get("ZOFL_JAX_TEST_PROGRAMS") == "users"
QUICK_FLAGS = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)

_ASK = "import jax; jax.devices()"


def compile_quickly() -> None:
    """Adds those of `QUICK_FLAGS` that XLA knows to its flags, here and in processes started here.

    A flag that it doesn't know ends a process, so one of its own is asked. To be called before
    anything is computed.
    """
    if AS_USERS_RUN_THEM or "PYTEST_XDIST_WORKER" in os.environ:  # a worker inherits the answer
        return
    if _known(QUICK_FLAGS):
        _add(QUICK_FLAGS)
        return
    for flag in QUICK_FLAGS:
        if _known((flag,)):
            _add((flag,))


def users_flags() -> str:
    """Returns XLA's flags without `QUICK_FLAGS`, for commands that run as a user's do."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(flag for flag in flags if flag not in QUICK_FLAGS)


def _with(flags: tuple[str, ...]) -> str:
    return " ".join((os.environ.get("XLA_FLAGS", ""), *flags)).strip()


def _known(flags: tuple[str, ...]) -> bool:
    environment = {**os.environ, "XLA_FLAGS": _with(flags)}
    return not subprocess.run(
        [sys.executable, "-c", _ASK], env=environment, capture_output=True
    ).returncode


def _add(flags: tuple[str, ...]) -> None:
    os.environ["XLA_FLAGS"] = _with(flags)
