"""Random small models of each family, as transformers makes them."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = 96
_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OPT = {"ffn_dim": 48, "dropout": 0.0, "activation_function": "relu"}
_LLAMA = {"intermediate_size": 48, "num_key_value_heads": 2}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CONFIGURATIONS = {
    "opt": ("OPT", _OPT),
    "opt-post-norm": (
        "OPT",
        _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "llama": ("Llama", _LLAMA | {"tie_word_embeddings": False, "rope_parameters": _LLAMA3_ROPE}),
    "llama-biases": (
        "Llama",
        _LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2", _LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3": ("Qwen3", _LLAMA | {"tie_word_embeddings": False, "head_dim": 12}),
    "smollm3": ("SmolLM3", _LLAMA | {"no_rope_layers": [1, 0, 1]}),
}


def random_model(name, **changes):
    """Returns a transformers model of CONFIGURATIONS with weights far from their defaults."""
    family, fields = CONFIGURATIONS[name]
    config = getattr(transformers, f"{family}Config")(**_SHARED | fields | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def scores(model, tokens, mask):
    """Returns the model's logits as an array, [B, T, V]."""
    with torch.no_grad():
        output = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long())
    return output.logits.numpy()


def greedy(model, tokens, mask, max_new_tokens, eos=None):
    """Returns what the model writes after each prompt, padded left: [B, max_new_tokens]."""
    model.generation_config.eos_token_id = eos
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=eos
    )
    inputs = {"inputs": torch.tensor(tokens), "attention_mask": torch.tensor(mask).long()}
    return model.generate(**inputs, generation_config=settings).numpy()[:, tokens.shape[1] :]
