"""FedKSeed and FedKSeed-Pro: all directions from a pool of n seeds (Qin et al. 2024).

The pool's directions z_1, ..., z_n are the same in all rounds, so every model there will be is

    x = x_0 − η Σ_j A_j z_j

and the n accumulators A bring any client up to date, however long it was away.

    client i, from y = x:  for k = 1..K:
        draws j from the pool, g ≈ ⟨∇f_i(y; ξ_k), z_j⟩, y ← y − η s g z_j
      uploads the K pairs (j, g)
    server: broadcasts all pairs and the weights w_i;  A_j ← A_j + w_i s g for each pair

The factor s is 1, or follows the round. In the Pro form seeds are drawn with p_j ∝ exp(a_j), a_j
the mean |g| along z_j so far, scaled to [0, 1] over the pool.
Ref: arXiv 2312.06353, Algorithm 1 and section 4.3.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys, precision
from zofl_jax.algorithms.method import LOSSY_CODECS, Method, Parts, Refusal
from zofl_jax.conditions.compression import Codec
from zofl_jax.core import (
    Algorithm,
    Array,
    Batches,
    Broadcast,
    ClientResult,
    LossFn,
    Params,
    PRNGKey,
    ServerState,
    Sync,
    Upload,
    Wire,
)
from zofl_jax.directions.estimators import Estimator
from zofl_jax.settings import setting


class SeedPool(NamedTuple):
    """What is known of the pool: the `opt_state` of the `ServerState`; float32 [n] each.

    The last two are `()` but in the Pro form.
    """

    accumulators: Array  # A
    amplitudes: Any  # the sum of |g| along each direction
    counts: Any  # over how many measurements


def fedkseed(
    loss_fn: LossFn,
    estimator: Estimator,
    learning_rate: float | Array,
    *,
    pool_key: PRNGKey,
    pool_size: int = 4096,
    local_steps: int = 200,
    pro: bool = False,
    codec: Codec | None = None,
    factor: optax.Schedule | None = None,
) -> Algorithm:
    """Returns FedKSeed as an `Algorithm`.

    An upload is K indices (2 bytes each in pools of up to 65,536 seeds) and K scalars. The
    broadcast holds the pairs of the whole cohort, so a client that missed more than about
    n / (M K) rounds is sent the accumulators instead.

    Args:
      loss_fn: (params, batch) -> mean loss, [].
      estimator: of one direction, P = 1.
      learning_rate: η > 0. Plain SGD only: A would not sum up any other update.
      pool_key: from which all directions are drawn, such as `keys.pool_key(root.shared)`.
      pool_size: n >= 1.
      local_steps: K >= 1.
      pro: whether seeds are drawn by their importance.
      codec: how a client writes its K scalars, as 4 bytes each unless given. The broadcast holds
        them as they are read.
      factor: round -> s, the factor on η in that round; 1 unless given.

    Raises:
      ValueError: for arguments out of range.

    >>> from zofl_jax.directions import estimators
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> algorithm = fedkseed(f, estimators.central_difference(1, 1e-3), 0.1,
    ...                      pool_key=jax.random.key(7), pool_size=64, local_steps=5)
    >>> state, key = algorithm.init(jnp.zeros(3)), jax.random.key(0)
    >>> upload = algorithm.client(key, state, (), jnp.ones((5, 3)), jax.random.key(1)).upload
    >>> {name: (x.shape, str(x.dtype)) for name, x in sorted(upload.items())}
    {'scalars': ((5,), 'float32'), 'seeds': ((5,), 'uint16')}
    """
    if estimator.num_perturbations != 1:
        raise ValueError(
            "FedKSeed measures one direction a local step: give num_perturbations = 1, got "
            f"{estimator.num_perturbations}"
        )
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    for name, value in (("pool_size", pool_size), ("local_steps", local_steps)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    width = jnp.uint16 if pool_size <= 2**16 else jnp.uint32

    def descend(params: Params, seed: Array, scalar: Array) -> Params:
        direction = estimator.expand(keys.step_key(pool_key, seed), params, scalar[None])
        return jax.tree.map(
            lambda x, z: x - jnp.asarray(learning_rate, x.dtype) * z, params, direction
        )

    def at_rate(scalars: Array, round_index: Array) -> Array:
        return scalars if factor is None else scalars * jnp.float32(factor(round_index))

    def init(params: Params) -> ServerState:
        zeros = jnp.zeros(pool_size, jnp.float32)
        pool = SeedPool(zeros, zeros if pro else (), zeros if pro else ())
        return ServerState(precision.wide(params), pool, jnp.zeros((), jnp.int32))

    def draw(own_key: PRNGKey, pool: SeedPool) -> Array:
        if not pro:
            return jax.random.randint(own_key, (local_steps,), 0, pool_size, jnp.int32)
        return jax.random.categorical(own_key, _importance(pool), shape=(local_steps,))

    def numbers(upload: Upload) -> Array:
        sent = upload["scalars"]
        return sent if codec is None else codec.decode(sent, local_steps)

    def written(key: PRNGKey, scalars: Array, upload: Upload) -> Upload:
        sent = scalars if codec is None else codec.encode(key, scalars)
        return {**upload, "scalars": sent}

    def client(
        shared_key: PRNGKey, state: ServerState, memory: tuple, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        del shared_key  # the directions are the pool's

        def step(params: Params, inputs: tuple) -> tuple:
            seed, batch = inputs
            seed_key = keys.step_key(pool_key, seed)
            estimate = estimator.measure(loss_fn, seed_key, state.round, params, batch)
            scalar = estimate.scalars[0].astype(jnp.float32)
            params = descend(params, seed, at_rate(scalar, state.round))
            return params, (scalar, estimate.loss)

        seeds = draw(own_key, state.opt_state)
        scalars: Array
        losses: Array
        _, (scalars, losses) = jax.lax.scan(step, state.params, (seeds, batches))
        codec_key = jax.random.fold_in(own_key, keys.name_id("codec"))
        upload = written(codec_key, scalars, {"seeds": seeds.astype(width)})
        return ClientResult(upload, memory, {"loss": jnp.mean(losses)})

    def aggregate(uploads: Upload, weights: Array) -> Broadcast:
        uploads = {**uploads, "scalars": jax.vmap(numbers)(uploads)}
        shares = weights / jnp.sum(weights)
        return {**uploads, "weights": shares.astype(jnp.float32)}

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        del key
        seeds = broadcast["seeds"].astype(jnp.int32)
        scalars = broadcast["scalars"]
        parts = at_rate(scalars * broadcast["weights"][:, None], state.round)

        def step(params: Params, pair: tuple[Array, Array]) -> tuple[Params, None]:
            return descend(params, *pair), None

        params, _ = jax.lax.scan(step, state.params, (seeds.reshape(-1), parts.reshape(-1)))
        accumulators, amplitudes, counts = state.opt_state
        if pro:
            # A client without weight, such as one that dropped out, was not heard.
            heard = jnp.broadcast_to((broadcast["weights"] > 0)[:, None], seeds.shape)
            amplitudes = amplitudes.at[seeds].add(jnp.where(heard, jnp.abs(scalars), 0))
            counts = counts.at[seeds].add(heard.astype(counts.dtype))
        pool = SeedPool(accumulators.at[seeds].add(parts), amplitudes, counts)
        return ServerState(params, pool, state.round + 1)

    def restore(state: ServerState, message: SeedPool) -> ServerState:
        def step(params: Params, pair: tuple[Array, Array]) -> tuple[Params, None]:
            return descend(params, *pair), None

        every = (jnp.arange(pool_size), message.accumulators)
        params, _ = jax.lax.scan(step, state.params, every)
        return ServerState(params, message, state.round)

    return Algorithm(
        init=init,
        client=client,
        aggregate=aggregate,
        server=server,
        local_steps=local_steps,
        sync=Sync(message=lambda state: state.opt_state, restore=restore, alone=False),
        passes=estimator.passes.times(local_steps),
        wire=Wire(numbers, written),
    )


def _importance(pool: SeedPool) -> Array:
    """Returns the mean amplitude along each direction, scaled to [0, 1]; [n].

    Directions that were not measured yet count as average ones.
    """
    measured = pool.counts > 0
    average = jnp.sum(pool.amplitudes) / jnp.maximum(jnp.sum(pool.counts), 1)
    mean = jnp.where(measured, pool.amplitudes / jnp.maximum(pool.counts, 1), average)
    spread = jnp.max(mean) - jnp.min(mean)
    return (mean - jnp.min(mean)) / jnp.where(spread > 0, spread, 1)


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of FedKSeed."""

    pool_size: int = setting(4096, "Seeds in the pool of fedkseed.", least=1)


def _build(pro: bool) -> Callable[[Parts, Options], Algorithm]:
    def build(parts: Parts, options: Options) -> Algorithm:
        return fedkseed(
            parts.loss_fn,
            parts.estimator,
            parts.learning_rate,
            pool_key=parts.pool_key,
            pool_size=options.pool_size,
            local_steps=parts.local_steps,
            pro=pro,
            codec=parts.codec,
            factor=parts.rate_factor,
        )

    return build


METHOD = Method(
    "fedkseed",
    _build(pro=False),
    order=0,
    summary="many local steps, each along a seed of a pool; pairs of seed and scalar up (Qin et "
    "al. 2024)",
    options=Options,
    defaults={"local_steps": 200},
    fixed={"num_perturbations": 1, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0},
    refuses={
        "compression": LOSSY_CODECS,
        "perturbation": Refusal(
            "whose pool has the same directions in all rounds",
            ("subspace",),
            "use --perturbation=low_rank",
        ),
        "history": Refusal("whose pool has the same directions in all rounds"),
        "centre_rounds": Refusal("whose pool has the same directions in all rounds"),
    },
    takes=("codec",),
    warms_up=True,
)
METHOD_PRO = dataclasses.replace(
    METHOD,
    name="fedkseed_pro",
    build=_build(pro=True),
    summary="fedkseed with seeds drawn by their importance (Qin et al. 2024)",
)
