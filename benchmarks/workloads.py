"""The work that is measured: tasks with data of the right shape, rounds, and their bound.

The images and the tokens are random, and so are the weights: a round takes as long on them as
on real ones. The bound of a round is the unperturbed forward pass of as many examples as the
round evaluates, in the batches that are fastest.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from zofl_jax import platforms
from zofl_jax.algorithms import decomfl
from zofl_jax.core import Algorithm, Array, Batch, ClientData, Params, Task
from zofl_jax.data.sources import Dataset
from zofl_jax.directions import batching, estimators, perturbations
from zofl_jax.engine import compilation, placement, simulation
from zofl_jax.models import architectures, cnn, mlp
from zofl_jax.tasks import tokens, vision

VARIANTS = ("gaussian", "rademacher", "low_rank", "projection")
"""Distributions of the directions; "projection" is the gradient's inner products with Gaussian
directions in place of differences."""

SMOOTHING, LEARNING_RATE = 1e-3, 1e-5


class Work(NamedTuple):
    """A round to measure.

    Attributes:
      task: model, data and loss.
      population, clients: all clients and those of a round.
      batch: examples of a client in a local step.
      local_steps, num_perturbations: K and P.
      estimator: "central" or "forward".
      clients_at_once: see `batching.at_once`.
      bound_batches: sizes of a batch that the bound tries, in examples.
      architecture: of a language model.
      perturbations_at_once: see `estimators.forward_difference`.
      bound_share: one in so many of the bound's passes is timed, and the time multiplied, since
        all are alike.
    """

    task: Task
    population: int
    clients: int
    batch: int
    local_steps: int
    num_perturbations: int
    estimator: str
    clients_at_once: int | None
    bound_batches: tuple[int, ...]
    architecture: architectures.Config | None = None
    perturbations_at_once: int | None = None
    bound_share: int = 1

    @property
    def examples(self) -> int:
        """How many examples a round evaluates, forward."""
        p = self.num_perturbations
        passes = 2 * p if self.estimator == "central" else p + 1
        return passes * self.local_steps * self.clients * self.batch


def cnn_work(
    local_steps: int,
    num_perturbations: int,
    bound_share: int = 1,
    smoke: bool = False,
    accelerator: bool = False,
) -> Work:
    """Returns the MNIST CNN, 28,938 params: 10 clients of 100, batch 32, central differences.

    For an accelerator the bound may take more images at once.
    """
    clients, each, batch, size = (2, 4, 4, 8) if smoke else (10, 100, 32, 28)
    if accelerator:
        each *= 5
    task = image_task(cnn.MnistCnn(10), clients * each, clients, (size, size, 1))
    return Work(
        task,
        population=clients,
        clients=clients,
        batch=batch,
        local_steps=local_steps,
        num_perturbations=num_perturbations,
        estimator="central",
        clients_at_once=None if accelerator else 1,
        bound_batches=(4,) if smoke else (320, 1024, 4096) if accelerator else (32, 64, 160, 320),
        bound_share=1 if accelerator else bound_share,
    )


def decoder_work(
    name: str,
    *,
    population: int = 8,
    clients: int,
    length: int,
    local_steps: int = 1,
    num_perturbations: int = 5,
    clients_at_once: int | None = None,
    bound_share: int = 1,
    smoke: bool = False,
    accelerator: bool = False,
    **changes: Any,
) -> Work:
    """Returns a language model that chooses between two words; batch 16, forward differences.

    `name` and `changes` are of `architectures.named`, `length` is the tokens of an example, none
    of them padding; a smoke run makes the model tiny; the rest as in `Work`.
    """
    config = architectures.named(name, **changes)
    batch = 16
    if smoke:
        sizes = {"num_layers": 2, "vocab_size": 64, "width": 32, "mlp_width": 48, "head_dim": 8}
        config = architectures.named(name, **changes, **sizes, num_heads=4, num_kv_heads=4)
        population, batch, length = clients, 2, 4
    per_step = clients * batch
    most = (num_perturbations + 1) * per_step
    sizes_of_bound = [*([batch] if accelerator else []), per_step, most]
    each = -(-most // population) if accelerator else 2 * batch
    task = tokens.random_task(config, population, each, length)
    fitting = tuple(sorted({min(size, len(task.test["label"])) for size in sizes_of_bound}))
    return Work(
        task,
        population,
        clients,
        batch,
        local_steps,
        num_perturbations,
        "forward",
        clients_at_once,
        fitting,
        config,
        # A model at a time: 32 texts keep all cores busy, and more fall out of the cache.
        perturbations_at_once=1,
        bound_share=1 if accelerator else bound_share,
    )


CONFIGS: dict[str, Callable[..., Work]] = {
    "cnn": functools.partial(cnn_work, 1, 10),
    "cnn-k4": functools.partial(cnn_work, 4, 20, bound_share=4),
    "decoder-135m": functools.partial(decoder_work, "smollm2-135m", clients=2, length=40),
    "decoder-135m-bf16": functools.partial(
        decoder_work, "smollm2-135m", clients=2, length=40, matmul_dtype="bfloat16"
    ),
    "decoder-135m-k4": functools.partial(
        decoder_work, "smollm2-135m", clients=8, length=40, local_steps=4, bound_share=16
    ),
    "opt-1.3b": functools.partial(
        decoder_work,
        "opt-1.3b",
        clients=8,
        length=64,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
    ),
}
"""By the name of `--config`; each takes `smoke` and `accelerator`."""


def work_of(config: str, variant: str, smoke: bool = False) -> Work:
    """Returns the work of a config in the form that suits JAX's default device."""
    accelerator = platforms.current().platform != "cpu"
    return in_form(CONFIGS[config](smoke=smoke, accelerator=accelerator), variant)


def in_form(work: Work, variant: str) -> Work:
    """Returns the work with as many models at once as the library takes on the current target."""
    platform = platforms.current().platform
    if platform == "cpu":
        return work
    shapes = jax.eval_shape(work.task.init, jax.random.key(0))
    each = batching.rows_of_an_example(work.task.test, convolutional=True)  # all of images are
    at_once = batching.models_at_once(
        platform,
        rows=work.clients * work.batch * each,
        params=sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)),
        count=work.num_perturbations,
        shared=variant == "low_rank",
    )
    return work._replace(clients_at_once=None, perturbations_at_once=at_once)


def image_task(model: Any, count: int, clients: int, shape: tuple[int, ...]) -> Task:
    """Returns the task of classifying `count` random images, uint8, into 10 classes."""
    random = np.random.default_rng(0)
    examples = {
        "image": random.integers(0, 256, (count, *shape), np.uint8),
        "label": random.integers(0, 10, count, np.int32),
    }
    order, offsets = tokens.even_shares(clients, count // clients, count)
    return vision.classification(
        Dataset(examples, examples, 10, 255, None, "random"), model, order, offsets
    )


def softmax_task(population: int, batch: int) -> Task:
    """Returns softmax regression on 8 x 8 images for a population of any size.

    The clients share a thousand images, so that only the index of who owns which grows.
    """
    task = image_task(mlp.Softmax(10), 1000, 1, (8, 8, 1))
    order, offsets = tokens.even_shares(population, batch, 1000)
    train = ClientData(task.train.examples, jnp.asarray(order), jnp.asarray(offsets))
    return task._replace(train=train)


def perturbation(variant: str) -> perturbations.Perturbation:
    """Returns the distribution of the directions of a variant; low rank is rank 1."""
    if variant == "low_rank":
        return perturbations.low_rank(1)
    return perturbations.rademacher() if variant == "rademacher" else perturbations.gaussian()


def algorithm(work: Work, variant: str) -> Algorithm:
    """Returns DeComFL with plain SGD on this work."""
    count, chosen = work.num_perturbations, perturbation(variant)
    at_once = (work.clients_at_once, work.perturbations_at_once)
    if variant == "projection":
        estimator = estimators.projection(count, chosen, work.clients_at_once)
    elif work.estimator == "central":
        estimator = estimators.central_difference(count, SMOOTHING, chosen, *at_once)
    else:
        estimator = estimators.forward_difference(count, SMOOTHING, chosen, *at_once)
    optimizer = optax.sgd(LEARNING_RATE)
    return decomfl(work.task.loss, estimator, optimizer, local_steps=work.local_steps)


def simulator(
    work: Work, variant: str, devices: int = 1, prng_impl: str = "threefry2x32"
) -> simulation.Simulator:
    """Returns the simulator whose rounds are measured, on so many local devices."""
    return simulation.make_simulator(
        algorithm(work, variant),
        work.task,
        clients_per_round=work.clients,
        batch_size=work.batch,
        prng_impl=prng_impl,
        mesh=mesh_of(devices),
    )


def mesh_of(devices: int) -> Mesh | None:
    """Returns a mesh over the first local devices, None for one."""
    return placement.clients_mesh(jax.local_devices()[:devices])


def bound(
    work: Work, params: Params, batch: int, devices: int
) -> tuple[Callable[[Params], None], float]:
    """Returns params -> None, the forward passes of as many examples as a round's, and a factor.

    The factor is how many times as many passes the round's examples take, see `Work.bound_share`.

    Args:
      work: whose round.
      params: on as many devices; only their shapes matter.
      batch: examples of one pass.
      devices: that share the passes out.

    Each pass takes other examples, so that none is the same as another to the compiler.
    """
    mesh = mesh_of(devices)
    whole = math.ceil(work.examples / (batch * devices))
    passes = math.ceil(whole / work.bound_share)
    examples = placement.Placement(mesh).replicated(jax.device_put(work.task.test))
    positions = len(work.task.test["label"]) - batch + 1

    def losses(params: Params, examples: Batch, first: Array) -> Array:
        def one(total: Array, index: Array) -> tuple[Array, None]:
            start = (index * batch) % positions
            rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, batch), examples)
            return total + work.task.loss(params, rows).astype(jnp.float32), None

        return jax.lax.scan(one, jnp.zeros(()), first[0] + jnp.arange(passes))[0][None]

    spread = losses
    if mesh is not None:
        shared, apart = PartitionSpec(), PartitionSpec(placement.CLIENTS)
        spread = jax.shard_map(
            losses, mesh=mesh, in_specs=(shared, shared, apart), out_specs=apart, check_vma=False
        )
    first = jnp.arange(devices) * passes
    compiled = compilation.compiled(spread, (params, examples, first))
    return lambda params: jax.block_until_ready(compiled(params, examples, first)), whole / passes
