"""Hybrid order: exact gradients for the top layers, scalars for the rest (HO-FL, 2026).

The params are split at a boundary into the top t and the rest u below it. Round r, shared key s_r:

    client i, from (t, u):   for k = 1..K:
        g_i[k,p] ≈ ⟨∇_u f_i(t, u; ξ_k), z[k,p]⟩,   h = ∇_t f_i(t, u; ξ_k)
        u ← optimiser(u, (1/P) Σ_p g_i[k,p] z[k,p]),   t ← client's optimiser(t, h)
      uploads g_i, K·P scalars, and Δ_i, what changed of the top
    server: broadcasts the means ḡ and Δ̄
    everyone: u by the K optimiser steps with ḡ,   t ← t − Δ̄

The rest moves as in DeComFL and the top as in FedAvg. The backward pass ends at the boundary, so
activations below it need not be kept, and a message holds as many numbers as the top, and K·P.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofl_jax import keys, precision
from zofl_jax.algorithms.fedavg import whole_state
from zofl_jax.algorithms.local_training import ClientOptimizer, difference
from zofl_jax.algorithms.method import Method, Parts, Refusal
from zofl_jax.conditions import aggregation
from zofl_jax.core import (
    Algorithm,
    Array,
    Batch,
    Batches,
    Broadcast,
    ClientResult,
    LossFn,
    Params,
    Passes,
    PRNGKey,
    ServerState,
    Upload,
)
from zofl_jax.directions.batching import at_once
from zofl_jax.directions.estimators import Estimator
from zofl_jax.directions.perturbations import is_stacked
from zofl_jax.settings import positive, setting

_TOP = r"^(output|head|final_norm)/"


class Boundary(NamedTuple):
    """Which params are the top.

    Unless anything is given, those of an output, a head or a final norm; where nothing is called
    so, or all is, the last layer of the stacks, or else the last leaf.

    Attributes:
      pattern: a regular expression: params whose path it is found in; "" for those above.
      layers: how many of the last layers of each stack.
    """

    pattern: str = ""
    layers: int = 0


def hybrid(
    loss_fn: LossFn,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    client_optimizer: ClientOptimizer,
    *,
    boundary: Boundary = Boundary(),  # noqa: B008 (a constant)
    top_rate: float = 1.0,
    local_steps: int = 1,
    aggregate: Callable[[Upload, Array], Broadcast] = aggregation.mean,
    clients_at_once: int | None = None,
) -> Algorithm:
    """Returns the hybrid as an `Algorithm`; its messages are {"scalars": [K, P], "top": a tree}.

    A client that was away is sent the model and the optimiser's state, or what it missed where that
    is smaller.

    Args:
      loss_fn: (params, batch) -> mean loss, differentiable.
      estimator: how a step's P scalars along the rest are measured and expanded.
      optimizer: of the rest; its state is shared and replayed.
      client_optimizer: of the top, or round -> that round's; its state starts anew in every round.
      boundary: between top and rest.
      top_rate: > 0, what the steps of the top are multiplied by.
      local_steps: K >= 1.
      aggregate: (uploads [C, ...], weights [C]) -> broadcast.
      clients_at_once: how many clients of a vmap take a gradient at once, see `batching.at_once`.

    Raises:
      ValueError: for arguments out of range; by `init`, where all params of a model of several are
        on one side.

    >>> from zofl_jax.directions import estimators
    >>> f = lambda x, batch: jnp.mean(jnp.square(batch @ x["hidden"]["w"] @ x["output"]["w"]))
    >>> sgd, pairs = optax.sgd(0.1), estimators.central_difference(4, 1e-3)
    >>> algorithm, key = hybrid(f, pairs, sgd, sgd), jax.random.key(0)
    >>> x = {"hidden": {"w": jnp.ones((5, 3))}, "output": {"w": jnp.ones((3, 1))}}
    >>> upload = algorithm.client(key, algorithm.init(x), (), jnp.ones((1, 2, 5)), key).upload
    >>> upload["scalars"].shape, [leaf.shape for leaf in jax.tree.leaves(upload["top"])]
    ((1, 4), [(3, 1)])
    """
    if local_steps < 1:
        raise ValueError(f"local_steps must be >= 1, got {local_steps}")
    if not 0 < top_rate < float("inf"):
        raise ValueError(f"top_rate must be positive and finite, got {top_rate}")
    if boundary.layers < 0:
        raise ValueError(f"the layers of the top must be >= 0, got {boundary.layers}")

    def loss_of_rest(rest: Params, batch_and_top: tuple[Batch, Params]) -> Array:
        batch, top = batch_and_top
        return loss_fn(join(top, rest), batch)

    def slope(top: Params, rest: Params, batch: Batch) -> tuple[Array, Params]:
        return jax.value_and_grad(lambda t: loss_fn(join(t, rest), batch))(top)

    def descend(
        key: PRNGKey, rest: Params, opt_state: optax.OptState, scalars: Array
    ) -> tuple[Params, optax.OptState]:
        direction = estimator.expand(key, rest, scalars)
        updates, opt_state = optimizer.update(direction, opt_state, rest)
        return optax.apply_updates(rest, updates), opt_state

    def init(params: Params) -> ServerState:
        params = precision.wide(params)
        _check(boundary, params)
        _, rest = split(boundary, params)
        return ServerState(params, optimizer.init(rest), jnp.zeros((), jnp.int32))

    def client(
        shared_key: PRNGKey, state: ServerState, memory: tuple, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        del own_key  # every direction is shared
        chosen = client_optimizer(state.round) if callable(client_optimizer) else client_optimizer

        def step(carry: tuple, inputs: tuple) -> tuple:
            top, rest, opt_state, top_state = carry
            k, batch = inputs
            key = keys.step_key(shared_key, k)
            scalars, _ = estimator.measure(loss_of_rest, key, state.round, rest, (batch, top))
            loss, gradient = at_once(slope, clients_at_once)(top, rest, batch)
            rest, opt_state = descend(key, rest, opt_state, scalars)
            updates, top_state = chosen.update(gradient, top_state, top)
            top = optax.apply_updates(top, jax.tree.map(lambda u: top_rate * u, updates))
            return (top, rest, opt_state, top_state), (scalars, loss)

        top, rest = split(boundary, state.params)
        start = (top, rest, state.opt_state, chosen.init(top))
        scalars: Array
        losses: Array
        (after, *_), (scalars, losses) = jax.lax.scan(
            step, start, (jnp.arange(local_steps), batches)
        )
        upload = {"scalars": scalars, "top": difference(top, after)}
        return ClientResult(upload, memory, {"loss": jnp.mean(losses)})

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        def step(carry: tuple, inputs: tuple) -> tuple:
            k, scalars = inputs
            rest, opt_state = carry
            return descend(keys.step_key(key, k), rest, opt_state, scalars), None

        top, rest = split(boundary, state.params)
        each = (jnp.arange(local_steps), broadcast["scalars"])
        (rest, opt_state), _ = jax.lax.scan(step, (rest, state.opt_state), each)
        params = join(difference(top, broadcast["top"]), rest)
        return ServerState(params, opt_state, state.round + 1)

    return Algorithm(
        init=init,
        client=client,
        aggregate=aggregate,
        server=server,
        local_steps=local_steps,
        sync=whole_state(),
        passes=_sum(estimator.passes, Passes(1, 1)).times(local_steps),
    )


def split(boundary: Boundary, params: Params) -> tuple[Params, Params]:
    """Returns the top and the rest: trees like params, None where a leaf is on the other side.

    >>> x = {"layers": {"w": jnp.arange(3.0)}, "output": {"b": jnp.ones(1)}}
    >>> top, rest = split(Boundary(layers=1), x)
    >>> top["layers"]["w"].tolist(), rest["layers"]["w"].tolist(), rest["output"]["b"]
    ([2.0], [0.0, 1.0], None)
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [keys.path_name(path) for path, _ in leaves]
    chosen, layers = {name for name in names if re.search(boundary.pattern or _TOP, name)}, 0
    if not boundary.pattern and len(chosen) == len(names):
        chosen = set()
    if boundary.layers or not chosen:
        layers = boundary.layers or (0 if boundary.pattern else 1)
    nothing = not chosen and not (layers and any(map(is_stacked, names)))
    if nothing and (not boundary.pattern or len(names) == 1):
        chosen = {names[-1]}

    def sides(path: tuple[Any, ...], x: Array) -> tuple[Any, Any]:
        name = keys.path_name(path)
        count = layers if is_stacked(name) else 0
        if name in chosen or (count and count >= x.shape[0]):
            return x, None
        return (x[-count:], x[:-count]) if count else (None, x)

    both = jax.tree.map_with_path(sides, params)

    def side(i: int) -> Params:
        return jax.tree.map(lambda pair: pair[i], both, is_leaf=lambda node: type(node) is tuple)

    return side(0), side(1)


def join(top: Params, rest: Params) -> Params:
    """Returns the params of which these are the top and the rest."""

    def leaf(upper: Array | None, lower: Array | None) -> Any:
        if upper is None or lower is None:
            return lower if upper is None else upper
        return jnp.concatenate([lower, upper])

    return jax.tree.map(leaf, top, rest, is_leaf=lambda node: node is None)


def _check(boundary: Boundary, params: Params) -> None:
    """Checks that a model of several leaves has both sides."""
    sides = [jax.tree.leaves(side) for side in split(boundary, params)]
    if len(jax.tree.leaves(params)) > 1 and not all(sides):
        where = "above" if sides[0] else "below"
        paths = [keys.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(
            f"all params are {where} the boundary, hybrid_top={boundary.pattern!r} and "
            f"hybrid_layers={boundary.layers}: give others; the params are {', '.join(paths)}"
        )


def _sum(one: Passes, other: Passes) -> Passes:
    return Passes(one.forward + other.forward, one.backward + other.backward)


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of the hybrid."""

    hybrid_top: str = setting(
        "",
        "Regular expression: params that hybrid trains by gradients; unless given, those of an "
        "output, a head or a final norm, else the last layer.",
    )
    hybrid_layers: int = setting(
        0, "How many of the last layers of a stack hybrid trains by gradients too.", least=0
    )
    hybrid_rate: float = setting(
        1.0, "Learning rate of hybrid's top, times that of the rest.", within=positive()
    )


def build(parts: Parts, options: Options) -> Algorithm:
    """Returns the algorithm of `METHOD`."""
    try:
        re.compile(options.hybrid_top)
    except re.error as error:
        raise ValueError(
            f"--hybrid_top={options.hybrid_top} is no regular expression ({error})"
        ) from None
    return hybrid(
        parts.loss_fn,
        parts.estimator,
        parts.optimizer,
        parts.client_optimizer,
        boundary=Boundary(options.hybrid_top, options.hybrid_layers),
        top_rate=options.hybrid_rate,
        local_steps=parts.local_steps,
        clients_at_once=parts.clients_at_once,
    )


METHOD = Method(
    "hybrid",
    build,
    order=1,
    summary="gradients for the top layers, scalars for the rest; both up and down (HO-FL, 2026)",
    options=Options,
    defaults={"momentum": 0.0},
    reads=(
        *("estimator", "perturbation", "rank", "num_perturbations", "smoothing"),
        *("perturbations_at_once", "examples_per_direction"),
    ),
    refuses={
        "perturbation": Refusal(
            "whose top is cut out of the matrices", ("subspace",), "use --perturbation=low_rank"
        )
    },
    noise=lambda options, num_perturbations, local_steps: 1.0,
)
