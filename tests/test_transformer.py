import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax import keys
from zofl_jax.directions import estimators, perturbations
from zofl_jax.models import architectures, blocks, generation, transformer

TINY = architectures.Config(
    family="qwen3",
    vocab_size=50,
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=32,
    qk_norm=True,
    pad_id=0,
)
KEY = jax.random.key(0)
apply = jax.jit(transformer.apply, static_argnums=0)
hidden = jax.jit(transformer.hidden, static_argnums=0)
FAMILIES = ["opt", "opt-post-norm", "llama", "llama-biases", "qwen2", "qwen3", "smollm3"]


@pytest.fixture(scope="module")
def params():
    """Random params; drawn by NumPy, since `transformer.init` takes seconds to compile."""
    rng = np.random.default_rng(0)
    spec = transformer.shapes(TINY)
    leaves = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape), spec)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), leaves)


def prompts(side, vocabulary=96, lengths=(9, 5, 1, 7), filler=0):
    """The same texts, padded left or right: tokens [B, T] and mask [B, T]."""
    rng = np.random.default_rng(0)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    if side == "left":
        mask = mask[:, ::-1].copy()
    tokens = np.full(mask.shape, filler)
    tokens[mask] = rng.integers(3, vocabulary, mask.sum())
    return tokens, mask


def pair(name, folder):
    """The same random model in transformers and here."""
    tiny = pytest.importorskip("tiny_language_models")
    pytest.importorskip("tokenizers")
    from zofl_jax.models import weights

    model = tiny.random_model(name)
    model.save_pretrained(folder)
    config, params, _ = weights.load(f"hf:{folder}")
    return tiny, model, config, params


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_generation_equal_transformers(name, tmp_path):
    tiny, model, config, params = pair(name, tmp_path)
    for side in ("left", "right"):
        tokens, mask = prompts(side)
        theirs = tiny.scores(model, tokens, mask)
        ours = np.asarray(apply(config, params, tokens, mask))
        assert np.std(theirs) > 0.3  # so that 1e-4 means something
        np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-4)
    theirs = tiny.greedy(model, *prompts("left"), 12)
    for side in ("left", "right"):
        ours = generation.generate(config, params, *prompts(side), 12)
        np.testing.assert_array_equal(ours, theirs)


def test_generation_stops_at_eos_as_transformers_does(tmp_path):
    tiny, model, config, params = pair("llama", tmp_path)
    tokens, mask = prompts("left")
    free = tiny.greedy(model, tokens, mask, 12)
    for eos in ([int(free[0, 4])], [int(free[0, 7]), int(free[2, 2])]):
        theirs = tiny.greedy(model, tokens, mask, 12, eos)
        assert (theirs != free[:, : theirs.shape[1]]).any()  # some rows did end
        ours = np.asarray(generation.generate(config, params, tokens, mask, 12, eos=eos))
        np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
        assert (ours[:, theirs.shape[1] :] == config.pad_id).all()


def test_sampling_follows_the_distribution(params):
    n, prompt = 2000, jnp.array([7, 9, 11])
    mask = jnp.ones((n, 3), bool)

    def draw(seed):
        tokens = jnp.tile(prompt, (n, 1))
        key = jax.random.key(seed)
        return np.asarray(generation.generate(TINY, params, tokens, mask, 2, key, temperature=2.0))

    drawn = draw(1)
    scores = apply(TINY, params, jnp.array([[*prompt, drawn[0, 0]]]), jnp.ones((1, 4), bool))
    given = drawn[:, 0] == drawn[0, 0]  # the second token, after one certain first token
    for tokens, logits in [(drawn[:, 0], scores[0, 2]), (drawn[given, 1], scores[0, 3])]:
        expected = np.asarray(jax.nn.softmax(logits / 2.0))
        counts = np.bincount(tokens, minlength=TINY.vocab_size)
        deviation = np.sqrt(len(tokens) * expected * (1 - expected))
        assert len(tokens) > 30
        assert np.max(np.abs(counts - len(tokens) * expected) / (deviation + 1)) < 4.5
    assert (draw(2) != drawn).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"max_new_tokens": 2, "temperature": 0.5}, "pass a key"),
        ({"max_new_tokens": 2, "temperature": -1.0}, "temperature must be >= 0, got -1"),
        ({"max_new_tokens": 30}, "33 tokens exceed the model's 32 positions"),
    ],
)
def test_generation_refuses(arguments, message):
    spec = transformer.shapes(TINY)
    with pytest.raises(ValueError, match=message):
        generation.generate(TINY, spec, jnp.zeros((1, 3), int), jnp.ones((1, 3), bool), **arguments)


def test_too_long_a_sequence_is_refused(params):
    with pytest.raises(ValueError, match="40 tokens exceed the model's 32 positions"):
        apply(TINY, params, jnp.zeros((1, 40), int), jnp.ones((1, 40), bool))


def test_head_at_one_position_and_for_candidates_only(params):
    for side in ("left", "right"):
        tokens, mask = prompts(side, TINY.vocab_size)
        full = np.asarray(apply(TINY, params, tokens, mask))
        features = hidden(TINY, params, tokens, mask)
        ends = [np.flatnonzero(row)[-1] for row in mask]
        at_last = transformer.last(features, mask)
        ours = transformer.logits(TINY, params, at_last, [4, 40])
        np.testing.assert_allclose(ours, full[range(len(ends)), ends][:, [4, 40]], rtol=1e-5)


def test_padding_does_not_matter(params):
    real = []
    for side, filler in [("left", 0), ("right", 0), ("left", 49)]:
        tokens, mask = prompts(side, TINY.vocab_size, filler=filler)
        scores = np.asarray(apply(TINY, params, tokens, mask))
        assert np.isfinite(scores).all()
        real.append(scores[mask])  # the texts' tokens in order
    np.testing.assert_allclose(real[1], real[0], atol=1e-6)
    np.testing.assert_array_equal(real[2], real[0])


def test_a_token_sees_itself_and_what_stands_before_it(params):
    """Another token changes the scores from its own place on, and none before it."""
    tokens, mask = prompts("right", TINY.vocab_size)
    scores = np.asarray(apply(TINY, params, tokens, mask))
    for place in (3, 8):
        other = tokens.copy()
        other[:, place] = (other[:, place] + 1) % TINY.vocab_size
        changed = np.abs(np.asarray(apply(TINY, params, other, mask)) - scores).max(axis=2) > 0
        assert not changed[:, :place].any()
        assert changed[0, place:].all()


def test_tokens_written_one_by_one_are_the_likeliest_of_the_whole_text(params):
    """Decoding with a cache, against the scores of the text so far; padded on either side."""
    steps = 8
    sharp = jax.tree.map(lambda x: 5 * x, params)  # so that what is written hangs on positions
    tokens, mask = prompts("right", TINY.vocab_size)
    length, rows = mask.sum(axis=1), np.arange(len(mask))
    text = np.pad(tokens, [(0, 0), (0, steps)])
    for end in (length + step for step in range(steps)):
        real = np.arange(text.shape[1]) < end[:, None]
        scores = np.asarray(apply(TINY, sharp, text, real))
        text[rows, end] = scores[rows, end - 1].argmax(axis=1)
    expected = [row[n : n + steps] for row, n in zip(text, length, strict=True)]
    for side in ("left", "right"):
        written = generation.generate(TINY, sharp, *prompts(side, TINY.vocab_size), steps)
        np.testing.assert_array_equal(written, expected)


def test_positions_turn_pairs_of_features_in_the_complex_plane():
    """Feature i with feature i + d/2, position m by m θ^(−2i/d): as one complex number."""
    d, theta = TINY.head_dim, TINY.rope_theta
    x = np.random.default_rng(0).normal(size=(2, 5, 3, d))
    positions = np.array([[0, 1, 2, 3, 4], [0, 0, 7, 8, 9]])
    angles = positions[:, :, None, None] * theta ** (-2.0 * np.arange(d // 2) / d)
    expected = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * np.exp(1j * angles)
    turned = blocks.rotate(jnp.asarray(x, jnp.float32), blocks.rotary(TINY, jnp.asarray(positions)))
    expected = np.concatenate([expected.real, expected.imag], axis=-1)
    np.testing.assert_allclose(turned, expected, atol=1e-5)


def test_vmap_over_clients_keeps_the_weights_unbatched(params):
    tokens = jax.random.randint(jax.random.key(1), (3, 4, 6), 0, TINY.vocab_size)
    mask = jnp.ones(tokens.shape, bool)

    def loss(params, tokens, mask):
        features = transformer.last(transformer.hidden(TINY, params, tokens, mask), mask)
        return transformer.logits(TINY, params, features, [1, 2]).mean()

    clients = jax.vmap(loss, in_axes=(None, 0, 0))
    one = jax.jit(loss)
    one_by_one = jnp.stack([one(params, *batch) for batch in zip(tokens, mask, strict=True)])
    np.testing.assert_allclose(jax.jit(clients)(params, tokens, mask), one_by_one, rtol=1e-5)
    jaxpr = str(jax.make_jaxpr(clients)(params, tokens, mask))
    # the MLP is one product of [clients, batch, time, width] by an unbatched matrix
    assert "f32[3,4,6,24] = dot_general" in jaxpr
    assert "dimension_numbers=(([3], [0]), ([], []))" in jaxpr
    assert "f32[3,16,24]" not in jaxpr


def test_gradient_reaches_every_leaf(params):
    tokens, mask = prompts("left", TINY.vocab_size)

    def loss(params):
        return jnp.square(apply(TINY, params, tokens, mask)).mean()

    for path, gradient in jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(loss))(params))[0]:
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, params):
    half = architectures.dataclasses.replace(TINY, param_dtype=dtype, compute_dtype=dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    tokens, mask = prompts("left", TINY.vocab_size)
    features = hidden(half, params, tokens, mask)
    assert features.dtype == dtype
    ours = transformer.logits(half, params, features)
    assert ours.dtype == jnp.float32
    mixed = architectures.dataclasses.replace(half, compute_dtype="float32")
    exact = apply(mixed, params, tokens, mask)
    tolerance = {"bfloat16": 0.05, "float16": 0.006}[dtype] * np.abs(exact[mask]).max()
    np.testing.assert_allclose(ours[mask], exact[mask], atol=tolerance)
    assert np.abs(ours[mask] - exact[mask]).max() > tolerance / 1000  # it was computed in half


ROUNDED = architectures.dataclasses.replace(TINY, matmul_dtype="bfloat16")


def test_products_are_of_rounded_factors_and_summed_in_float32():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((64, 64)), jnp.float32) for _ in range(2))
    found = jax.jit(blocks.dense, static_argnums=0)(ROUNDED, x, {"kernel": w})
    factors = (np.asarray(part.astype("bfloat16"), np.float64) for part in (x, w))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.matmul(*factors), atol=1e-4)
    assert np.abs(found - x @ w).max() > 1e-2


def test_only_products_with_weights_are_rounded(params):
    """Those of q, k, v, out, gate, up, down and of the head; not those of attention."""
    tokens, mask = prompts("left", TINY.vocab_size)
    lowered = apply.lower(ROUNDED, params, tokens, mask).as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    rounded = [line for line in products if "bf16" in line.split(" : ")[-1]]
    assert (len(rounded), len(products)) == (8, 10)
    assert all(line.split("->")[-1].strip().endswith("f32>") for line in products)
    ours, exact = (apply(config, params, tokens, mask) for config in (ROUNDED, TINY))
    tolerance = 0.03 * np.abs(exact[mask]).max()
    np.testing.assert_allclose(ours[mask], exact[mask], atol=tolerance)
    assert np.abs(ours[mask] - exact[mask]).max() > tolerance / 100


def test_products_with_a_tables_adapters_are_rounded_too(params):
    """One more in the look-up, two more in the head."""
    rows, width = params["embed"]["tokens"]["embedding"].shape
    adapters = {"lora_a": jnp.ones((rows, 2)), "lora_b": jnp.ones((2, width))}
    table = params["embed"]["tokens"] | adapters | {"lora_scale": jnp.ones(())}
    adapted = params | {"embed": {"tokens": table}}
    lowered = apply.lower(ROUNDED, adapted, *prompts("left", TINY.vocab_size)).as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    rounded = [line for line in products if "bf16" in line.split(" : ")[-1]]
    assert (len(rounded), len(products)) == (11, 13)


@pytest.mark.parametrize("name", ["forward_difference", "projection"])
def test_scalars_of_rounded_products_are_close(name, params):
    """By differences in low-rank directions, whose step is added after the product, and by
    derivatives through the rounding, forwards and then backwards."""
    tokens, mask = prompts("left", TINY.vocab_size)
    smoothing = {"smoothing": 0.03} if name == "forward_difference" else {}
    estimator = getattr(estimators, name)(6, perturbation=perturbations.low_rank(), **smoothing)

    def scalars(config):
        def loss(params, batch):
            return jnp.square(transformer.apply(config, params, tokens, mask)[mask]).mean()

        measure = jax.jit(lambda params: estimator.measure(loss, KEY, jnp.int32(0), params, ()))
        return measure(params).scalars

    rounded, exact = scalars(ROUNDED), scalars(TINY)
    np.testing.assert_allclose(rounded, exact, atol=0.1 * np.abs(exact).max())
    assert np.abs(rounded - exact).max() > 1e-4 * np.abs(exact).max()


def test_init_matches_shapes_and_depends_on_the_path_only():
    config = architectures.dataclasses.replace(TINY, out_bias=True)
    params = transformer.init(config, jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), transformer.shapes(config)
    )
    assert (params["final_norm"]["scale"] == 1).all()
    assert (params["layers"]["attention"]["o"]["bias"] == 0).all()
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert abs(float(kernel.std()) - 0.02) < 0.002
    alone = {"layers": {"mlp": {"up": {"kernel": 0}}}}
    (key,) = jax.tree.leaves(keys.leaf_keys(jax.random.key(0), alone))
    np.testing.assert_allclose(kernel, 0.02 * jax.random.normal(key, kernel.shape), rtol=1e-6)


PUBLISHED_SIZES = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", architectures.PUBLISHED)
def test_published_sizes(name):
    config = architectures.named(name)
    spec = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(spec)) == PUBLISHED_SIZES[name]


@pytest.mark.parametrize("name", ["opt-1.3b", "opt-6.7b"])
def test_large_models_lower_without_allocating(name):
    config = architectures.named(name, param_dtype="float16", compute_dtype="float16")
    batch = jax.ShapeDtypeStruct((2, 64), jnp.int32), jax.ShapeDtypeStruct((2, 64), bool)

    def loss(params, tokens, mask):
        features = transformer.last(transformer.hidden(config, params, tokens, mask), mask)
        return transformer.logits(config, params, features, [1, 2])

    lowered = jax.jit(loss).lower(transformer.shapes(config), *batch)
    assert lowered.out_info.shape == (2, 2) and lowered.out_info.dtype == jnp.float32
    # depth is a loop: one copy of the layer, whatever the number of layers
    products = lowered.as_text().count("stablehlo.dot_general")
    assert products == 9  # q, k, v, scores, attention, out, up, down and the head


def test_llama3_frequencies_keep_fast_and_stretch_slow_ones():
    config = architectures.named("llama-3.2-1b")
    plain = architectures.dataclasses.replace(config, rope_scaling=None)
    ratio = blocks.rotary_frequencies(plain) / blocks.rotary_frequencies(config)
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(32.0)
    assert (np.diff(ratio) >= 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "mamba"}, "architecture 'mamba' is not supported"),
        ({"activation": "swish2"}, "activation 'swish2' is not supported"),
        ({"param_dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"matmul_dtype": "int8"}, "float32, bfloat16, float16, got 'int8'"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"rope_layers": (True,)}, "one entry a layer, got 1 for 2 layers"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        architectures.dataclasses.replace(TINY, **changes)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"model 'opt-9b' is not known: use one of opt-125m"):
        architectures.named("opt-9b")
