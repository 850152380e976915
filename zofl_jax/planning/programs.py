"""What a compiled program moves: through the memory of a device, and between devices.

XLA's own `cost_analysis` counts the body of a loop once, whatever its number of turns. So the text
of the compiled program is read, computation by computation, and the loops are multiplied out. Such
text is no stable interface. What can't be read makes a figure None, and a note says why; it never
counts as zero.

An array in the chip's fast memory (`S(1)` in a layout) takes no traffic, and of an operand that a
fusion takes slices of, the slices are counted.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
"""Of collectives, as XLA calls them."""


class Figures(NamedTuple):
    """What a round takes on a device; None where the program doesn't tell.

    Attributes:
      collectives: bytes of the arrays that a device has in collectives, by kind: the whole array
        of a sum or a gather.
      sent: bytes that a device sends for them, around a ring.
      traffic: bytes between the device and its memory.
      cycles: by the compiler's own estimate, of a TPU alone.
      largest: the largest arrays beside the arguments: bytes, shape, and what it is a part of.
      notes: why a figure is not known.
    """

    collectives: dict[str, int] | None
    sent: int | None
    traffic: int | None
    cycles: int | None
    largest: tuple[tuple[int, str, str], ...]
    notes: tuple[str, ...]


def figures(text: str) -> Figures:
    """Returns what a turn of the outermost loop takes, whose turns are rounds.

    Args:
      text: of a compiled program, `Compiled.as_text()`.
    """
    try:
        module = _Module(text)
        loops = [i for i in module.instructions(module.entry) if i.op == "while"]
        rounds = [loop for loop in loops if module.turns(loop) is None]
        if len(rounds) != 1:
            return _unknown(f"the program has {len(rounds)} loops that could be that of the rounds")
        body = rounds[0].called("body")
        total = module.total(body)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        return _unknown(f"the text of the compiled program can't be read ({error!r})")
    known = {name: None if name in total.doubtful else getattr(total, name) for name in _COUNTS}
    return Figures(
        collectives=None if known["sent"] is None else dict(sorted(total.collectives.items())),
        sent=None if known["sent"] is None else round(total.sent),
        traffic=None if known["traffic"] is None else round(total.traffic),
        cycles=round(known["cycles"]) if known["cycles"] else None,
        largest=module.largest(body),
        notes=tuple(sorted(total.notes)),
    )


def _unknown(note: str) -> Figures:
    return Figures(None, None, None, None, (), (note,))


_COUNTS = ("traffic", "sent", "cycles")


@dataclasses.dataclass
class _Total:
    traffic: float = 0
    sent: float = 0
    cycles: float = 0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    doubtful: frozenset[str] = frozenset()
    notes: frozenset[str] = frozenset()

    def add(self, other: "_Total", times: int = 1) -> None:
        """Adds another total so many times."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for kind, size in other.collectives.items():
            self.collectives[kind] = self.collectives.get(kind, 0) + times * size
        self.doubt(other.doubtful, other.notes)

    def doubt(self, names: frozenset[str], notes: frozenset[str]) -> None:
        """Marks figures as not known."""
        self.doubtful |= names
        self.notes |= notes

    def counted(self) -> frozenset[str]:
        """Returns which figures are not zero."""
        return frozenset(name for name in _COUNTS if getattr(self, name))


class _Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    space: int  # 0 is the device's memory

    @property
    def size(self) -> int:
        return math.prod(self.shape) * _bits(self.dtype) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class _Instruction(NamedTuple):
    name: str
    arrays: tuple[_Array, ...]
    op: str
    operands: tuple[str, ...]
    arguments: str  # the text of the operands
    rest: str
    root: bool

    def called(self, role: str) -> str:
        """Returns the computation that an instruction calls as its body, its condition, ..."""
        return re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)[1]  # type: ignore[index]

    def calls(self) -> list[str]:
        """Returns all computations that an instruction calls, but those that reduce numbers."""
        found = re.findall(r"\b(?:calls|called_computation)=%?([\w.\-]+)", self.rest)
        for several in re.findall(r"\b(?:calls|called_computations)=\{([^}]*)\}", self.rest):
            found += re.findall(r"%?([\w.\-]+)", several)
        return found

    def branches(self) -> list[str]:
        """Returns the computations that a conditional chooses from."""
        several = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if several:
            return re.findall(r"%?([\w.\-]+)", several[1])
        return [self.called("true_computation"), self.called("false_computation")]


_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([\d,<= ]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) ?\(.*\{$")
_DEFINITION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")

# What moves nothing: other names for arrays that are there, and ends of what has begun.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier", "domain"),
    *("add-dependency", "while", "conditional", "call"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}


class _Module:
    """The computations of a program."""

    def __init__(self, text: str):
        self._lines: dict[str, list[str]] = {}
        self.entry = ""
        current: list[str] | None = None
        for line in text.splitlines():
            if current is not None:
                if line.startswith("}"):
                    current = None
                else:
                    current.append(line)
                continue
            header = _HEADER.match(line)
            if header:
                current = self._lines[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
        if not self.entry:
            raise ValueError("no entry computation")
        self._parsed: dict[str, list[_Instruction]] = {}
        self._totals: dict[str, _Total] = {}

    def instructions(self, computation: str) -> list[_Instruction]:
        """Returns the instructions of a computation."""
        if computation not in self._parsed:
            lines = self._lines[computation]
            self._parsed[computation] = [i for line in lines if (i := _parse(line))]
        return self._parsed[computation]

    def table(self, computation: str) -> dict[str, _Instruction]:
        """Returns the instructions by name."""
        return {i.name: i for i in self.instructions(computation)}

    def turns(self, loop: _Instruction) -> int | None:
        """Returns how often the body of a loop is run, None if that isn't fixed.

        XLA says so for some devices; else the loop is one of JAX, which counts up from 0 until a
        constant is reached.
        """
        said = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if said:
            return int(said[1])
        condition = self.table(loop.called("condition"))
        root = next(i for i in condition.values() if i.root)
        # On CPUs the comparison is a fusion of its own.
        if root.op == "fusion":
            outer, (called,) = [condition[name] for name in root.operands], root.calls()
            inside = self.table(called)
            parameters = {i.name: int(i.arguments) for i in inside.values() if i.op == "parameter"}
            condition = {
                name: outer[parameters[name]] if name in parameters else i
                for name, i in inside.items()
            }
            root = next(i for i in inside.values() if i.root)
        if root.op != "compare" or "direction=LT" not in root.rest:
            return None
        counter, end = (condition[name] for name in root.operands)
        if counter.op != "get-tuple-element" or end.op != "constant":
            return None
        return int(end.arguments)

    def total(self, computation: str) -> _Total:
        """Returns what a computation takes, with all that it calls."""
        if computation in self._totals:
            return self._totals[computation]
        total, table = _Total(), self.table(computation)
        for instruction in table.values():
            total.add(self._one(instruction, table))
        self._totals[computation] = total
        return total

    def largest(self, computation: str, most: int = 5) -> tuple[tuple[int, str, str], ...]:
        """Returns the largest arrays in memory that a computation makes, with what it calls."""
        found: dict[str, tuple[int, str, str]] = {}
        for name in self._reached(computation):
            for i in self.instructions(name):
                if i.op in _FREE or i.op.endswith(("-start", "-done")):
                    continue
                told = re.search(r'op_name="([^"]*)"', i.rest)
                for array in i.arrays:
                    if array.space == 0:
                        part = told[1].removeprefix("jit(with_arrays)/") if told else i.op
                        found.setdefault(str(array), (array.size, str(array), part))
        return tuple(sorted(found.values(), reverse=True)[:most])

    def _reached(self, computation: str) -> Iterator[str]:
        yield computation
        for i in self.instructions(computation):
            if i.op == "while":
                yield from self._reached(i.called("body"))
            elif i.op == "conditional":
                for branch in i.branches():
                    yield from self._reached(branch)
            elif i.op == "call":
                yield from self._reached(i.called("to_apply"))

    def _one(self, i: _Instruction, table: dict[str, _Instruction]) -> _Total:
        total = _Total()
        if i.op == "while":
            body, turns = self.total(i.called("body")), self.turns(i)
            total.add(body, turns or 1)
            if turns is None and body.counted():
                note = f"the loop {i.name} has no fixed number of turns"
                total.doubt(body.counted(), frozenset({note}))
        elif i.op == "conditional":
            branches = [self.total(name) for name in i.branches()]
            total.add(max(branches, key=lambda t: (t.traffic, t.sent)))
        elif i.op == "call":
            total.add(self.total(i.called("to_apply")))
        else:
            self._enter_collective(i, table, total)
            for name in i.calls():
                inside = self.total(name)  # of a fusion the collectives alone
                total.sent += inside.sent
                for kind, size in inside.collectives.items():
                    total.collectives[kind] = total.collectives.get(kind, 0) + size
                total.doubt(inside.doubtful & {"sent"}, inside.notes)
            total.traffic += self._traffic(i, table)
            cycles = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
            total.cycles += int(cycles[1]) if cycles else 0
        return total

    def _enter_collective(
        self, i: _Instruction, table: dict[str, _Instruction], total: _Total
    ) -> None:
        kind = i.op.removesuffix("-start")
        if kind not in KINDS:
            return
        given = sum(array.size for name in i.operands for array in table[name].arrays)
        made = sum(array.size for array in i.arrays)
        if i.op != kind and len(i.arrays) > len(i.operands):  # which lists the operands too
            made = max(array.size for array in i.arrays)
        size = max(given, made)
        total.collectives[kind] = total.collectives.get(kind, 0) + size
        members = _members(i.rest)
        share = (members - 1) / members if members else 1.0
        total.sent += size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)

    def _traffic(self, i: _Instruction, table: dict[str, _Instruction]) -> float:
        """Returns the bytes that an instruction reads from memory and writes to it."""
        if i.op in _FREE or i.op.endswith("-done") or (i.op == "custom-call" and not i.operands):
            return 0
        if i.op == "copy-start":
            return _in_memory(i.arrays[:1]) + _in_memory(table[i.operands[0]].arrays)
        if i.op in _SLICES:
            return 2 * _in_memory(i.arrays)
        if i.op == "dynamic-update-slice":
            return 2 * _in_memory(table[i.operands[1]].arrays)
        if i.op == "async-start" or i.op.endswith("-start"):
            inside = sum(self.total(name).traffic for name in i.calls())
            return inside or 2 * sum(_in_memory(table[name].arrays) for name in i.operands)
        if i.op != "fusion":
            given = sum(_in_memory(table[name].arrays) for name in i.operands)
            return given + _in_memory(i.arrays)
        (called,) = i.calls()
        read = 0.0
        for number, name in enumerate(i.operands):
            arrays = table[name].arrays
            if any(array.space == 0 for array in arrays):
                read += min(_in_memory(arrays), self._used(called, number))
        return read + (0 if all(a.space for a in i.arrays) else self._written(called))

    @functools.cache  # noqa: B019 (a module lives as long as its figures are made)
    def _used(self, computation: str, number: int) -> float:
        """Returns how many bytes of a parameter a fused computation reads."""
        instructions = self.instructions(computation)
        names = [i.name for i in instructions if i.op == "parameter" and i.arguments == str(number)]
        whole = sum(a.size for i in instructions if i.name == names[0] for a in i.arrays)
        read = 0.0
        while names:
            name = names.pop()
            for i in instructions:
                if name not in i.operands:
                    continue
                places = [at for at, operand in enumerate(i.operands) if operand == name]
                if i.op in ("bitcast", "reshape") and not i.root:
                    names.append(i.name)
                elif i.op in _SLICES and places == [0]:
                    read += sum(a.size for a in i.arrays)
                elif i.op == "dynamic-update-slice" and places == [0]:
                    continue  # what is updated stays where it is
                elif i.op == "fusion":
                    read += sum(self._used(i.calls()[0], at) for at in places)
                else:
                    return whole
        return min(read, whole)

    @functools.cache  # noqa: B019
    def _written(self, computation: str) -> float:
        """Returns how many bytes a fused computation writes: of an update in place its part."""
        table = self.table(computation)
        root = next(i for i in table.values() if i.root)
        results = [table[name] for name in root.operands] if root.op == "tuple" else [root]
        written = 0.0
        for result in results:
            while result.op in ("bitcast", "reshape") and result.operands[0] in table:
                result = table[result.operands[0]]
            if result.op == "dynamic-update-slice":
                written += sum(a.size for a in table[result.operands[1]].arrays)
            elif result.op == "fusion" and len(result.arrays) == 1:
                written += self._written(result.calls()[0])
            else:
                written += sum(a.size for a in result.arrays)
        return written


def _parse(line: str) -> _Instruction | None:
    """Returns the instruction of a line, None for a line that is none.

    >>> i = _parse("  ROOT %a.1 = f32[2,3]{1,0:T(8,128)S(1)} add(%x, %y), metadata={}")
    >>> i.op, i.operands, str(i.arrays[0]), i.arrays[0].space, i.root
    ('add', ('x', 'y'), 'f32[2,3]', 1, True)
    """
    begin = _DEFINITION.match(line)
    if not begin:
        return None
    text = line[begin.end() :]
    end = _closed(text) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    op = text[: text.index("(")]
    text = text[len(op) :]
    end = _closed(text)
    arguments = text[1 : end - 1]
    return _Instruction(
        begin[2],
        tuple(_array(match) for match in _ARRAY.finditer(shape)),
        op,
        tuple(_NAME.findall(arguments)),
        arguments,
        text[end:],
        bool(begin[1]),
    )


def _closed(text: str) -> int:
    """Returns where the bracket that a text begins with is closed."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return at + 1
    raise ValueError(f"a bracket is not closed: {text[:80]}")


def _array(match: re.Match[str]) -> _Array:
    dtype, shape, layout = match.groups()
    space = re.search(r"S\((\d+)\)", layout or "")
    numbers = tuple(int(n) for n in re.findall(r"\d+", shape))
    return _Array(dtype, numbers, int(space[1]) if space else 0)


def _bits(dtype: str) -> int:
    """Returns the width of a type, as XLA names it.

    >>> [_bits(name) for name in ("bf16", "pred", "u32", "f8e4m3fn", "s4", "token")]
    [16, 8, 32, 8, 4, 0]
    """
    if dtype == "pred":
        return 8
    width = re.search(r"\d+", dtype)
    return int(width[0]) if width else 0


def _in_memory(arrays: tuple[_Array, ...]) -> int:
    return sum(array.size for array in arrays if array.space == 0)


def _members(rest: str) -> int | None:
    """Returns how many devices take part in a collective together, None if it doesn't say.

    >>> _members("replica_groups={{0,1,2},{3,4,5}}"), _members("replica_groups=[8,2]<=[16]")
    (3, 2)
    >>> _members("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_1'}")
    2
    """
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    if counted:
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return None
