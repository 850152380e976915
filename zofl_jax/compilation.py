"""Ahead-of-time compilation in which the arrays a function closes over are arguments."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core

from zofl_jax.core import Array


def compiled(
    fn: Callable[..., Any], args: tuple[Any, ...], donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Returns `fn` compiled for arguments like `args`.

    What `fn` closes over, such as the frozen weights of a language model, is handed over at
    each call. As constants these arrays would be copied into the program, and the compiler
    would spend seconds folding them (400 MB: 6 s and as much memory again).

    Args:
      fn: a traceable function; an inner `jax.jit` keeps what it closes over itself.
      args: trees of arrays, or of `jax.ShapeDtypeStruct`s.
      donate: which of `args` may be overwritten.

    >>> import jax.numpy as jnp
    >>> weights = jnp.ones((2, 2))
    >>> compiled(lambda x: x @ weights, (jnp.ones(2),))(jnp.arange(2.0)).tolist()
    [1.0, 1.0]
    """
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    treedef = jax.tree.structure(out)

    def with_arrays(arrays: list[Array], *args: Any) -> Any:
        program = jax.extend.core.ClosedJaxpr(closed.jaxpr, arrays)
        evaluate = jax.extend.core.jaxpr_as_fun(program)
        return jax.tree.unflatten(treedef, evaluate(*jax.tree.leaves(args)))

    jitted = jax.jit(with_arrays, donate_argnums=tuple(1 + i for i in donate))
    return functools.partial(jitted.lower(closed.consts, *args).compile(), closed.consts)


def memory_bytes(function: Callable[..., Any]) -> int:
    """Returns the device memory that a function from `compiled` needs, in bytes.

    Arguments, results and temporaries by the compiler's account; what is overwritten counts
    once. Its own figure for the peak leaves out the temporaries on CPU.

    Raises:
      ValueError: for a function that `compiled` did not return.

    >>> import jax.numpy as jnp
    >>> memory_bytes(compiled(lambda x: x + 1, (jnp.ones(1000),)))
    8000
    """
    if not isinstance(function, functools.partial):
        raise ValueError(f"{function} does not come from `compiled`")
    found = function.func.memory_analysis()  # type: ignore[attr-defined]
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )
