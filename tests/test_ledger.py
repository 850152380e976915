"""The count of bytes; `test_oracle.py` compares it with messages that were really sent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_tasks import BATCH_SIZE, softmax_task

from zofl_jax import keys
from zofl_jax.algorithms import decomfl
from zofl_jax.conditions import participation
from zofl_jax.core import Algorithm, ClientResult
from zofl_jax.directions import estimators
from zofl_jax.engine import ledger

SIZES = ledger.MessageSizes(seed=8, upload=20, broadcast=24, params=1000)


def test_columns_of_five_rounds_by_hand():
    book = ledger.Ledger(num_clients=4)
    assert book.record([0, 1], SIZES) == ledger.RoundBytes(40, 16, 48, 0, 2000)
    # Client 2 is new and missed one round.
    assert book.record([0, 2], SIZES) == ledger.RoundBytes(40, 16, 48, 32, 1000)
    # Client 1 was last there in round 0 and missed round 1.
    assert book.record([1], SIZES) == ledger.RoundBytes(20, 8, 24, 32, 0)
    assert book.record([1], SIZES) == ledger.RoundBytes(20, 8, 24, 0, 0)
    # Client 3 is new and missed four, clients 0 and 2 missed two.
    assert book.record([0, 2, 3], SIZES) == ledger.RoundBytes(60, 24, 72, 8 * 32, 1000)

    assert book.totals == ledger.RoundBytes(180, 72, 216, 32 + 32 + 256, 4000)
    assert book.totals.up == 180
    assert book.totals.down == 72 + 216 + 320 + 4000
    assert book.num_rounds == 5
    assert book.participations == 9
    assert book.dense_bytes == 9 * 2 * 1000
    assert book.last_round.tolist() == [4, 3, 4, 4]
    assert book.per_client(book.totals.up) == 45.0
    assert book.first_syncs == [2000, 1000, 0, 0, 1000]


def test_late_clients_are_sent_the_messages_that_were_missed():
    """Against a list of who has what, with messages whose sizes change between rounds."""
    random = np.random.default_rng(0)
    num_clients = 9
    book = ledger.Ledger(num_clients)
    held = {client: set() for client in range(num_clients)}  # rounds whose broadcast they have
    sizes = []
    for r in range(60):
        p = 4 if r < 30 else 12
        sizes.append(ledger.MessageSizes(seed=8, upload=4 * p, broadcast=4 * p + 1, params=777))
        cohort = random.choice(num_clients, size=random.integers(1, 5), replace=False)
        missed = [(client, t) for client in cohort.tolist() for t in set(range(r)) - held[client]]
        new = sum(not held[client] for client in cohort.tolist())
        counted = book.record(cohort, sizes[r])
        assert counted.catch_up == sum(sizes[t].seed + sizes[t].broadcast for _, t in missed)
        assert counted.first_sync == new * 777
        for client in cohort.tolist():
            held[client] = set(range(r + 1))
            assert book.last_round[client] == r
    assert {type(total) for total in book.totals} == {int}


def test_totals_of_large_models_do_not_overflow():
    book = ledger.Ledger(num_clients=3)
    sizes = SIZES._replace(params=2**62)
    counted = book.record(np.arange(3), sizes)
    assert counted.first_sync == counted.down - 3 * 32 == 3 * 2**62
    assert book.dense_bytes == 6 * 2**62


def decomfl_sizes(dtype=np.float32, impl="threefry2x32", weighted=False, **options):
    task = softmax_task(dtype)
    algorithm = decomfl(
        task.loss, estimators.central_difference(5, 1e-3), optax.adam(0.1), **options
    )
    key = keys.root(0, impl).shared
    params = jax.eval_shape(task.init, key)
    batches = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((algorithm.local_steps, BATCH_SIZE, *x.shape[1:]), x.dtype),
        task.train.examples,
    )
    shapes = ledger.message_shapes(algorithm, key, params, batches)
    return ledger.message_sizes(shapes, key, params, weighted)


def test_sizes_of_decomfl_messages():
    """K·P scalars each way, whatever the optimiser keeps; 18 params."""
    assert decomfl_sizes(local_steps=3)[:4] == (8, 3 * 5 * 4, 3 * 5 * 4, 18 * 4)
    assert decomfl_sizes(impl="threefry4x32")[:4] == (16, 5 * 4, 5 * 4, 18 * 4)
    assert decomfl_sizes(weighted=True)[:4] == (8, 5 * 4 + 4, 5 * 4, 18 * 4)


def test_sizes_in_float64(x64):
    assert decomfl_sizes(np.float64)[:4] == (8, 5 * 8, 5 * 8, 18 * 8)


def test_sizes_of_a_dense_upload_follow_its_tree():
    """Any algorithm is measured by its own messages: here the whole params in bfloat16."""
    params = {"w": jnp.zeros((3, 5)), "b": jnp.zeros(7)}

    def client(shared_key, state, memory, batches, own_key):
        upload = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
        return ClientResult(upload, memory, {"loss": jnp.zeros(())})

    def aggregate(uploads, weights):
        return jax.tree.map(lambda u: u.astype(jnp.float32).mean(0), uploads)

    algorithm = Algorithm(lambda x: x, client, aggregate, lambda k, s, b: b, 1)
    key = keys.root(0).shared
    shapes = ledger.message_shapes(algorithm, key, params, {"x": jnp.zeros((1, 1))})
    assert ledger.message_sizes(shapes, key, params)[:4] == (8, 22 * 2, 22 * 4, 22 * 4)


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32, np.uint32])
def test_the_size_of_a_tree_is_that_of_its_buffers(dtype):
    tree = {"a": np.zeros((3, 0, 2), dtype), "b": [np.zeros((), dtype), np.ones((4, 5), dtype)]}
    assert ledger.tree_bytes(tree) == sum(x.nbytes for x in jax.tree.leaves(tree))


def test_the_ledger_starts_empty():
    book = ledger.Ledger(3)
    assert book.num_rounds == book.participations == book.dense_bytes == 0
    assert book.totals == ledger.RoundBytes(0, 0, 0, 0, 0)
    assert book.last_round.tolist() == [participation.NEVER] * 3


def test_clients_with_a_sync_message_by_hand():
    """No broadcast at a round's end; later the smaller of the message and of what was missed."""
    sizes = ledger.MessageSizes(seed=8, upload=20, broadcast=24, params=1000, sync=100)
    book = ledger.Ledger(num_clients=3)
    assert book.record([0], sizes) == ledger.RoundBytes(20, 8, 0, 0, 1000)
    # Client 0 has not had the broadcast of round 0; client 1 needs it too.
    assert book.record([0, 1], sizes) == ledger.RoundBytes(40, 16, 0, 2 * 32, 1000)
    for _ in range(3):
        assert book.record([0], sizes).catch_up == 32
    # Five rounds would be 160 bytes, four are 128: more than the message of 100.
    assert book.record([1, 2], sizes) == ledger.RoundBytes(40, 16, 0, 2 * 100, 1000)


def test_a_sync_message_that_stands_alone_is_all_a_client_gets():
    sizes = ledger.MessageSizes(8, 20, 1000, params=1000, sync=1100, sync_alone=True)
    book = ledger.Ledger(num_clients=3)
    # The initial params, agreed on before, are less than the message in the first round.
    assert book.record([0], sizes) == ledger.RoundBytes(20, 8, 0, 0, 1000)
    assert book.record([0, 1], sizes) == ledger.RoundBytes(40, 16, 0, 1008, 1100)
    assert book.record([0, 2], sizes) == ledger.RoundBytes(40, 16, 0, 1008, 1100)
    assert book.record([1], sizes) == ledger.RoundBytes(20, 8, 0, 1100, 0)
