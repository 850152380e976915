"""What all measurements share: timing by turns, what a figure depends on, where it is written."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

LEAST_REPEATS = 5


class Times(NamedTuple):
    """What one job took, a figure a turn."""

    seconds: list[float]  # wall clock
    cpu_seconds: list[float]  # of all threads of this process

    @property
    def median(self) -> float:
        """The median of the wall clock, seconds."""
        return statistics.median(self.seconds)

    @property
    def median_cpu(self) -> float:
        """The median of the CPU time, seconds."""
        return statistics.median(self.cpu_seconds)

    def scaled(self, factor: float) -> "Times":
        """Returns the times of `factor` times the work."""
        return Times(*([factor * x for x in each] for each in self))


def by_turns(
    jobs: Sequence[Callable[[], Any]], repeats: int, least_seconds: float = 0.0
) -> list[Times]:
    """Returns the times of jobs that take turns, so that a busy moment hits all of them alike.

    Each job is called once before, unmeasured. There are `repeats` turns, and more until the
    measured calls together have taken `least_seconds`.
    """
    for job in jobs:
        job()
    times = [Times([], []) for _ in jobs]
    began = time.perf_counter()
    while len(times[0].seconds) < repeats or time.perf_counter() - began < least_seconds:
        for job, (seconds, cpu_seconds) in zip(jobs, times, strict=True):
            start, cpu = time.perf_counter(), time.process_time()
            job()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu)
    return times


def ratio(job: Times, bound: Times) -> float:
    """Returns the median over turns of one job's time in units of another's."""
    return statistics.median(a / b for a, b in zip(job.seconds, bound.seconds, strict=True))


def parser(doc: str | None, repeats: int = 7) -> argparse.ArgumentParser:
    """Returns a parser of the flags that all measurements have."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--out", type=Path, help="a JSON file to write")
    made.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs")
    made.add_argument(
        "--repeats", type=int, default=repeats, help=f"turns of a median, >= {LEAST_REPEATS}"
    )
    return made


def check_repeats(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program unless there are enough turns for a median; a smoke run needs one."""
    if options.smoke:
        options.repeats = 1
    elif options.repeats < LEAST_REPEATS:
        made.error(f"--repeats must be >= {LEAST_REPEATS} for a median, got {options.repeats}")


def without_cache() -> None:
    """Turns off the persistent compilation cache, so that compilation is seen as it is."""
    jax.config.update("jax_enable_compilation_cache", False)


def machine(devices: int | None = None) -> dict[str, Any]:
    """Returns what a figure depends on: device, versions, and how busy the machine was."""
    found = jax.devices()
    return {
        "device": f"{_device_name(found[0])} x {devices or len(found)}",
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        },
    }


def report(result: dict[str, Any], out: Path | None) -> None:
    """Prints a result as JSON and writes it to a file, if one is given."""
    text = json.dumps(_rounded(result), indent=2)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


def status_bytes(name: str) -> int:
    """Returns a memory figure of this process in bytes: VmHWM is its peak, VmRSS is now.

    The peak is of this program alone; `resource.getrusage` would remember its parent's.
    """
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"/proc/self/status has no line {name}")
    return int(found.group(1)) * 1024


def _device_name(device: jax.Device) -> str:
    if device.platform != "cpu":
        return device.device_kind
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"cpu ({names[0]})" if names else "cpu"


def _rounded(value: Any) -> Any:
    """Returns a tree with its floats to five digits; the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
