"""The key schedule: golden words, names, independence of the streams, and what is refused."""

import hashlib
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax import keys

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "keys.json").read_text())
PARAMS = {"Dense_0": {"bias": jnp.zeros(3), "kernel": jnp.zeros((5, 3))}, "scale": jnp.zeros(())}

pytestmark = pytest.mark.optimized


def words(key) -> str:
    """Returns the words of a key, or of several, in hexadecimal."""
    return " ".join(f"{word:08x}" for word in np.asarray(jax.random.key_data(key)).ravel())


def schedule(impl: str) -> dict[str, str]:
    """Returns one key of every kind, for seed 7."""
    root = keys.root(7, impl)
    key = keys.round_key(root.shared, 1000)
    step = keys.step_key(key, 2)
    leaves = keys.leaf_keys(keys.direction_keys(step, 4)[3], PARAMS)
    named = {
        **{f"root/{name}": stream for name, stream in root._asdict().items()},
        "round 0": keys.round_key(root.shared, 0),
        "round 1000": key,
        "round 1000/step 2": step,
        "round 1000/step 2/direction 0": keys.direction_keys(step, 1)[0],
        "round 1000/step 2/direction 3": keys.direction_keys(step, 4)[3],
        "round 1000/step 2/direction 3/Dense_0/bias": leaves["Dense_0"]["bias"],
        "round 1000/step 2/direction 3/Dense_0/kernel": leaves["Dense_0"]["kernel"],
        "round 1000/step 2/direction 3/scale": leaves["scale"],
        "batches/round 1000/client 5": keys.batch_key(root.batches, 1000, 5),
        "own/round 1000/client 5": keys.own_key(root.own, 1000, 5),
    }
    return {name: words(key) for name, key in named.items()}


@pytest.mark.parametrize("impl", keys.IMPLEMENTATIONS)
def test_the_schedule_never_changes(impl):
    """Logs of old runs can only be replayed if every key stays what it was."""
    assert schedule(impl) == GOLDEN[impl]


@pytest.mark.parametrize("impl", keys.IMPLEMENTATIONS)
def test_golden_keys_differ_from_each_other(impl):
    assert len(set(GOLDEN[impl].values())) == len(GOLDEN[impl])


def test_generator_changes_the_shared_stream_alone():
    usual, other = keys.root(7), keys.root(7, "threefry4x32")
    assert words(usual.shared) != words(other.shared)
    assert (keys.key_bytes(usual.shared), keys.key_bytes(other.shared)) == (8, 16)
    for name in ("cohort", "batches", "own", "init", "partition"):
        assert words(getattr(usual, name)) == words(getattr(other, name))


@pytest.mark.parametrize("impl", keys.IMPLEMENTATIONS)
def test_keys_are_the_same_under_jit_vmap_and_in_x64(impl):
    root = keys.root(7, impl)
    rounds = np.arange(5, dtype=np.int32)

    def chain(r):
        return jax.random.key_data(keys.step_key(keys.round_key(root.shared, r), r))

    expected = np.stack([chain(int(r)) for r in rounds])
    np.testing.assert_array_equal(jax.jit(jax.vmap(chain))(rounds), expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(np.stack([chain(int(r)) for r in rounds]), expected)
        assert schedule(impl) == GOLDEN[impl]


def test_directions_of_fewer_perturbations_are_the_first_of_more():
    key = keys.step_key(keys.root(0).shared, 0)
    assert words(keys.direction_keys(key, 3)) == words(keys.direction_keys(key, 5)[:3])


def test_keys_of_all_indices_differ():
    root = keys.root(0)
    seen = [
        words(key)
        for r, k in itertools.product(range(4), range(4))
        for key in keys.direction_keys(keys.step_key(keys.round_key(root.shared, r), k), 4)
    ]
    seen += [
        words(keys.batch_key(root.batches, r, client))
        for r, client in itertools.product(range(8), range(8))
    ]
    assert len(set(seen)) == len(seen) == 128


def test_a_leaf_key_depends_on_the_path_alone():
    key = keys.root(0).shared
    full = keys.leaf_keys(key, PARAMS)
    part = keys.leaf_keys(key, {"Dense_0": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}})
    assert words(part["Dense_0"]["kernel"]) == words(full["Dense_0"]["kernel"])
    assert jax.tree.structure(full) == jax.tree.structure(PARAMS)
    # The same names in a container of another kind have the same path.
    listed = keys.leaf_keys(key, [jnp.zeros(1), (jnp.zeros(1),)])
    assert words(listed[0]) == words(jax.random.fold_in(key, keys.name_id("0")))
    assert words(listed[1][0]) == words(jax.random.fold_in(key, keys.name_id("1/0")))


def test_name_ids_are_the_head_of_sha256():
    digest = hashlib.sha256(b"Dense_0/kernel").hexdigest()
    assert f"{keys.name_id('Dense_0/kernel'):08x}" == digest[:8]
    paths, _ = jax.tree_util.tree_flatten_with_path(PARAMS)
    assert [keys.path_name(path) for path, _ in paths] == [
        "Dense_0/bias",
        "Dense_0/kernel",
        "scale",
    ]


def test_paths_with_one_id_are_refused(monkeypatch):
    monkeypatch.setattr(keys, "name_id", lambda name: len(name))
    with pytest.raises(ValueError, match=r"\['ab', 'cd'\] would share their directions"):
        keys.leaf_keys(keys.root(0).shared, {"ab": jnp.zeros(1), "cd": jnp.zeros(1)})


@pytest.mark.parametrize(
    ("impl", "reason"),
    [
        ("rbg", "takes the whole batch from the first key"),
        ("unsafe_rbg", "takes the whole batch from the first key"),
        ("philox4x32", "does not compile once arrays are sharded"),
        ("mersenne", "not a generator of this library"),
    ],
)
def test_generators_that_break_replay_are_refused(impl, reason):
    with pytest.raises(ValueError, match=f"prng_impl '{impl}' is refused: .*{reason}.*threefry"):
        keys.root(0, impl)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match=rf"seed must be in \[0, 2\*\*32\), got {seed}"):
        keys.root(seed)


def test_seeds_up_to_the_last_are_distinct():
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    assert len({words(keys.root(seed).shared) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("impl", keys.IMPLEMENTATIONS)
def test_a_chain_of_keys_costs_what_its_links_cost(impl):
    """Fused into one loop, threefry4x32 recomputes every link for every use of it.

    Three links then take 100 times as long as they should, and four half a minute.
    """
    shared = keys.root(0, impl).shared

    @jax.jit
    def chain(r):
        return jax.random.key_data(
            keys.direction_keys(keys.step_key(keys.round_key(shared, r), r), 4)
        )

    def seconds() -> float:
        began = time.perf_counter()
        chain(1).block_until_ready()
        return time.perf_counter() - began

    seconds()
    assert min(seconds() for _ in range(5)) < 0.05
