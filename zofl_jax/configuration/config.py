"""The settings of a run, as one frozen value.

`Config` is made by `resolve.resolve`. Its fields are those of the groups below, whose docstrings
head the help of the commands, and `options`: the settings of the run's method alone, which are
declared beside it. `Config.flat` is what `flags.json` of a run directory holds.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from zofl_jax import keys
from zofl_jax.algorithms import METHODS, Method
from zofl_jax.configuration import choices, kinds
from zofl_jax.models.images import MODELS
from zofl_jax.settings import Setting, Value, positive, setting, settings_of, share
from zofl_jax.tasks import catalogue, objectives


@dataclasses.dataclass(frozen=True)
class Data:
    """Task and data."""

    task: str = setting(
        kinds.DIGITS,
        f"Images: {', '.join(kinds.IMAGES)}, {kinds.TFDS}NAME. Texts: "
        f"{', '.join(catalogue.CATALOGUE)}, and {kinds.OWN_TEXTS} for data of one's own. Or "
        f"{kinds.QUADRATIC}.",
    )
    data_dir: str | None = setting(
        None, "Folder (idx, tfds, texts) or file (npz, reviews, text) of the data."
    )
    model: str | None = setting(
        None,
        f"Of images: {', '.join(MODELS)}; {next(iter(MODELS))} unless given. Of texts: gguf:FILE "
        "or hf:FOLDER_OR_NAME; what make smollm2 fetched unless given.",
    )
    objective: str | None = setting(
        None,
        "What is improved: the cross-entropy of the classes (unless given), accuracy or F1; of "
        "texts also the cross-entropy of the answer in the whole vocabulary (sequence; for "
        "written answers unless given), where F1 is that of the tokens.",
        choices=(*objectives.CLASSIFICATION, "sequence"),
    )
    partition: str = setting(
        "iid", "How examples are shared out to clients.", choices=choices.PARTITIONS
    )
    dirichlet_alpha: float = setting(1.0, "α of the Dirichlet partition.", within=positive())
    shards_per_client: int = setting(2, "Label shards a client gets.", least=1)
    missing_owner: Literal["error", "drop", "own"] | None = setting(
        None,
        "What a training example without an owner is with --partition=natural: an error (unless "
        "given), left out, or a client of its own.",
        choices=("error", "drop", "own"),
    )
    least_examples: int = setting(
        0, "Owners of fewer training examples are left out (--partition=natural).", least=0
    )


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Clients and rounds."""

    num_clients: int = setting(20, "Population.", least=1)
    clients_per_round: int = setting(5, "Cohort, sampled uniformly.", least=1)
    batch_size: int = setting(32, "Examples of a client in a local step.", least=1)
    rounds: int = setting(400, "Rounds in all.", least=1)
    eval_every: int = setting(50, "Rounds between evaluations.", least=1)
    weighting: Literal["uniform", "examples"] = setting(
        "uniform", "Weights of the cohort's mean.", choices=("uniform", "examples")
    )
    seed: int = setting(
        0, "Seed of everything random.", within=("in [0, 2**32)", lambda seed: 0 <= seed < 2**32)
    )
    prng_impl: str = setting(
        "threefry2x32", f"Generator of the directions: {', '.join(keys.IMPLEMENTATIONS)}."
    )


@dataclasses.dataclass(frozen=True)
class Learning:
    """Method and optimiser."""

    algorithm: str = setting(next(iter(METHODS)), "Federated algorithm.", choices=METHODS)
    local_steps: int = setting(4, "K, local steps of a client in a round.", least=1)
    optimizer: str = setting(
        "sgd",
        "Optimiser: the one that everyone replays, of methods with dense uploads the clients' own.",
        choices=choices.OPTIMIZERS,
    )
    learning_rate: float | None = setting(
        None,
        "Learning rate; unless given, one that suits the task, the model and the method.",
        within=positive(),
    )
    momentum: float = setting(0.9, "Momentum of sgd.", within=share(below_one=True))
    weight_decay: float = setting(
        0.0, "Weight decay: added to the direction (sgd), decoupled (others).", least=0
    )
    schedule: str = setting(
        "",
        "Factors on learning rate (lr), smoothing (mu) and perturbations (P) from a round on, "
        "relative to the start, as in '500:lr=0.8,P=2;1000:lr=0.5,P=4'; 'authors' is "
        f"'{choices.AUTHORS}'.",
    )


_WARMUPS = sorted(
    (name for name, method in METHODS.items() if method.warms_up),
    key=lambda name: -METHODS[name].order,  # gradients first
)


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """A warm-up by another method."""

    warmup_rounds: int = setting(
        0, "Rounds of another method before those of --algorithm (ZOWarmUp); 0 for none.", least=0
    )
    warmup: str = setting(
        _WARMUPS[0],
        "Method of the warm-up, with its own defaults, by sgd without momentum.",
        choices=_WARMUPS,
    )
    warmup_learning_rate: float | None = setting(
        None,
        "Learning rate of the warm-up; unless given, one that suits task, model and method.",
        within=positive(),
    )
    warmup_local_steps: int | None = setting(
        None,
        "Local steps in a round of the warm-up; unless given, those of its method's defaults or of "
        "--local_steps.",
        least=1,
    )
    warmup_share: float = setting(
        1.0,
        "Share of the population that is there for the warm-up; the others join after it.",
        within=share(),
    )


@dataclasses.dataclass(frozen=True)
class Directions:
    """Directions, of methods that measure along them."""

    estimator: str = setting(
        "central",
        "Finite differences, or exact directional derivatives by one backward pass (projection) "
        "or by forward mode (jvp).",
        choices=choices.ESTIMATORS,
    )
    perturbation: str = setting(
        "gaussian", "Distribution of the directions.", choices=choices.PERTURBATIONS
    )
    rank: int = setting(1, "Rank of low_rank and subspace directions.", least=1)
    subspace_rounds: int = setting(
        50, "Rounds after which subspace directions get other subspaces.", least=1
    )
    history: int = setting(
        0,
        "Directions lean towards the span of as many of the last rounds' updates; 0 for none.",
        least=0,
    )
    history_share: float = setting(
        0.5,
        "Share of a direction's square length that lies in the span of --history.",
        within=share(below_one=True),
    )
    centre_rounds: str = setting(
        "",
        "Rounds, such as 0 or 0,100, in which clients send the mean inputs of the model's matrices "
        "in place of scalars: directions are at right angles to them from then on.",
    )
    num_perturbations: int = setting(
        20,
        "P, directions of a local step; of a round where its change is projected on them.",
        least=1,
    )
    smoothing: float = setting(
        1e-3, "μ, the length of a perturbation in units of z.", within=positive()
    )
    examples_per_direction: int = setting(
        0,
        "Examples of a batch that a direction is measured on, each group of so many with "
        "directions of its own; 0 for the whole batch.",
        least=0,
    )
    mask: str = setting(
        "none",
        "Perturb some params alone: random ones, the smallest, or those that the loss of a "
        f"calibration batch ({choices.CALIBRATION_EXAMPLES} training examples) reacts to most.",
        choices=choices.MASKS,
    )
    mask_density: float = setting(0.1, "Share of the params that a mask keeps.")
    mask_data: str | None = setting(
        None,
        "Public examples of --mask=sensitivity in place of the clients' own (MEERKAT): another "
        "task's, as SOURCE or SOURCE:PLACE, or a .txt file with a text a line.",
    )


@dataclasses.dataclass(frozen=True)
class Compression:
    """Compression of messages."""

    compression: str = setting(
        "none",
        "What uploads are written as: int8 and int4 with a scale a message, qsgd in 4 bits with a "
        "norm for 512 numbers, top_k and sign with error feedback where uploads are like the "
        "params.",
        choices=choices.CODECS,
    )
    broadcast_compression: str = setting(
        "none",
        "What the server's broadcasts are written as, rounded to the nearest.",
        choices=choices.BROADCAST_CODECS,
    )
    top_k_fraction: float = setting(0.01, "Share of an upload that top_k sends.")
    stochastic_rounding: bool = setting(
        True, "Round at random, without bias; to the nearest otherwise."
    )


@dataclasses.dataclass(frozen=True)
class Adversity:
    """Malicious clients and robust rules."""

    aggregator: str = setting(
        "mean",
        "How the server makes one broadcast of the uploads.",
        choices=choices.AGGREGATORS,
    )
    trimmed_share: float = setting(0.2, "Share that trimmed_mean drops at each end.")
    num_byzantine: int = setting(
        1, "Bad clients in a cohort that krum and multi_krum count on.", least=0
    )
    aggregator_size: float = setting(
        1.0,
        "Norm that clipped_mean clips to; magnitude that majority_sign sends.",
        within=positive(),
    )
    attack: str = setting("none", "What malicious clients do.", choices=choices.ATTACKS)
    malicious_share: float = setting(
        0.2, "Share of the population that is malicious.", within=share()
    )
    attack_size: float | None = setting(
        None,
        "Size of the attack: times the honest root mean square (gaussian), the own upload (scaling "
        "10, sign_flip 1) or the honest mean (inner_product 2), stretch (trim 2), the number "
        "itself (out_of_range 1e30).",
    )
    max_message: float = setting(
        1e6, "Messages with a number larger than this in size are rejected.", within=positive()
    )


@dataclasses.dataclass(frozen=True)
class Privacy:
    """Privacy and secure sums."""

    dp: str = setting(
        "none",
        "Differential privacy of a whole client, or of each example of a client.",
        choices=("none", "client", "example"),
    )
    dp_clip: float = setting(
        1.0, "Norm that an upload, or an example's scalars, is clipped to.", within=positive()
    )
    dp_noise: float = setting(1.0, "Noise multiplier σ: the noise over the clipping norm.", least=0)
    dp_delta: float = setting(
        1e-5, "δ at which ε is reported.", within=("in (0, 1)", lambda delta: 0 < delta < 1)
    )
    secure_sum: bool = setting(False, "Upload integers of which the server needs the sum alone.")
    secure_bits: int = setting(16, "Bits of the fraction in a secure sum.", least=0)
    secure_largest: float = setting(
        100.0, "Largest number that a secure sum takes.", within=positive()
    )


@dataclasses.dataclass(frozen=True)
class Presence:
    """Who is there, and in time."""

    dropout: float = setting(0.0, "Chance that an upload is lost.", within=share(below_one=True))
    deadline: float | None = setting(
        None,
        "When uploads are too late, in median round times; none unless given.",
        within=positive(),
    )
    time_spread: float = setting(0.5, "Spread of the log of clients' round times.", least=0)
    late_weight: float = setting(
        0.0, "Weight of a late upload in the next round; 0 discards it.", within=share()
    )
    late_joiners: float = setting(0.0, "Share of the population that joins late.", within=share())
    join_by: int = setting(100, "Round by which the late joiners have joined.", least=1)
    availability: str = setting(
        "",
        "When clients are there: PERIOD:SHARE (each for a share of a period, by its time zone), or "
        "a .npy file of booleans [rounds, clients]. Always unless given.",
    )


@dataclasses.dataclass(frozen=True)
class Texts:
    """Language models and texts."""

    dtype: str = setting(
        "float32",
        "What a language model computes in, and its weights are kept in: those that are trained "
        "are kept in float32, or small updates would round away.",
        choices=choices.DTYPES,
    )
    matmul_dtype: str | None = setting(
        None,
        "What the factors of a language model's products with weights are rounded to; sums stay "
        "float32. bfloat16 is two to three times as fast on CPUs with AMX, and what TPUs do "
        "anyway.",
        choices=choices.DTYPES,
    )
    bos: str | None = setting(
        None,
        "Whether the token that starts a text (BOS) stands before every prompt: as the model's "
        "files say (auto, unless given), always or never.",
        choices=("auto", "always", "never"),
    )
    lora_rank: int = setting(0, "Rank of LoRA adapters; 0 trains the weights.", least=0)
    lora_alpha: float = setting(
        16.0, "α of LoRA: adapters are scaled by α / rank.", within=positive()
    )
    lora_pattern: str = setting(
        "attention/(q|v)/kernel", "Regular expression: weights that get adapters."
    )
    train_only: str | None = setting(
        None, "Regular expression: the only params of a language model to train."
    )
    max_length: int | None = setting(
        None,
        "Longest text in tokens, cut on the left; the model's limit unless given.",
        least=8,
    )
    max_new_tokens: int = setting(
        32, "Longest written answer in tokens, of the data and of the model.", least=1
    )
    shots: int = setting(0, "Training examples shown with their answers before each text.", least=0)
    train_examples: int = setting(0, "Training examples used, 0 for all.", least=0)
    test_examples: int = setting(0, "Test examples used, 0 for all.", least=0)
    text_column: str = setting("text", f"Column of the text (--task={kinds.OWN_TEXTS}).")
    label_column: str = setting("label", f"Column of the label (--task={kinds.OWN_TEXTS}).")
    client_column: str | None = setting(
        None,
        "Column that names an example's owner (--partition=natural); the document of snippets "
        "unless given.",
    )
    held_out: float = setting(
        0.1,
        f"Share of the rows held out for testing (--task={kinds.OWN_TEXTS} with a single file).",
        within=share(),
    )
    template: str | None = setting(
        None, "Prompt with columns in braces, as '{text} It was'; that of the task unless given."
    )
    verbalizers: str | None = setting(
        None,
        "A word for each label, as 'negative=bad,positive=good'; those of the task unless given.",
    )


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """The quadratic."""

    quadratic_dim: int = setting(1000, "Dimension of the quadratic.", least=1)
    effective_rank: float = setting(10.0, "Effective rank of the quadratic.")
    heterogeneity: float = setting(1.0, "Distance between the clients' quadratics.", least=0)
    noise: float = setting(0.0, "Distance between the examples of a client's quadratic.", least=0)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How rounds are computed; results differ in rounding alone."""

    clients_at_once: int | None = setting(
        None,
        "Clients evaluated at once, 0 for all. Unless given, 1 for convolutional models on a CPU, "
        "for them elsewhere and for texts as many as the device's memory holds, for others all.",
        least=0,
    )
    perturbations_at_once: int | None = setting(
        None,
        "Perturbed models evaluated at once, 0 for as many as share their products: all of "
        "low_rank directions, one of others. 0 unless given; for convolutional and language "
        "models 1 on a CPU, elsewhere as many as fill the device.",
        least=0,
    )


@dataclasses.dataclass(frozen=True)
class Config(
    Data,
    Rounds,
    Learning,
    WarmUp,
    Directions,
    Compression,
    Adversity,
    Privacy,
    Presence,
    Texts,
    Quadratic,
    Execution,
):
    """The settings of a run, resolved and checked; see `resolve.resolve`.

    Attributes:
      options: the settings of the method alone, an instance of `method.options`.
      given: the names of those that the user gave.
    """

    options: Any = None
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False, repr=False)

    @property
    def method(self) -> Method:
        """What the method says of itself."""
        return METHODS[self.algorithm]

    @property
    def groups(self) -> int:
        """How many groups of a batch's examples have directions of their own."""
        return max(1, self.batch_size // (self.examples_per_direction or self.batch_size))

    @property
    def kind(self) -> str:
        """Images, texts or quadratic, see `kinds`."""
        return kinds.kind_of(self.task).name

    def get(self, name: str) -> Value:
        """Returns a setting by its name; the default of one that is another method's."""
        if name in general():
            return getattr(self, name)
        return getattr(self.options, name, everything()[name].default)

    def flat(self) -> dict[str, Value]:
        """Returns all settings by name, those of other methods with their defaults."""
        return {name: self.get(name) for name in everything()}

    def replace(self, **changes: Any) -> Self:
        """Returns the config with other values, which are not checked."""
        own = {name: value for name, value in changes.items() if name not in general()}
        options = dataclasses.replace(self.options, **own) if own else self.options
        rest = {name: value for name, value in changes.items() if name not in own}
        return dataclasses.replace(self, **rest, options=options)

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config that `flat` told, as a run directory of any release holds it.

        Settings that are missing have their defaults; what is not known is left aside.

        Raises:
          ValueError: for a run whose method is not here.
        """
        name = values.get("algorithm", next(iter(METHODS)))
        if name not in METHODS:
            raise ValueError(
                f"the run's method is {name!r}, not one of {', '.join(METHODS)}: where Python code "
                "made it (zofl.train), the same code goes on with it, and "
                "zofl_jax.runs.recording.rebuild replays it"
            )
        known = {name: value for name, value in values.items() if name in general()}
        options = METHODS[name].options
        own = {name: values[name] for name in settings_of(options) if name in values}
        return cls(**known, options=options(**own))


GROUPS: tuple[type, ...] = tuple(
    base for base in Config.__mro__[1:] if dataclasses.is_dataclass(base)
)
"""The settings that all methods share, by what they are about."""


@functools.cache
def general() -> Mapping[str, Setting]:
    """Returns the settings that all methods share, by name."""
    return MappingProxyType({n: s for group in GROUPS for n, s in settings_of(group).items()})


@functools.cache
def everything() -> Mapping[str, Setting]:
    """Returns all settings by name, those of single methods last."""
    own = {n: s for method in METHODS.values() for n, s in settings_of(method.options).items()}
    return MappingProxyType({**general(), **own})
