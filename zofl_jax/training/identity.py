"""What a simulation is known by, so that a run directory goes on with the one it began with.

The command line knows a run by its flags. Here there are functions and arrays alone, so what
is noted are their digests: of the algorithm as JAX traces it, the loss and the learning rate
included; of who takes part when; of the data and the initial params. What malicious clients do is
not seen: what else tells runs apart belongs into `settings` of `train`.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax import keys
from zofl_jax.core import Algorithm
from zofl_jax.directions import jaxprs
from zofl_jax.engine import rounds, simulation
from zofl_jax.runs import fingerprints
from zofl_jax.runs.directory import Flag

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def settings(simulator: simulation.Simulator) -> dict[str, Flag]:
    """Returns what a simulator is, as plain values.

    The digests under "algorithm" begin with JAX's release, since another one may trace the same
    functions to another program.
    """
    attendance = simulator.attendance(np.arange(rounds.CAPACITY))
    phases = "; ".join(
        f"from round {phase.first_round} {_traced(phase.algorithm, simulator)}"
        for phase in simulator.phases
    )
    return {
        "task": simulator.task.name,
        "num_clients": simulator.setting.num_clients,
        "clients_per_round": simulator.setting.clients_per_round,
        "batch_size": simulator.setting.batch_size,
        "weighting": simulator.setting.weighting,
        "seed": fingerprints.array(jax.random.key_data(simulator.root.shared)),
        "attendance": fingerprints.arrays(*jax.tree.leaves(attendance)),
        "algorithm": f"jax {jax.__version__}, {phases}",
    }


def may_change(stored: dict[str, Flag]) -> tuple[str, ...]:
    """Returns which settings of a run may differ from `stored`: its length, and what JAX traces."""
    other_jax = not str(stored.get("algorithm", "")).startswith(f"jax {jax.__version__},")
    return ("rounds", "eval_every", *(("algorithm",) if other_jax else ()))


def inputs(simulator: simulation.Simulator) -> fingerprints.Fingerprints:
    """Returns the fingerprints of the data, of whose they are, and of the initial params."""
    task = simulator.task
    train = task.train
    found: fingerprints.Fingerprints = {
        "partition": fingerprints.arrays(train.order, train.offsets)
    }
    trees = {
        "training examples": train.examples,
        "test examples": task.test,
        "initial params": task.init(simulator.root.init),
    }
    for kind, tree in trees.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found |= {
            f"{kind} {keys.path_name(path)!r}": fingerprints.array(leaf) for path, leaf in leaves
        }
    return found


def _traced(algorithm: Algorithm, simulator: simulation.Simulator) -> str:
    """Returns the digest of a client's, the aggregation's and the server's program."""
    key = keys.round_key(simulator.root.shared, jnp.int32(0))
    params = jax.eval_shape(simulator.task.init, simulator.root.init)
    size = simulator.setting.batch_size
    batches = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((algorithm.local_steps, size, *x.shape[1:]), x.dtype),
        simulator.task.train.examples,
    )
    state, memory = (jax.eval_shape(f, params) for f in (algorithm.init, algorithm.init_memory))

    def exchange(key, state, memory, batches, own_key):  # type: ignore[no-untyped-def]
        result = algorithm.client(key, state, memory, batches, own_key)
        uploads = jax.tree.map(lambda x: jnp.stack([x, x]), result.upload)
        broadcast = algorithm.aggregate(uploads, jnp.ones(2))
        return result, broadcast, algorithm.server(key, state, broadcast)

    programs = [
        jaxprs.trace(algorithm.init, params)[0],
        jaxprs.trace(exchange, key, state, memory, batches, jax.random.key(0))[0],
    ]
    texts = [_ADDRESS.sub("", str(program.jaxpr)) for program in programs]
    consts = [_digest(x) for program in programs for x in program.consts]
    return fingerprints.text(*texts, *consts)


def _digest(x: Any) -> str:
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return fingerprints.array(jax.random.key_data(x) if is_key else x)
