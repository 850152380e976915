"""What malicious clients send in place of what they should.

An attack is (key, uploads [C, ...], malicious [C], present [C]) -> uploads. It changes rows of
`malicious` alone, and knows everything: "honest" below are the uploads of all clients that are
there and not malicious, the strongest case of each paper. A data attack maps the batches a
malicious client trains on; then it follows the protocol.

Attacks are sized by the honest uploads, so that they mean the same for a few scalars and for
whole models. On compressed uploads, and on bits, they act on what the server makes of them
(`on_wire`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zofl_jax import sampling
from zofl_jax.conditions import aggregation
from zofl_jax.core import Array, Batches, PRNGKey, Upload, Wire

Attack = Callable[[PRNGKey, Upload, Array, Array], Upload]
DataAttack = Callable[[Batches], Batches]


class Adversary(NamedTuple):
    """A fixed set of malicious clients, and what they do."""

    malicious: Array  # bool [num_clients]
    attack: Attack | None = None
    data_attack: DataAttack | None = None


def drawn(key: PRNGKey, num_clients: int, share: float) -> Array:
    """Returns who is malicious: round(share · num_clients) clients, uniform; bool [num_clients].

    Args:
      key: `keys.RootKeys.adversary`.
      num_clients: the size of the population.
      share: in [0, 1].

    Raises:
      ValueError: for a share out of range.

    >>> int(drawn(jax.random.key(0), 10, 0.3).sum())
    3
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of malicious clients must be in [0, 1], got {share}")
    count = round(share * num_clients)
    nobody = jnp.zeros(num_clients, bool)
    return nobody.at[sampling.subset(key, num_clients, count)].set(True) if count else nobody


def on_wire(attack: Attack, wire: Wire | None) -> Attack:
    """Returns the attack on uploads written as `wire` says, itself if they are plain numbers.

    It sees the numbers that the server reads from all uploads; malicious clients write down what
    it makes of theirs. The others' uploads stay as they are.

    >>> wire = Wire(lambda u: 1.0 - 2.0 * u, lambda key, x, u: (x < 0).astype(u.dtype))
    >>> attack, bits = on_wire(sign_flip(), wire), jnp.array([1, 1, 0], jnp.uint8)
    >>> attack(jax.random.key(0), bits, jnp.array([True, False, True]), jnp.ones(3, bool)).tolist()
    [0, 1, 1]
    """
    if wire is None:
        return attack

    def written(key: PRNGKey, uploads: Upload, malicious: Array, present: Array) -> Upload:
        attack_key, write_key = jax.random.split(key)
        numbers = attack(attack_key, jax.vmap(wire.numbers)(uploads), malicious, present)
        write_keys = jax.random.split(write_key, len(malicious))
        return _replaced(uploads, jax.vmap(wire.written)(write_keys, numbers, uploads), malicious)

    return written


def gaussian(scale: float = 10.0) -> Attack:
    """Returns the attack of noise N(0, (scale · r)²), r the honest uploads' root mean square.

    Ref: Blanchard et al., NeurIPS 2017 (arXiv 1703.02757), section 5.
    """

    def attack(key: PRNGKey, uploads: Upload, malicious: Array, present: Array) -> Upload:
        honest = _honest(malicious, present)
        leaves, treedef = jax.tree.flatten(_floating(uploads))
        keys = jax.random.split(key, len(leaves))
        square = _average(jax.tree.unflatten(treedef, [jnp.square(u) for u in leaves]), honest)
        noise = [
            scale * jnp.sqrt(jnp.mean(s)) * jax.random.normal(k, u.shape, u.dtype)
            for k, u, s in zip(keys, leaves, jax.tree.leaves(square), strict=True)
        ]
        return _replaced(uploads, jax.tree.unflatten(treedef, noise), malicious)

    return attack


def sign_flip(factor: float = 1.0) -> Attack:
    """Returns the attack that sends −factor times one's own honest upload."""
    return scaling(-factor)


def scaling(factor: float = 10.0) -> Attack:
    """Returns the attack that sends `factor` times one's own honest upload.

    Ref: Bagdasaryan et al., AISTATS 2020 (arXiv 1807.00459), "model replacement".
    """

    def attack(key: PRNGKey, uploads: Upload, malicious: Array, present: Array) -> Upload:
        del key, present
        return _replaced(uploads, jax.tree.map(lambda u: factor * u, _floating(uploads)), malicious)

    return attack


def alie(deviations: float | None = None) -> Attack:
    """Returns "a little is enough": all send mean − z · standard deviation of the honest.

    Ref: Baruch et al., NeurIPS 2019 (arXiv 1902.06156), Algorithm 3.

    Args:
      deviations: z, that of `alie_deviations` unless given.
    """

    def attack(key: PRNGKey, uploads: Upload, malicious: Array, present: Array) -> Upload:
        del key
        honest = _honest(malicious, present)
        n, m = jnp.sum(present), jnp.sum(malicious & present)
        z = alie_deviations(n, m) if deviations is None else jnp.asarray(deviations)
        mean = _average(_floating(uploads), honest)
        apart = jax.tree.map(lambda u, a: jnp.square(u - a), uploads, mean)
        deviation = jax.tree.map(jnp.sqrt, _average(apart, honest))
        sent = jax.tree.map(lambda a, d: a - z.astype(a.dtype) * d, mean, deviation)
        return _replaced(uploads, sent, malicious)

    return attack


def alie_deviations(n: Array | int, m: Array | int) -> Array:
    """Returns z of `alie` with n clients there and m of them malicious, [].

    It is the largest for which a median still has to count them as honest,
    Φ⁻¹((n − m − s) / (n − m)) with s = ⌊n/2 + 1⌋ − m, and 0 at least: where few are malicious
    they can do no better than to send the honest mean.

    >>> [round(float(alie_deviations(20, m)), 2) for m in (2, 6)]
    [0.0, 0.37]
    """
    supporters = n // 2 + 1 - m
    share = (n - m - supporters) / jnp.maximum(n - m, 1)
    return jax.scipy.special.ndtri(jnp.clip(share, 0.5, 0.999))


def inner_product(factor: float = 2.0) -> Attack:
    """Returns inner-product manipulation: all send −factor times the honest mean.

    The broadcast then points away from the descent if factor > (n − m) / m under the mean.
    Ref: Xie, Koyejo, Gupta, UAI 2019 (arXiv 1903.03936).
    """

    def attack(key: PRNGKey, uploads: Upload, malicious: Array, present: Array) -> Upload:
        del key
        mean = _average(_floating(uploads), _honest(malicious, present))
        return _replaced(uploads, jax.tree.map(lambda a: -factor * a, mean), malicious)

    return attack


def trim(factor: float = 2.0) -> Attack:
    """Returns the attack on trimmed means: just beyond the honest, on the wrong side.

    Where the honest mean is positive, numbers are uniform between the honest minimum and its
    multiple further down, by `factor` (or its quotient, where the minimum is positive); where
    it is negative, the same above the maximum.
    Ref: Fang et al., USENIX Security 2020 (arXiv 1911.11815), section 4.3.

    Args:
      factor: b > 1.

    Raises:
      ValueError: for a factor that is not above 1.
    """
    if not factor > 1:
        raise ValueError(f"the factor of the trim attack must be above 1, got {factor}")

    def attack(key: PRNGKey, uploads: Upload, malicious: Array, present: Array) -> Upload:
        honest = _honest(malicious, present)
        leaves, treedef = jax.tree.flatten(_floating(uploads))
        keys = jax.random.split(key, len(leaves))

        def leaf(key: PRNGKey, u: Array) -> Array:
            counted = aggregation.beside(honest, u)
            least = jnp.min(jnp.where(counted, u, jnp.inf), axis=0)
            most = jnp.max(jnp.where(counted, u, -jnp.inf), axis=0)
            below = jnp.where(least > 0, least / factor, least * factor)
            above = jnp.where(most > 0, most * factor, most / factor)
            rising = _average(u, honest) > 0
            near, far = jnp.where(rising, least, most), jnp.where(rising, below, above)
            sent = near + jax.random.uniform(key, u.shape, u.dtype) * (far - near)
            return jnp.where(jnp.any(honest), sent, u)

        sent = [leaf(key, u) for key, u in zip(keys, leaves, strict=True)]
        return _replaced(uploads, jax.tree.unflatten(treedef, sent), malicious)

    return attack


def krum(halvings: int = 30) -> Attack:
    """Returns the attack on Krum: the longest step the wrong way that Krum still chooses.

    All send −λ · sign(honest mean). λ starts at the paper's upper bound and is halved until
    Krum, told of m bad clients, takes one of them, `halvings` times at most.
    Ref: Fang et al., USENIX Security 2020 (arXiv 1911.11815), section 4.2.

    Args:
      halvings: >= 1.

    Raises:
      ValueError: for a number below 1.
    """
    if halvings < 1:
        raise ValueError(f"halvings must be >= 1, got {halvings}")

    def attack(key: PRNGKey, uploads: Upload, malicious: Array, present: Array) -> Upload:
        del key
        honest = _honest(malicious, present)
        here = present.astype(jnp.float32)
        direction = jax.tree.map(jnp.sign, _average(_floating(uploads), honest))
        m = jnp.sum(malicious & present)

        def sent(size: Array) -> Upload:
            wrong = jax.tree.map(lambda s: -size.astype(s.dtype) * s, direction)
            return _replaced(uploads, wrong, malicious & present)

        def deceived(size: Array) -> Array:
            return jnp.asarray(malicious)[jnp.argmin(aggregation.krum_scores(sent(size), here, m))]

        def body(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            return carry[0] + 1, carry[1] / 2

        def going_on(carry: tuple[Array, Array]) -> Array:
            return (carry[0] < halvings) & (m > 0) & ~deceived(carry[1])

        start = _largest_step(uploads, honest, m)
        return sent(jax.lax.while_loop(going_on, body, (jnp.zeros((), jnp.int32), start))[1])

    return attack


def constant(value: float) -> Attack:
    """Returns the attack that sends one value everywhere: NaN, infinity, or out of range.

    >>> here = jnp.ones(2, bool)
    >>> attack = constant(float("nan"))
    >>> attack(jax.random.key(0), jnp.ones(2), jnp.array([True, False]), here).tolist()
    [nan, 1.0]
    """

    def attack(key: PRNGKey, uploads: Upload, malicious: Array, present: Array) -> Upload:
        del key, present
        sent = jax.tree.map(lambda u: jnp.full_like(u, value), _floating(uploads))
        return _replaced(uploads, sent, malicious)

    return attack


def label_flip(num_classes: int) -> DataAttack:
    """Returns the data attack that trains on label L − 1 − l in place of l.

    Ref: Fang et al., USENIX Security 2020 (arXiv 1911.11815), section 5.1.

    Raises:
      ValueError: for fewer than 2 classes, or (when used) batches without a "label".

    >>> label_flip(10)({"label": jnp.array([0, 7])})["label"].tolist()
    [9, 2]
    """
    if num_classes < 2:
        raise ValueError(f"labels of {num_classes} classes can't be flipped")

    def flipped(batches: Batches) -> Batches:
        if not isinstance(batches, dict) or "label" not in batches:
            raise ValueError("label flipping needs a task whose examples have a label")
        return {**batches, "label": num_classes - 1 - batches["label"]}

    return flipped


def chosen(attacks: Sequence[Attack], index: Array) -> Attack:
    """Returns the attack with this (traced) index, so that one compilation serves them all."""

    def attack(key: PRNGKey, uploads: Upload, malicious: Array, present: Array) -> Upload:
        return jax.lax.switch(index, list(attacks), key, uploads, malicious, present)

    return attack


def _largest_step(uploads: Upload, honest: Array, m: Array) -> Array:
    """Returns the upper bound of λ in theorem 1 of Fang et al., []."""
    size, n = len(honest), jnp.sum(honest) + m
    cleared = aggregation.present_only(uploads, honest.astype(jnp.float32))

    def lengths(one: Upload) -> Array:
        squares = jax.tree.map(
            lambda u, x: jnp.sum(jnp.square(u - x).reshape(size, -1), axis=1), cleared, one
        )
        return jnp.sqrt(sum(jax.tree.leaves(squares), jnp.zeros(())))

    numbers = sum(leaf.size for leaf in jax.tree.leaves(uploads)) / size
    pairs = jax.lax.map(lengths, cleared)
    others = honest[None, :] & ~jnp.eye(size, dtype=bool)
    ordered = jnp.sort(jnp.where(others, pairs, jnp.inf), axis=1)
    neighbours = jnp.clip(n - m - 2, 1, size)
    near = jnp.where((jnp.arange(size) < neighbours) & jnp.isfinite(ordered), ordered, 0.0)
    closest = jnp.min(jnp.where(honest, jnp.sum(near, axis=1), jnp.inf))
    longest = jnp.max(jnp.where(honest, lengths(jax.tree.map(lambda u: 0 * u[0], cleared)), 0.0))
    bound = (closest / jnp.maximum(n - 2 * m - 1, 1) + longest) / jnp.sqrt(numbers)
    return jnp.where(jnp.any(honest), bound, 0.0)


def _honest(malicious: Array, present: Array) -> Array:
    return present & ~malicious


def _average(tree: Upload, counted: Array) -> Upload:
    return aggregation.mean(tree, counted.astype(jnp.float32))


def _replaced(uploads: Upload, sent: Upload, malicious: Array) -> Upload:
    """Returns the uploads with `sent`, of each client or the same for all, from the malicious."""
    return jax.tree.map(
        lambda u, x: jnp.where(aggregation.beside(malicious, u), x, u).astype(u.dtype),
        uploads,
        sent,
    )


def _floating(uploads: Upload) -> Upload:
    return aggregation.check_floating(
        uploads, "attacks are on uploads", "use label flipping with this algorithm"
    )
