"""FeedSign: one bit each way (Cai et al. 2025).

Every client measures one directional derivative along the shared direction and uploads its
sign; the server broadcasts the majority's sign, and everyone steps by it:

    client i: b_i = sign g_i;   server: b = sign Σ_i w_i b_i;   x ← optimiser(x, b z)

With P directions a round each message has P bits, packed into ⌈P/8⌉ bytes. The private form
flips each bit with probability 1 / (1 + exp ε) before it is sent (randomised response, Warner
1965), which is ε-differentially private for each bit without trust in the server. It is not the
DP-FeedSign of the paper: there a trusted server sees the true bits and draws the one it broadcasts
at random, by an exponential mechanism on the vote. That perturbs the vote alone, this form the bit
of every client, which protects from the server too.
Ref: arXiv 2501.17610.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from zofl_jax.algorithms.decomfl import decomfl
from zofl_jax.algorithms.method import Method, Parts
from zofl_jax.conditions import accounting, compression
from zofl_jax.core import (
    Algorithm,
    Array,
    Batches,
    Broadcast,
    ClientResult,
    LossFn,
    PRNGKey,
    ServerState,
    Upload,
    Wire,
)
from zofl_jax.directions.estimators import Estimator
from zofl_jax.settings import setting


def feedsign(
    loss_fn: LossFn,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    *,
    epsilon: float | None = None,
    delta: float | None = None,
) -> Algorithm:
    """Returns FeedSign as an `Algorithm`; its messages are packed bits, uint8 [⌈P/8⌉].

    A set bit is a negative sign, and a tie is positive.

    Args:
      loss_fn: (params, batch) -> mean loss, [].
      estimator: how P scalars are measured; P = 1 in the paper.
      optimizer: applied to (1/P) Σ_p ±z_p. It steps by the sign alone, so its learning rate is
        a length in units of the params, whatever the slope.
      epsilon: ε > 0 of each bit, 0 < ε; bits are sent as they are unless given. One round
        spends at most P ε.
      delta: δ in (0, 1) at which simulations report the ε of all rounds; they report none unless
        given.

    Raises:
      ValueError: unless ε is positive and δ in (0, 1), or for δ without ε.

    >>> from zofl_jax.directions import estimators
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> algorithm = feedsign(f, estimators.central_difference(1, 1e-3), optax.sgd(0.1))
    >>> state, key = algorithm.init(jnp.zeros(3)), jax.random.key(0)
    >>> algorithm.client(key, state, (), jnp.ones((1, 3)), key).upload.nbytes
    1
    """
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if delta is not None and epsilon is None:
        raise ValueError(f"delta={delta} has no effect without epsilon: leave it out")
    inner = decomfl(loss_fn, estimator, optimizer)
    count = estimator.num_perturbations

    def client(
        shared_key: PRNGKey, state: ServerState, memory: tuple, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        result = inner.client(shared_key, state, memory, batches, own_key)
        negative = result.upload[0] < 0
        if epsilon is not None:
            negative ^= jax.random.bernoulli(own_key, 1 / (1 + math.exp(epsilon)), (count,))
        return result._replace(upload=compression.pack(negative.astype(jnp.uint8), 1))

    def aggregate(uploads: Upload, weights: Array) -> Broadcast:
        votes = weights @ jax.vmap(_signs)(uploads)
        return compression.pack((votes < 0).astype(jnp.uint8), 1)

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        return inner.server(key, state, _signs(broadcast)[None])

    def _signs(packed: Array) -> Array:
        return 1 - 2 * compression.unpack(packed, 1, count).astype(jnp.float32)

    def written(key: PRNGKey, numbers: Array, upload: Upload) -> Upload:
        return compression.pack((numbers < 0).astype(jnp.uint8), 1)

    plain = Algorithm(
        inner.init,
        client,
        aggregate,
        server,
        local_steps=1,
        passes=inner.passes,
        wire=Wire(_signs, written),
    )
    if epsilon is None or delta is None:
        return plain
    return accounting.accounted(plain, accounting.BitAccountant(count, epsilon, delta))


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of FeedSign."""

    feedsign_epsilon: float | None = setting(
        None, "ε of a bit in the private form of feedsign; not private unless given."
    )


def build(parts: Parts, options: Options) -> Algorithm:
    """Returns the algorithm of `METHOD`."""
    private = options.feedsign_epsilon is not None
    return feedsign(
        parts.loss_fn,
        parts.estimator,
        parts.optimizer,
        epsilon=options.feedsign_epsilon,
        delta=parts.delta if private else None,
    )


METHOD = Method(
    "feedsign",
    build,
    order=0,
    summary="the sign of each directional derivative, a bit up and down (Cai et al. 2025)",
    options=Options,
    defaults={"num_perturbations": 1, "momentum": 0.0},
    fixed={"local_steps": 1},
    private=lambda options: options.feedsign_epsilon is not None,
)
