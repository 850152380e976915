"""What a traced function computes, seen in its jaxpr."""

import jax


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Returns the shapes of all intermediates, those of inner functions included."""
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {variable.aval.shape for variable in equation.outvars}
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                shapes |= shapes_in(inner)
    return shapes
