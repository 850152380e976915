r"""`--distributed`: the same command in every process of a pod or cluster is one run.

    python -m experiments.train --distributed ...                       # TPU pods, SLURM
    python -m experiments.train --distributed --coordinator=HOST:PORT \
        --num_processes=2 --process_id=0 ...                            # elsewhere; 1 on the other

Instead of the last three flags there may be JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID in the environment.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from absl import flags

from zofl_jax.engine import processes
from zofl_jax.engine.simulation import Simulator
from zofl_jax.runs.directory import RunError

from .entry import UserError

flags.DEFINE_bool(
    "distributed",
    False,
    "Share a round's clients out over the devices of all processes: give the same command on every "
    "host of a TPU pod or a cluster. Process 0 writes.",
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX can't find it out.")
flags.DEFINE_integer("num_processes", None, "Processes in all, likewise.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Which of them this is, likewise.", lower_bound=0)
flags.DEFINE_integer(
    "wait_seconds", 300, "How long a process waits for the others to start.", lower_bound=1
)

FLAGS = flags.FLAGS

_GIVEN = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
_JAX_LATER = 30  # seconds after which JAX would abort a process that waits


def run(
    values: Mapping[str, Any],
    lead: Callable[[processes.Team], None],
    simulator: Callable[[], Simulator],
) -> None:
    """Joins the processes; process 0 leads a run and the others follow.

    Args:
      values: what must be the same in every process.
      lead: what process 0 does; its rounds are those of `Team.lead`.
      simulator: builds that of the others.

    Raises:
      UserError: if the processes don't come together, or one of them fails.
      KeyboardInterrupt: in all of them, if one gets Ctrl-C.
    """
    given = {
        name: FLAGS[name].value if FLAGS[name].value is not None else os.environ.get(variable)
        for name, variable in _GIVEN.items()
    }
    team = _join(given)
    try:
        with _stopping(team):
            same = {"num_processes": str(given["num_processes"]), **values}
            team.compare({f"--{name}": value for name, value in same.items()})
            if team.leads:
                with team.leading():
                    lead(team)
            else:
                _follow(team, simulator)
    except processes.ProcessError as error:
        raise UserError(str(error)) from error
    except (UserError, RunError, KeyboardInterrupt):
        if team.broken:
            _leave("the processes lost step with each other")
        raise
    except Exception as error:
        # At its end JAX would wait for the others, and they for this one. A lost connection is
        # of this or that type, whichever call met it.
        if team.broken:
            _leave(
                f"process {team.index} lost another one, or failed in a round; the same command "
                f"goes on from the last logged round ({str(error).partition(chr(10))[0]})"
            )
        traceback.print_exc()
        _leave(f"process {team.index} failed")


def _join(given: Mapping[str, Any]) -> processes.Team:
    try:
        count, index = (
            None if given[name] is None else int(given[name])
            for name in ("num_processes", "process_id")
        )
        # JAX would abort, and neither return nor hear Ctrl-C before.
        with _default_interrupt(), _deadline(FLAGS.wait_seconds):
            processes.join(
                given["coordinator"], count, index, wait_seconds=FLAGS.wait_seconds + _JAX_LATER
            )
            return processes.Team()
    except (ValueError, processes.ProcessError) as error:
        raise UserError(f"--distributed: {error}") from error


def _follow(team: processes.Team, simulator: Callable[[], Simulator]) -> None:
    try:
        built = simulator()
    except (UserError, RunError) as error:
        team.fail(str(error))
        raise
    team.follow(built)


@contextlib.contextmanager
def _stopping(team: processes.Team) -> Iterator[None]:
    """The first Ctrl-C stops all processes between two dispatches, a second one this at once."""

    def asked(*_: Any) -> None:
        team.request_stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, asked)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _default_interrupt() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    def late() -> None:
        _leave(
            f"the processes have not come together within {seconds} seconds (--wait_seconds): "
            "start as many as --num_processes says, each with another --process_id, and let all "
            "reach --coordinator"
        )

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(sentence: str) -> NoReturn:
    """Ends this process at once, where JAX would wait for others that don't come."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
