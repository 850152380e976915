"""Differential privacy for messages of a few scalars, and secure aggregation.

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

The ε of both is `accounting.py`'s: given δ, the algorithm carries an accountant.

Ref: Zhang et al., "DPZero", ICML 2024 (arXiv 2310.09639); McMahan et al., ICLR 2018
(arXiv 1710.06963) for clients.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zofl_jax.conditions import accounting, aggregation
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
    algorithm: Algorithm,
    clip: float,
    noise_multiplier: float,
    clients_per_round: int,
    *,
    delta: float | None,
) -> Algorithm:
    """Returns the algorithm whose clients clip their upload and add their share of the noise.

    Each of the M clients adds N(0, σ²C²/M). If only m of them are heard the noise of the sum
    is σ²C²·m/M, which `accounting.client_epsilon` takes into account.

    Args:
      algorithm: its broadcast must be the uniform mean of floating point uploads, and nothing may
        be made of the noisy uploads but that mean: ε is not that of compressed ones.
      clip: C > 0, the norm of an upload over all its leaves.
      noise_multiplier: σ >= 0.
      clients_per_round: M >= 1, the cohort's size; a simulation of another one is refused.
      delta: δ in (0, 1) of the ε that simulations report; None reports none, and needs no package.

    Raises:
      ValueError: for numbers out of range, uploads that are not plain numbers or late ones, or
        an algorithm that is private already.
    """
    _check(clip, noise_multiplier)
    _check_plain(algorithm, "client_level")
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

    expects = algorithm.expects.also(clients_per_round=clients_per_round, weighting="uniform")
    noisy_algorithm = algorithm._replace(client=client, expects=expects)
    return accounting.accounted(
        noisy_algorithm,
        None if delta is None else accounting.ClientAccountant(noise_multiplier, delta),
    )


def example_level(
    make: Callable[[Callable[[Estimator], Estimator]], Algorithm],
    clip: float,
    noise_multiplier: float,
    batch_size: int,
    *,
    delta: float | None,
) -> Algorithm:
    """Returns the algorithm whose clients clip every example's scalars and add noise each step.

        example_level(
            lambda private: decomfl(loss, private(estimator), optimizer), 1.0, 2.0, 32, delta=1e-5
        )

    The noise N(0, (σC/B)²) is drawn anew in each local step, from the client's own key, and the
    client goes on with the noisy scalars.

    Args:
      make: private -> the algorithm with the estimator `private(estimator)`, which is made
        without `clients_at_once` and whose loss is a mean over examples.
      clip: C > 0, the norm of an example's P scalars, in loss per unit length.
      noise_multiplier: σ >= 0.
      batch_size: B >= 1; a simulation of other batches is refused.
      delta: δ in (0, 1) of the ε that simulations report; None reports none, and needs no package.

    Raises:
      ValueError: for numbers out of range, or an algorithm that is private already.
    """
    _check(clip, noise_multiplier)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    deviation = noise_multiplier * clip / batch_size

    def private(estimator: Estimator) -> Estimator:
        if estimator.groups > 1:
            raise ValueError(
                f"an example's scalars are those along all directions, and this estimator has "
                f"{estimator.groups} groups of examples with directions of their own: take 1"
            )

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

    noisy = algorithm._replace(client=client, expects=algorithm.expects.also(batch_size=batch_size))
    return accounting.accounted(
        noisy, None if delta is None else accounting.ExampleAccountant(noise_multiplier, delta)
    )


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
      clients_per_round: M; the sum of M such numbers must not overflow. A simulation of another
        cohort is refused, and so is one with a weighted mean.

    Raises:
      ValueError: for numbers out of range, if M · (largest · 2^bits + 1) reaches 2³¹, or for
        uploads that are not plain numbers or late ones.
    """
    _check_plain(algorithm, "fixed_point")
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
    expects = algorithm.expects.also(clients_per_round=clients_per_round, weighting="uniform")
    return algorithm._replace(client=client, aggregate=aggregate, wire=wire, expects=expects)


def _check_plain(algorithm: Algorithm, name: str) -> None:
    if algorithm.wire is not None:
        raise ValueError(
            f"{name} needs uploads that are plain numbers, and this algorithm's are codes, bits or "
            f"integers: put {name} around the algorithm first, or leave one of them out"
        )
    if algorithm.late_uploads:
        raise ValueError(
            f"{name} needs a uniform mean of one round's uploads, and this algorithm weighs late "
            "ones: leave with_late_uploads out"
        )


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


def _check(clip: float, noise_multiplier: float) -> None:
    if not 0 < clip < math.inf:
        raise ValueError(f"the clipping norm must be positive and finite, got {clip}")
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"the noise multiplier must be >= 0 and finite, got {noise_multiplier}")
