"""What a round takes by its trace alone, for devices that there is no compiler for here.

    mesh = topologies.mesh("h100:64", placement.Shape(clients=8, model=8))
    plan = paper.make(simulation.make_simulator(algorithm, task, ..., mesh=mesh))

The traced program is walked as a compiler would run it that fuses well: what is computed number by
number (sums, the words of a generator, conversions, broadcasts) is made where it is used and takes
no memory, unless a product, a loop or a branch takes it or it is a result. So arrays come from
products, reductions, gathers and loops; each is there from where it is made until it is last used,
and is written once and read by each that uses it. What is split over the devices of a group is
followed from the params on. docs/scaling.md has the error against compilers' own accounts.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from zofl_jax.directions import jaxprs
from zofl_jax.engine import compilation, hardware
from zofl_jax.engine.placement import MODEL
from zofl_jax.engine.simulator import Simulator
from zofl_jax.planning import costs, plans, programs

NOTE = "estimated from the traced program, not compiled: docs/scaling.md has the error of that"

PRODUCTS = {"dot_general", "conv_general_dilated", "zofl_convolution"}
BLOCKS = {"scan", "while", "cond", "shard_map"}
"""Primitives whose inner programs are run apart; those of others are part of what is around."""

VIEWS = {"slice", "dynamic_slice", "gather"}
"""Primitives that read a part of an array: the part is what moves."""

ALIASES = {
    *("reshape", "squeeze", "expand_dims", "sharding_constraint", "optimization_barrier"),
    *("dynamic_update_slice", "copy"),
}
"""Primitives whose results lie where their first inputs do, one after the other."""

APART = {"sort", "top_k", "scatter", "scatter-add", "dynamic_update_slice", "cumsum", "argmax"}
"""Further primitives that make an array of their own, besides reductions."""

FAST = {"gpu": 25 * 10**6, "tpu": 32 * 2**20}
"""Arrays of fewer bytes that a round makes are taken to stay on the chip: half of an H100's L2 (50
MB, by NVIDIA's white paper), about as much on a TPU. What a round is given is read from memory. A
CPU's compiled program counts all."""


class Label(NamedTuple):
    """What is known of an array.

    Attributes:
      axis: which one devices split, counted from the last as 1; None where each has all.
      is_given: whether it is made number by number of what the round is given, such as params.
    """

    axis: int | None = None
    is_given: bool = False


NEW = Label()


class Estimate(NamedTuple):
    """What one device's part of a round takes.

    Attributes:
      temporaries: bytes of memory beside the arguments.
      traffic: bytes between the chip and its memory.
      sent: bytes that the device sends, by the kind of collective.
    """

    temporaries: int
    traffic: int
    sent: dict[str, int]


def make(simulator: Simulator, *, phase: int = 0, factors: str = "float32") -> plans.Plan:
    """Returns the plan of a round by its trace.

    Args:
      simulator: its devices need not be there, nor a compiler for them.
      phase: of its phases.
      factors: what the factors of most products are, "float32" or "bfloat16".

    Raises:
      DoesNotFitError: if a device has too little memory.
    """
    where = simulator.placement
    chip = hardware.of(simulator.devices())
    limit = chip.memory if chip else None
    memory = plans.arguments(simulator.shapes(phase), limit)
    plans.check(memory, memory.arguments, where.split)
    began = time.perf_counter()
    program, args = simulator.program(phase)
    consts = [where.closed_over(x) for x in program.consts]
    inputs = [*consts, *jax.tree.leaves(args)]
    fast = FAST.get(where.platform, 0)
    found = estimate(program, inputs, where.groups, where.split, fast)
    memory = dataclasses.replace(
        memory,
        frozen=compilation.bytes_on_a_device(consts),
        records=0,
        temporaries=found.temporaries + _copies(simulator, args[0].params),
        code=0,
    )
    if memory.needed is not None:
        plans.check(memory, memory.needed, where.split)
    counted = costs.of(program, where.groups, where.split)
    return plans.Plan(
        device=chip.name if chip else simulator.devices()[0].device_kind,
        mesh={"clients": where.groups, "model": where.split},
        clients=simulator.setting.clients_per_round,
        memory=memory,
        costs=counted,
        figures=programs.Figures(
            collectives=found.sent,
            sent=sum(found.sent.values()),
            traffic=found.traffic,
            cycles=None,
            largest=(),
            notes=(),
        ),
        factors=factors,
        chip=chip,
        compile_seconds=time.perf_counter() - began,
        notes=(NOTE, *plans.idle(simulator), *counted.notes),
        compiled=False,
    )


def estimate(
    program: jaxprs.Program,
    inputs: Sequence[Any],
    groups: int = 1,
    split: int = 1,
    fast: int = 0,
) -> Estimate:
    """Returns what a program takes whose outermost loop has rounds as turns, once.

    Args:
      program: as `jaxprs.trace` gives it.
      inputs: what it closes over, and its arguments' leaves: arrays, or shapes with shardings.
      groups: of devices, that clients are shared out over.
      split: devices of a group.
      fast: of how many bytes an array that is made need be to go through the memory.

    >>> import jax.numpy as jnp
    >>> x, w = jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    >>> def deep(x, w):
    ...     return jax.lax.scan(lambda x, w: (jnp.sin(x @ w) + 1, None), x, w)[0]
    >>> found = estimate(jaxprs.trace(deep, x, w)[0], [x, w])
    >>> found.temporaries  # a product, while its input is the loop's
    128
    >>> found.traffic == 5 * (4 * (4 * 8 + 8 * 8 + 4 * 8) + 4 * (4 * 8 + 4 * 8))
    True
    """
    walk = _Walk(groups, split, fast)
    labels = [_label(x) for x in inputs]
    # The state that rounds start from is overwritten.
    state = frozenset(range(len(program.jaxpr.outvars)))
    peak, _ = walk.run(program, labels, walk.total, state)
    return Estimate(peak, round(walk.total.traffic), walk.total.told())


def _copies(simulator: Simulator, params: Any) -> int:
    """Returns the bytes of the params as the products take them, where those are narrower.

    The compiler makes such a copy before the passes. A TPU rounds float32 to bfloat16 by itself.
    """
    initial = jax.eval_shape(simulator.task.init, simulator.root.init)

    def size(kept: Any, first: Any) -> int:
        wide = jax.dtypes.issubdtype(kept.dtype, jax.numpy.floating) and kept.ndim > 1
        narrow = simulator.placement.platform == "tpu" and wide
        taken = min(first.dtype.itemsize, 2) if narrow else first.dtype.itemsize
        whole = compilation.bytes_on_a_device(kept)
        return whole * taken // kept.dtype.itemsize if taken < kept.dtype.itemsize else 0

    return sum(jax.tree.leaves(jax.tree.map(size, params, initial)))


@dataclasses.dataclass
class _Total:
    """Bytes of a device that a program moves."""

    traffic: float = 0
    sums: float = 0  # that a device sends for the parts of products
    clients: float = 0  # for sums over the groups

    def add(self, other: "_Total", times: int = 1) -> None:
        self.traffic += times * other.traffic
        self.sums += times * other.sums
        self.clients += times * other.clients

    def told(self) -> dict[str, int]:
        kinds = {"all-reduce of a group": self.sums, "over the groups": self.clients}
        return {name: round(size) for name, size in kinds.items() if size}


@dataclasses.dataclass
class _Value:
    """An array of a program.

    Attributes:
      aval: its shape and dtype.
      label: how it is split.
      sources: the arrays in memory that are read to make it, itself where it is one.
    """

    aval: Any
    label: Label = NEW
    sources: frozenset[int] = frozenset()


class _Op(NamedTuple):
    """An equation of a program, with numbers of values; None stands for a literal."""

    name: str
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    equation: Any


class _Walk:
    """The way through a program and those inside."""

    def __init__(self, groups: int, split: int, fast: int):
        self._groups, self._split, self._fast = groups, split, fast
        self.total = _Total()

    def run(
        self,
        program: jaxprs.Program,
        labels: Sequence[Label],
        total: _Total,
        in_place: frozenset[int] = frozenset(),
    ) -> tuple[int, list[Label]]:
        """Returns the most bytes that a program has beside its inputs, and its results' labels.

        Args:
          program: what is run.
          labels: of its inputs, and of what it closes over before them if that is split.
          total: what it moves is added to.
          in_place: which results overwrite inputs.
        """
        values, ops, results = _flat(program, labels)
        kept = _in_memory(ops, [r for r in results if r is not None])
        over = _overwriting(ops, {results[i] for i in in_place})
        ends = _last_uses(ops, results, kept)
        live = peak = 0
        held: dict[int, int] = {}
        for at, op in enumerate(ops):
            read = _sources(values[i] for i in op.inputs if i is not None)
            ending = {i: held[i] for i in read if i in held and ends[i] <= at}
            free = set(over)
            for place, out in enumerate(op.outputs):
                if out not in kept or out in over:
                    continue
                size = self._size(values[out])
                first = op.inputs[min(place, len(op.inputs) - 1)] if op.inputs else None
                if op.name in ALIASES and first is not None and first in kept:
                    free.add(out)
                    if first in ending:  # lives on under another name
                        held[out] = held.pop(first)
                        del ending[first]
                elif op.name not in PRODUCTS:
                    same = next((i for i, has in ending.items() if has == size > 0), None)
                    if same is not None:
                        free.add(out)
                        held[out] = held.pop(same)
                        del ending[same]
            inner = self._step(op, values, kept, total, free)
            for out in op.outputs:
                if out in kept and out not in free:
                    held[out] = self._size(values[out])
                    live += held[out]
            peak = max(peak, live + inner)
            for done in [i for i in held if ends.get(i, at) <= at]:
                live -= held.pop(done)
        return peak, [NEW if r is None else values[r].label for r in results]

    def _step(
        self,
        op: _Op,
        values: dict[int, _Value],
        kept: set[int],
        total: _Total,
        free: set[int],
    ) -> int:
        """Labels the results of an operation and adds what it moves; returns its own peak.

        Args:
          op: the operation.
          values: of the program.
          kept: which are arrays of their own.
          total: what is moved is added to.
          free: which results lie where something else was.
        """
        given = [values[i] for i in op.inputs if i is not None]
        inner = 0
        if op.name in BLOCKS:
            inner = self._block(op, values, total, free)
        elif op.name in PRODUCTS:
            self._product(op, values, total)
        else:
            self._inherit(op, values)
        if op.name == "psum":  # over the groups, inside of `shard_map`
            size = sum(self._size(values[i]) for i in op.outputs)
            total.clients += 2 * size * (self._groups - 1) / self._groups
        for out in op.outputs:
            value = values[out]
            if out in kept or _is_narrowed(op, given, value):
                value.sources = frozenset([out])
            else:
                value.sources = _sources(given)
        if op.name in VIEWS:
            # Of a table that is split by rows each device has some, and adds zeros for the others.
            table, made = given[0], sum(self._size(values[i]) for i in op.outputs)
            if op.name == "gather" and (table.label.axis or 0) > 1:
                self._send(made, total)
            total.traffic += (
                2 * made if any(i in kept for i in op.outputs) and made >= self._fast else 0
            )
        elif op.name in ALIASES and op.inputs[0] in kept:
            if op.name == "dynamic_update_slice":
                total.traffic += 2 * self._size(given[1])
        elif op.name not in BLOCKS and any(i in kept for i in op.outputs):
            total.traffic += sum(self._moved(values[i]) for i in _sources(given))
            total.traffic += sum(self._moved(values[i]) for i in op.outputs)
        return inner

    def _block(self, op: _Op, values: dict[int, _Value], total: _Total, free: set[int]) -> int:
        labels = [NEW if i is None else values[i].label for i in op.inputs]
        programs_inside = jaxprs.inner(op.equation)
        found = [NEW] * len(op.outputs)
        peak = 0
        if op.name == "cond":
            choices: list[tuple[float, _Total, list[Label]]] = []
            in_place = frozenset(i for i, out in enumerate(op.outputs) if out in free)
            for part in programs_inside:
                own = _Total()
                size, out = self.run(part, labels[1:], own, in_place)
                choices.append((own.traffic, own, out))
                peak = max(peak, size)
            _, own, found = max(choices, key=lambda each: each[0])
            total.add(own)
        elif op.name == "while":
            # What the condition closes over, what the body does, and what is carried.
            carried = len(op.outputs)
            closed_over, carry = labels[: len(labels) - carried], labels[len(labels) - carried :]
            for part in programs_inside:
                own, before = _Total(), part.num_inputs - carried
                is_body = len(part.jaxpr.outvars) == carried and not _is_test(part)
                own_consts = closed_over[-before:] if is_body else closed_over[:before]
                size, out = self.run(
                    part,
                    [*(own_consts if before else ()), *carry],
                    own,
                    frozenset(range(carried) if is_body else ()),
                )
                peak = max(peak, size)
                total.add(own)
                found = out if is_body else found
        elif op.name == "scan":
            own = _Total()
            read = jaxprs.loop(op.equation)
            carry_size = read.num_carry if read else 0
            peak, found = self.run(programs_inside[0], labels, own, frozenset(range(carry_size)))
            # What is stacked is written into the loop's results.
            stacked = programs_inside[0].jaxpr.outvars[carry_size:]
            peak -= min(peak, sum(_bytes(v.aval) for v in stacked))
            total.add(own, jaxprs.turns(op.equation) or 1)
        else:  # shard_map, whose results every group gets
            peak, found = self.run(programs_inside[0], labels, total)
            made = sum(_bytes(v.aval) for v in programs_inside[0].jaxpr.outvars)
            total.clients += made * (self._groups - 1)
        for number, label in zip(op.outputs, found, strict=True):
            values[number].label = label
        return peak

    def _product(self, op: _Op, values: dict[int, _Value], total: _Total) -> None:
        out = values[op.outputs[0]]
        if op.name != "dot_general":
            return
        try:
            (left, right), _ = op.equation.params["dimension_numbers"]
        except (KeyError, TypeError, ValueError):
            return
        summed = False
        for side, (number, contracted) in enumerate(zip(op.inputs, (left, right), strict=False)):
            axis = None if number is None else values[number].label.axis
            if number is None or axis is None:
                continue
            if len(values[number].aval.shape) - axis in contracted:
                summed = True
            elif side == 1 and out.aval.shape and axis == 1:
                out.label = Label(axis)
        if summed:  # the parts, in float32
            out.label = NEW
            self._send(4 * math.prod(out.aval.shape), total)

    def _inherit(self, op: _Op, values: dict[int, _Value]) -> None:
        """What is made number by number is split as what it is made of."""
        for out in op.outputs:
            shape = values[out].aval.shape
            for number in op.inputs:
                value = None if number is None else values[number]
                if value is None or value.label == NEW:
                    continue
                axis, given = value.label
                # Not what a scale, or a bias, is spread over.
                alike = math.prod(shape) == math.prod(value.aval.shape)
                kept = values[out].label.is_given or (given and alike)
                values[out].label = values[out].label._replace(is_given=kept)
                if axis is None or len(shape) < axis:
                    continue
                if op.name == "transpose":
                    at = op.equation.params["permutation"].index(len(shape) - axis)
                    values[out].label = Label(len(shape) - at, kept)
                elif shape[-axis] == value.aval.shape[-axis]:
                    values[out].label = Label(axis, kept)

    def _send(self, size: float, total: _Total) -> None:
        total.sums += 2 * size * (self._split - 1) / self._split

    def _size(self, value: _Value) -> int:
        whole = _bytes(value.aval)
        return whole if value.label.axis is None else math.ceil(whole / self._split)

    def _moved(self, value: _Value) -> int:
        """Returns the bytes of an array that are read from memory, or written to it."""
        size = self._size(value)
        return size if value.label.is_given or size >= self._fast else 0


def _flat(
    program: jaxprs.Program, labels: Sequence[Label]
) -> tuple[dict[int, _Value], list[_Op], list[int | None]]:
    """Returns a program's values, its operations in order, and the numbers of its results.

    Functions called on the way are written out.
    """
    values: dict[int, _Value] = {}
    ops: list[_Op] = []

    def new(aval: Any, label: Label = NEW) -> int:
        number = len(values)
        values[number] = _Value(aval, label)
        return number

    def enter(inside: jaxprs.Program, given: Sequence[int | None]) -> list[int | None]:
        known: dict[Any, int | None] = {}
        variables = [*inside.jaxpr.constvars, *inside.jaxpr.invars]
        known.update(zip(variables, given, strict=True))

        def of(atom: Any) -> int | None:
            return None if jaxprs.is_literal(atom) else known[atom]

        for equation in inside.jaxpr.eqns:
            inputs = tuple(of(atom) for atom in equation.invars)
            called = list(_called(equation, len(inputs)))
            if called:
                consts = [new(v.aval) for v in called[0].jaxpr.constvars]
                results = enter(called[0], [*consts, *inputs])
                known.update(zip(equation.outvars, results, strict=True))
                continue
            outputs = tuple(new(v.aval) for v in equation.outvars)
            known.update(zip(equation.outvars, outputs, strict=True))
            ops.append(_Op(_name(equation), inputs, outputs, equation))
        return [of(atom) for atom in inside.jaxpr.outvars]

    outer = [*program.jaxpr.constvars, *program.jaxpr.invars]
    constants = [NEW] * (len(outer) - len(labels))  # of a program inside, which are small
    given = []
    for variable, label in zip(outer, [*constants, *labels], strict=True):
        number = new(variable.aval, label)
        values[number].sources = frozenset([number])
        given.append(number)
    return values, ops, enter(program, given)


def _name(equation: Any) -> str:
    """Returns the name of a primitive; a product of one column and one row is a multiplication."""
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        if math.prod(equation.invars[0].aval.shape[axis] for axis in contracted) == 1:
            return "mul"
    return name


def _called(equation: Any, inputs: int) -> Iterator[jaxprs.Program]:
    """Yields the program of an equation that only calls it."""
    inner = jaxprs.inner(equation)
    if equation.primitive.name not in BLOCKS and inner and inner[0].num_inputs == inputs:
        yield inner[0]


def _in_memory(ops: Sequence[_Op], results: Sequence[int]) -> set[int]:
    """Returns the values that are arrays of their own."""
    kept = set(results)
    for op in ops:
        name = op.name
        takes = name in PRODUCTS or name in BLOCKS or name in APART
        if takes:
            kept.update(i for i in op.inputs if i is not None)
        if takes or name == "gather" or name.startswith(("reduce_", "psum", "all_")):
            kept.update(op.outputs)
    return kept


def _overwriting(ops: Sequence[_Op], results: set[int | None]) -> set[int]:
    """Returns the values that lie where results do that overwrite inputs."""
    found = {i for i in results if i is not None}
    for op in reversed(ops):
        if op.name in ALIASES:
            pairs = zip(op.inputs, op.outputs, strict=False)
            found |= {into for into, out in pairs if out in found and into is not None}
    return found


def _sources(values: Iterable[_Value]) -> frozenset[int]:
    """Returns the arrays in memory that are read for values."""
    return frozenset(i for value in values for i in value.sources)


def _last_uses(ops: Sequence[_Op], results: Sequence[int | None], kept: set[int]) -> dict[int, int]:
    """Returns after which operation each value is needed no more."""
    ends: dict[int, int] = {i: len(ops) for i in results if i is not None}
    for at in reversed(range(len(ops))):
        op = ops[at]
        until = max((ends.get(i, at) for i in op.outputs if i not in kept), default=at)
        until = max(until, at)
        for i in op.inputs:
            if i is not None:
                ends[i] = max(ends.get(i, -1), until)
    return ends


def _label(x: Any) -> Label:
    """Returns the label of what a round is given: an array, or a shape with a sharding."""
    spec = getattr(getattr(x, "sharding", None), "spec", ())
    rank = len(getattr(x, "shape", ()))
    return Label(next((rank - at for at, name in enumerate(spec) if name == MODEL), None), True)


def _is_narrowed(op: _Op, given: Sequence[_Value], value: _Value) -> bool:
    """Returns whether an operation rounds what a round is given: a compiler does so once."""
    if op.name != "convert_element_type" or not given or not given[0].label.is_given:
        return False
    return _bytes(value.aval) < _bytes(given[0].aval)


def _is_test(part: jaxprs.Program) -> bool:
    """Returns whether a program is the condition of a loop: it gives a truth value alone."""
    out = part.jaxpr.outvars
    return len(out) == 1 and out[0].aval.dtype == bool


def _bytes(aval: Any) -> int:
    itemsize = getattr(aval.dtype, "itemsize", 4)
    return math.prod(aval.shape) * itemsize
