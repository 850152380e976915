"""DeComFL with directions for each group of clients, so a round goes along G P of them.

Round r, shared key s_r, P directions z[g,k,p] of group g drawn from s_r and g:

    client i: draws its group g(i) and does what a client of DeComFL does, along z[g(i)]
      uploads g(i) and K·P scalars
    server: broadcasts S[g,k,p] = Σ_{i in g} w_i g_i[k,p],  w the cohort's shares, Σ_i w_i = 1
    everyone, from x_r: for k = 1..K:  x ← optimiser(x, (1/P) Σ_{g,p} S[g,k,p] z[g,k,p])

The broadcast is a sum over groups and G times as long as DeComFL's; an upload is 1 byte longer (2
beyond 256 groups). With one direction for all, M clients share the noise of their examples and not
that of the directions; with directions of their own it is the other way round. Where clients'
gradients are ∇f + e_i, e of mean 0 and variance σ², the error of a step's estimate (K = 1, Gaussian
directions) is

    (d + 1) / P · (‖∇f‖² Σ_g W_g² + σ² / M) + σ² / M,   W_g = Σ_{i in g} w_i

where Σ_g W_g² is 1 with one group, on average 1 / M + (1 − 1 / M) / G for equal weights, and 1 / M
where nobody shares a group: up to M times less where the gradient stands out of the noise, nothing
gained where it doesn't. FedKSeed is the same with one direction a step, of a pool for all rounds.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys
from zofl_jax.algorithms.decomfl import decomfl
from zofl_jax.algorithms.method import LOSSY_CODECS, Method, Parts
from zofl_jax.conditions import aggregation
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
    Upload,
    Wire,
)
from zofl_jax.directions.estimators import Estimator
from zofl_jax.settings import setting

MOST_GROUPS = 2**16
"""As many as two bytes can name."""


def decomfl_groups(
    loss_fn: LossFn,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    *,
    groups: int,
    local_steps: int = 1,
    codec: Codec | None = None,
) -> Algorithm:
    """Returns DeComFL whose clients are in groups, each with directions of its own.

    The broadcast is [G, K, P]: of a group that nobody drew it is zero.

    Args:
      loss_fn: (params, batch) -> mean loss, [].
      estimator: of P directions a step.
      optimizer: any optax optimiser, see `decomfl`.
      groups: 1 <= G <= 65,536.
      local_steps: K >= 1.
      codec: how a client writes its K·P scalars, as 4 bytes each unless given.

    Raises:
      ValueError: for arguments out of range.

    >>> from zofl_jax.directions import estimators
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> algorithm = decomfl_groups(
    ...     f, estimators.central_difference(4, 1e-3), optax.sgd(0.1), groups=8)
    >>> state, key = algorithm.init(jnp.zeros(3)), jax.random.key(0)
    >>> upload = algorithm.client(key, state, (), jnp.ones((1, 3)), jax.random.key(1)).upload
    >>> {name: (x.shape, str(x.dtype)) for name, x in sorted(upload.items())}
    {'group': ((), 'uint8'), 'scalars': ((1, 4), 'float32')}
    """
    if not 1 <= groups <= MOST_GROUPS:
        raise ValueError(f"groups must be in [1, {MOST_GROUPS}], got {groups}")
    alike = decomfl(loss_fn, estimator, optimizer, local_steps=local_steps)
    width = jnp.uint8 if groups <= 2**8 else jnp.uint16
    shape = local_steps, estimator.num_perturbations

    def numbers(upload: Upload) -> Array:
        sent = upload["scalars"]
        return sent if codec is None else codec.decode(sent, shape[0] * shape[1]).reshape(shape)

    def written(key: PRNGKey, scalars: Array, upload: Upload) -> Upload:
        sent = scalars if codec is None else codec.encode(key, scalars.reshape(-1))
        return {**upload, "scalars": sent}

    def client(
        shared_key: PRNGKey, state: ServerState, memory: tuple, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        draw, code = (jax.random.fold_in(own_key, keys.name_id(n)) for n in ("group", "codec"))
        group = jax.random.randint(draw, (), 0, groups, jnp.int32)
        found = alike.client(keys.group_key(shared_key, group), state, memory, batches, own_key)
        upload = written(code, found.upload, {"group": group.astype(width)})
        return found._replace(upload=upload)

    def aggregate(uploads: Upload, weights: Array) -> Broadcast:
        scalars = aggregation.present_only(jax.vmap(numbers)(uploads), weights)
        member = uploads["group"][:, None] == jnp.arange(groups, dtype=width)  # [C, G]
        weights = weights.astype(scalars.dtype)
        total = jnp.sum(weights)
        of_group = jnp.where(member, weights[:, None] / jnp.where(total > 0, total, 1), 0)
        return jnp.tensordot(of_group, scalars, (0, 0), precision=jax.lax.Precision.HIGHEST)

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        group_keys = jax.vmap(lambda g: keys.group_key(key, g))(jnp.arange(groups))

        def step(carry: tuple, inputs: tuple) -> tuple:
            params, opt_state = carry
            k, scalars = inputs  # scalars [G, P]
            each = jax.vmap(lambda own: keys.direction_keys(keys.step_key(own, k), shape[1]))
            direction: Params = estimator.perturbation.accumulate(
                each(group_keys).reshape(-1), params, scalars.reshape(-1) / shape[1]
            )
            updates, opt_state = optimizer.update(direction, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        inputs = jnp.arange(local_steps), jnp.moveaxis(broadcast, 0, 1)
        (params, opt_state), _ = jax.lax.scan(step, (state.params, state.opt_state), inputs)
        return ServerState(params, opt_state, state.round + 1)

    return alike._replace(
        client=client, aggregate=aggregate, server=server, wire=Wire(numbers, written)
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of DeComFL in groups."""

    client_groups: int = setting(
        8,
        "Groups of clients, each with directions of its own, of decomfl_groups.",
        within=(f"in [1, {MOST_GROUPS}]", lambda count: 1 <= count <= MOST_GROUPS),
    )


def build(parts: Parts, options: Options) -> Algorithm:
    """Returns the algorithm of `METHOD`."""
    return decomfl_groups(
        parts.loss_fn,
        parts.estimator,
        parts.optimizer,
        groups=options.client_groups,
        local_steps=parts.local_steps,
        codec=parts.codec,
    )


METHOD = Method(
    "decomfl_groups",
    build,
    order=0,
    summary="decomfl whose clients are in groups with directions of their own; G·K·P scalars down",
    options=Options,
    refuses={"compression": LOSSY_CODECS},
    takes=("codec",),
)
