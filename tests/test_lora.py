import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from zofl_jax import keys
from zofl_jax.models import architectures, lora, transformer

TINY = architectures.Config(
    family="opt",
    vocab_size=40,
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    max_positions=16,
    activation="relu",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
MASK = np.arange(6) >= np.array([[0], [2]])
TOKENS = np.where(MASK, np.arange(12).reshape(2, 6) * 3 + 1, 0)
ALL = "kernel|embedding"

apply = jax.jit(transformer.apply, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    leaves = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape), transformer.shapes(TINY)
    )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), leaves)


def trained(trainable, scale=0.3):
    """Adapters as training would leave them: neither factor is 0."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: leaf + scale * rng.standard_normal(leaf.shape).astype(np.float32), trainable
    )


def test_split_and_combine_are_inverse(params):
    trainable, frozen = lora.split(params, lambda path: path.endswith("bias"))
    assert len(jax.tree.leaves(trainable)) == 9
    assert all(path.endswith("bias") for path in flatten_dict(trainable, sep="/"))
    both = lora.combine(trainable, frozen)
    assert jax.tree.structure(both) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, both, params)
    everything, nothing = lora.split(params, lambda path: True)
    assert nothing == {} and lora.combine(everything, nothing).keys() == params.keys()


def test_directions_do_not_depend_on_what_else_is_trained(params):
    key = jax.random.key(3)
    trainable, _ = lora.split(params, lambda path: "mlp" in path)
    alone, among_all = (
        flatten_dict(keys.leaf_keys(key, tree), sep="/") for tree in (trainable, params)
    )
    assert 0 < len(alone) < len(among_all)
    assert all((among_all[path] == alone[path]).all() for path in alone)


def test_split_and_combine_refuse(params):
    with pytest.raises(
        ValueError, match="no leaf would be trained: choose from embed/positions/embedding"
    ):
        lora.split(params, lambda path: "router" in path)
    _, frozen = lora.split(params, lambda path: "mlp" in path)
    with pytest.raises(ValueError, match="final_norm/bias are both trained and frozen"):
        lora.combine({"final_norm": {"bias": 0.0}}, frozen)


def test_new_adapters_change_nothing(params):
    trainable, frozen = lora.add(params, ALL, 2, 16.0, jax.random.key(1))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(trainable, sep="/").items()}
    assert shapes["layers/mlp/up/lora_a"] == (2, 16, 2)
    assert shapes["layers/mlp/up/lora_b"] == (2, 2, 24)
    assert shapes["embed/tokens/lora_a"] == (40, 2) and len(shapes) == 2 * 8
    a = trainable["layers"]["mlp"]["down"]["lora_a"]
    assert np.abs(a).max() <= 24**-0.5 and a.std() == pytest.approx(24**-0.5 / 3**0.5, rel=0.2)
    assert not np.array_equal(a[0], a[1])
    whole = lora.combine(trainable, frozen)
    before = apply(TINY, params, TOKENS, MASK)
    np.testing.assert_array_equal(apply(TINY, whole, TOKENS, MASK), before)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(whole), params)


def test_adapters_act_as_the_merged_matrices_do(params):
    trainable, frozen = lora.add(params, ALL, 2, 3.0, jax.random.key(1))
    whole = lora.combine(trained(trainable), frozen)
    merged = lora.merge(whole)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    up, name = whole["layers"]["mlp"]["up"], "layers/mlp/up/kernel"
    expected = up["kernel"] + 1.5 * np.einsum("lir,lro->lio", up["lora_a"], up["lora_b"])
    np.testing.assert_allclose(flatten_dict(merged, sep="/")[name], expected, rtol=1e-4, atol=1e-5)
    before, after = (apply(TINY, p, TOKENS, MASK)[MASK] for p in (params, merged))
    assert np.abs(after - before).max() > 0.3
    np.testing.assert_allclose(apply(TINY, whole, TOKENS, MASK)[MASK], after, atol=2e-4)
    candidates = transformer.logits(TINY, whole, jnp.ones((1, 16)), [3, 9])
    full = transformer.logits(TINY, merged, jnp.ones((1, 16)))
    np.testing.assert_allclose(candidates, full[:, [3, 9]], rtol=1e-4, atol=1e-4)


def test_each_client_may_have_its_own_adapters_over_one_model(params):
    trainable, frozen = lora.add(params, "mlp", 2, 2.0, jax.random.key(1))
    clients = [trained(trainable, scale) for scale in (0.1, 0.2, 0.4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *clients)

    def features(adapters, frozen):
        return transformer.hidden(TINY, lora.combine(adapters, frozen), TOKENS, MASK)

    together = jax.vmap(features, in_axes=(0, None))
    ours = jax.jit(together)(stacked, frozen)
    one = jax.jit(features)
    for client, expected in zip(ours, map(lambda c: one(c, frozen), clients), strict=True):
        np.testing.assert_allclose(client[MASK], expected[MASK], atol=1e-4)
    jaxpr = str(jax.make_jaxpr(together)(stacked, frozen))
    assert "f32[3,16,2]" in jaxpr and "f32[3,16,24]" not in jaxpr  # A is batched, W is not


def test_only_adapters_are_trained_and_the_model_stays_in_half_precision(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    trainable, frozen = lora.add(half, "attention/(q|v)/", 2, 2.0, jax.random.key(1))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainable)} == {"float32"}

    def loss(adapters):
        scores = transformer.apply(TINY, lora.combine(adapters, frozen), TOKENS, MASK)
        return jnp.square(scores).mean()

    gradient = flatten_dict(jax.jit(jax.grad(loss))(trained(trainable)), sep="/")
    assert sorted(gradient) == [
        f"layers/attention/{name}/lora_{side}" for name in "qv" for side in "ab"
    ]
    assert all(np.abs(leaf).max() > 0 for leaf in gradient.values())
    merged = flatten_dict(lora.merge(lora.combine(trained(trainable), frozen)), sep="/")
    wide = {f"layers/attention/{name}/kernel" for name in "qv"}  # see test_precision.py
    assert {path for path, leaf in merged.items() if leaf.dtype != jnp.bfloat16} == wide


def test_adapters_of_any_nested_params():
    params = {"Conv_0": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}}
    trainable, frozen = lora.add(params, "Conv", 2, 4.0, jax.random.key(0))
    assert trainable["Conv_0"]["lora_a"].shape == (3, 3, 4, 2)
    moved = jax.tree.map(lambda leaf: leaf + 1.0, trainable)
    merged = lora.merge(lora.combine(moved, frozen))
    a, b = moved["Conv_0"]["lora_a"], moved["Conv_0"]["lora_b"]
    np.testing.assert_allclose(merged["Conv_0"]["kernel"], 1 + 2 * (a @ b), rtol=1e-5)
    assert merged["Conv_0"].keys() == {"kernel", "bias"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("router", 2, 1.0), "'router' matches no matrix: choose from embed/positions/embedding"),
        (("bias", 2, 1.0), "'bias' matches no matrix"),
        (("mlp", 0, 1.0), r"rank must be in \[1, 16\] for layers/mlp/down/kernel, got 0"),
        (("mlp", 17, 1.0), r"rank must be in \[1, 16\] .* got 17"),
        (("mlp", 2, 0.0), "alpha must be > 0, got 0"),
    ],
)
def test_adding_refuses(arguments, message, params):
    with pytest.raises(ValueError, match=message):
        lora.add(params, *arguments, jax.random.key(0))


def test_adding_twice_is_refused(params):
    whole = lora.combine(*lora.add(params, "mlp", 2, 1.0, jax.random.key(0)))
    with pytest.raises(ValueError, match="mlp/down/kernel has an adapter already: merge it first"):
        lora.add(whole, "mlp/down", 2, 1.0, jax.random.key(0))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("opt", "attention/(q|v)/"),
        ("opt-post-norm", "kernel"),
        ("llama", "kernel|tokens|head"),
        ("qwen3", "mlp|head"),
    ],
)
def test_peft_computes_the_same(name, pattern, tmp_path):
    tiny = pytest.importorskip("tiny_language_models")
    peft = pytest.importorskip("peft")
    from zofl_jax.models import weights

    model = tiny.random_model(name)
    model.save_pretrained(tmp_path / "model")
    config, params, _ = weights.load(f"hf:{tmp_path / 'model'}")
    before = tiny.scores(model, TOKENS, MASK)
    trainable, frozen = lora.add(params, pattern, 4, 6.0, jax.random.key(0))
    whole = lora.combine(trained(trainable, 0.1), frozen)
    ours = np.asarray(apply(config, whole, TOKENS, MASK))[MASK]

    lora.save_peft(str(tmp_path / "adapter"), config, whole, str(tmp_path / "model"))
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert len(adapted.state_dict()) > len(before)
    theirs = tiny.scores(adapted, TOKENS, MASK)[MASK]
    assert np.abs(theirs - before[MASK]).max() > 0.3
    np.testing.assert_allclose(ours, theirs, atol=1e-4)

    weights.save_hf(str(tmp_path / "merged"), config, lora.merge(whole))
    load = tiny.transformers.AutoModelForCausalLM.from_pretrained
    merged = tiny.scores(load(tmp_path / "merged").eval(), TOKENS, MASK)[MASK]
    np.testing.assert_allclose(ours, merged, atol=1e-4)


def test_what_peft_cannot_express_is_refused(params, tmp_path):
    def save(params):
        lora.save_peft(str(tmp_path), TINY, params)

    with pytest.raises(ValueError, match="params hold no adapters"):
        save(params)
    for table in ("tokens", "positions"):
        whole = lora.combine(*lora.add(params, table, 2, 1.0, jax.random.key(0)))
        with pytest.raises(ValueError, match=f"computes the same for embed/{table}: merge it"):
            save(whole)
    once = lora.combine(*lora.add(params, "mlp", 2, 1.0, jax.random.key(0)))
    twice = lora.combine(*lora.add(once, "attention/q/", 3, 1.0, jax.random.key(0)))
    with pytest.raises(ValueError, match=r"peft needs one rank and scale, got \{2, 3\}"):
        save(twice)
