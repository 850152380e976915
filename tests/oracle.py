"""DeComFL, Ferret and the hybrid as objects and messages: a slow NumPy reference in float64.

Server and clients are objects that share nothing. All they learn of each other are the
messages of `zofl_jax.ledger`, bytes that pass through a `Channel`, which counts them:

    first_sync   down  the initial params, once in a client's life
    catch_up     down  for each round the client missed: the seed and the broadcast
    seed         down  the key of this round
    upload       up    K·P scalars (and the client's number of examples, if means are weighted;
                       before them its group, if groups have directions of their own)
    broadcast    down  the cohort's mean, K·P scalars (of each group)

Where directions are kept away from mean activations, upload and broadcast of some rounds are these.

A late client replays the missed rounds one by one. Losses have hand-written gradients, and
optimisers follow PyTorch's definitions. Taken from the library, and tested apart: the
direction that belongs to a seed, and the batches a client draws.

Ref: Li et al., ICLR 2025 (arXiv 2405.15861), Algorithms 3 to 5.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

Tree = dict[str, np.ndarray]  # params, gradients and directions: float64 arrays by name
Batch = dict[str, np.ndarray]

COLUMNS = ("upload", "seed", "broadcast", "catch_up", "first_sync")


# Losses: a value and its gradient.


class Objective(NamedTuple):
    value: Callable[[Tree, Batch], float]
    gradient: Callable[[Tree, Batch], Tree]


def softmax_regression() -> Objective:
    """Mean cross-entropy of softmax(features @ kernel + bias)."""

    def log_probabilities(x: Tree, batch: Batch) -> np.ndarray:
        logits = batch["features"] @ x["kernel"] + x["bias"]
        largest = logits.max(axis=1, keepdims=True)
        return logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))

    def value(x: Tree, batch: Batch) -> float:
        rows = np.arange(len(batch["label"]))
        return -log_probabilities(x, batch)[rows, batch["label"]].mean()

    def gradient(x: Tree, batch: Batch) -> Tree:
        error = np.exp(log_probabilities(x, batch))
        error[np.arange(len(batch["label"])), batch["label"]] -= 1
        error /= len(batch["label"])
        return {"kernel": batch["features"].T @ error, "bias": error.sum(axis=0)}

    return Objective(value, gradient)


def quadratic(matrix: np.ndarray) -> Objective:
    """Mean of ½ (x − b)ᵀ A (x − b) over the centres b of a batch, for a symmetric A."""

    def value(x: Tree, batch: Batch) -> float:
        errors = [x["x"] - center for center in batch["center"]]
        return float(np.mean([error @ matrix @ error / 2 for error in errors]))

    def gradient(x: Tree, batch: Batch) -> Tree:
        return {"x": np.mean([matrix @ (x["x"] - center) for center in batch["center"]], axis=0)}

    return Objective(value, gradient)


# Estimators: one scalar along one direction.

ScalarFn = Callable[[Objective, Tree, Tree, Batch, float], float]


def forward_difference(f: Objective, x: Tree, z: Tree, batch: Batch, mu: float) -> float:
    return (f.value(_moved(x, z, mu), batch) - f.value(x, batch)) / mu


def central_difference(f: Objective, x: Tree, z: Tree, batch: Batch, mu: float) -> float:
    return (f.value(_moved(x, z, mu), batch) - f.value(_moved(x, z, -mu), batch)) / (2 * mu)


def projection(f: Objective, x: Tree, z: Tree, batch: Batch, mu: float) -> float:
    gradient = f.gradient(x, batch)
    return sum(float(np.sum(gradient[name] * z[name])) for name in x)


def _part(batch: Batch, group: int, groups: int) -> Batch:
    return {name: np.split(x, groups)[group] for name, x in batch.items()}


def _moved(x: Tree, z: Tree, distance: float) -> Tree:
    return {name: x[name] + distance * z[name] for name in x}


# Optimisers: objects that hold their own state; `step` is their count of updates.


class Optimizer(Protocol):
    def update(self, x: Tree, gradient: Tree) -> Tree: ...


class SGD:
    """g += wd·x;  buf = m·buf + g;  x −= lr·buf."""

    def __init__(
        self,
        learning_rate: float | Callable[[int], float],
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ):
        self.learning_rate, self.momentum, self.decay = learning_rate, momentum, weight_decay
        self.step = 0
        self.buffer: Tree = {}

    def update(self, x: Tree, gradient: Tree) -> Tree:
        rate = self.learning_rate
        rate = rate(self.step) if callable(rate) else rate
        updated = {}
        for name in x:
            g = gradient[name] + self.decay * x[name]
            self.buffer[name] = self.momentum * self.buffer.get(name, np.zeros_like(g)) + g
            updated[name] = x[name] - rate * self.buffer[name]
        self.step += 1
        return updated


class Adam:
    """x −= lr · m̂ / (√v̂ + ε), with bias-corrected moments (Kingma & Ba 2015)."""

    def __init__(self, learning_rate: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
        self.learning_rate, self.b1, self.b2, self.eps = learning_rate, b1, b2, eps
        self.step = 0
        self.first: Tree = {}
        self.second: Tree = {}

    def update(self, x: Tree, gradient: Tree) -> Tree:
        self.step += 1
        updated = {}
        for name, g in gradient.items():
            zeros = np.zeros_like(g)
            self.first[name] = self.b1 * self.first.get(name, zeros) + (1 - self.b1) * g
            self.second[name] = self.b2 * self.second.get(name, zeros) + (1 - self.b2) * g**2
            mean = self.first[name] / (1 - self.b1**self.step)
            spread = np.sqrt(self.second[name] / (1 - self.b2**self.step))
            updated[name] = x[name] - self.learning_rate * mean / (spread + self.eps)
        return updated


# The protocol: what server and clients agree on before the first round.


class Agreement(NamedTuple):
    scalar: ScalarFn
    smoothing: Callable[[int], float]  # μ of a round
    local_steps: Callable[[int], int]  # K of a round
    num_perturbations: Callable[[int], int]  # P of a round
    optimizer: Callable[[], Optimizer]
    direction: Callable[[bytes, int, int], Tree]  # (seed, local step, index) -> z
    shapes: dict[str, tuple[int, ...]]  # of the params, in the order they are sent
    dtype: np.dtype  # of numbers on the wire
    weighted: bool = False
    groups: int = 1  # of a batch, whose directions are p = group, group + groups, ...
    client_groups: int = 0  # with directions of their own; 0: all clients have the same
    group_seed: Callable[[bytes, int], bytes] = lambda seed, group: seed
    measuring: tuple[int, ...] = ()  # rounds in which the mean inputs of a matrix are sent
    measured: tuple[str, str] = ("kernel", "features")  # the matrix, and its inputs in a batch

    def seeds(self, seed: bytes) -> list[bytes]:
        """Returns the seed of each group's directions."""
        if not self.client_groups:
            return [seed]
        return [self.group_seed(seed, g) for g in range(self.client_groups)]


class Channel:
    """Carries messages and counts their bytes, by round and column."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, int]] = []

    def new_round(self) -> None:
        self.rounds.append(dict.fromkeys(COLUMNS, 0))

    def carry(self, column: str, message: bytes) -> bytes:
        assert type(message) is bytes
        self.rounds[-1][column] += len(message)
        return message


class Replica:
    """The state that server and clients share: rebuilt from messages alone."""

    def __init__(self, agreement: Agreement, params_message: bytes):
        self.agreement = agreement
        self.params = _unpack_params(agreement, params_message)
        self.optimizer = agreement.optimizer()
        self.mean: np.ndarray | None = None  # inputs of the measured matrix
        self.round = 0

    def apply_broadcast(self, seed: bytes, broadcast: bytes) -> None:
        """Advances one round: K optimiser steps with the cohort's mean scalars, of each group."""
        if self.round in self.agreement.measuring:
            self.mean = np.frombuffer(broadcast, self.agreement.dtype).astype(np.float64)
            self.round += 1
            return
        seeds = self.agreement.seeds(seed)
        scalars = _unpack_scalars(self.agreement, self.round, broadcast, len(seeds))
        for k in range(scalars.shape[1]):
            self.descend(seeds, k, scalars[:, k])
        self.round += 1

    def descend(self, seeds: Sequence[bytes], k: int, scalars: np.ndarray) -> None:
        """One optimiser step along (1/P) Σ_g Σ_p scalars[g, p] z_gp."""
        direction = {name: np.zeros_like(x) for name, x in self.params.items()}
        for seed, row in zip(seeds, scalars, strict=True):
            for p, scalar in enumerate(row):
                z = self.direction(seed, k, p)
                for name in direction:
                    direction[name] += scalar * z[name] / len(row)
        self.params = self.optimizer.update(self.params, direction)

    def direction(self, seed: bytes, k: int, p: int) -> Tree:
        """Returns z, at right angles to the mean inputs if they are known."""
        z = self.agreement.direction(seed, k, p)
        if self.mean is None:
            return z
        matrix, unit = self.agreement.measured[0], self.mean / np.linalg.norm(self.mean)
        return {**z, matrix: z[matrix] - np.outer(unit, unit @ z[matrix])}

    def copy(self) -> "Replica":
        other = Replica.__new__(Replica)
        other.agreement, other.round, other.mean = self.agreement, self.round, self.mean
        other.params = {name: x.copy() for name, x in self.params.items()}
        other.optimizer = type(self.optimizer).__new__(type(self.optimizer))
        for name, value in vars(self.optimizer).items():
            setattr(other.optimizer, name, dict(value) if isinstance(value, dict) else value)
        return other


class Client:
    """Knows its own data, the agreement, and the messages it received."""

    def __init__(
        self,
        agreement: Agreement,
        objective: Objective,
        draw_batches: Callable[[int], Sequence[Batch]],
        num_examples: int,
        draw_group: Callable[[int], int] = lambda r: 0,
    ):
        self.agreement = agreement
        self.objective = objective
        self.draw_batches = draw_batches
        self.num_examples = num_examples
        self.draw_group = draw_group
        self.replica: Replica | None = None
        self.seed = b""

    def receive_params(self, message: bytes) -> None:
        self.replica = Replica(self.agreement, message)

    def receive_missed_round(self, seed: bytes, broadcast: bytes) -> None:
        self.replica.apply_broadcast(seed, broadcast)

    def receive_seed(self, seed: bytes) -> None:
        self.seed = seed

    def make_upload(self) -> bytes:
        """Runs K local steps on a copy of the model and forgets the copy."""
        local, r = self.replica.copy(), self.replica.round
        steps, directions = self.agreement.local_steps(r), self.agreement.num_perturbations(r)
        mu = self.agreement.smoothing(r)
        batches = self.draw_batches(r)
        if r in self.agreement.measuring:
            inputs = np.mean([b[self.agreement.measured[1]].mean(axis=0) for b in batches], axis=0)
            return self.sent(inputs)
        group = self.draw_group(r)
        seed = self.agreement.seeds(self.seed)[group]
        scalars = np.zeros((steps, directions))
        for k in range(steps):
            for p in range(directions):
                z = local.direction(seed, k, p)
                own = _part(batches[k], p % self.agreement.groups, self.agreement.groups)
                scalars[k, p] = self.agreement.scalar(self.objective, local.params, z, own, mu)
            local.descend([seed], k, scalars[k : k + 1])
        message = bytes([group]) if self.agreement.client_groups else b""
        return message + self.sent(scalars)

    def sent(self, numbers: np.ndarray) -> bytes:
        weight = struct.pack("<I", self.num_examples) * self.agreement.weighted
        return numbers.astype(self.agreement.dtype).tobytes() + weight

    def receive_broadcast(self, message: bytes) -> None:
        self.replica.apply_broadcast(self.seed, message)


class Server:
    """Keeps the initial params, the log of (seed, broadcast), and who was last in which round."""

    def __init__(self, agreement: Agreement, params: Tree):
        self.agreement = agreement
        self.initial = b"".join(
            np.asarray(params[name], agreement.dtype).tobytes() for name in agreement.shapes
        )
        self.replica = Replica(agreement, self.initial)
        self.log: list[tuple[bytes, bytes]] = []
        self.last_round: dict[int, int] = {}

    def run_round(
        self, cohort: Sequence[int], clients: Sequence[Client], seed: bytes, channel: Channel
    ) -> None:
        channel.new_round()
        now = len(self.log)
        uploads = []
        for i in cohort:
            self.bring_up_to_date(i, clients[i], channel)
            clients[i].receive_seed(channel.carry("seed", seed))
            uploads.append(channel.carry("upload", clients[i].make_upload()))
        broadcast = self.average(uploads)
        for i in cohort:
            clients[i].receive_broadcast(channel.carry("broadcast", broadcast))
            self.last_round[i] = now
        self.log.append((seed, broadcast))
        self.replica.apply_broadcast(seed, broadcast)

    def bring_up_to_date(self, i: int, client: Client, channel: Channel) -> None:
        if i not in self.last_round:
            client.receive_params(channel.carry("first_sync", self.initial))
        for seed, broadcast in self.log[self.last_round.get(i, -1) + 1 :]:
            message = channel.carry("catch_up", seed + broadcast)
            client.receive_missed_round(message[: len(seed)], message[len(seed) :])

    def average(self, uploads: Sequence[bytes]) -> bytes:
        total, weight_sum = 0.0, 0.0
        for upload in uploads:
            weight = 1.0
            if self.agreement.weighted:
                upload, weight = upload[:-4], struct.unpack("<I", upload[-4:])[0]
            share = np.ones(1)
            if groups := self.agreement.client_groups:
                upload, share = upload[1:], np.arange(groups) == upload[0]
            numbers = np.frombuffer(upload, self.agreement.dtype).astype(np.float64)
            total = total + weight * np.outer(share, numbers)
            weight_sum += weight
        return (total / weight_sum).astype(self.agreement.dtype).tobytes()


# Ferret and the hybrid: other agreements, and the server that keeps to them.


class Line(NamedTuple):
    """One number of a sketch: its direction, zero outside of its block, and the block."""

    z: Tree
    count: int  # of the block's directions
    size: int  # of the block


class Ferret(NamedTuple):
    local_steps: int
    rate: float  # of plain SGD
    server_rate: float
    rank: float  # r
    sketch: Callable[[bytes], Sequence[Line]]  # seed -> P lines
    shapes: dict[str, tuple[int, ...]]
    dtype: np.dtype

    def start(self, params: Tree) -> Tree:
        return params

    def apply(self, x: Tree, seed: bytes, message: bytes) -> Tree:
        """x −= η_g Σ_p f s_p z_p / √P."""
        scalars = np.frombuffer(message, self.dtype).astype(np.float64)
        total = sum(int(np.prod(shape)) for shape in self.shapes.values())
        x, rho = dict(x), min(1.0, self.rank / total)
        for line, scalar in zip(self.sketch(seed), scalars, strict=True):
            f = line.count / (line.count + rho * (line.size + 1))
            for name in x:
                x[name] = x[name] - self.server_rate * f * scalar * line.z[name] / line.count**0.5
        return x

    def upload(
        self, f: Objective, x: Tree, seed: bytes, batches: Sequence[Batch], left: Tree | None
    ) -> tuple[bytes, Tree]:
        """Returns the scalars of what local SGD changed, and what they don't say of it."""
        y = x
        for batch in batches:
            gradient = f.gradient(y, batch)
            y = {name: y[name] - self.rate * gradient[name] for name in y}
        change = {name: x[name] - y[name] + (left[name] if left else 0) for name in x}
        scalars = [
            sum(float(np.sum(change[name] * line.z[name])) for name in x) / line.count**0.5
            for line in self.sketch(seed)
        ]
        message = np.array(scalars).astype(self.dtype).tobytes()
        step = self._replace(server_rate=1.0).apply(dict.fromkeys(x, 0.0), seed, message)
        return message, {name: change[name] + step[name] for name in x}


class Hybrid(NamedTuple):
    """Exact gradients for the top, scalars along directions that are zero there for the rest.

    Everyone holds the params and the momentum of the rest, under `MOMENTUM` and its name. A message
    is K·P scalars and what changed of the top.
    """

    scalar: ScalarFn
    smoothing: float
    local_steps: int
    num_perturbations: int
    optimizer: Callable[[], SGD]  # of the rest, whose momentum is kept
    top_optimizer: Callable[[], SGD]  # of the top, a new one in every round
    top_rate: float  # that the steps of the top are multiplied by
    direction: Callable[[bytes, int, int], Tree]  # (seed, local step, index) -> z of the rest
    top: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    dtype: np.dtype

    @property
    def rest(self) -> list[str]:
        return [name for name in self.shapes if name not in self.top]

    def start(self, params: Tree) -> Tree:
        zeros = {MOMENTUM + name: np.zeros(self.shapes[name]) for name in self.rest}
        return {**params, **zeros}

    def apply(self, state: Tree, seed: bytes, message: bytes) -> Tree:
        """K optimiser steps of the rest; t −= Δ."""
        numbers = np.frombuffer(message, self.dtype).astype(np.float64)
        count = self.local_steps * self.num_perturbations
        for k, row in enumerate(numbers[:count].reshape(self.local_steps, -1)):
            state = self._descend(state, seed, k, row)
        sizes = [int(np.prod(self.shapes[name])) for name in self.top]
        changes = np.split(numbers[count:], np.cumsum(sizes)[:-1])
        moved = {
            name: state[name] - change.reshape(self.shapes[name])
            for name, change in zip(self.top, changes, strict=True)
        }
        return {**state, **moved}

    def upload(
        self, f: Objective, state: Tree, seed: bytes, batches: Sequence[Batch], left: None
    ) -> tuple[bytes, None]:
        """Returns the scalars of K steps and what they changed of the top."""
        optimizer, sent, local = self.top_optimizer(), [], state
        for k, batch in enumerate(batches):
            x = {name: local[name] for name in self.shapes}
            row = []
            for p in range(self.num_perturbations):
                z = self._along(seed, k, p)
                row.append(self.scalar(f, x, z, batch, self.smoothing))
            gradient = f.gradient(x, batch)
            stepped = optimizer.update({name: x[name] for name in self.top}, gradient)
            local = self._descend(local, seed, k, np.array(row))
            for name in self.top:
                local[name] = x[name] + self.top_rate * (stepped[name] - x[name])
            sent += row
        changes = [(state[name] - local[name]).ravel() for name in self.top]
        return np.concatenate([sent, *changes]).astype(self.dtype).tobytes(), left

    def _descend(self, state: Tree, seed: bytes, k: int, scalars: np.ndarray) -> Tree:
        direction = {name: np.zeros(self.shapes[name]) for name in self.rest}
        for p, scalar in enumerate(scalars):
            z = self._along(seed, k, p)
            for name in self.rest:
                direction[name] += scalar * z[name] / len(scalars)
        optimizer = self.optimizer()
        optimizer.buffer = {name: state[MOMENTUM + name] for name in self.rest}
        moved = optimizer.update({name: state[name] for name in self.rest}, direction)
        kept = {MOMENTUM + name: buffer for name, buffer in optimizer.buffer.items()}
        return {**state, **moved, **kept}

    def _along(self, seed: bytes, k: int, p: int) -> Tree:
        still = {name: np.zeros(self.shapes[name]) for name in self.top}
        return {**still, **self.direction(seed, k, p)}


MOMENTUM = "momentum of "


class ModelServer:
    """Sends what all hold, or what a client missed where that is shorter; no broadcast at the end.

    What all hold are the params, and what `apply` moves beside them. A new client is sent the
    initial params and all rounds where that is shorter.
    """

    def __init__(
        self, agreement: "Ferret | Hybrid", params: Tree, num_clients: int, remainder: bool = False
    ):
        self.agreement = agreement
        self.initial = _packed(agreement, params)
        self.state = agreement.start(_unpack_params(agreement, self.initial))
        self.log: list[tuple[bytes, bytes]] = []
        self.held: dict[int, tuple[int, Tree]] = {}  # of a client: its round, what it holds
        self.sent: set[tuple[str, str]] = set()  # column, and what clients were sent
        self.left: list[Tree | None] = [
            {name: np.zeros_like(x) for name, x in self.state.items()} if remainder else None
            for _ in range(num_clients)
        ]

    def run_round(
        self,
        cohort: Sequence[int],
        objective: Objective,
        batches: Callable[[int], Sequence[Batch]],
        seed: bytes,
        channel: Channel,
    ) -> None:
        channel.new_round()
        total = 0.0
        for i in cohort:
            x = self.bring_up_to_date(i, channel)
            self.held[i] = len(self.log), x
            channel.carry("seed", seed)
            upload, left = self.agreement.upload(objective, x, seed, batches(i), self.left[i])
            self.left[i] = left if self.left[i] is not None else None
            sent = channel.carry("upload", upload)
            total = total + np.frombuffer(sent, self.agreement.dtype).astype(np.float64)
        broadcast = (total / len(cohort)).astype(self.agreement.dtype).tobytes()
        self.state = self.agreement.apply(self.state, seed, broadcast)
        self.log.append((seed, broadcast))

    def bring_up_to_date(self, i: int, channel: Channel) -> Tree:
        column, first = ("catch_up", b"") if i in self.held else ("first_sync", self.initial)
        since, x = self.held.get(i, (0, self.state))
        missed, whole = self.log[since:], _packed(self.agreement, self.state)
        longer = len(first) + sum(len(seed + sent) for seed, sent in missed) >= len(whole)
        self.sent.add((column, "model" if longer else "missed rounds"))
        if longer:
            shapes = {name: held.shape for name, held in self.state.items()}
            return _unpacked(channel.carry(column, whole), shapes, self.agreement.dtype)
        if first:
            x = self.agreement.start(_unpack_params(self.agreement, channel.carry(column, first)))
        for seed, sent in missed:
            channel.carry(column, seed + sent)
            x = self.agreement.apply(x, seed, sent)
        return x


def _packed(agreement: Ferret | Hybrid, tree: Tree) -> bytes:
    return b"".join(np.asarray(x, agreement.dtype).tobytes() for x in tree.values())


def _unpack_params(agreement: Agreement | Ferret | Hybrid, message: bytes) -> Tree:
    return _unpacked(message, agreement.shapes, agreement.dtype)


def _unpacked(message: bytes, shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> Tree:
    numbers = np.frombuffer(message, dtype).astype(np.float64)
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    pieces = np.split(numbers, np.cumsum(sizes)[:-1])
    return {
        name: piece.reshape(shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def _unpack_scalars(
    agreement: Agreement, round_index: int, message: bytes, groups: int = 1
) -> np.ndarray:
    shape = groups, agreement.local_steps(round_index), agreement.num_perturbations(round_index)
    return np.frombuffer(message, agreement.dtype).astype(np.float64).reshape(shape)
