"""What a method says of itself, and what it is made of.

Each module of `algorithms/` ends with the `Method` of its algorithm: how it is built, which
settings of its own it has, its defaults, and what it can't do. `algorithms.METHODS` has a row for
each. Nothing else in the library or its commands knows a method by its name; what uploads are
(scalars, bits, a model) is told by their shapes, see `configuration.messages`.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax
import optax

from zofl_jax.algorithms.local_training import ClientOptimizer
from zofl_jax.conditions.aggregation import Rule
from zofl_jax.conditions.compression import Codec
from zofl_jax.core import Algorithm, Array, LossFn, PRNGKey
from zofl_jax.directions.estimators import Estimator
from zofl_jax.directions.perturbations import Perturbation


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a method is made of: settings that methods share, as library objects.

    Attributes:
      loss_fn: (params, batch) -> mean loss, [].
      optimizer: the one whose state everyone keeps from round to round.
      client_optimizer: the one whose state starts anew in every round, or round -> that round's.
      learning_rate: [], without the schedule.
      scheduled_rate: [], or round -> [] where a schedule changes it.
      rate_factor: round -> the schedule's factor on the rate, None where it is always 1.
      make_estimator: directions -> what measures along them.
      perturbation: the directions.
      pool_key: of seeds that are known to all before the first round.
      codec: what uploads are written as, None for plain numbers.
      rule: how the server makes one broadcast of the uploads.
      local_steps: K.
      clients_at_once: of a cohort, None for all.
      share: of the population that a cohort is, in (0, 1].
      delta: δ at which an ε is reported.
    """

    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    client_optimizer: ClientOptimizer
    learning_rate: jax.Array
    scheduled_rate: Array | optax.Schedule
    rate_factor: optax.Schedule | None
    make_estimator: Callable[[Perturbation], Estimator]
    perturbation: Perturbation
    pool_key: PRNGKey
    codec: Codec | None
    rule: Rule
    local_steps: int
    clients_at_once: int | None
    share: float
    delta: float

    @property
    def estimator(self) -> Estimator:
        """Measures along the directions as they are."""
        return self.make_estimator(self.perturbation)


class Refusal(NamedTuple):
    """Values of a setting that a method can't do with.

    Attributes:
      reason: ends the sentence "... is not possible with this method, ", as "which ...".
      values: those that are refused; all but the setting's default unless given.
      instead: what to do about it.
    """

    reason: str
    values: Collection[Any] | None = None
    instead: str = "leave it out"


LOSSY_CODECS = Refusal(
    "all of whose scalars are needed",
    ("top_k", "sign"),
    "use float16, bfloat16, int8, int4 or qsgd",
)
"""Of `compression`, where each scalar goes with the code of its directions."""


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The settings of a method that has none of its own."""


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method says of itself.

    Attributes:
      name: of `--algorithm`.
      build: (parts, its own settings) -> the algorithm.
      order: of the derivatives that clients ask of the loss: 0, measured along directions by
        forward passes, or 1, gradients.
      summary: a line for people.
      options: the group of its own settings, see `settings`; methods may share one.
      defaults: settings whose default is another here.
      fixed: settings that can have one value alone here.
      refuses: settings that have values which are not possible here.
      reads: settings of directions that it reads with `order` 1; with 0 it reads them all.
      takes: those of "codec" and "rule" that `build` gives the algorithm itself. Where it doesn't,
        uploads are compressed from outside, and the algorithm's `aggregate` is replaced.
      coefficients: whether at K > 1 clients' models are coefficients of shared low-rank directions,
        which takes a linear optimiser; otherwise every client has a copy of the params.
      noise: (its own settings, P, K) -> the noise of its steps, as a multiple of that of a gradient
        estimated along P directions, for the learning rate of a run that is given none. Unless
        given it is 1 of order 0, and none of order 1.
      warms_up: whether rounds of it, with its own defaults, may come before those of another
        method, see `warmup.py`.
      private: its own settings -> whether they make it differentially private by itself.
    """

    name: str
    build: Callable[[Parts, Any], Algorithm]
    order: Literal[0, 1]
    summary: str
    options: type = NoOptions
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refuses: Mapping[str, Refusal] = dataclasses.field(default_factory=dict)
    reads: Collection[str] = ()
    takes: Collection[str] = ()
    coefficients: bool = False
    noise: Callable[[Any, int, int], float] | None = None
    warms_up: bool = False
    private: Callable[[Any], bool] = lambda options: False
