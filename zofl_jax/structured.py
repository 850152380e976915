"""Evaluates unchanged functions on params that are sums, without forming the sums.

    loss = structured.evaluate(loss_fn, params, batch)

Leaves of `params` may be values that stand for arrays:

    LowRank    W + Σ_t A_t diag(c_t) B_tᵀ: x W + Σ_t ((x A_t) c_t) B_tᵀ in matrix products,
               W[i] + ... in look-ups, a layer at a time in scans over stacked layers
    Drawn      W + μ z with z drawn from a key: in a scan only one layer's sum is alive

The function is traced to a jaxpr with arrays in their place, and the jaxpr is run operation
by operation: those with a rule below keep the structure, all others get the sum. So any
function gives the right result, and those made of matrix products give it fast. Under a
`vmap` over clients and directions W stays one matrix, read once for all of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax

from zofl_jax.core import Array
from zofl_jax.sums import NARROW, LowRank, Side, as_array, is_value

_LEFT: Side = "left"
_RIGHT: Side = "right"


def evaluate(fn: Callable[..., Any], *args: Any) -> Any:
    """Returns fn(*args), where leaves of `args` may be `Value`s.

    Args:
      fn: a traceable function of trees of arrays.
      *args: its arguments.

    >>> from zofl_jax.sums import Term
    >>> w = LowRank(jnp.zeros((2, 3)), (Term(jnp.ones((2, 1)), jnp.ones((3, 1)), jnp.ones(1)),),
    ...     ("left", "right"))
    >>> evaluate(lambda w, x: x @ w, w, jnp.ones(2)).tolist()
    [2.0, 2.0, 2.0]
    """
    leaves, treedef = jax.tree.flatten(args, is_leaf=is_value)
    if not any(map(is_value, leaves)):
        return fn(*args)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(_array_like, leaves)]
    closed, out = jax.make_jaxpr(
        lambda *flat: fn(*jax.tree.unflatten(treedef, flat)), return_shape=True
    )(*shapes)
    results = _run(closed.jaxpr, closed.consts, leaves)
    return jax.tree.unflatten(jax.tree.structure(out), [as_array(x) for x in results])


def _array_like(x: Any) -> Any:
    return x if is_value(x) else jnp.asarray(x)


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = {}
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jax.extend.core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = None
        if any(map(is_value, inputs)):
            rule = _RULES.get(eqn.primitive.name)
            outputs = rule(eqn, *inputs) if rule else None
            if outputs is None:
                for atom, x in zip(eqn.invars, inputs, strict=True):
                    if is_value(x):
                        env[atom] = x.array()  # formed once, however often it is used
                inputs = [read(atom) for atom in eqn.invars]
        if outputs is None:
            outputs = _bind(jaxpr, eqn, inputs)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(around: Any, eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """Returns what an equation of a jaxpr computes from arrays: it is run as a jaxpr alone."""
    given = {
        atom: x
        for atom, x in zip(eqn.invars, inputs, strict=True)
        if not isinstance(atom, jax.extend.core.Literal)
    }
    alone = around.replace(
        constvars=(), invars=list(given), outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects
    )
    return jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(alone, ()))(*given.values())


# Rules: (equation, inputs) -> outputs, or None where the sum is needed after all.


def _inline(eqn: Any, *inputs: Any) -> list[Any]:
    inner = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr") if name in eqn.params)
    jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
    return _run(jaxpr, consts, inputs)


def _scan(eqn: Any, *inputs: Any) -> list[Any]:
    params = eqn.params
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, xs = inputs[:num_consts], inputs[num_consts + num_carry :]
    carry = [as_array(x) for x in inputs[num_consts : num_consts + num_carry]]
    body = params["jaxpr"]
    split = [(x.layers() if is_value(x) else None) for x in xs]
    parts = [cut[0] if cut is not None else as_array(x) for x, cut in zip(xs, split, strict=True)]

    def step(carry: list[Array], parts: list[Any]) -> tuple[list[Array], list[Array]]:
        whole = [
            cut[1](part) if cut is not None else part
            for part, cut in zip(parts, split, strict=True)
        ]
        out = [as_array(x) for x in _run(body.jaxpr, body.consts, [*consts, *carry, *whole])]
        return out[:num_carry], out[num_carry:]

    carry, stacked = lax.scan(
        step,
        carry,
        parts,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]


def _while(eqn: Any, *inputs: Any) -> list[Any]:
    params = eqn.params
    first, second = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = inputs[:first], inputs[first : first + second]
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]

    def go_on(carry: list[Array]) -> Array:
        return as_array(_run(condition.jaxpr, condition.consts, [*cond_consts, *carry])[0])

    def step(carry: list[Array]) -> list[Array]:
        out = _run(body.jaxpr, body.consts, [*body_consts, *carry])
        return [as_array(x) for x in out]

    return lax.while_loop(go_on, step, [as_array(x) for x in inputs[first + second :]])


def _cond(eqn: Any, index: Array, *operands: Any) -> list[Any]:
    def branch(closed: Any) -> Callable[[], list[Array]]:
        def evaluate() -> list[Array]:
            return [as_array(x) for x in _run(closed.jaxpr, closed.consts, operands)]

        return evaluate

    return lax.switch(index, [branch(closed) for closed in eqn.params["branches"]])


def _elementwise(eqn: Any, x: Any) -> list[Any] | None:
    if not isinstance(x, LowRank):
        return None
    return [x.map(lambda part: eqn.primitive.bind(part, **eqn.params))]


def _convert(eqn: Any, x: Any) -> list[Any]:
    dtype = eqn.params["new_dtype"]
    if isinstance(x, LowRank) and jnp.issubdtype(dtype, jnp.floating):
        return [x.map(lambda part: part.astype(dtype))]
    return [as_array(x).astype(dtype)]


def _transpose(eqn: Any, x: Any) -> list[Any] | None:
    if not isinstance(x, LowRank):
        return None
    order = eqn.params["permutation"]

    def factor(part: Array, own: list[int]) -> Array:
        return part.transpose(*[own.index(i) for i in order if i in own], part.ndim - 1)

    return [x.rearranged(x.base.transpose(order), tuple(x.sides[i] for i in order), factor)]


def _reshape(eqn: Any, x: Any) -> list[Any] | None:
    """Merges or splits axes of one side each, such as a kernel [h, w, C, F] into [h w C, F]."""
    if not isinstance(x, LowRank) or eqn.params.get("dimensions") is not None:
        return None
    new = eqn.params["new_sizes"]
    sides = _reshaped_sides(x.shape, x.sides, new)
    if sides is None:
        return None

    def factor(part: Array, own: list[int]) -> Array:
        there = {x.sides[i] for i in own}
        kept = [size for size, side in zip(new, sides, strict=True) if side in there]
        return part.reshape(*kept, part.shape[-1])

    return [x.rearranged(x.base.reshape(new), sides, factor)]


def _reshaped_sides(
    old: Sequence[int], sides: Sequence[Side], new: Sequence[int]
) -> tuple[Side, ...] | None:
    """Returns the sides of the new axes; None if one would mix two sides."""
    result: list[Side] = []
    i = j = 0
    while i < len(old) or j < len(new):
        # The shortest runs of old and of new axes with the same product.
        run_old, run_new = list(old[i : i + 1]), list(new[j : j + 1])
        while math.prod(run_old) != math.prod(run_new):
            if math.prod(run_old) < math.prod(run_new):
                run_old.append(old[i + len(run_old)])
            else:
                run_new.append(new[j + len(run_new)])
        kinds = set(sides[i : i + len(run_old)])
        if len(kinds) != 1:
            return None
        result += [*kinds] * len(run_new)
        i, j = i + len(run_old), j + len(run_new)
    return tuple(result)


def _gather(eqn: Any, x: Any, indices: Any) -> list[Any] | None:
    """Looks up rows of a table [rows, features]."""
    if not isinstance(x, LowRank) or is_value(indices):
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    out_ndim = indices.ndim
    sides: tuple[Side, ...] = (*[_LEFT] * (out_ndim - 1), _RIGHT)
    plain = (
        x.sides == ("left", "right")
        and numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and numbers.offset_dims == (out_ndim - 1,)
        and sizes == (1, x.shape[1])
    )
    if not plain:
        return None
    rest = {k: v for k, v in eqn.params.items() if k != "slice_sizes"}

    def rows(part: Array) -> Array:
        return eqn.primitive.bind(part, indices, slice_sizes=(1, part.shape[1]), **rest)

    terms = tuple(term.replace(a=rows(term.a)) for term in x.terms)
    return [LowRank(rows(x.base), terms, sides)]


def _dot(eqn: Any, x: Any, y: Any) -> list[Any] | None:
    """Returns x·W + Σ_t ((x·A_t) c_t) B_tᵀ, where whole sides are contracted."""
    (x_axes, y_axes), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    if x_batch or y_batch or (is_value(x) and is_value(y)):
        return None
    params = {k: v for k, v in eqn.params.items() if k != "dimension_numbers"}
    if not isinstance(y, LowRank):
        if not isinstance(x, LowRank):
            return None
        out = _contract(y, y_axes, x, x_axes, params)
        if out is None:
            return None
        # The free axes of x come first.
        free = out.ndim - (x.base.ndim - len(x_axes))
        return [jnp.moveaxis(out, range(free), range(-free, 0)) if free else out]
    out = _contract(x, x_axes, y, y_axes, params)
    return None if out is None else [out]


def _contract(
    x: Array, x_axes: Sequence[int], w: LowRank, w_axes: Sequence[int], params: dict[str, Any]
) -> Array | None:
    """Returns the product, [free axes of x, free axes of w]; None if no side is used up."""
    if w.axes("stack"):
        return None
    used = next((side for side in (_LEFT, _RIGHT) if sorted(w_axes) == w.axes(side)), None)
    if used is None:
        return None
    own = w.axes(used)
    in_factor = [own.index(axis) for axis in w_axes]

    def dot(x: Array, y: Array, dims: Any) -> Array:
        return lax.dot_general(x, y, dimension_numbers=dims, **params)

    narrow: list[tuple[Array, Array]] = []
    wide: list[tuple[Array, Array]] = []
    for term in w.terms:
        inner, outer = (term.a, term.b) if used == _LEFT else (term.b, term.a)
        low = dot(x, inner, ((tuple(x_axes), tuple(in_factor)), ((), ())))
        low = low * term.c.astype(low.dtype)
        (narrow if term.c.size <= NARROW else wide).append((low, outer))
    if wide and (len(x_axes), tuple(x_axes), w.base.ndim) == (1, (x.ndim - 1,), 2):
        # Side by side with W: one product, and nothing of the result's size to add.
        rows = [x, *(low.astype(x.dtype) for low, _ in wide)]
        base = w.base if w_axes[0] == 0 else w.base.T
        columns = [base, *(outer.T.astype(base.dtype) for _, outer in wide)]
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        total = dot(jnp.concatenate(rows, -1), jnp.concatenate(columns, 0), dims)
    else:
        total = dot(x, w.base, ((tuple(x_axes), tuple(w_axes)), ((), ())))
        for low, outer in wide:
            dims = (((low.ndim - 1,), (outer.ndim - 1,)), ((), ()))
            total = total + dot(low, outer.astype(low.dtype), dims).astype(total.dtype)
    for low, outer in narrow:
        for r in range(low.shape[-1]):
            column = low[(..., r, *[None] * (outer.ndim - 1))]
            total = total + (column * outer[..., r].astype(low.dtype)).astype(total.dtype)
    return total


_RULES: dict[str, Callable[..., Sequence[Any] | None]] = {
    "jit": _inline,
    "closed_call": _inline,
    "checkpoint": _inline,
    "remat2": _inline,
    "custom_jvp_call": _inline,
    "custom_vjp_call": _inline,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "copy": _elementwise,
    "convert_element_type": _convert,
    "transpose": _transpose,
    "reshape": _reshape,
    "gather": _gather,
    "dot_general": _dot,
}
