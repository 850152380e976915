"""Values that stand for arrays: sums of params and directions that need not be formed.

    LowRank    W + Σ_t A_t diag(c_t) B_tᵀ
    Drawn      W + μ z with z drawn from a key

`structured.py` evaluates functions of them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from zofl_jax import keys, platforms
from zofl_jax.core import Array, PRNGKey

Side = Literal["stack", "left", "right"]
"""Where an axis of a low-rank value comes from: both factors, A or B."""

NARROW = 4
"""Up to this many columns a term is added to a product column by column, fused into it.

On 2 cores, of x W alone, x [3840, 576], W [576, 1536]: one column a direction 1.00; 20 columns
side by side with W 1.08, column by column 1.21; a product of their own 2.2.
"""

FORMED = 8
"""Up to this many columns A Bᵀ itself is formed column by column, fused into what takes it.

An update of 10 matrices [576, 1536] by 5 columns takes 11 ms and no memory; as a product it is
stored first, 150 ms where the memory is fresh. With 20 columns the product is faster.
"""

BLOCK = 2**20
"""The most numbers drawn at once: what a generator needs in between is a multiple of it."""


class Value:
    """A sum that stands for the array it would be."""

    base: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Of the array."""
        return self.base.dtype

    def array(self) -> Array:
        """Returns the array."""
        raise NotImplementedError

    def layers(self) -> tuple[Any, Callable[[Any], Any]] | None:
        """Returns (arrays [L, ...], part of them -> value of one layer); None if unstacked."""
        raise NotImplementedError


class Term(struct.PyTreeNode):
    """A diag(c) Bᵀ."""

    a: Array  # [stack..., left..., R]
    b: Array  # [stack..., right..., R]
    c: Array  # [R]


class Watch:
    """The mean rows of X in products X W, by the names of the W that are watched.

    Where a W has several products, as in a loop, their means are added.
    """

    def __init__(self) -> None:
        self.seen: dict[str, Array] = {}

    def add(self, name: str, mean: Array) -> None:
        """Notes what a product has."""
        self.seen[name] = self.seen[name] + mean if name in self.seen else mean

    @contextlib.contextmanager
    def inside(self) -> Iterator[dict[str, Array]]:
        """Notes apart what is in a part of the function that is traced on its own."""
        outside, self.seen = self.seen, {}
        try:
            yield self.seen
        finally:
            self.seen = outside


class LowRank(Value, struct.PyTreeNode):
    """W + Σ_t A_t diag(c_t) B_tᵀ.

    With a `watch` it is W alone: of its one term only the shape of A is read.
    """

    base: Array
    terms: tuple[Term, ...]
    sides: tuple[Side, ...] = struct.field(pytree_node=False)  # of each axis of the base
    watch: Watch | None = struct.field(pytree_node=False, default=None)
    name: str = struct.field(pytree_node=False, default="")  # that the watch knows

    def array(self) -> Array:
        """Returns the sum."""
        total = self.base
        for term in self.terms:
            total = total + self._product(term)
        return total

    def layers(self) -> tuple[Any, Callable[[Any], "LowRank"]] | None:
        """Returns the parts that a scan over the first axis takes, and how they go together."""
        if self.sides[0] != "stack":
            return None
        scales = [term.c for term in self.terms]

        def one(parts: Any) -> LowRank:
            base, factors = parts
            terms = (Term(a, b, c) for (a, b), c in zip(factors, scales, strict=True))
            return self.replace(base=base, terms=tuple(terms), sides=self.sides[1:])

        return (self.base, [(term.a, term.b) for term in self.terms]), one

    def axes(self, *sides: Side) -> list[int]:
        """Returns which axes of the base come from these sides."""
        return [i for i, side in enumerate(self.sides) if side in sides]

    def rearranged(
        self, base: Array, sides: tuple[Side, ...], factor: Callable[[Array, list[int]], Array]
    ) -> "LowRank":
        """Returns the value with other axes.

        Args:
          base: with them.
          sides: of its axes.
          factor: (A or B, which axes of the old base it has) -> the same with other axes.
        """
        left, right = self.axes("stack", "left"), self.axes("stack", "right")
        terms = (t.replace(a=factor(t.a, left), b=factor(t.b, right)) for t in self.terms)
        return self.replace(base=base, terms=tuple(terms), sides=sides)

    def map(self, fn: Callable[[Array], Array]) -> "LowRank":
        """Returns the value with `fn` applied to base, A and B."""
        return self.replace(
            base=fn(self.base),
            terms=tuple(term.replace(a=fn(term.a), b=fn(term.b)) for term in self.terms),
        )

    def _product(self, term: Term) -> Array:
        stack, left, right = (self.axes(side) for side in ("stack", "left", "right"))
        if term.c.size <= FORMED:
            a = _spread(term.a * term.c.astype(term.a.dtype), self.sides, ("stack", "left"))
            b = _spread(term.b, self.sides, ("stack", "right"))
            total = jnp.zeros(self.shape, self.dtype)
            for r in range(term.c.size):
                total = total + (a[..., r] * b[..., r]).astype(self.dtype)
            return total
        size = len(stack)
        dims = (
            ((term.a.ndim - 1,), (term.b.ndim - 1,)),
            (tuple(range(size)), tuple(range(size))),
        )
        product = lax.dot_general(term.a * term.c.astype(term.a.dtype), term.b, dims)
        order = [*stack, *left, *right]
        back = [order.index(i) for i in range(len(order))]
        return product.transpose(back).astype(self.dtype)


class Factors(struct.PyTreeNode):
    """A Bᵀ / √R, a direction; its axes stand in the order of the sides."""

    a: Array  # [stack..., left..., R]
    b: Array  # [stack..., right..., R]
    sides: tuple[Side, ...] = struct.field(pytree_node=False)

    def plus(self, base: Any, scale: Array | float) -> LowRank:
        """Returns base + scale · this, for an array or a low-rank value."""
        rank = self.a.shape[-1]
        wide = jnp.promote_types(self.a.dtype, jnp.float32)
        return self.combined(base, jnp.full(rank, scale / math.sqrt(rank), wide))

    def combined(self, base: Any, scales: Array) -> LowRank:
        """Returns base + A diag(scales) Bᵀ."""
        terms = base.terms if isinstance(base, LowRank) else ()
        array = base.base if isinstance(base, LowRank) else base
        return LowRank(array, (*terms, Term(self.a, self.b, scales)), self.sides)

    def array(self) -> Array:
        """Returns the direction."""
        shape = (*self.a.shape[:-1], self.b.shape[-2])
        return self.plus(jnp.zeros(shape, self.a.dtype), 1.0).array()

    def inner(self, gradient: Array) -> Array:
        """Returns ⟨gradient, direction⟩, []."""
        if self.sides[0] == "stack":
            part = self.replace(sides=self.sides[1:])
            return jnp.sum(
                jax.vmap(lambda a, b, g: part.replace(a=a, b=b).inner(g))(self.a, self.b, gradient)
            )
        projected = gradient @ self.b
        return jnp.sum(projected * self.a) / math.sqrt(self.a.shape[-1])


class Seeded(struct.PyTreeNode):
    """A direction that is drawn from its key where it is needed."""

    key: PRNGKey
    draw: Callable[..., Array] = struct.field(pytree_node=False)  # (key, shape, dtype) -> z
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    dtype: Any = struct.field(pytree_node=False)
    stacked: bool = struct.field(pytree_node=False)  # layer l draws from block_key(key, l)

    def array(self) -> Array:
        """Returns the direction, drawn in blocks."""
        return in_blocks(
            lambda key, shape: self.draw(key, shape, self.dtype), self.key, self.shape, self.stacked
        )


class Drawn(Value, struct.PyTreeNode):
    """W + μ z."""

    base: Array
    direction: Seeded
    scale: Array  # []

    def array(self) -> Array:
        """Returns the sum."""
        return self.base + jnp.asarray(self.scale, self.dtype) * self.direction.array()

    def layers(self) -> tuple[Any, Callable[[Any], "Drawn"]] | None:
        """Returns the parts that a scan over the first axis takes, and how they go together."""
        if not self.direction.stacked:
            return None

        def one(parts: Any) -> Drawn:
            base, layer = parts
            key = keys.block_key(self.direction.key, layer)
            direction = self.direction.replace(key=key, shape=self.shape[1:], stacked=False)
            return Drawn(base, direction, self.scale)

        return (self.base, jnp.arange(self.shape[0], dtype=jnp.uint32)), one


def in_blocks(
    fn: Callable[[PRNGKey, tuple[int, ...]], Array],
    leaf_keys: PRNGKey,
    shape: tuple[int, ...],
    stacked: bool,
) -> Array:
    """Returns an array [*shape] made in blocks of at most about `BLOCK` numbers.

    Args:
      fn: (keys, shape of a block) -> the block; elementwise but for its random numbers.
      leaf_keys: of the leaf, [] or of several directions, [P]; a block has keys of its own.
      shape: of the leaf.
      stacked: whether the first axis is one of layers, each a block or more.
    """
    blocks = shape[0] if stacked else _num_blocks(shape)
    if blocks == 1 and not stacked:
        return fn(leaf_keys, shape)
    part = shape[1:] if stacked else (shape[0] // blocks, *shape[1:])

    def block(i: Array) -> Array:
        derive = keys.block_key if leaf_keys.ndim == 0 else jax.vmap(keys.block_key, (0, None))
        return in_blocks(fn, derive(leaf_keys, i), part, False)

    if math.prod(shape) <= BLOCK or not platforms.current().cached:
        return jax.vmap(block)(jnp.arange(blocks, dtype=jnp.uint32)).reshape(shape)
    made = jax.eval_shape(block, jnp.zeros((), jnp.uint32))
    # Filled with a word of the leaf's own, to be overwritten: leaves of one shape would start from
    # the same zeros, which XLA makes once, keeps and copies.
    word = jax.random.key_data(leaf_keys).reshape(-1)[0]
    return lax.fori_loop(
        0,
        blocks,
        lambda i, out: lax.dynamic_update_index_in_dim(out, block(i.astype(jnp.uint32)), i, 0),
        jnp.full((blocks, *made.shape), word, made.dtype),
    ).reshape(shape)


def _num_blocks(shape: tuple[int, ...]) -> int:
    """Returns the least number of equal blocks of the first axis that keeps to `BLOCK`."""
    size = math.prod(shape)
    if size <= BLOCK:
        return 1
    candidates = (n for n in range(1, shape[0] + 1) if shape[0] % n == 0)
    return next((n for n in candidates if size // n <= BLOCK), shape[0])


def matrix_sides(ndim: int, stacked: bool) -> tuple[Side, ...]:
    """Returns the sides of a matrix [in..., out], or of a stack of them.

    >>> matrix_sides(3, stacked=True)
    ('stack', 'left', 'right')
    """
    lead: list[Side] = ["stack"] if stacked else []
    left: list[Side] = ["left"] * (ndim - len(lead) - 1)
    return (*lead, *left, "right")


def is_value(x: Any) -> bool:
    """Returns whether x stands for an array without being one."""
    return isinstance(x, (Value, Factors, Seeded))


def as_array(x: Any) -> Any:
    """Returns what x stands for."""
    return x.array() if is_value(x) else x


def arrays(tree: Any) -> Any:
    """Returns a tree of arrays in place of the values that stand for them."""
    return jax.tree.map(as_array, tree, is_leaf=is_value)


def shapes(tree: Any) -> Any:
    """Returns a tree of `jax.ShapeDtypeStruct`s like a tree of arrays and values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree, is_leaf=is_value)


def _spread(part: Array, sides: Sequence[Side], own: Sequence[Side]) -> Array:
    """Returns a factor with axes of size 1 where it lacks the value's, its columns last."""
    shape, sizes = [], list(part.shape)
    for side in sides:
        shape.append(sizes.pop(0) if side in own else 1)
    return part.reshape(*shape, part.shape[-1])
