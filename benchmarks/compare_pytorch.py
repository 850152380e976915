"""Compares a round with a plain PyTorch form of what the authors' client does, on the same work.

    pip install -e '.[torch]'
    python -m benchmarks.compare_pytorch --config=cnn --out=FILE.json

The PyTorch form (`TorchClient`) keeps a model a client. A client that takes part again first
puts back the params it had before its last local steps, replays every round since and saves the
params; then, for each local step and direction, it adds the direction in place, evaluates, takes
it off again and keeps the sum of scalar times direction, and steps. Both forms evaluate the same
number of examples in the same batches and take turns in one process.

Of the authors' client (github.com/ZidongLiu/DeComFL) two things are left out because nobody
needs them: one more forward pass a step for its statistics, and dropout. Language models score
the whole vocabulary at every position, as theirs do; `lean` is the same with the last position
alone.

On a busy machine PyTorch's threads wait for each other in a loop, which counts as CPU time too;
with `--torch_threads=1` they don't, and `ratio_cpu_seconds` is then a fair figure, as if PyTorch
made perfect use of any number of cores.

Where ours multiplies bfloat16 factors and sums in float32, `medium` is the plain form with
PyTorch's way to do so, the float32 matmul precision of that name; `plain` keeps float32 products.

In a population of N clients with M a round, a client that takes part was last there N / M rounds
ago on average, so it misses N / M - 1 and replays N / M, its own last one included. For
`--config=decoder-135m` one replayed round is timed and the times for populations are reckoned
from it, since a hundred models don't fit into memory.
"""

import argparse
import copy
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import measuring, workloads
from benchmarks.round import Rounds
from benchmarks.workloads import LEARNING_RATE, SMOOTHING, Work
from zofl_jax import keys
from zofl_jax.engine import placement
from zofl_jax.models import architectures
from zofl_jax.tasks import tokens

Direction = Callable[[int, int], torch.Tensor]  # (local step, index) -> z [d]
TorchLoss = Callable[[torch.nn.Module, Any], torch.Tensor]  # (model, batch) -> []

POPULATION = 100


class Round(NamedTuple):
    """What a client needs to replay a round."""

    seed: int
    scalars: torch.Tensor  # [K, P]


class TorchClient:
    """A client with a model of its own."""

    def __init__(self, model: torch.nn.Module, work: Work, loss: TorchLoss):
        self.model, self.work, self.loss = model, work, loss
        self.params = list(model.parameters())
        self.size = sum(p.numel() for p in self.params)
        self.device = self.params[0].device
        self.optimizer = torch.optim.SGD(self.params, lr=LEARNING_RATE)
        self.saved = copy.deepcopy(model.state_dict())

    def rejoin(self, missed: Sequence[Round]) -> None:
        """Goes back to the params before the last local steps and replays rounds."""
        self.model.load_state_dict(self.saved)
        for each in missed:
            self.replay(each)
        self.saved = copy.deepcopy(self.model.state_dict())

    def replay(self, missed: Round) -> None:
        """Does one round's steps with the cohort's mean scalars."""
        for k, scalars in enumerate(missed.scalars):
            total = torch.zeros(self.size, device=self.device)
            for p, scalar in enumerate(scalars.tolist()):
                total.add_(self.direction(missed.seed, k, p), alpha=scalar / len(scalars))
            self.step(total)

    def local_steps(self, seed: int, batches: Sequence[Any]) -> torch.Tensor:
        """Returns the scalars [K, P] of one batch a local step."""
        return measure(self, functools.partial(self.direction, seed), batches)

    def direction(self, seed: int, step: int, index: int) -> torch.Tensor:
        """Returns z [d]."""
        generator = torch.Generator(self.device).manual_seed((seed * 1009 + step) * 1009 + index)
        return torch.randn(self.size, generator=generator, device=self.device)

    def move(self, direction: torch.Tensor, distance: float) -> None:
        """Adds a direction to the params, in place."""
        for p, z in self.parts(direction):
            p.add_(z, alpha=distance)

    def step(self, gradient: torch.Tensor) -> None:
        """Lets the optimiser do one step."""
        for p, g in self.parts(gradient):
            p.grad = g
        self.optimizer.step()

    def parts(self, vector: torch.Tensor) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Returns the params, each with its part of a vector [d]."""
        pieces = vector.split([p.numel() for p in self.params])
        return [(p, piece.view(p.shape)) for p, piece in zip(self.params, pieces, strict=True)]


@torch.no_grad()
def measure(client: TorchClient, direction: Direction, batches: Sequence[Any]) -> torch.Tensor:
    """Returns a client's scalars [K, P] along given directions; its model moves K steps."""
    work, mu = client.work, SMOOTHING
    evaluate = functools.partial(client.loss, client.model)
    rows = []
    for k, batch in enumerate(batches):
        base = evaluate(batch) if work.estimator == "forward" else None
        scalars, total = [], torch.zeros(client.size, device=client.device)
        for p in range(work.num_perturbations):
            z = direction(k, p)
            client.move(z, mu)
            plus = evaluate(batch)
            if base is None:
                client.move(z, -2 * mu)
                scalar = (plus - evaluate(batch)) / (2 * mu)
                client.move(z, mu)
            else:
                scalar = (plus - base) / mu
                client.move(z, -mu)
            scalars.append(scalar)
            total.add_(z, alpha=scalar.item() / work.num_perturbations)
        client.step(total)
        rows.append(torch.stack(scalars))
    return torch.stack(rows)


class TorchRounds:
    """Rounds of the PyTorch form with every client in every round: a call is a round."""

    def __init__(self, clients: Sequence[TorchClient], draw: Callable[[], Any]):
        self.clients, self.draw = clients, draw
        self.last: Round | None = None
        self.done = 0

    @torch.no_grad()
    def __call__(self) -> None:
        """Does a round: each client replays the last one and measures."""
        uploads = []
        self.done += 1
        for client in self.clients:
            client.rejoin([self.last] if self.last else [])
            batches = [self.draw() for _ in range(client.work.local_steps)]
            uploads.append(client.local_steps(self.done, batches))
        self.last = Round(self.done, torch.stack(uploads).mean(dim=0))
        if self.last.scalars.is_cuda:
            torch.cuda.synchronize()


class MnistCnn(torch.nn.Module):
    """The CNN of `zofl_jax.models.cnn.MnistCnn`."""

    def __init__(self, size: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 16, 5, padding="same")
        self.conv2 = torch.nn.Conv2d(16, 32, 5, padding="same")
        self.output = torch.nn.Linear(32 * (size // 4) ** 2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits [B, 10] of images [B, 1, H, W]."""
        for convolution in (self.conv1, self.conv2):
            x = torch.nn.functional.max_pool2d(torch.relu(convolution(x)), 2)
        return self.output(x.flatten(1))


def image_model(work: Work) -> tuple[torch.nn.Module, TorchLoss]:
    """Returns the CNN for the images of a task, and its loss."""

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch["image"]), batch["label"])

    return MnistCnn(work.task.test["image"].shape[1]), loss


def language_model(config: architectures.Config) -> torch.nn.Module:
    """Returns transformers' Llama of a configuration, with random weights."""
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied,
        )
    ).eval()


def language_loss(lean: bool) -> TorchLoss:
    """Returns the loss of the next word among the candidates; `lean` scores one position only."""
    candidates = list(tokens.CANDIDATES)

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = batch["tokens"]
        scores = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            use_cache=False,
            logits_to_keep=1 if lean else 0,
        ).logits
        return torch.nn.functional.cross_entropy(scores[:, -1, candidates], batch["label"])

    return loss


def torch_batches(work: Work, device: str = "cpu") -> Callable[[], dict[str, torch.Tensor]]:
    """Returns () -> the next batch of the task's examples, images as [B, C, H, W]."""
    examples = {
        name: torch.from_numpy(x.astype(np.int64)).to(device) for name, x in work.task.test.items()
    }
    if "image" in examples:
        images = examples["image"].to(torch.float32).permute(0, 3, 1, 2)
        examples["image"] = (images - images.mean()) / images.std(correction=0)
    count = len(examples["label"])
    at = 0

    def draw() -> dict[str, torch.Tensor]:
        nonlocal at
        rows = torch.arange(at, at + work.batch) % count
        at += work.batch
        return {name: x[rows] for name, x in examples.items()}

    return draw


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and saves."""
    made = measuring.parser(__doc__)
    made.add_argument(
        "--config", required=True, choices=[c for c in workloads.CONFIGS if c != "opt-1.3b"]
    )
    made.add_argument("--variants", default="gaussian", help="of our round, separated by commas")
    made.add_argument(
        "--lean",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of language models, time the lean form too",
    )
    made.add_argument(
        "--torch_device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="that of the PyTorch form",
    )
    made.add_argument("--torch_threads", type=int, help="all cores unless given")
    made.add_argument("--prng_impl", default="threefry2x32", choices=keys.IMPLEMENTATIONS)
    options = made.parse_args(argv)
    measuring.check_repeats(made, options)
    variants = options.variants.split(",")
    if unknown := set(variants) - set(workloads.VARIANTS):
        made.error(f"--variants: {sorted(unknown)} are not among {', '.join(workloads.VARIANTS)}")
    devices = placement.use_cpu_devices(None if options.config.startswith("cnn") else 1)
    devices = devices if options.config.startswith("cnn") else 1
    measuring.without_cache()
    if options.torch_threads:
        torch.set_num_threads(options.torch_threads)
    work = workloads.CONFIGS[options.config](smoke=options.smoke)
    result = {
        "config": options.config,
        "prng_impl": options.prng_impl,
        **compare(
            work,
            variants,
            devices,
            options.prng_impl,
            options.repeats,
            options.lean,
            options.torch_device,
        ),
    }
    result |= measuring.machine(devices)
    result["versions"] |= {"torch": importlib.metadata.version("torch")}
    result["torch_threads"] = torch.get_num_threads()
    result["torch_device"] = options.torch_device
    measuring.report(result, options.out)
    return result


def compare(
    work: Work,
    variants: Sequence[str],
    devices: int,
    prng_impl: str,
    repeats: int,
    lean: bool = True,
    torch_device: str = "cpu",
) -> dict[str, Any]:
    """Returns the times of both forms of a round and their ratios; `lean` adds the lean form."""
    forms = torch_forms(work, torch_device)
    if not lean:
        forms.pop("lean", None)
    ours = [
        Rounds(workloads.simulator(workloads.in_form(work, variant), variant, devices, prng_impl))
        for variant in variants
    ]
    jobs: list[Callable[[], Any]] = [*forms.values(), *ours]
    times = measuring.by_turns(jobs, repeats)
    theirs = dict(zip(forms, times, strict=False))
    rounds = dict(zip(variants, times[len(forms) :], strict=True))
    result: dict[str, Any] = {
        "pytorch_seconds": {name: each.median for name, each in theirs.items()},
        "seconds_per_round": {name: each.median for name, each in rounds.items()},
        "pytorch_cpu_seconds": {name: each.median_cpu for name, each in theirs.items()},
        "cpu_seconds_per_round": {name: each.median_cpu for name, each in rounds.items()},
        "turns": len(times[0].seconds),
        "ratio_cpu_seconds": {
            form: {name: slow.median_cpu / each.median_cpu for name, each in rounds.items()}
            for form, slow in theirs.items()
            if form != "replay"
        },
        "ratio": {
            form: {name: measuring.ratio(slow, each) for name, each in rounds.items()}
            for form, slow in theirs.items()
            if form != "replay"
        },
    }
    if "replay" in theirs:
        result["population"] = populated(work, theirs, rounds)
    return result


def torch_forms(work: Work, device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """Returns the jobs of the PyTorch side by name, in the order of their turns."""
    draw = torch_batches(work, device)
    if work.architecture is None:
        model, loss = image_model(work)
        model.to(device)
        clients = [TorchClient(copy.deepcopy(model), work, loss) for _ in range(work.clients)]
        return {"plain": TorchRounds(clients, draw)}
    model = language_model(work.architecture).to(device)
    losses = {"plain": language_loss(lean=False), "lean": language_loss(lean=True)}
    clients = [
        TorchClient(copy.deepcopy(model), work, losses["plain"]) for _ in range(work.clients)
    ]
    rounds = TorchRounds(clients, draw)

    def with_loss(chosen: TorchLoss, precision: str = "highest") -> None:
        for client in clients:
            client.loss = chosen
        torch.set_float32_matmul_precision(precision)
        rounds()

    @torch.no_grad()
    def replay() -> None:
        assert rounds.last is not None
        clients[0].replay(rounds.last)

    forms = {name: functools.partial(with_loss, loss) for name, loss in losses.items()}
    if work.architecture.matmul_dtype == "bfloat16":
        forms["medium"] = functools.partial(with_loss, losses["plain"], "medium")
    return {**forms, "replay": replay}


def populated(
    work: Work, theirs: dict[str, measuring.Times], rounds: dict[str, measuring.Times]
) -> dict[str, Any]:
    """Returns what the PyTorch form takes with a larger population, reckoned.

    A client that takes part replays N / M rounds on average; the rounds that were timed hold one
    replay a client. Ours replays nothing: a round costs the same in any population.
    """
    replayed = POPULATION / work.clients
    replay = theirs["replay"].median
    reckoned = {
        name: times.median + work.clients * (replayed - 1) * replay
        for name, times in theirs.items()
        if name != "replay"
    }
    return {
        "clients": POPULATION,
        "rounds_missed": replayed - 1,
        "replay_seconds_per_round": replay,
        "pytorch_seconds": reckoned,
        "pytorch_model_copies": POPULATION,
        "ratio": {
            form: {name: seconds / times.median for name, times in rounds.items()}
            for form, seconds in reckoned.items()
        },
    }


if __name__ == "__main__":
    main()
