"""Compares ways to keep the params of a run: learning curves, memory and time of each.

    python -m benchmarks.precision --out=benchmarks/results/precision.json
    python -m benchmarks.precision --case=small_rate --out=benchmarks/results/precision_5e-6.json

    float32     computed and kept in float32
    bfloat16    computed in bfloat16, kept in float32: what the library does (`precision.py`)
    rounded     kept in bfloat16, each update rounded to the nearest: what it did before
    stochastic  kept in bfloat16, each update rounded up or down at random, by the round's key

DeComFL trains a decoder of 22,688 params to say which of four words is in a row of others, at a
rate whose updates are far below the spacing of the params in bfloat16. The curves take about two
minutes on two cores. Memory is the compiler's account of a round of SmolLM2-135M's shape with 2
clients, beyond the data; the seconds are of a round of a decoder of six million params, by turns.
`--case=small_rate` makes the curves alone, of a decoder of 28,768 params at 5e-6.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import measuring, workloads
from benchmarks.workloads import Work
from zofl_jax import keys
from zofl_jax.algorithms import decomfl
from zofl_jax.core import Algorithm, Array, Broadcast, LossFn, Params, PRNGKey, ServerState, Task
from zofl_jax.directions import estimators
from zofl_jax.engine import compilation, placement, rounds, simulation
from zofl_jax.models import architectures, transformer
from zofl_jax.tasks import tokens

WAYS = ("float32", "bfloat16", "rounded", "stochastic")
RECORDS = 10
DIRECTIONS = 5
CLIENTS = 8
WIDTH = 32


class Case(NamedTuple):
    """A decoder, its task and its run.

    Attributes:
      rate, rounds: of the run.
      words: of the vocabulary.
      marks: so many of them are marks; the label says from which half of these one is.
      length: of a row of words, one of which is a mark.
      heads: of keys and values; as many again of queries where `shared`.
      shared: whether two heads of queries share one of keys and values.
      enlarged: how often as large as `transformer.init` makes them the weights are.
      sharp: the scale of the last norm, which the scores grow with, and the steps.
    """

    rate: float
    rounds: int
    words: int
    marks: int
    length: int
    heads: int
    shared: bool
    enlarged: float
    sharp: float


CASES = {
    # Larger weights than those of `transformer.init`, as beside the small updates of fine-tuning.
    "words": Case(1e-4, 4000, 64, 4, 6, heads=2, shared=False, enlarged=8.0, sharp=1.0),
    # Sharp scores, so that 2,000 rounds at so small a rate teach something. The rate is that of Li
    # et al. 2025 (arXiv 2405.15861) for OPT-125M.
    "small_rate": Case(5e-6, 2000, 318, 4, 2, heads=2, shared=True, enlarged=8.0, sharp=4.0),
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and saves."""
    made = measuring.parser(__doc__)
    made.add_argument("--seeds", type=int, default=1, help="of the curves")
    made.add_argument("--case", choices=CASES, default="words", help="what the curves are of")
    options = made.parse_args(argv)
    measuring.check_repeats(made, options)
    placement.use_cpu_devices(1)
    case = CASES[options.case]
    result: dict[str, Any] = {
        "rate": case.rate,
        "num_perturbations": DIRECTIONS,
        "curves": {},
        "costs": {},
        **measuring.machine(1),
    }
    with warnings.catch_warnings():
        # Two of the ways are those that the library warns of.
        warnings.filterwarnings("ignore", "this algorithm keeps its params in bfloat16")
        for way in WAYS:
            seeds = range(options.seeds)
            result["curves"][way] = [curve(way, seed, options.smoke, case) for seed in seeds]
            measuring.report(result, options.out)
        for variant in ("gaussian", "low_rank") if options.case == "words" else ():
            result["costs"][variant] = costs(variant, options.repeats, options.smoke)
            measuring.report(result, options.out)
    return result


def kept(way: str, algorithm: Algorithm, estimator: estimators.Estimator, rate: float) -> Algorithm:
    """Returns DeComFL with plain SGD and K = 1, its params kept in one of the `WAYS`."""
    if way in ("float32", "bfloat16"):
        return algorithm
    narrow = algorithm._replace(
        init=lambda params: ServerState(params, optax.sgd(rate).init(params), jnp.zeros((), int))
    )
    if way == "rounded":
        return narrow

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        step = keys.step_key(key, 0)
        before = jax.tree.map(lambda x: x.astype(jnp.float32), state.params)
        direction = estimator.expand(step, before, broadcast[0])
        own = keys.leaf_keys(jax.random.fold_in(step, keys.name_id("rounding")), before)

        def leaf(x: Array, z: Array, leaf_key: PRNGKey) -> Array:
            # What bfloat16 cuts off carries into what it keeps in as large a share of cases.
            bits = jax.lax.bitcast_convert_type(x - rate * z, jnp.uint32)
            bits += jax.random.bits(leaf_key, x.shape, jnp.uint16).astype(jnp.uint32)
            return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)

        after = jax.tree.map(leaf, before, direction, own)
        return ServerState(after, state.opt_state, state.round + 1)

    return narrow._replace(server=server)


def dtypes(way: str) -> dict[str, Any]:
    """Returns the dtypes of a model's configuration, those that its params come in."""
    return dict.fromkeys(
        ("param_dtype", "compute_dtype"), "float32" if way == "float32" else "bfloat16"
    )


def method(way: str, loss: LossFn, rate: float) -> Algorithm:
    """Returns the algorithm of the curves."""
    estimator = estimators.forward_difference(DIRECTIONS, workloads.SMOOTHING)
    return kept(way, decomfl(loss, estimator, optax.sgd(rate)), estimator, rate)


def curve(way: str, seed: int, smoke: bool, case: Case = CASES["words"]) -> dict[str, Any]:
    """Returns accuracy and loss by round, how far the params went, and seconds of the rounds."""
    simulator = simulation.make_simulator(
        method(way, (task := words_task(way, case)).loss, case.rate),
        task,
        clients_per_round=2,
        batch_size=16,
        seed=seed,
    )
    count = RECORDS if smoke else case.rounds
    start = _flat(simulator.start(None).state.params)
    progress = simulation.run(simulator, rounds=count, eval_every=count // RECORDS)
    moved = _flat(progress.state.params) - start
    return {
        "round": [record.round for record in progress.history],
        "accuracy": [record.metrics["accuracy"] for record in progress.history],
        "loss": [record.metrics["loss"] for record in progress.history],
        "num_params": start.size,
        "params_moved": int(np.count_nonzero(moved)),
        "distance": float(np.linalg.norm(moved)),
        "first_model_bytes": simulator.sizes[0].params,
        "run_seconds": progress.run_seconds,
    }


def words_task(way: str, case: Case) -> Task:
    """Returns the task of telling which half of the marks the one in a row of words is from."""
    num_heads = case.heads * (2 if case.shared else 1)
    config = architectures.named(
        "smollm2-135m",
        num_layers=2,
        vocab_size=case.words,
        width=WIDTH,
        mlp_width=64,
        head_dim=WIDTH // num_heads,
        num_heads=num_heads,
        num_kv_heads=case.heads,
        **dtypes(way),
    )
    random = np.random.default_rng(0)

    def examples(count: int) -> dict[str, np.ndarray]:
        tokens = random.integers(case.marks, case.words, (count, case.length), np.int32)
        marks = random.integers(0, case.marks, count, np.int32)
        tokens[np.arange(count), random.integers(0, case.length, count)] = marks
        return {"tokens": tokens, "label": (marks >= case.marks // 2).astype(np.int32)}

    def init(key: PRNGKey) -> Params:
        drawn = transformer.init(dataclasses.replace(config, param_dtype="float32"), key)

        def leaf(path: tuple[Any, ...], x: Array) -> Array:
            scale = case.sharp if path[0].key == "final_norm" else 1.0
            enlarged = scale * x if path[-1].key == "scale" else case.enlarged * x
            # All ways start from the same numbers.
            return enlarged.astype(jnp.bfloat16).astype(config.param_dtype)

        return jax.tree.map_with_path(leaf, drawn)

    return tokens.choice_task(config, examples(512), examples(256), CLIENTS, init)


def costs(variant: str, repeats: int, smoke: bool) -> dict[str, Any]:
    """Returns memory and seconds of a round, a row a way, with one kind of directions."""
    rows: dict[str, dict[str, Any]] = {}
    jobs = []
    for way in WAYS:
        large = workloads.decoder_work(
            "smollm2-135m", clients=2, length=40, clients_at_once=2, smoke=smoke, **dtypes(way)
        )
        rows[way] = {"memory_bytes": memory(way, large, variant)}
        jobs.append(round_of(way, variant, smoke))
    times = measuring.by_turns(jobs, repeats)
    for way, taken in zip(WAYS, times, strict=True):
        rows[way] |= {"round_seconds": taken.median, "round_cpu_seconds": taken.median_cpu}
    return rows


def algorithm_of(way: str, work: Work, variant: str) -> Algorithm:
    """Returns the algorithm of a round whose cost is measured."""
    estimator = estimators.forward_difference(
        work.num_perturbations,
        workloads.SMOOTHING,
        workloads.perturbation(variant),
        work.clients_at_once,
        work.perturbations_at_once,
    )
    rate = workloads.LEARNING_RATE
    return kept(way, decomfl(work.task.loss, estimator, optax.sgd(rate)), estimator, rate)


def memory(way: str, work: Work, variant: str) -> int:
    """Returns what a round needs beyond its data by the compiler's account, without running it."""
    algorithm = algorithm_of(way, work, variant)
    advance = rounds.make_advance(algorithm, work.task, work.clients, work.batch, "uniform")
    params = jax.eval_shape(work.task.init, jax.random.key(0))
    state = jax.eval_shape(algorithm.init, params)
    args = (state, (), work.task.train, keys.root(0), np.int32(1))
    needed = compilation.memory_bytes(compilation.compiled(advance, args, donate=(0, 1)))
    return needed - sum(x.nbytes for x in jax.tree.leaves(work.task.train))


def round_of(way: str, variant: str, smoke: bool) -> Callable[[], None]:
    """Returns what does one round of a decoder of six million params."""
    sizes: dict[str, Any] = (
        {} if smoke else {"num_layers": 6, "vocab_size": 2048, "width": 288, "mlp_width": 768}
    )
    work = workloads.decoder_work(
        "smollm2-135m", clients=2, length=40, smoke=smoke, **sizes, **dtypes(way)
    )
    simulator = simulation.make_simulator(
        algorithm_of(way, work, variant),
        work.task,
        clients_per_round=work.clients,
        batch_size=work.batch,
    )
    state = simulator.start(None).state

    def job() -> None:
        nonlocal state
        state, _, _ = simulator.advance(state, (), 1)
        jax.block_until_ready(state)

    return job


def _flat(params: Params) -> np.ndarray:
    leaves = [np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(params)]
    return np.concatenate(leaves)


if __name__ == "__main__":
    main()
