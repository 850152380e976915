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

JAX promises neither the names of its operations nor those of their params. A rule therefore says
which params it reads and which it may leave aside, and with any others the sum is taken.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from zofl_jax.core import Array
from zofl_jax.directions import jaxprs
from zofl_jax.directions.sums import NARROW, LowRank, Side, Watch, as_array, is_value

_LEFT: Side = "left"
_RIGHT: Side = "right"


def evaluate(fn: Callable[..., Any], *args: Any) -> Any:
    """Returns fn(*args), where leaves of `args` may be `Value`s.

    Args:
      fn: a traceable function of trees of arrays.
      *args: its arguments.

    >>> from zofl_jax.directions.sums import Term
    >>> w = LowRank(jnp.zeros((2, 3)), (Term(jnp.ones((2, 1)), jnp.ones((3, 1)), jnp.ones(1)),),
    ...     ("left", "right"))
    >>> evaluate(lambda w, x: x @ w, w, jnp.ones(2)).tolist()
    [2.0, 2.0, 2.0]
    """
    leaves, treedef = jax.tree.flatten(args, is_leaf=is_value)
    if not any(map(is_value, leaves)):
        return fn(*args)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(_array_like, leaves)]
    program, out = jaxprs.trace(lambda *flat: fn(*jax.tree.unflatten(treedef, flat)), *shapes)
    return jax.tree.unflatten(out, [as_array(x) for x in _run(program, leaves)])


def _array_like(x: Any) -> Any:
    return x if is_value(x) else jnp.asarray(x)


def _run(program: jaxprs.Program, args: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = {}
    env.update(zip(program.jaxpr.constvars, program.consts, strict=True))
    env.update(zip(program.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if jaxprs.is_literal(atom) else env[atom]

    for eqn in program.jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = _by_rule(eqn, inputs) if any(map(is_value, inputs)) else None
        if outputs is None:
            for atom, x in zip(eqn.invars, inputs, strict=True):
                if is_value(x):
                    env[atom] = x.array()  # formed once, however often it is used
            outputs = jaxprs.run_equation(program, eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in program.jaxpr.outvars]


def _by_rule(eqn: jaxprs.Equation, inputs: Sequence[Any]) -> Sequence[Any] | None:
    """Returns the outputs of an equation by its rule, None where the sum is needed."""
    rule = _RULES.get(eqn.primitive.name)
    if rule is None:
        return None
    if not rule.fits(eqn):
        warnings.warn(
            f"jax {jax.__version__} writes {eqn.primitive.name} with params "
            f"({', '.join(eqn.params)}) that this release of zofl_jax does not know: perturbed "
            "params are formed as a whole there, which is right but slower and takes more memory; "
            "a newer zofl_jax may know them",
            stacklevel=2,
        )
        return None
    return rule.apply(eqn, *inputs)


class Rule(NamedTuple):
    """What keeps the structure through one primitive.

    Attributes:
      apply: (equation, inputs) -> outputs, or None where the sum is needed after all.
      reads: params that it needs.
      ignores: params that may be there and make no difference to it; None for any.
    """

    apply: Callable[..., Sequence[Any] | None]
    reads: frozenset[str] = frozenset()
    ignores: frozenset[str] | None = None

    def fits(self, eqn: jaxprs.Equation) -> bool:
        """Returns whether an equation's params are those that the rule was written for."""
        found = set(eqn.params)
        return self.reads <= found and (self.ignores is None or found <= self.reads | self.ignores)


def _inline(eqn: jaxprs.Equation, *inputs: Any) -> list[Any] | None:
    """Runs the one function that an equation calls with its own inputs."""
    called = [program for program in jaxprs.inner(eqn) if program.num_inputs == len(inputs)]
    return _run(called[0], inputs) if len(called) == 1 else None


def _scan(eqn: jaxprs.Equation, *inputs: Any) -> list[Any] | None:
    loop = jaxprs.loop(eqn)
    if loop is None:
        return None
    body, num_consts, num_carry = loop
    consts, xs = inputs[:num_consts], inputs[num_consts + num_carry :]
    carry = [as_array(x) for x in inputs[num_consts : num_consts + num_carry]]
    split = [(x.layers() if is_value(x) else None) for x in xs]
    parts = [cut[0] if cut is not None else as_array(x) for x, cut in zip(xs, split, strict=True)]

    watch = _watch_of(inputs) or Watch()

    def step(carry: list[Array], parts: list[Any]) -> tuple[list[Array], tuple[Any, Any]]:
        whole = [
            cut[1](part) if cut is not None else part
            for part, cut in zip(parts, split, strict=True)
        ]
        with watch.inside() as seen:
            out = [as_array(x) for x in _run(body, [*consts, *carry, *whole])]
        return out[:num_carry], (out[num_carry:], seen)

    carry, (stacked, seen) = lax.scan(
        step,
        carry,
        parts,
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    of_layers = {x.name for x in xs if isinstance(x, LowRank)}
    for name, means in seen.items():
        watch.add(name, means if name in of_layers else means.sum(0))
    return [*carry, *stacked]


def _while(eqn: jaxprs.Equation, *inputs: Any) -> list[Any] | None:
    condition, body = (jaxprs.program_of(eqn.params[f"{x}_jaxpr"]) for x in ("cond", "body"))
    num_carry = len(eqn.outvars)
    first, second = condition.num_inputs - num_carry, body.num_inputs - num_carry
    if min(first, second) < 0 or first + second + num_carry != len(inputs):
        return None
    cond_consts, body_consts = inputs[:first], inputs[first : first + second]
    watch = _watch_of(inputs) or Watch()

    # How often it turns isn't known, so its means are left out.
    def go_on(carry: list[Array]) -> Array:
        with watch.inside():
            return as_array(_run(condition, [*cond_consts, *carry])[0])

    def step(carry: list[Array]) -> list[Array]:
        with watch.inside():
            return [as_array(x) for x in _run(body, [*body_consts, *carry])]

    return lax.while_loop(go_on, step, [as_array(x) for x in inputs[first + second :]])


def _cond(eqn: jaxprs.Equation, index: Array, *operands: Any) -> list[Any] | None:
    programs = jaxprs.inner(eqn)
    if any(program.num_inputs != len(operands) for program in programs):
        return None

    watch = _watch_of(operands)
    if watch is not None:
        return _watched_switch(watch, index, programs, operands)

    def branch(program: jaxprs.Program) -> Callable[[], list[Array]]:
        return lambda: [as_array(x) for x in _run(program, operands)]

    return lax.switch(index, [branch(program) for program in programs])


def _watched_switch(
    watch: Watch, index: Array, programs: Sequence[jaxprs.Program], operands: Sequence[Any]
) -> list[Array]:
    """Runs one of the programs; what another one alone has products with has the mean 0."""

    def branch(program: jaxprs.Program) -> tuple[list[Array], dict[str, Array]]:
        with watch.inside() as seen:
            return [as_array(x) for x in _run(program, operands)], seen

    met: dict[str, Any] = {}
    for program in programs:
        met |= jax.eval_shape(functools.partial(branch, program))[1]

    def with_all(program: jaxprs.Program) -> tuple[list[Array], dict[str, Array]]:
        out, seen = branch(program)
        return out, {name: jnp.zeros(x.shape, x.dtype) for name, x in met.items()} | seen

    out, seen = lax.switch(index, [functools.partial(with_all, program) for program in programs])
    for name, mean in seen.items():
        watch.add(name, mean)
    return out


def _watch_of(inputs: Sequence[Any]) -> Watch | None:
    found = (x.watch for x in inputs if isinstance(x, LowRank) and x.watch is not None)
    return next(found, None)


def _note(w: LowRank, product: Callable[[Array], Array]) -> None:
    """Notes the mean row of X; `product` takes an array like A, of one column, to X A."""
    if w.watch is None:
        return
    a = w.terms[0].a
    rows = jax.eval_shape(product, a)
    (mean,) = jax.linear_transpose(product, a)(jnp.full(rows.shape, 1 / rows.size, rows.dtype))
    w.watch.add(w.name, mean[..., 0])


def _elementwise(eqn: jaxprs.Equation, x: Any) -> list[Any] | None:
    if not isinstance(x, LowRank):
        return None
    return [x.map(lambda part: eqn.primitive.bind(part, **eqn.params))]


def _convert(eqn: jaxprs.Equation, x: Any) -> list[Any]:
    dtype = eqn.params["new_dtype"]
    if isinstance(x, LowRank) and jnp.issubdtype(dtype, jnp.floating):
        return [x.map(lambda part: part.astype(dtype))]
    return [as_array(x).astype(dtype)]


def _transpose(eqn: jaxprs.Equation, x: Any) -> list[Any] | None:
    if not isinstance(x, LowRank):
        return None
    order = eqn.params["permutation"]

    def factor(part: Array, own: list[int]) -> Array:
        return part.transpose(*[own.index(i) for i in order if i in own], part.ndim - 1)

    return [x.rearranged(x.base.transpose(order), tuple(x.sides[i] for i in order), factor)]


def _reshape(eqn: jaxprs.Equation, x: Any) -> list[Any] | None:
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


def _gather(eqn: jaxprs.Equation, x: Any, indices: Any) -> list[Any] | None:
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


def _dot(eqn: jaxprs.Equation, x: Any, y: Any) -> list[Any] | None:
    """Returns x·W + Σ_t ((x·A_t) c_t) B_tᵀ, where whole sides are contracted."""
    (x_axes, y_axes), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    if x_batch or y_batch or (is_value(x) and is_value(y)):
        return None
    if eqn.params.get("out_sharding") is not None:  # which is the whole product's, not a factor's
        return None
    params = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}
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


def _convolution(eqn: jaxprs.Equation, x: Any, kernel: Any) -> list[Any] | None:
    """Returns x * W + Σ_t ((x * A_t) c_t) B_tᵀ for kernels whose features are the right side.

    What is narrow is added so, for the price of a few features more; where the columns together are
    as many as the features or more, as in clients' own models after some steps, the kernel is
    formed of them, which is small.
    """
    if not isinstance(kernel, LowRank) or is_value(x):
        return None
    numbers = eqn.params["dimension_numbers"]
    features = numbers.rhs_spec[0]
    plain = eqn.params["feature_group_count"] == eqn.params["batch_group_count"] == 1
    plain = plain and eqn.params.get("out_sharding") is None
    if not plain or kernel.axes(_RIGHT) != [features] or features != kernel.base.ndim - 1:
        return None
    _note(kernel, lambda a: eqn.primitive.bind(x, a, **eqn.params))
    terms = () if kernel.watch else kernel.terms
    narrow = [term for term in terms if term.c.size <= NARROW]
    wide = tuple(term for term in terms if term.c.size > NARROW)
    base = kernel.replace(terms=wide).array() if wide else kernel.base
    total = eqn.primitive.bind(x, base, **eqn.params)
    out_features = numbers.out_spec[1]
    for term in narrow:
        low = eqn.primitive.bind(x, term.a, **eqn.params)
        low = jnp.moveaxis(low, out_features, -1) * term.c.astype(low.dtype)
        for r in range(term.c.size):
            column = low[..., r, None] * term.b[:, r].astype(low.dtype)
            total = total + jnp.moveaxis(column, -1, out_features).astype(total.dtype)
    return [total]


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

    if used == _LEFT:
        _note(w, lambda a: dot(x, a, ((tuple(x_axes), tuple(in_factor)), ((), ()))))
    narrow: list[tuple[Array, Array]] = []
    wide: list[tuple[Array, Array]] = []
    for term in () if w.watch else w.terms:
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


def _rule(
    apply: Callable[..., Sequence[Any] | None], reads: str = "", ignores: str | None = ""
) -> Rule:
    return Rule(
        apply,
        frozenset(reads.split()),
        None if ignores is None else frozenset(ignores.split()),
    )


_CALL = _rule(_inline, ignores=None)

_RULES: dict[str, Rule] = {
    "jit": _CALL,
    "closed_call": _CALL,
    "checkpoint": _CALL,
    "remat2": _CALL,
    "custom_jvp_call": _CALL,
    "custom_vjp_call": _CALL,
    "scan": _rule(
        _scan,
        "jaxpr length reverse unroll",
        # The first four say in words of one release or another what the shapes say.
        "num_consts num_carry ft_in ft_out linear _split_transpose",
    ),
    "while": _rule(_while, "cond_jaxpr body_jaxpr", "cond_nconsts body_nconsts"),
    "cond": _rule(_cond, "branches"),
    "copy": _rule(_elementwise),
    "convert_element_type": _rule(_convert, "new_dtype", "weak_type sharding"),
    "transpose": _rule(_transpose, "permutation"),
    "reshape": _rule(_reshape, "new_sizes", "dimensions sharding"),
    "gather": _rule(_gather, "dimension_numbers slice_sizes", None),
    "conv_general_dilated": _rule(
        _convolution,
        "dimension_numbers feature_group_count batch_group_count window_strides padding "
        "lhs_dilation rhs_dilation precision preferred_element_type",
        "out_sharding",
    ),
    "dot_general": _rule(
        _dot, "dimension_numbers precision preferred_element_type", "out_sharding"
    ),
}
