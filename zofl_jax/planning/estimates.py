"""Whether a run fits into memory, by estimate, before anything is compiled."""

import math

import jax

from zofl_jax.core import Batch
from zofl_jax.directions import jaxprs
from zofl_jax.engine import compilation, exhaustion
from zofl_jax.engine.exhaustion import in_words
from zofl_jax.engine.simulator import Simulator

FACTOR = 4096
"""No pass is taken to need more bytes than this for each byte of its batch, unless it is looked at:
so that small runs are not traced once more."""


def check(simulator: Simulator, batch: Batch, clients_at_once: int = 0) -> tuple[str, ...]:
    """Returns a sentence for the user where the memory may not suffice, () where it should.

    Args:
      simulator: on devices that are there, its data on them already.
      batch: the shapes of one client's examples in a local step.
      clients_at_once: clients whose activations are there together, 0 for all.

    Raises:
      ValueError: if params, state and clients' memory alone are larger than what is free.
    """
    where = simulator.placement
    available = compilation.memory_available(where)
    if not available:
        return ()
    started = simulator.shapes()
    kept = compilation.bytes_on_a_device((started.state, started.memory))
    if where.platform == "cpu":  # whose devices share the host's memory
        kept *= where.num_devices
    if kept > available:
        raise ValueError(
            f"params, state and what clients remember take {in_words(kept)}, and "
            f"{in_words(available)} of memory are free: split them with --mesh=model:M over M "
            "devices, or take a smaller --model"
        )
    groups = min(where.groups, simulator.setting.clients_per_round)
    clients = clients_at_once or math.ceil(simulator.setting.clients_per_round / groups)
    if where.platform == "cpu":
        clients *= groups
    examples = clients * compilation.bytes_on_a_device(batch)
    if kept + FACTOR * examples < available:
        return ()
    program, _ = jaxprs.trace(simulator.task.loss, started.state.params, batch)
    needed = kept + clients * max(_sizes(program), default=0)
    if needed <= available:
        return ()
    return (
        f"a round may need {in_words(needed)} of memory, and {in_words(available)} are free: where "
        f"that fails, try {exhaustion.KNOBS}",
    )


def _sizes(program: jaxprs.Program) -> list[int]:
    """Returns the bytes of each array that a program makes."""
    found = []
    for equation in program.jaxpr.eqns:
        inside = jaxprs.inner(equation)
        for part in inside:
            found += _sizes(part)
        if not inside:
            avals = [v.aval for v in equation.outvars]
            found += [math.prod(a.shape) * a.dtype.itemsize for a in avals if not _is_key(a)]
    return found


def _is_key(aval: jax.core.AbstractValue) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key)  # type: ignore[attr-defined]
