"""Differential privacy for messages of a few scalars, its accounting, and secure aggregation.

Two units of privacy:

- **a client** (`client_level`): each client clips its whole upload u_i, K·P scalars, to the
  norm C and adds its share of the noise, so that the sum over the M clients of a round is
  Σ_i clip(u_i, C) + N(0, σ²C²). Noise of clients, and not of the server, is what a secure sum
  leaves the server with; its key is the client's own.
- **an example** (`example_level`, DPZero): each example's P finite
  differences are clipped to the norm C before the mean over the batch of B, and N(0, σ²C²/B²)
  is added, step after step; a client goes on with the noisy scalars, as everything after them
  must.

What is released are scalars; the directions come from public seeds and what the server does
with the scalars is post-processing, so nothing depends on the model's dimension.

ε is by Rényi accounting of dp-accounting, for one client (or example) *replaced* by another:
the sampling is without replacement and of fixed size, and replacing moves a clipped sum by 2C,
twice the clipping norm. The cohort must be unknown to the adversary for its sampling to count.

Ref: Zhang et al., "DPZero", ICML 2024 (arXiv 2310.09639); McMahan et al., ICLR 2018
(arXiv 1710.06963) for clients; Wang, Balle, Kasiviswanathan, AISTATS 2019 for the sampling.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
    PRNGKey,
    ServerState,
    Upload,
    Wire,
)
from zofl_jax.directions.estimators import Estimate, Estimator


def client_level(
    algorithm: Algorithm, clip: float, noise_multiplier: float, clients_per_round: int
) -> Algorithm:
    """Returns the algorithm whose clients clip their upload and add their share of the noise.

    Each of the M clients adds N(0, σ²C²/M). If only m of them are heard the noise of the sum
    is σ²C²·m/M, which `client_epsilon` takes into account.

    Args:
      algorithm: its broadcast must be the uniform mean of floating point uploads, and nothing may
        be made of the noisy uploads but that mean: ε is not that of compressed ones.
      clip: C > 0, the norm of an upload over all its leaves.
      noise_multiplier: σ >= 0.
      clients_per_round: M >= 1.

    Raises:
      ValueError: for numbers out of range.
    """
    _check(clip, noise_multiplier)
    if clients_per_round < 1:
        raise ValueError(f"clients_per_round must be >= 1, got {clients_per_round}")
    deviation = noise_multiplier * clip / math.sqrt(clients_per_round)

    def client(
        shared_key: PRNGKey, state: ServerState, memory: Any, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        computed, noisy = jax.random.split(own_key)
        result = algorithm.client(shared_key, state, memory, batches, computed)
        clipped = aggregation.clip_norm(result.upload, clip)
        return result._replace(upload=_with_noise(noisy, clipped, deviation))

    return algorithm._replace(client=client)


def example_level(
    make: Callable[[Callable[[Estimator], Estimator]], Algorithm],
    clip: float,
    noise_multiplier: float,
    batch_size: int,
) -> Algorithm:
    """Returns the algorithm whose clients clip every example's scalars and add noise each step.

        example_level(lambda private: decomfl(loss, private(estimator), optimizer), 1.0, 2.0, 32)

    The noise N(0, (σC/B)²) is drawn anew in each local step, from the client's own key, and the
    client goes on with the noisy scalars.

    Args:
      make: private -> the algorithm with the estimator `private(estimator)`, which is made
        without `clients_at_once` and whose loss is a mean over examples.
      clip: C > 0, the norm of an example's P scalars, in loss per unit length.
      noise_multiplier: σ >= 0.
      batch_size: B >= 1.

    Raises:
      ValueError: for numbers out of range.
    """
    _check(clip, noise_multiplier)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    deviation = noise_multiplier * clip / batch_size

    def private(estimator: Estimator) -> Estimator:
        def measure(
            loss_fn: LossFn, key: PRNGKey, round_index: Array, params: Params, step: _Step
        ) -> Estimate:
            found = _clipped(estimator, clip, loss_fn, key, round_index, params, step.batch)
            return found._replace(scalars=_with_noise(step.noise, found.scalars, deviation))

        return estimator._replace(measure=measure)

    algorithm = make(private)

    def client(
        shared_key: PRNGKey, state: ServerState, memory: Any, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        # Not from the steps' shared keys: FedKSeed may draw one seed, and so one key, twice.
        computed, noise = jax.random.split(own_key)
        steps = _Step(batches, jax.random.split(noise, algorithm.local_steps))
        return algorithm.client(shared_key, state, memory, steps, computed)

    return algorithm._replace(client=client)


class _Step(NamedTuple):
    """What stands for a batch where examples are private."""

    batch: Batch
    noise: PRNGKey  # of this local step's noise, the client's own


def _clipped(
    estimator: Estimator,
    clip: float,
    loss_fn: LossFn,
    key: PRNGKey,
    round_index: Array,
    params: Params,
    batch: Batch,
) -> Estimate:
    """Returns the mean over a batch of each example's scalars, clipped to a norm."""

    def of_one(example: Batch) -> Estimate:
        alone = jax.tree.map(lambda x: x[None], example)
        found = estimator.measure(loss_fn, key, round_index, params, alone)
        return found._replace(scalars=aggregation.clip_norm(found.scalars, clip))

    each = jax.vmap(of_one)(batch)
    return Estimate(jnp.mean(each.scalars, axis=0), jnp.mean(each.loss))


def client_epsilon(
    contributors: Mapping[int, int],
    *,
    noise_multiplier: float,
    clients_per_round: int,
    num_clients: int,
    delta: float,
) -> float:
    """Returns the ε that rounds of `client_level` have spent, for one client replaced.

    Args:
      contributors: how many rounds had how many clients in their mean; rounds without any
        release nothing.
      noise_multiplier: σ.
      clients_per_round: M, the cohort's size.
      num_clients: N, the population; M of N are drawn without replacement.
      delta: δ in (0, 1).

    Raises:
      ValueError: for numbers out of range.
      ImportError: without the package dp-accounting.
    """
    _check_delta(delta)
    parts = []
    for count, rounds in sorted(contributors.items()):
        if not count:
            continue
        # The noise of m clients' shares, against a sum that one client moves by 2C.
        effective = noise_multiplier * math.sqrt(count / clients_per_round) / 2
        parts.append((effective, clients_per_round, num_clients, rounds))
    return _epsilon(parts, delta)


def example_epsilon(
    steps: int, *, noise_multiplier: float, batch_size: int, num_examples: int, delta: float
) -> float:
    """Returns the ε that steps of one client have spent, for one of its examples replaced.

    Args:
      steps: local steps that the client has done: K a round that it took part in.
      noise_multiplier: σ.
      batch_size: B, drawn without replacement from
      num_examples: n, what the client owns.
      delta: δ in (0, 1).

    Raises:
      ValueError: for numbers out of range.
      ImportError: without the package dp-accounting.
    """
    _check_delta(delta)
    return _epsilon([(noise_multiplier / 2, batch_size, num_examples, steps)], delta)


def bit_epsilon(bits: int, *, epsilon: float, delta: float) -> float:
    """Returns the ε at δ that private bits of one client have spent, see `feedsign`.

    Each bit is flipped with probability 1 / (1 + exp ε₀), randomised response, and is known to
    the server: sampling does not help.

    Args:
      bits: that the client has sent: P a round that it took part in.
      epsilon: ε₀ > 0 of each.
      delta: δ in (0, 1).

    Raises:
      ValueError: for numbers out of range.
      ImportError: without the package dp-accounting.
    """
    _check_delta(delta)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"the epsilon of a bit must be positive and finite, got {epsilon}")
    if not bits:
        return 0.0
    # The library's parameter: how often the answer is drawn at random, half of which are flips.
    event = _library().RandomizedResponseDpEvent(2 / (1 + math.exp(epsilon)), 2)
    return min(bits * epsilon, _composed([(event, bits)], delta))


def fixed_point(
    algorithm: Algorithm, bits: int, largest: float, clients_per_round: int
) -> Algorithm:
    """Returns the algorithm whose uploads are integers mod 2³² that only their sum is needed of.

    A number u, clipped to ±`largest`, is sent as round(u · 2^bits) mod 2³², one uint32. The sum
    over the cohort, mod 2³² too, is all that a protocol of secure aggregation (Bonawitz et al.,
    CCS 2017) hands to the server, and tells the uniform mean up to 2^−(bits+1). The `mean` of
    half-precision uploads is rounded to them once more.

    A server that sees the sum alone can't reject a message or weigh it: absent clients send 0,
    and how many are there is known. A number that is not finite is sent as 0 too.

    Args:
      algorithm: its broadcast must be the uniform mean of floating point uploads.
      bits: of the fraction, >= 0.
      largest: the largest number that can be sent, positive.
      clients_per_round: M; the sum of M such numbers must not overflow.

    Raises:
      ValueError: for numbers out of range, or if M · (largest · 2^bits + 1) reaches 2³¹.
    """
    if bits < 0:
        raise ValueError(f"the bits of a fraction must be >= 0, got {bits}")
    if not 0 < largest < math.inf:
        raise ValueError(f"the largest number that can be sent must be positive, got {largest}")
    if clients_per_round * (largest * 2**bits + 1) >= 2**31:
        raise ValueError(
            f"the sum of {clients_per_round} numbers up to {largest} with {bits} bits of fraction "
            "overflows 32 bits: take fewer bits or a smaller largest number"
        )

    def encoded(u: Array) -> Array:
        wide = u.astype(jnp.promote_types(u.dtype, jnp.float32))
        wide = jnp.where(jnp.isfinite(wide), jnp.clip(wide, -largest, largest), 0)
        return jax.lax.bitcast_convert_type(
            jnp.round(wide * 2.0**bits).astype(jnp.int32), jnp.uint32
        )

    def decoded(u: Array) -> Array:
        return jax.lax.bitcast_convert_type(u, jnp.int32).astype(jnp.float32) / 2.0**bits

    def client(
        shared_key: PRNGKey, state: ServerState, memory: Any, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        result = algorithm.client(shared_key, state, memory, batches, own_key)
        return result._replace(upload=jax.tree.map(encoded, result.upload))

    def written(key: PRNGKey, numbers: Any, upload: Upload) -> Upload:
        return jax.tree.map(encoded, numbers)

    def aggregate(uploads: Upload, weights: Array) -> Broadcast:
        count = jnp.maximum(jnp.sum(weights > 0), 1)

        def leaf(u: Array) -> Array:
            here = (weights > 0).reshape(-1, *(1,) * (u.ndim - 1))
            total = jnp.sum(jnp.where(here, u, jnp.zeros_like(u)), axis=0, dtype=jnp.uint32)
            signed = jax.lax.bitcast_convert_type(total, jnp.int32)
            # Quotient and remainder apart: float32 has not the digits of a large sum.
            whole, rest = signed // count, signed % count
            mean = whole.astype(jnp.float32) + rest.astype(jnp.float32) / count
            return mean / 2.0**bits

        return jax.tree.map(leaf, uploads)

    wire = Wire(lambda upload: jax.tree.map(decoded, upload), written)
    return algorithm._replace(client=client, aggregate=aggregate, wire=wire)


def _with_noise(key: PRNGKey, tree: Any, deviation: float) -> Any:
    if not deviation:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        (
            x + deviation * jax.random.normal(k, x.shape, jnp.promote_types(x.dtype, jnp.float32))
        ).astype(x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def _epsilon(parts: list[tuple[float, int, int, int]], delta: float) -> float:
    """Returns ε of (noise multiplier, sample, population, times), each of sensitivity 1."""
    dp = _library()
    if any(times and not multiplier for multiplier, _, _, times in parts):
        return math.inf
    events = []
    for multiplier, sample, population, times in parts:
        event = dp.GaussianDpEvent(multiplier)
        if sample < population:
            event = dp.SampledWithoutReplacementDpEvent(population, sample, event)
        if times:
            events.append((event, times))
    return _composed(events, delta)


def _composed(events: list[tuple[Any, int]], delta: float) -> float:
    """Returns ε of events of dp-accounting, each so many times."""
    if not events:
        return 0.0
    dp = _library()
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    for event, times in events:
        accountant.compose(event, times)
    return float(accountant.get_epsilon(delta))


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise ImportError(
            "accounting for privacy needs the package dp-accounting; "
            "pip install 'zofl-jax[privacy]'"
        ) from None
    return dp_accounting


def _check(clip: float, noise_multiplier: float) -> None:
    if not 0 < clip < math.inf:
        raise ValueError(f"the clipping norm must be positive and finite, got {clip}")
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"the noise multiplier must be >= 0 and finite, got {noise_multiplier}")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
