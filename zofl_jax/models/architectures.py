"""What a decoder-only language model is made of: the OPT and the Llama family as one `Config`.

The two families differ in a few places, which the fields below name; `transformer.py` reads
nothing else. `named` holds the published sizes.

OPT: Zhang et al. 2022, arXiv 2205.01068. Llama: Touvron et al. 2023, arXiv 2302.13971, and
Grattafiori et al. 2024, arXiv 2407.21783. Qwen3: Yang et al. 2025, arXiv 2505.09388.
"""

import dataclasses
from typing import Any, NamedTuple

FAMILIES = ("opt", "llama", "qwen2", "qwen3", "smollm3")
"""Supported values of `Config.family`: the `model_type` of Hugging Face."""

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("relu", "gelu", "silu")


class RopeScaling(NamedTuple):
    """Llama 3's stretching of the slow rotary frequencies (arXiv 2407.21783, section 3.4.2)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder-only language model: hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      family: one of `FAMILIES`. "opt" has learned positions, layer norms and an MLP of two
        matrices; the others have rotary positions, RMS norms and a gated MLP.
      vocab_size: rows of the embedding table, padding rows included.
      width: features of the residual stream, D.
      mlp_width: features inside the MLP.
      num_kv_heads: heads of keys and values; fewer than `num_heads` is grouped-query attention.
      max_positions: the longest sequence.
      embed_width: features of the embedding table where they differ from `width` (OPT-350M,
        which projects in and out), else None.
      tied: the output head is the embedding table.
      pre_norm: norms stand before attention and MLP; False is OPT-350M.
      final_norm: a norm follows the last layer.
      qk_norm: RMS norm of each query and key head before the rotation (Qwen3).
      rope_layers: whether layer i rotates queries and keys; None is all of them. Layers
        without positions are SmolLM3's.
      eos_ids: every token that ends a text.
      param_dtype, compute_dtype: one of `DTYPES`. Norms, softmax and logits are float32 always.
      matmul_dtype: that the factors of every product with a weight are rounded to; it is summed
        in float32. None is the compute dtype. "bfloat16" is what TPUs do to float32 products
        by default.

    Raises:
      ValueError: for a family, an activation or a dtype that isn't known and for heads that
        don't divide.
    """

    family: str
    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    embed_width: int | None = None
    tied: bool = True
    activation: str = "silu"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    final_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_layers: tuple[bool, ...] | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    matmul_dtype: str | None = None

    def __post_init__(self) -> None:
        check_family(self.family)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} is not supported: use one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        matmul_dtype = self.matmul_dtype or self.compute_dtype
        for name in (self.param_dtype, self.compute_dtype, matmul_dtype):
            if name not in DTYPES:
                raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}"
            )
        if self.rotary and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")
        if self.rope_layers is not None and len(self.rope_layers) != self.num_layers:
            raise ValueError(
                f"rope_layers must have one entry a layer, got {len(self.rope_layers)} for "
                f"{self.num_layers} layers"
            )

    @property
    def rotary(self) -> bool:
        """Whether positions are rotations of queries and keys; else they are learned vectors."""
        return self.family != "opt"

    @property
    def gated(self) -> bool:
        """Whether the MLP is down(activation(gate(x)) * up(x)); else down(activation(up(x)))."""
        return self.family != "opt"

    @property
    def layer_norm(self) -> bool:
        """Whether norms subtract the mean and have a bias; else they are RMS norms."""
        return self.family == "opt"


def check_family(family: str) -> None:
    """Raises ValueError if `family` isn't one of `FAMILIES`."""
    if family not in FAMILIES:
        raise ValueError(
            f"architecture {family!r} is not supported: use one of {', '.join(FAMILIES)}"
        )


def named(name: str, **changes: Any) -> Config:
    """Returns the published configuration `name`, such as "opt-1.3b", with fields changed.

    >>> named("opt-125m").width
    768
    >>> named("smollm2-135m", compute_dtype="bfloat16").compute_dtype
    'bfloat16'

    Raises:
      ValueError: for an unknown name; the message lists the known ones.
    """
    if name.lower() not in PUBLISHED:
        raise ValueError(f"model {name!r} is not known: use one of {', '.join(PUBLISHED)}")
    return dataclasses.replace(PUBLISHED[name.lower()], **changes)


def _opt(width: int, layers: int, heads: int, **changes: Any) -> Config:
    return Config(
        family="opt",
        vocab_size=50272,
        width=width,
        mlp_width=4 * width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_positions=2048,
        activation="relu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        bos_id=2,
        eos_ids=(2,),
        pad_id=1,
        **changes,
    )


def _llama(
    family: str,
    width: int,
    mlp_width: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    vocab_size: int,
    **changes: Any,
) -> Config:
    return Config(
        family=family,
        vocab_size=vocab_size,
        width=width,
        mlp_width=mlp_width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **changes,
    )


def _llama3(
    *sizes: int,
    tied: bool = True,
    max_positions: int = 131072,
    stretched: float | None = 32.0,
) -> Config:
    return _llama(
        "llama",
        *sizes,
        vocab_size=128256,
        tied=tied,
        max_positions=max_positions,
        rope_theta=500000.0,
        rope_scaling=None if stretched is None else RopeScaling(stretched),
        bos_id=128000,
        eos_ids=(128001,),
    )


def _smollm2(*sizes: int, rope_theta: float = 100000.0) -> Config:
    return _llama(
        "llama",
        *sizes,
        vocab_size=49152,
        max_positions=8192,
        rope_theta=rope_theta,
        bos_id=0,
        eos_ids=(0,),
    )


def _qwen(family: str, *sizes: int, vocab_size: int = 151936, tied: bool = True) -> Config:
    return _llama(
        family,
        *sizes,
        vocab_size=vocab_size,
        tied=tied,
        max_positions=40960 if family == "qwen3" else 32768,
        norm_eps=1e-6,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=1000000.0,
        bos_id=151643,
        eos_ids=(151645,) if family == "qwen3" else (151643,),
    )


PUBLISHED: dict[str, Config] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, embed_width=512, pre_norm=False, final_norm=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    # width, mlp_width, layers, heads, kv_heads, head_dim
    "llama-3-8b": _llama3(
        *(4096, 14336, 32, 32, 8, 128), tied=False, max_positions=8192, stretched=None
    ),
    "llama-3-70b": _llama3(
        *(8192, 28672, 80, 64, 8, 128), tied=False, max_positions=8192, stretched=None
    ),
    "llama-3.1-8b": _llama3(*(4096, 14336, 32, 32, 8, 128), tied=False, stretched=8.0),
    "llama-3.1-70b": _llama3(*(8192, 28672, 80, 64, 8, 128), tied=False, stretched=8.0),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 8, 64),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 8, 128),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 64),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 64),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 64, rope_theta=130000.0),
    "smollm3-3b": _llama(
        "smollm3",
        *(2048, 11008, 36, 16, 4, 128),
        vocab_size=128256,
        max_positions=65536,
        norm_eps=1e-6,
        rope_theta=5000000.0,
        rope_layers=tuple((i + 1) % 4 != 0 for i in range(36)),
        bos_id=128000,
        eos_ids=(128012,),
        pad_id=128004,
    ),
    "qwen2.5-0.5b": _qwen("qwen2", 896, 4864, 24, 14, 2, 64),
    "qwen2.5-1.5b": _qwen("qwen2", 1536, 8960, 28, 12, 2, 128),
    "qwen2.5-3b": _qwen("qwen2", 2048, 11008, 36, 16, 2, 128),
    "qwen2.5-7b": _qwen("qwen2", 3584, 18944, 28, 28, 4, 128, vocab_size=152064, tied=False),
    "qwen3-0.6b": _qwen("qwen3", 1024, 3072, 28, 16, 8, 128),
    "qwen3-1.7b": _qwen("qwen3", 2048, 6144, 28, 16, 8, 128),
    "qwen3-4b": _qwen("qwen3", 2560, 9728, 36, 32, 8, 128),
    "qwen3-8b": _qwen("qwen3", 4096, 12288, 36, 32, 8, 128, tied=False),
}
"""The sizes that `named` knows."""
