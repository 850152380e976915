"""Runs one distributed run as several processes on this machine, to try it out.

    python -m experiments.launch_local --processes=2 -- --flagfile=FLAGS --workdir=RUN

What follows `--` are flags of `experiments.train`. The output is that of process 0; when one
process fails, the others are ended and its status is that of this command.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

from absl import app, flags

from zofl_jax.engine import hardware

flags.DEFINE_integer("processes", 2, "How many processes.", lower_bound=1)
flags.DEFINE_integer("devices_per_process", 1, "Devices of each.", lower_bound=1)

FLAGS = flags.FLAGS

GRACE_SECONDS = 10.0
"""How long the others may take to end by themselves after one has ended badly."""


def main(argv: Sequence[str]) -> None:
    """Starts the processes and waits for them."""
    with reserved_port() as port, contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(FLAGS.processes)]
        started = [
            stack.enter_context(_process(argv[1:], port, index, outputs[index]))
            for index in range(FLAGS.processes)
        ]
        signal.signal(signal.SIGINT, lambda *_: _signal(started, signal.SIGINT))
        signal.signal(signal.SIGTERM, lambda *_: _signal(started, signal.SIGTERM))
        failed = _first_failure(started)
        if failed:
            outputs[failed].seek(0)
            text = outputs[failed].read().decode(errors="replace").strip()
            print(f"process {failed}: {text}", file=sys.stderr)
    if failed is not None:
        status = started[failed].returncode
        sys.exit(128 - status if status < 0 else status)


def _process(
    arguments: Sequence[str], port: int, index: int, output: IO[bytes]
) -> contextlib.AbstractContextManager[subprocess.Popen]:
    command = [
        *(sys.executable, "-m", f"{__package__}.train", *arguments),
        "--distributed",
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={FLAGS.processes}",
        f"--process_id={index}",
    ]
    # A mesh says itself which devices are used; on a CPU a process has as many as it is told.
    if not any(argument.lstrip("-").startswith("mesh=") for argument in arguments):
        command.append(f"--devices={FLAGS.devices_per_process}")
    # In a session of its own a process gets Ctrl-C once, from here, and not from the terminal too.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output if index else None,
        stderr=subprocess.STDOUT if index else None,
        start_new_session=True,
        env={**os.environ, **_cpu_devices()},
    )
    return _killed_at_the_end(process)


def _cpu_devices() -> dict[str, str]:
    """Returns what makes JAX see a CPU as --devices_per_process, unless a flag of XLA says it."""
    if hardware.counts_cpu_devices():
        return {}
    return {"JAX_NUM_CPU_DEVICES": str(FLAGS.devices_per_process)}


@contextlib.contextmanager
def _killed_at_the_end(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _first_failure(started: Sequence[subprocess.Popen]) -> int | None:
    """Waits for all; returns which ended badly, None if none did."""
    ends_by, first = float("inf"), None
    while any(process.poll() is None for process in started) and time.monotonic() < ends_by:
        bad = [index for index, process in enumerate(started) if process.poll()]
        if bad and first is None:
            first, ends_by = bad[0], time.monotonic() + GRACE_SECONDS
        time.sleep(0.05)
    bad = [index for index, process in enumerate(started) if process.poll()]
    # Process 0 says what happened wherever it can.
    return 0 if 0 in bad else first if first is not None else next(iter(bad), None)


def _signal(started: Sequence[subprocess.Popen], number: int) -> None:
    for process in started:
        if process.poll() is None:
            process.send_signal(number)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of the loopback that nobody else is given while the block lasts.

    The socket is bound and not listening: gRPC, which shares ports, can listen there, and
    others can't.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


if __name__ == "__main__":
    app.run(main)
