"""FLOPs of a traced program, its loops multiplied out.

A product of [m, k] and [k, n] is 2 m k n FLOPs, a convolution likewise. All other operations are
counted apart, as the numbers that they make: they run on other units, for whose rate makers give no
figure.
"""

import math
from typing import Any, NamedTuple

from zofl_jax.directions import jaxprs

_MOVES = {
    *(
        "reshape",
        "broadcast_in_dim",
        "transpose",
        "squeeze",
        "slice",
        "concatenate",
        "copy",
        "iota",
    ),
    *("dynamic_slice", "dynamic_update_slice", "gather", "convert_element_type", "rev", "pad"),
    *("expand_dims", "sharding_constraint", "optimization_barrier", "psum", "axis_index"),
}
"""Primitives that compute no numbers."""


class Costs(NamedTuple):
    """What a round computes.

    Attributes:
      products: FLOPs of products and convolutions of all devices, what each group does counted.
      products_each: the same of one device.
      others: numbers made by other operations on one device.
      notes: what could not be read, so that a figure is a lower bound.
    """

    products: int
    products_each: int
    others: int
    notes: tuple[str, ...]


class _Count(NamedTuple):
    """FLOPs and numbers, done once for all groups, and by one group of devices for its clients."""

    shared: int = 0
    grouped: int = 0
    shared_others: int = 0
    grouped_others: int = 0

    def plus(self, other: "_Count", times: int = 1) -> "_Count":
        return _Count(*(a + times * b for a, b in zip(self, other, strict=True)))

    def by_a_group(self) -> "_Count":
        return _Count(
            grouped=self.shared + self.grouped,
            grouped_others=self.shared_others + self.grouped_others,
        )


def of(program: jaxprs.Program, groups: int = 1, split: int = 1) -> Costs:
    """Returns what a program computes whose outermost loop has rounds as turns, once.

    Args:
      program: as `jaxprs.trace` gives it.
      groups: devices, or groups of them, that clients are shared out over by `shard_map`. What is
        outside of it each does for itself.
      split: devices of a group, which share the products.

    >>> import jax, jax.numpy as jnp
    >>> layers = jnp.ones((5, 8, 8))
    >>> def deep(x):
    ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, layers)[0]
    >>> program, _ = jaxprs.trace(deep, jnp.ones((4, 8)))
    >>> of(program).products == 5 * 2 * 4 * 8 * 8
    True
    """
    notes: set[str] = set()
    found = _count(program, notes, in_loop=False)
    return Costs(
        products=groups * (found.shared + found.grouped),
        products_each=(found.shared + found.grouped) // split,
        others=(found.shared_others + found.grouped_others) // split,
        notes=tuple(sorted(notes)),
    )


def _count(program: jaxprs.Program, notes: set[str], in_loop: bool) -> _Count:
    total = _Count()
    for equation in program.jaxpr.eqns:
        total = total.plus(_of_equation(equation, notes, in_loop))
    return total


def _of_equation(equation: jaxprs.Equation, notes: set[str], in_loop: bool) -> _Count:
    name = equation.primitive.name
    inner = jaxprs.inner(equation)
    if name == "scan":
        turns = jaxprs.turns(equation)
        body = _count(inner[0], notes, in_loop)
        if turns is None:
            notes.add("the turns of a scan can't be read")
        return _Count().plus(body, turns or 1)
    if name == "while":
        found = _Count()
        for part in inner:
            found = found.plus(_count(part, notes, True))
        if in_loop and found.shared + found.grouped:
            notes.add("products in a loop without a fixed number of turns are counted once")
        return found
    if name == "cond":
        branches = [_count(part, notes, in_loop) for part in inner]
        return max(branches, key=lambda c: (c.shared + c.grouped, c.shared_others))
    if name == "shard_map":
        return _count(inner[0], notes, in_loop).by_a_group()
    if inner:
        total = _Count()
        for part in inner:
            total = total.plus(_count(part, notes, in_loop))
        return total
    made = sum(math.prod(v.aval.shape) for v in equation.outvars)
    if name in ("dot_general", "conv_general_dilated", "zofl_convolution"):
        flops = _of_product(equation, name)
        if flops is None:
            notes.add(f"the params of {name} can't be read")
        return _Count(shared=flops or 0)
    return _Count() if name in _MOVES else _Count(shared_others=made)


def _of_product(equation: Any, name: str) -> int | None:
    """Returns the FLOPs of a product or a convolution, None where its params can't be read."""
    left, right = (v.aval.shape for v in equation.invars[:2])
    made = math.prod(equation.outvars[0].aval.shape)
    try:
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            return 2 * made * math.prod(left[axis] for axis in contracted)
        if name == "zofl_convolution":  # kernels are [height, width, in, out]
            return 2 * made * math.prod(right[:-1])
        out_axis = equation.params["dimension_numbers"].rhs_spec[0]
        return 2 * made * math.prod(right) // max(right[out_axis], 1)
    except (KeyError, AttributeError, TypeError, ValueError):
        return None
