"""The directions: their moments, their bits, and that nothing around them changes either."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax import keys
from zofl_jax.directions import perturbations

PERTURBATIONS = {
    "gaussian": perturbations.gaussian(),
    "rademacher": perturbations.rademacher(),
    "sphere": perturbations.sphere(),
}
SAMPLE = {name: jax.jit(perturbation.sample) for name, perturbation in PERTURBATIONS.items()}
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "directions.json").read_text())

# 45 params: no leaf fills whole words of 32 signs.
PARAMS = {"a": jnp.zeros((3, 11)), "b": {"c": jnp.zeros(7), "d": jnp.zeros(()), "e": jnp.zeros(4)}}
DIM = 45
SAMPLES = 20_000


def flat(tree) -> np.ndarray:
    """Returns all leaves side by side, [..., d], from leaves [..., *shape]."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    lead = leaves[0].shape[: leaves[0].ndim - 2]  # leaf "a" has two axes of its own
    return np.concatenate([leaf.reshape(*lead, -1) for leaf in leaves], axis=-1)


@functools.cache
def samples(name: str) -> np.ndarray:
    """Returns 20,000 directions, [n, d]."""
    draw = jax.jit(jax.vmap(SAMPLE[name], in_axes=(0, None)))
    return flat(draw(keys.direction_keys(keys.root(0).shared, SAMPLES), PARAMS))


@functools.cache
def compiled_anew(name: str):
    """Returns a sampler for tests with LLVM's optimisations: without, normals differ by an ulp."""
    return jax.jit(functools.partial(PERTURBATIONS[name].sample))


def key(impl: str = "threefry2x32") -> jax.Array:
    return keys.round_key(keys.root(3, impl).shared, 1)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_covariance_is_the_identity(name):
    """Within and across leaves: each product z_i z_j has mean δ_ij, by 5 standard errors."""
    z = samples(name)
    assert z.shape == (SAMPLES, DIM)
    mean_error = z.mean(0) / (z.std(0) / SAMPLES**0.5)
    assert np.abs(mean_error).max() < 5
    for i in range(DIM):
        products = z[:, i, None] * z[:, i:]
        error = products.mean(0) - np.eye(DIM)[i, i:]
        standard_error = products.std(0) / SAMPLES**0.5
        assert np.all(np.abs(error) <= 5 * standard_error + 1e-12)


@pytest.mark.parametrize(
    ("name", "fourth_moment"), [("gaussian", 3), ("rademacher", 1), ("sphere", 3 * DIM / (DIM + 2))]
)
def test_fourth_moment_tells_the_distributions_apart(name, fourth_moment):
    """E z⁴ of one coordinate."""
    z = samples(name)
    fourth = np.mean(z**4, axis=1)  # the mean over coordinates, one value a sample
    standard_error = fourth.std() / SAMPLES**0.5
    assert abs(fourth.mean() - fourth_moment) <= 5 * standard_error + 1e-12


def test_sphere_has_radius_root_d():
    np.testing.assert_allclose(np.linalg.norm(samples("sphere"), axis=1), DIM**0.5, rtol=1e-6)
    lengths = np.linalg.norm(samples("gaussian"), axis=1)
    assert lengths.std() > 0.5, "all leaves together are on the sphere, not the normals"


SIZES = [1, 31, 32, 33, 64, 100]


@functools.cache
def signs_and_words():
    """Returns a leaf of signs and the words of its key, by the leaf's size."""
    params = {f"w{size}": np.zeros(size, np.float32) for size in SIZES}

    @jax.jit
    def words(key):
        own = keys.leaf_keys(key, params)
        return {
            f"w{size}": jax.random.bits(own[f"w{size}"], (-(-size // 32),), jnp.uint32)
            for size in SIZES
        }

    z, drawn = jax.tree.map(np.asarray, (SAMPLE["rademacher"](key(), params), words(key())))
    return {size: (z[f"w{size}"], drawn[f"w{size}"]) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
def test_signs_use_each_bit_of_each_word_once(size):
    """z[i] is 1 − 2 times bit i mod 32 of word i div 32 of the leaf's own words."""
    z, words = signs_and_words()[size]
    expected = [1 - 2 * ((int(words[i // 32]) >> (i % 32)) & 1) for i in range(size)]
    assert z.tolist() == expected


@pytest.mark.parametrize("name", PERTURBATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_leaves_keep_their_type_and_lose_only_its_precision(name, dtype):
    """A narrow leaf gets the float32 direction, rounded."""
    sample = SAMPLE[name]
    narrow = sample(key(), jax.tree.map(lambda x: x.astype(dtype), PARAMS))
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(dtype)}
    wide = sample(key(), PARAMS)
    precision = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(flat(narrow), flat(wide), rtol=2 * precision)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_leaves_of_float64(x64, name):
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float64), PARAMS)
    z = SAMPLE[name](key(), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(z)} == {jnp.dtype(np.float64)}
    if name == "rademacher":
        np.testing.assert_array_equal(flat(z), flat(SAMPLE[name](key(), PARAMS)))
    if name == "sphere":
        assert abs(np.linalg.norm(flat(z)) - DIM**0.5) < 1e-14 * DIM


@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_other_leaves_change_nothing(name):
    sample = SAMPLE[name]
    full = sample(key(), PARAMS)
    np.testing.assert_array_equal(sample(key(), {"a": PARAMS["a"]})["a"], full["a"])
    more = sample(key(), {"Z": jnp.zeros(9), **PARAMS, "b": {"c": PARAMS["b"]["c"]}})
    np.testing.assert_array_equal(more["b"]["c"], full["b"]["c"])


def test_sphere_rescales_all_leaves_alike():
    """Another leaf changes the radius, and the length alone."""
    sample = SAMPLE["sphere"]
    full, part = sample(key(), PARAMS)["a"], sample(key(), {"a": PARAMS["a"]})["a"]
    ratio = np.asarray(part / full)
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize("impl", keys.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PERTURBATIONS)
def test_the_directions_never_change(impl, name):
    """Exact signs; normals to 1e-6, as far as erfinv agrees between backends."""
    z = compiled_anew(name)(key(impl), PARAMS)
    tolerance = 0 if name == "rademacher" else 1e-6
    np.testing.assert_allclose(flat(z), GOLDEN[impl][name], rtol=0, atol=tolerance)


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_the_bits_are_the_same_under_jit_vmap_and_scan(name):
    """Not so the sphere's radius, whose squares may be summed in another order."""
    sample = PERTURBATIONS[name].sample
    alone = compiled_anew(name)
    direction_keys = keys.direction_keys(key(), 3)
    one_by_one = [flat(alone(k, PARAMS)) for k in direction_keys]
    batched = flat(jax.jit(jax.vmap(sample, in_axes=(0, None)))(direction_keys, PARAMS))
    np.testing.assert_array_equal(batched, one_by_one)
    looped = flat(jax.jit(lambda ks: jax.lax.map(lambda k: sample(k, PARAMS), ks))(direction_keys))
    np.testing.assert_array_equal(looped, one_by_one)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from zofl_jax import keys
from zofl_jax.directions import perturbations

devices = jax.devices()
assert len(devices) == 2, devices
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
for impl in keys.IMPLEMENTATIONS:
    for name in ("gaussian", "rademacher"):
        sample = getattr(perturbations, name)().sample
        key = keys.round_key(keys.root(3, impl).shared, 1)
        params = {"w": jnp.zeros((6, 11)), "v": jnp.zeros(10)}
        alone = jax.jit(sample)(key, params)
        shardings = {"w": split, "v": split}
        sharded = jax.jit(sample, out_shardings=shardings)(key, jax.device_put(params, split))
        for leaf in params:
            assert len(sharded[leaf].sharding.device_set) == 2
            np.testing.assert_array_equal(np.asarray(sharded[leaf]), np.asarray(alone[leaf]))
        print(impl, name, np.asarray(alone["v"]).tobytes().hex())
"""


@pytest.mark.optimized
def test_the_bits_are_the_same_sharded_over_two_devices():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment["JAX_PLATFORMS"] = "cpu"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == 2 * len(keys.IMPLEMENTATIONS)
    for line in lines:
        impl, name, expected = line.split()
        params = {"w": jnp.zeros((6, 11)), "v": jnp.zeros(10)}
        here = compiled_anew(name)(key(impl), params)
        assert np.asarray(here["v"]).tobytes().hex() == expected


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_add_moves_along_the_direction(name):
    perturbation = PERTURBATIONS[name]
    z = SAMPLE[name](key(), PARAMS)
    x = jax.tree.map(lambda leaf: leaf + 2, PARAMS)
    moved = perturbation.add(x, z, 0.25)
    np.testing.assert_allclose(flat(moved), 2 + 0.25 * flat(z), rtol=1e-6)
    back = perturbation.add(moved, z, jnp.float32(-0.25))
    np.testing.assert_allclose(flat(back), 2, rtol=1e-6)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_accumulate_is_the_weighted_sum_of_directions(name):
    perturbation = PERTURBATIONS[name]
    direction_keys, scalars = keys.direction_keys(key(), 4), jnp.array([0.5, -2.0, 0.0, 1.0])
    total = jax.jit(perturbation.accumulate)(direction_keys, PARAMS, scalars)
    expected = sum(
        float(g) * flat(SAMPLE[name](k, PARAMS))
        for g, k in zip(scalars, direction_keys, strict=True)
    )
    np.testing.assert_allclose(flat(total), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_leaves_that_are_not_real_are_refused(dtype):
    params = {"steps": jnp.zeros(3, dtype)}
    with pytest.raises(
        ValueError, match=f"must be real floating point .* got a leaf of {jnp.dtype(dtype)}"
    ):
        SAMPLE["gaussian"](key(), params)
