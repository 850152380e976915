"""What a round takes on the devices of a simulator, compiled and not run.

    mesh = topologies.mesh("v5e:4x4", placement.Shape(clients=8, model=2))
    simulator = simulation.make_simulator(algorithm, task, ..., mesh=mesh)
    plan = plans.make(simulator)
    plan.rows(), plan.as_json()

FLOPs are those of the traced program (`costs`), memory is by the compiler's account, traffic and
collectives are read off the compiled program (`programs`). Times are what the peak rates of the
device allow (`engine.hardware`): a round takes at least as long as the longest of them.
"""

import dataclasses
import time
from typing import Any

import jax

from zofl_jax.engine import compilation, exhaustion, hardware
from zofl_jax.engine.exhaustion import in_words
from zofl_jax.engine.simulator import Shapes, Simulator
from zofl_jax.planning import costs, programs

UNKNOWN = "not known"


class DoesNotFitError(ValueError):
    """A round needs more memory than a device has; the message names the number and the knob."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device that a round needs; None where the compiler doesn't tell.

    Attributes:
      params, state, clients, data, frozen: of the arguments: what is trained, the optimiser's
        state, what clients remember, the examples, and what the program closes over.
      records: what the rounds of a dispatch leave beside them.
      temporaries: activations, directions and all else that lives inside a round.
      code: the program.
      limit: of the device.
    """

    params: int
    state: int
    clients: int
    data: int
    frozen: int
    records: int | None = None
    temporaries: int | None = None
    code: int | None = None
    limit: int | None = None

    @property
    def arguments(self) -> int:
        """Bytes that are there before a round."""
        return self.params + self.state + self.clients + self.data + self.frozen

    @property
    def needed(self) -> int | None:
        """All of it, None where a part is not known."""
        parts = (self.records, self.temporaries, self.code)
        known = [part for part in parts if part is not None]
        return self.arguments + sum(known) if len(known) == len(parts) else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a round takes.

    Attributes:
      device: what the devices are.
      mesh: groups of devices that clients are shared out over, and devices of a group.
      clients: of a round.
      memory: of a device.
      costs: FLOPs.
      figures: traffic and collectives of a device.
      factors: what the factors of products are: "float32" or "bfloat16".
      chip: peak rates, None for a device that isn't in the table.
      compile_seconds: on this machine.
      notes: sentences for people.
      compiled: whether a compiler gave the memory, the traffic and the collectives; else they are
        estimated (`planning.paper`).
    """

    device: str
    mesh: dict[str, int]
    clients: int
    memory: Memory
    costs: costs.Costs
    figures: programs.Figures
    factors: str
    chip: hardware.Chip | None
    compile_seconds: float
    notes: tuple[str, ...] = ()
    compiled: bool = True

    @property
    def seconds(self) -> dict[str, float | None]:
        """What a round takes at the peak rates, by what is at its peak."""
        chip, found = self.chip, self.figures
        if chip is None:
            return dict.fromkeys(("compute", "memory", "interconnect"))
        rate = chip.bfloat16 if self.factors == "bfloat16" else chip.float32
        return {
            "compute": self.costs.products_each / rate,
            "memory": None if found.traffic is None else found.traffic / chip.memory_rate,
            "interconnect": None if found.sent is None else found.sent / chip.link_rate,
        }

    @property
    def saturates(self) -> str | None:
        """What is at its peak first; None where a time is not known."""
        times = {name: s for name, s in self.seconds.items() if s is not None}
        if len(times) < len(self.seconds):
            return None
        return max(times, key=lambda name: times[name])

    @property
    def clients_a_second(self) -> float | None:
        """Simulated clients a second where what saturates first is all that a round takes."""
        slowest = self.saturates and self.seconds[self.saturates]
        return self.clients / slowest if slowest else None

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as plain values; what is not known is None."""
        found = self.figures
        return {
            "device": self.device,
            "compiled": self.compiled,
            "mesh": self.mesh,
            "clients_a_round": self.clients,
            "memory_bytes_a_device": {
                **dataclasses.asdict(self.memory),
                "arguments": self.memory.arguments,
                "needed": self.memory.needed,
            },
            "flops_a_round": self.costs.products,
            "flops_a_device": self.costs.products_each,
            "other_operations_a_device": self.costs.others,
            "memory_traffic_bytes_a_device": found.traffic,
            "collective_bytes_a_device": found.collectives,
            "sent_bytes_a_device": found.sent,
            "compiler_cycles": found.cycles,
            "largest_arrays": [list(each) for each in found.largest],
            "factors": self.factors,
            "peaks": self.chip._asdict() if self.chip else None,
            "seconds_at_peak": self.seconds,
            "saturates_first": self.saturates,
            "clients_a_second_at_most": self.clients_a_second,
            "compile_seconds": round(self.compile_seconds, 1),
            "notes": list(self.notes),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Returns a table for people: what, and how much."""
        memory, found = self.memory, self.figures
        shape = " x ".join(f"{count} {name}" for name, count in self.mesh.items())
        limit = f" of {in_words(memory.limit)}" if memory.limit else ""
        rows = [
            ("devices", f"{shape}, {self.device}"),
            ("memory of a device", f"{_size(memory.needed)}{limit}"),
            ("  params", _size(memory.params)),
            ("  optimiser's state", _size(memory.state)),
            ("  clients' memory", _size(memory.clients)),
            ("  data", _size(memory.data)),
            ("  frozen params", _size(memory.frozen)),
            ("  activations, directions", _size(memory.temporaries)),
            ("  records of a dispatch", _size(memory.records)),
            ("  program", _size(memory.code)),
        ]
        rows += [("    " + shape, f"{_size(size)}, {part}") for size, shape, part in found.largest]
        rows += [
            ("FLOPs of a round", f"{self.costs.products:.3g}"),
            ("FLOPs of a device", f"{self.costs.products_each:.3g}"),
            ("other operations", f"{self.costs.others:.3g} numbers made by a device"),
            ("traffic with memory", _size(found.traffic)),
        ]
        if found.collectives is None:
            rows.append(("collectives", UNKNOWN))
        else:
            rows += [(kind, _size(size)) for kind, size in found.collectives.items()]
            rows.append(("sent by a device", _size(found.sent)))
        rows += [(f"{name} at its peak", _time(s)) for name, s in self.seconds.items()]
        rows += [
            ("saturates first", self.saturates or UNKNOWN),
            (
                "simulated clients",
                f"{self.clients_a_second:.3g} a second at most"
                if self.clients_a_second
                else UNKNOWN,
            ),
            (
                "compilation here" if self.compiled else "estimated, not compiled",
                f"{self.compile_seconds:.1f} s",
            ),
        ]
        return rows


def make(simulator: Simulator, *, phase: int = 0, factors: str = "float32") -> Plan:
    """Returns the plan of a round, which is compiled for the simulator's devices.

    Args:
      simulator: its devices need not be there.
      phase: of its phases.
      factors: what the factors of most products are, "float32" or "bfloat16".

    Raises:
      DoesNotFitError: if a device has too little memory.
    """
    where = simulator.placement
    began = time.perf_counter()
    devices = simulator.devices()
    chip = hardware.of(devices)
    limit = compilation.memory_available(where) or (chip.memory if chip else 0)
    memory = arguments(simulator.shapes(phase), limit or None)
    check(memory, memory.arguments, where.split)
    lowered = simulator.lowered(phase)
    frozen = compilation.bytes_on_a_device(lowered.arrays)
    memory = dataclasses.replace(memory, frozen=frozen)
    check(memory, memory.arguments, where.split)
    try:
        with exhaustion.told():
            compiled = lowered.lowered.compile()
    except exhaustion.OutOfMemoryError as error:
        known = dataclasses.replace(memory, limit=error.limit or memory.limit)
        raise _refusal(known, error.needed, where.split) from error
    seconds = time.perf_counter() - began
    memory = _with_account(memory, compiled.memory_analysis())
    if memory.needed is not None:
        check(memory, memory.needed, where.split)
    found = programs.figures(_text(compiled))
    counted = costs.of(lowered.program, where.groups, where.split)
    return Plan(
        device=chip.name if chip else devices[0].device_kind,
        mesh={"clients": where.groups, "model": where.split},
        clients=simulator.setting.clients_per_round,
        memory=memory,
        costs=counted,
        figures=found,
        factors=factors,
        chip=chip,
        compile_seconds=seconds,
        notes=(*idle(simulator), *counted.notes, *found.notes),
    )


def _text(compiled: Any) -> str:
    """Returns the text of a compiled program, none where XLA fails to write it down."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:  # as jaxlib 0.10 does for some programs of TPUs
        return ""


def arguments(shapes: Shapes, limit: int | None) -> Memory:
    """Returns the memory of what is on a device before a round, but for what is closed over."""
    size = compilation.bytes_on_a_device
    params = size(shapes.state.params)
    return Memory(
        params, size(shapes.state) - params, size(shapes.memory), size(shapes.train), 0, limit=limit
    )


def _with_account(memory: Memory, account: Any) -> Memory:
    """Returns the memory with the compiler's account of it, whose fields JAX doesn't promise."""

    def said(name: str) -> int | None:
        return getattr(account, f"{name}_size_in_bytes", None)

    results, overwritten = said("output"), said("alias")
    left = None if results is None or overwritten is None else results - overwritten
    return dataclasses.replace(
        memory, records=left, temporaries=said("temp"), code=said("generated_code")
    )


def idle(simulator: Simulator) -> tuple[str, ...]:
    """Returns a sentence for the user where devices do work that is dropped."""
    groups, clients = simulator.placement.groups, simulator.setting.clients_per_round
    if clients % groups == 0:
        return ()
    return (
        f"{clients} clients on {groups} groups of devices: some do work that is dropped; let "
        "--clients_per_round be a multiple",
    )


def check(memory: Memory, needed: int, split: int) -> None:
    """Checks that a device has the bytes that are needed.

    Raises:
      DoesNotFitError: if it has not.
    """
    if memory.limit and needed > memory.limit:
        raise _refusal(memory, needed, split)


def _refusal(memory: Memory, needed: int | None, split: int) -> DoesNotFitError:
    has = in_words(memory.limit) if memory.limit else "less"
    if memory.limit and memory.arguments > memory.limit:
        # Doubled until half of a device is left for the round itself.
        more = 2 * split
        while memory.arguments * split / more > memory.limit / 2:
            more *= 2
        return DoesNotFitError(
            f"params, state and data take {in_words(memory.arguments)} of a device that has {has}: "
            f"try --mesh=model:{more}, over whose devices they are split"
        )
    size = in_words(needed) if needed else "more memory"
    knobs = exhaustion.KNOBS.replace("model:M over M", f"model:{2 * split} over {2 * split}")
    return DoesNotFitError(
        f"a round needs {size} on a device that has {has}, {in_words(memory.arguments)} of it for "
        f"params, state and data: try {knobs}"
    )


def _size(size: float | None) -> str:
    return UNKNOWN if size is None else in_words(size)


def _time(seconds: float | None) -> str:
    """Returns a duration for people.

    >>> _time(0.25), _time(2.5e-5), _time(12.3)
    ('250 ms', '25 us', '12.3 s')
    """
    if seconds is None:
        return UNKNOWN
    for unit, least in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= least:
            return f"{seconds / least:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
