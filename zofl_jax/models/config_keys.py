"""The keys of Hugging Face's `config.json`: which are used, which leave the model as it is.

Any other key is refused with its value: a logit scale, soft-capped scores or a sliding window
change every number that a model computes and no shape. A key that is null is one that isn't set.
What tensors show (biases where the family has no key for them, an own head) is left to the names
of the tensors.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

_LISTED = 5  # names in an error
_SHOWN = 60  # characters of a value in an error

_HARMLESS = {
    "where the file comes from, and what wrote it": "_name_or_path name_or_path _commit_hash "
    "transformers_version transformers.js_config unsloth_version unsloth_fixed is_llama_config "
    "is_qwen2_config tokenizer_class prefix",
    "which file holds the weights, which `weights_hf` reads": "transformers_weights",
    "how it is stored, placed and evaluated: rounding at most": "dtype torch_dtype use_bfloat16 "
    "use_cache pretraining_tp chunk_size_feed_forward torchscript attn_implementation "
    "_attn_implementation _attn_implementation_autoset base_model_tp_plan base_model_pp_plan "
    "base_model_fsdp_plan",
    "training elsewhere; nothing is dropped here": "attention_dropout activation_dropout dropout "
    "layerdrop embd_pdrop resid_pdrop initializer_range init_std gradient_checkpointing "
    "neftune_noise_alpha tf_legacy_loss",
    "what is returned beside the scores; other heads": "return_dict "
    "output_attentions output_hidden_states output_scores return_dict_in_generate "
    "tie_last_hidden_states is_decoder num_labels id2label label2id problem_type finetuning_task "
    "task_specific_params",
    "how texts are generated, which transformers 5 ignores here": "max_length min_length "
    "do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p "
    "typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "encoder_repetition_penalty bad_words_ids num_return_sequences forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens epsilon_cutoff eta_cutoff decoder_start_token_id sep_token_id",
    "counts only where windows are in use, which is refused": "max_window_layers",
}
HARMLESS = frozenset(name for names in _HARMLESS.values() for name in names.split())
"""Keys whose value changes nothing that the model computes here."""

REQUIRED: Any = object()
"""The default of a key that must be there."""


class Key(NamedTuple):
    """A key that is used."""

    kind: type | tuple[type, ...]
    default: Any = REQUIRED  # transformers' own, where the key is missing
    nullable: bool = False

    def holds(self, value: Any) -> bool:
        """Returns whether a value is of the key's type."""
        if value is None:
            return self.nullable or self.default is None
        if isinstance(value, bool):
            return self.kind is bool
        return isinstance(value, (int, float) if self.kind is float else self.kind)


_INT = Key(int)
_SIZES = dict.fromkeys(
    (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ),
    _INT,
)


def _ends(bos: int | None, eos: int | None, pad: int | None) -> dict[str, Key]:
    return {
        "bos_token_id": Key(int, bos, nullable=True),
        "eos_token_id": Key((int, list), eos, nullable=True),
        "pad_token_id": Key(int, pad, nullable=True),
    }


_ROTARY = _SIZES | {
    "intermediate_size": _INT,
    "num_key_value_heads": Key(int, nullable=True),
    "head_dim": Key(int, None),
    "hidden_act": Key(str, "silu"),
    "rms_norm_eps": Key(float, 1e-6),
    "rope_theta": Key(float, 10000.0),
    "rope_scaling": Key(dict, None),
    "rope_parameters": Key(dict, None),
    "tie_word_embeddings": Key(bool, False),
}
_WINDOWS = {
    "use_sliding_window": Key(bool, False),
    "sliding_window": Key(int, 4096, nullable=True),
    "max_window_layers": Key(int, 28),
    "layer_types": Key(list, None),
}
_ATTENTION_BIAS = {"attention_bias": Key(bool, False)}
_BIASES = _ATTENTION_BIAS | {"mlp_bias": Key(bool, False)}

USED: Mapping[str, Mapping[str, Key]] = {
    "opt": _SIZES
    | _ends(2, 2, 1)
    | {
        "ffn_dim": _INT,
        "word_embed_proj_dim": Key(int, None),
        "do_layer_norm_before": Key(bool, True),
        "_remove_final_layer_norm": Key(bool, False),
        "activation_function": Key(str, "relu"),
        "enable_bias": Key(bool, True),
        "layer_norm_elementwise_affine": Key(bool, True),
        "tie_word_embeddings": Key(bool, True),
    },
    "llama": _ROTARY | _ends(1, 2, None) | _BIASES | {"num_key_value_heads": Key(int, None)},
    "qwen2": _ROTARY | _ends(None, None, None) | _WINDOWS,
    "qwen3": _ROTARY
    | _ends(None, None, None)
    | _WINDOWS
    | _ATTENTION_BIAS
    | {"head_dim": Key(int, 128)},
    "smollm3": _ROTARY
    | _ends(128000, 128001, 128004)
    | _WINDOWS
    | _BIASES
    | {
        "sliding_window": Key(int, None),
        "no_rope_layers": Key(list, None),
        "no_rope_layer_interval": Key(int, 4),
        "rope_theta": Key(float, 2000000.0),
        "tie_word_embeddings": Key(bool, True),
    },
}
"""The keys that are used, by family."""

_SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "is_causal": (True,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "qk_layer_norms": (False,),
    "partial_rotary_factor": (1,),
}
NEUTRAL: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "opt": _SWITCHED_OFF,
    "llama": _SWITCHED_OFF | {"use_sliding_window": (False,)},
    "qwen2": _SWITCHED_OFF | {"attention_bias": (True, False), "mlp_bias": (False,)},
    "qwen3": _SWITCHED_OFF | {"mlp_bias": (False,)},
    "smollm3": _SWITCHED_OFF,
}
"""Keys that leave the model as it is at these values only, by family."""

ROPE_USED: dict[str, Key] = {
    "rope_theta": Key(float, None),
    "rope_type": Key(str, None),
    "type": Key(str, None),
}
"""The keys of `rope_scaling` and `rope_parameters` that are used."""

ROPE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"partial_rotary_factor": (1,), "factor": (1,)}
"""Of a plain rotation."""

LLAMA3_USED: Mapping[str, Key] = ROPE_USED | {
    "factor": Key(float),
    "low_freq_factor": Key(float),
    "high_freq_factor": Key(float),
    "original_max_position_embeddings": Key(int, None),
}
"""The same where the rotation is scaled as in Llama 3."""


def read(where: str, fields: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """Returns the values of the keys that are used, transformers' own for missing ones.

    Raises:
      ValueError: for a missing key without a default, or one of another type; `where` is named.
    """
    values = {name: fields.get(name, key.default) for name, key in keys.items()}
    for name, value in values.items():
        if value is REQUIRED:
            raise ValueError(f"{where} lacks {name!r}: complete it")
        if not keys[name].holds(value):
            raise ValueError(f"{where} has {listed({name: value})}, which is of the wrong type")
    return values


def check_rest(
    where: str,
    fields: Mapping[str, Any],
    known: Collection[str],
    neutral: Mapping[str, tuple[Any, ...]],
) -> None:
    """Raises ValueError for keys that may change what the model computes.

    Args:
      where: named in the error.
      fields: all keys.
      known: those that are used, or harmless.
      neutral: those that leave the model as it is at these values.
    """
    odd = {
        name: value
        for name, value in fields.items()
        if not (value is None or name in known or value in neutral.get(name, ()))
    }
    if odd:
        raise ValueError(
            f"{where} has {listed(odd)}, which may change what the model computes and is not "
            "supported: load a model without it, or remove it where it changes nothing"
        )


def listed(values: Mapping[str, Any]) -> str:
    """Returns keys and values as an error shows them: the first few, cut short."""
    shown = []
    for name, value in values.items():
        text = repr(value)
        shown.append(f"{name} = {text if len(text) <= _SHOWN else text[:_SHOWN] + ' ...'}")
    return some(shown)


def some(names: Sequence[str]) -> str:
    """Returns the first few names as an error lists them, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
