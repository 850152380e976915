"""All that the library asks of a traced function, in one place.

JAX documents that a jaxpr has variables, constants and equations, that an equation has inputs,
outputs, a primitive and params, and what `jax.extend.core` offers for them. What the params of
its own primitives are called it doesn't: they change from release to release. So what the library
needs is read off the shapes of the variables, and what can't be read is said to be unknown.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core

Equation = Any
"""A `jax.extend.core.JaxprEqn`."""


class Program(NamedTuple):
    """A traced function of flat arguments, with the arrays it closes over apart."""

    jaxpr: Any  # a `jax.extend.core.Jaxpr`
    consts: Sequence[Any]

    @property
    def num_inputs(self) -> int:
        """Its arguments, without what it closes over."""
        return len(self.jaxpr.invars)


class Loop(NamedTuple):
    """How the inputs of a `lax.scan` are shared out: constants, carry, what is scanned."""

    body: Program
    num_consts: int
    num_carry: int


def trace(fn: Callable[..., Any], *args: Any) -> tuple[Program, Any]:
    """Returns a function as a program of its arguments' leaves, and its result's structure.

    Args:
      fn: a traceable function.
      *args: trees of arrays, or of their shapes.
    """
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    return program_of(closed), jax.tree.structure(out)


def run(program: Program, args: Sequence[Any]) -> list[Any]:
    """Returns what a program computes from arrays.

    >>> program, _ = trace(lambda x, y: (x + y, x), 1.0, 2.0)
    >>> [float(x) for x in run(program, (3.0, 4.0))]
    [7.0, 3.0]
    """
    closed = jax.extend.core.ClosedJaxpr(program.jaxpr, program.consts)
    return jax.extend.core.jaxpr_as_fun(closed)(*args)


def results(program: Program) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of what a program computes.

    >>> results(trace(lambda x: (x > 0, x), 1.0)[0])
    [ShapeDtypeStruct(shape=(), dtype=bool), ShapeDtypeStruct(shape=(), dtype=float32)]
    """
    avals = [variable.aval for variable in program.jaxpr.outvars]
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]


def run_equation(around: Program, equation: Equation, inputs: Sequence[Any]) -> list[Any]:
    """Returns what one equation of a program computes from arrays: it is run as one alone."""
    pairs = zip(equation.invars, inputs, strict=True)
    given = {atom: x for atom, x in pairs if not is_literal(atom)}
    alone = around.jaxpr.replace(
        constvars=(),
        invars=list(given),
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
    )
    return run(Program(alone, ()), list(given.values()))


def program_of(found: Any) -> Program:
    """Returns a jaxpr, with its constants or without, as a program.

    Until jax 0.10 the two kinds are two classes, since 0.11 they are one.
    """
    return Program(getattr(found, "jaxpr", found), getattr(found, "consts", ()))


def is_literal(atom: Any) -> bool:
    """Returns whether an input of an equation is a number in place of a variable."""
    return isinstance(atom, jax.extend.core.Literal)


def inner(equation: Equation) -> list[Program]:
    """Returns the programs that are params of an equation, such as the body of a loop.

    >>> program, _ = trace(lambda x: jax.lax.cond(x > 0, jax.numpy.sin, jax.numpy.cos, x), 1.0)
    >>> [[i.primitive.name for i in p.jaxpr.eqns] for p in inner(program.jaxpr.eqns[-1])]
    [['cos'], ['sin']]
    """
    kinds = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)
    leaves = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda value: isinstance(value, kinds)
    )
    return [program_of(leaf) for leaf in leaves if isinstance(leaf, kinds)]


def loop(equation: Equation) -> Loop | None:
    """Returns how the inputs of a scan are shared out, None if that can't be read.

    A scanned input has one axis more than the body's, and so has a stacked output; the outputs
    that are left are the carry, and the inputs that are left the constants and the carry.

    >>> def fn(w, x):
    ...     return jax.lax.scan(lambda x, row: (x * row + w[0], x), x, w)
    >>> program, _ = trace(fn, jax.numpy.ones(3), 1.0)
    >>> loop(program.jaxpr.eqns[-1])[1:]
    (1, 1)
    """
    bodies = inner(equation)
    if len(bodies) != 1:
        return None
    body = bodies[0]
    inside, outside = body.jaxpr, equation
    num_scanned = _num_with_an_axis_more(outside.invars, inside.invars)
    num_stacked = _num_with_an_axis_more(outside.outvars, inside.outvars)
    if num_scanned is None or num_stacked is None:
        return None
    num_carry = len(outside.outvars) - num_stacked
    num_consts = len(outside.invars) - num_scanned - num_carry
    if num_consts < 0:
        return None
    into = [v.aval.shape for v in inside.invars[num_consts : num_consts + num_carry]]
    out = [v.aval.shape for v in inside.outvars[:num_carry]]
    return Loop(body, num_consts, num_carry) if into == out else None


def turns(equation: Equation) -> int | None:
    """Returns how often the body of a scan is run, None if that can't be read.

    It is the size of the axis that scanned inputs and stacked outputs have more than the body's;
    where there are none, a param of the primitive.

    >>> program, _ = trace(lambda x: jax.lax.scan(lambda x, _: (x + 1, x), x, length=3), 1.0)
    >>> turns(program.jaxpr.eqns[-1])
    3
    """
    bodies = inner(equation)
    if len(bodies) != 1:
        return None
    body = bodies[0].jaxpr
    for outside, inside in ((equation.invars, body.invars), (equation.outvars, body.outvars)):
        for out, within in zip(outside, inside, strict=False):
            if len(out.aval.shape) == len(within.aval.shape) + 1:
                return out.aval.shape[0]
    said = equation.params.get("length")
    return said if isinstance(said, int) else None


def _num_with_an_axis_more(outside: Sequence[Any], inside: Sequence[Any]) -> int | None:
    """Returns how many of the last variables have one axis more outside, None if others have."""
    if len(outside) != len(inside):
        return None
    more = [
        len(out.aval.shape) - len(within.aval.shape)
        for out, within in zip(outside, inside, strict=True)
    ]
    count = sum(more)
    return count if more == [0] * (len(more) - count) + [1] * count else None
