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
    available = compilation.memory_available(simulator.placement)
    if not available:
        return ()
    kept = _kept(simulator)
    if kept > available:
        raise ValueError(
            f"params, state and what clients remember take {in_words(kept)}, and "
            f"{in_words(available)} of memory are free: split them with --mesh=model:M over M "
            "devices, or take a smaller --model"
        )
    examples = _clients(simulator, clients_at_once) * compilation.bytes_on_a_device(batch)
    if kept + FACTOR * examples < available:
        return ()
    size = needed(simulator, batch, clients_at_once)
    if size <= available:
        return ()
    return (
        f"a round may need {in_words(size)} of memory, and {in_words(available)} are free: where "
        f"that fails, try {exhaustion.KNOBS}",
    )


def needed(simulator: Simulator, batch: Batch, clients_at_once: int = 0) -> int:
    """Returns the bytes that a round needs at least: what is kept, and a pass's largest array.

    Args:
      simulator: as `check`.
      batch: likewise.
      clients_at_once: likewise.
    """
    params = simulator.shapes().state.params
    program, _ = jaxprs.trace(simulator.task.loss, params, batch)
    clients = _clients(simulator, clients_at_once)
    return _kept(simulator) + clients * max(_sizes(program), default=0)


def _kept(simulator: Simulator) -> int:
    """Returns the bytes of params, state and clients' memory, of all devices of a CPU."""
    where, started = simulator.placement, simulator.shapes()
    kept = compilation.bytes_on_a_device((started.state, started.memory))
    return kept * where.num_devices if where.platform == "cpu" else kept


def _clients(simulator: Simulator, at_once: int) -> int:
    """Returns how many clients' activations are in one memory together."""
    where, cohort = simulator.placement, simulator.setting.clients_per_round
    groups = min(where.groups, cohort)
    clients = at_once or math.ceil(cohort / groups)
    return clients * groups if where.platform == "cpu" else clients


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
