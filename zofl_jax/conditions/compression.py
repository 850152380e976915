"""Smaller messages: numbers of fewer bits, the largest values alone, signs.

A `Codec` turns an upload into the message that is really sent and back. `compressed` puts one
around any algorithm, so the ledger counts the message as it is: packed bits, scales, and of
top-k both values and indices. Codecs work on the upload as one vector of n numbers, whatever
its tree. Random rounding uses the client's own key. `compressed_broadcast` does the same for what
the server sends, which is what clients that were away receive most of.

    algorithm = compressed(decomfl(...), integers(8))
    algorithm = compressed(fedavg(...), top_k(0.01), error_feedback=True)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from zofl_jax import keys, precision
from zofl_jax.conditions import accounting
from zofl_jax.core import (
    Algorithm,
    Array,
    Batches,
    Broadcast,
    ClientResult,
    Params,
    PRNGKey,
    ServerState,
    Upload,
    Wire,
)


class Layout(NamedTuple):
    """What server and clients know of an upload before it is sent."""

    treedef: jax.tree_util.PyTreeDef
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Message:
    """An encoded upload: the arrays that are sent, and the layout that is agreed on."""

    payload: Any
    layout: Layout = dataclasses.field(metadata={"static": True})


class Codec(NamedTuple):
    """A way to write n numbers down.

    Attributes:
      encode: (own_key, numbers [n]) -> payload, a tree of arrays: what is sent.
      decode: (payload, n) -> numbers [n].
    """

    encode: Callable[[PRNGKey, Array], Any]
    decode: Callable[[Any, int], Array]


class WithResidual(NamedTuple):
    """The memory of a client with error feedback."""

    inner: Any
    residual: Upload  # what was not sent yet


def compressed(algorithm: Algorithm, codec: Codec, *, error_feedback: bool = False) -> Algorithm:
    """Returns the algorithm with its uploads encoded by `codec`; the broadcast stays as it is.

    Args:
      algorithm: any.
      codec: how uploads are written.
      error_feedback: clients keep what an upload lost and add it to their next one (Seide et al.
        2014; Karimireddy et al. 2019, arXiv 1901.09847). Uploads must be trees like the params.

    Raises:
      ValueError: for private clients whose ε is accounted for; while tracing, for error feedback
        on uploads that are not like the params.

    >>> from zofl_jax.algorithms import decomfl
    >>> from zofl_jax.directions import estimators
    >>> import optax
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> inner = decomfl(f, estimators.central_difference(4, 1e-3), optax.sgd(0.1))
    >>> algorithm, key = compressed(inner, integers(8)), jax.random.key(0)
    >>> state = algorithm.init(jnp.zeros(3))
    >>> message = algorithm.client(key, state, (), jnp.ones((1, 3)), key).upload
    >>> {name: str(x.dtype) for name, x in message.payload.items()}
    {'codes': 'uint8', 'scales': 'float32'}
    """
    if isinstance(algorithm.accountant, accounting.ClientAccountant):
        raise ValueError(
            "the ε of private clients is that of their noisy sum, and not of codes of its parts: "
            "leave compressed out, or account for nothing (client_level with delta=None)"
        )

    def encode(own_key: PRNGKey, upload: Upload) -> Message:
        numbers, layout = _flatten(upload)
        return Message(codec.encode(own_key, numbers), layout)

    def decode(message: Message) -> Upload:
        shapes = message.layout.shapes
        return _unflatten(codec.decode(message.payload, _size(shapes)), message.layout)

    def client(
        shared_key: PRNGKey, state: ServerState, memory: Any, batches: Batches, own_key: PRNGKey
    ) -> ClientResult:
        inner = memory.inner if error_feedback else memory
        result = algorithm.client(shared_key, state, inner, batches, own_key)
        # The inner algorithm may draw from own_key itself, and by small numbers for its steps.
        codec_key = jax.random.fold_in(own_key, keys.name_id("codec"))
        if not error_feedback:
            return result._replace(upload=encode(codec_key, result.upload))
        found, expected = (str(jax.tree.structure(t)) for t in (result.upload, memory.residual))
        if found != expected:
            raise ValueError(
                "error feedback needs uploads that are trees like the params, as those of fedavg "
                f"are; this algorithm's are {found}"
            )
        whole = jax.tree.map(lambda u, r: u + r.astype(u.dtype), result.upload, memory.residual)
        message = encode(codec_key, whole)
        residual = jax.tree.map(
            lambda w, sent, r: (w - sent).astype(r.dtype), whole, decode(message), memory.residual
        )
        return ClientResult(message, WithResidual(result.memory, residual), result.stats)

    def aggregate(uploads: Message, weights: Array) -> Broadcast:
        return algorithm.aggregate(jax.vmap(decode)(uploads), weights)

    def init_memory(params: Params) -> Any:
        inner = algorithm.init_memory(params)
        if not error_feedback:
            return inner
        return WithResidual(inner, jax.tree.map(jnp.zeros_like, precision.wide(params)))

    return algorithm._replace(
        client=client,
        aggregate=aggregate,
        init_memory=init_memory,
        wire=Wire(decode, lambda key, numbers, message: encode(key, numbers)),
    )


def compressed_broadcast(algorithm: Algorithm, codec: Codec) -> Algorithm:
    """Returns the algorithm whose broadcast is encoded by `codec`, each leaf on its own.

    Everyone, the server too, makes its step of the numbers as they are read, so nobody drifts apart
    and a replay has what was sent. Put it around everything else.

    Args:
      algorithm: its broadcast is of floating point numbers.
      codec: rounds to the nearest: the server's part has no key of its own.

    Raises:
      ValueError: while tracing, for a broadcast that holds codes or bits already.

    >>> from zofl_jax.algorithms import decomfl
    >>> from zofl_jax.directions import estimators
    >>> import optax
    >>> f = lambda x, batch: 0.5 * jnp.sum(jnp.square(x - batch))
    >>> inner = decomfl(f, estimators.central_difference(4, 1e-3), optax.sgd(0.1))
    >>> algorithm = compressed_broadcast(inner, integers(8, stochastic=False))
    >>> message = algorithm.aggregate(jnp.ones((2, 1, 4)), jnp.ones(2))
    >>> {name: x.shape for name, x in sorted(message.payload[0].items())}
    {'codes': (4,), 'scales': (1,)}
    """

    def aggregate(uploads: Upload, weights: Array) -> Broadcast:
        leaves, treedef = jax.tree.flatten(algorithm.aggregate(uploads, weights))
        key = jax.random.key(0)  # a codec that rounds to the nearest does not read it
        payload = [codec.encode(key, _flatten(leaf)[0]) for leaf in leaves]
        layout = Layout(treedef, tuple(x.shape for x in leaves), tuple(x.dtype for x in leaves))
        return Message(payload, layout)

    def server(key: PRNGKey, state: ServerState, broadcast: Broadcast) -> ServerState:
        layout = broadcast.layout
        leaves = [
            codec.decode(part, math.prod(shape)).reshape(shape).astype(dtype)
            for part, shape, dtype in zip(
                broadcast.payload, layout.shapes, layout.dtypes, strict=True
            )
        ]
        return algorithm.server(key, state, jax.tree.unflatten(layout.treedef, leaves))

    return algorithm._replace(aggregate=aggregate, server=server)


def floats(dtype: Any, *, stochastic: bool = False) -> Codec:
    """Returns the codec of floats of 16 bits: float16 or bfloat16.

    A number too large for the type becomes infinity, which the server rejects: beyond 65,504 in
    float16.

    Args:
      dtype: the type on the wire.
      stochastic: round up or down at random, without bias; to the nearest unless set.

    Raises:
      ValueError: for a type that is not a float of 16 bits.

    >>> codec = floats(jnp.bfloat16)
    >>> codec.decode(codec.encode(jax.random.key(0), jnp.array([1.001, 3.0])), 2).tolist()
    [1.0, 3.0]
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"floats on the wire must be float16 or bfloat16, got {dtype}")

    def encode(own_key: PRNGKey, numbers: Array) -> Array:
        nearest = numbers.astype(dtype)
        if not stochastic:
            return nearest
        error = numbers - nearest.astype(numbers.dtype)
        upwards = jnp.where(error > 0, jnp.inf, -jnp.inf).astype(dtype)
        other = jnp.nextafter(nearest, upwards)
        gap = other.astype(numbers.dtype) - nearest.astype(numbers.dtype)
        # The nearest is closer than half a gap, so the other is taken with the smaller chance.
        chance = jnp.where(error == 0, 0, error / gap)
        moved = jax.random.uniform(own_key, numbers.shape) < chance
        return jnp.where(moved & jnp.isfinite(nearest) & jnp.isfinite(other), other, nearest)

    return Codec(encode, lambda payload, n: payload.astype(jnp.float32))


def integers(
    bits: Literal[2, 4, 8],
    *,
    scale: Literal["max", "norm"] = "max",
    stochastic: bool = True,
    bucket: int | None = None,
) -> Codec:
    """Returns the codec of integers in [−L, L], L = 2^(bits − 1) − 1, and a scale a bucket.

        code = round(L · x / s)

    With s = max |x| it is uniform quantisation, as in FedCOM (Haddadpour et al. 2021, arXiv
    2007.01154); with s = ‖x‖₂ it is QSGD with L levels (Alistarh et al. 2017, arXiv 1610.02132).

    Args:
      bits: of a number; codes are packed into bytes.
      scale: what s is.
      stochastic: round up or down at random, without bias; to the nearest unless set.
      bucket: numbers that share a scale, all of a message unless given.

    Raises:
      ValueError: for arguments out of range.

    >>> codec = integers(4, stochastic=False)
    >>> payload = codec.encode(jax.random.key(0), jnp.array([7.0, -3.1, 0.2]))
    >>> payload["codes"].nbytes, codec.decode(payload, 3).tolist()
    (2, [7.0, -3.0, 0.0])
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits of an integer must be 2, 4 or 8, got {bits}")
    if scale not in ("max", "norm"):
        raise ValueError(f"scale must be 'max' or 'norm', got {scale!r}")
    if bucket is not None and bucket < 1:
        raise ValueError(f"a bucket must hold at least 1 number, got {bucket}")
    levels = 2 ** (bits - 1) - 1

    def encode(own_key: PRNGKey, numbers: Array) -> dict[str, Array]:
        rows = _rows(numbers, bucket)
        length = jnp.inf if scale == "max" else 2
        scales = jnp.linalg.norm(rows, length, axis=1).astype(jnp.float32)
        shares = rows / jnp.where(scales > 0, scales, 1)[:, None] * levels
        if stochastic:
            shares = jnp.floor(shares + jax.random.uniform(own_key, rows.shape))
        codes = jnp.clip(jnp.round(shares), -levels, levels).reshape(-1)[: numbers.size]
        return {"codes": pack((codes + levels).astype(jnp.uint8), bits), "scales": scales}

    def decode(payload: dict[str, Array], n: int) -> Array:
        codes = unpack(payload["codes"], bits, n).astype(jnp.float32) - levels
        rows = _rows(codes, bucket) * (payload["scales"] / levels)[:, None]
        return rows.reshape(-1)[:n]

    return Codec(encode, decode)


def top_k(fraction: float) -> Codec:
    """Returns the codec of the largest numbers alone: values, float32, and their indices.

    An index takes 2 bytes where there are at most 65,536 numbers and 4 elsewhere. Biased: use
    it with error feedback (Stich et al. 2018, arXiv 1809.07599).

    Args:
      fraction: the share that is sent, in (0, 1]; at least one number.

    Raises:
      ValueError: for a fraction out of range.

    >>> codec = top_k(0.5)
    >>> codec.decode(codec.encode(jax.random.key(0), jnp.array([1.0, -3.0, 2.0, 0.0])), 4).tolist()
    [0.0, -3.0, 2.0, 0.0]
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of top-k must be in (0, 1], got {fraction}")

    def encode(own_key: PRNGKey, numbers: Array) -> dict[str, Array]:
        del own_key
        kept = max(1, round(fraction * numbers.size))
        _, indices = jax.lax.top_k(jnp.abs(numbers), kept)
        width = jnp.uint16 if numbers.size <= 2**16 else jnp.uint32
        return {
            "values": numbers[indices].astype(jnp.float32),
            "indices": indices.astype(width),
        }

    def decode(payload: dict[str, Array], n: int) -> Array:
        indices = payload["indices"].astype(jnp.int32)
        return jnp.zeros(n, jnp.float32).at[indices].set(payload["values"])

    return Codec(encode, decode)


def signs(*, magnitude: bool = True) -> Codec:
    """Returns the codec of one bit a number, and the mean magnitude.

    With the magnitude it is scaled sign, to be used with error feedback (Karimireddy et al. 2019,
    arXiv 1901.09847); without it signSGD, whose numbers are ±1 (Bernstein et al. 2018, arXiv
    1802.04434): the mean over the cohort, or `majority` of it, is then a vote.

    >>> codec = signs()
    >>> codec.decode(codec.encode(jax.random.key(0), jnp.array([1.0, -3.0])), 2).tolist()
    [2.0, -2.0]
    """

    def encode(own_key: PRNGKey, numbers: Array) -> dict[str, Array]:
        del own_key
        bits = pack((numbers < 0).astype(jnp.uint8), 1)
        mean = jnp.mean(jnp.abs(numbers)).astype(jnp.float32)
        return {"bits": bits, "magnitude": mean} if magnitude else {"bits": bits}

    def decode(payload: dict[str, Array], n: int) -> Array:
        directions = 1 - 2 * unpack(payload["bits"], 1, n).astype(jnp.float32)
        return directions * payload.get("magnitude", 1.0)

    return Codec(encode, decode)


def pack(codes: Array, bits: int) -> Array:
    """Returns n codes below 2^bits packed into bytes, uint8 [⌈n · bits / 8⌉].

    Args:
      codes: uint8 [n].
      bits: of a code: 1, 2, 4 or 8.

    >>> pack(jnp.array([1, 0, 1, 1], jnp.uint8), 1).tolist()
    [13]
    """
    in_a_byte = 8 // bits
    rows = _rows(codes, in_a_byte)
    shifts = bits * jnp.arange(in_a_byte, dtype=jnp.uint8)
    return jnp.sum(rows << shifts, axis=1, dtype=jnp.uint8)


def unpack(packed: Array, bits: int, n: int) -> Array:
    """Returns the n codes that `pack` packed, uint8 [n].

    >>> unpack(jnp.array([13], jnp.uint8), 1, 4).tolist()
    [1, 0, 1, 1]
    """
    shifts = bits * jnp.arange(8 // bits, dtype=jnp.uint8)
    codes = (packed[:, None] >> shifts) & (2**bits - 1)
    return codes.reshape(-1)[:n].astype(jnp.uint8)


def _rows(numbers: Array, width: int | None) -> Array:
    """Returns the numbers in rows of this width, padded with zeros; in one row if None."""
    width = numbers.size if width is None else width
    padding = -numbers.size % width
    return jnp.pad(numbers, (0, padding)).reshape(-1, width)


def _flatten(tree: Upload) -> tuple[Array, Layout]:
    leaves, treedef = jax.tree.flatten(tree)
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"messages must be real floating point to be compressed, got a leaf of {leaf.dtype}"
            )
    layout = Layout(treedef, tuple(x.shape for x in leaves), tuple(x.dtype for x in leaves))
    dtype = jnp.result_type(jnp.float32, *leaves)
    return jnp.concatenate([x.reshape(-1).astype(dtype) for x in leaves]), layout


def _unflatten(numbers: Array, layout: Layout) -> Upload:
    leaves, at = [], 0
    for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True):
        size = math.prod(shape)
        leaves.append(numbers[at : at + size].reshape(shape).astype(dtype))
        at += size
    return jax.tree.unflatten(layout.treedef, leaves)


def _size(shapes: tuple[tuple[int, ...], ...]) -> int:
    return sum(math.prod(shape) for shape in shapes)
