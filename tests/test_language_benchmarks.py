"""GLUE, SuperGLUE, SQuAD, DROP and XSum as TFDS prepares them, through to a trained round."""

import jax
import numpy as np
import optax
import pytest
import text_benchmarks
import tiny_texts

from zofl_jax.algorithms import decomfl
from zofl_jax.data import partition
from zofl_jax.directions import estimators
from zofl_jax.engine import simulation
from zofl_jax.tasks import catalogue, evaluation, language

FEW = "mlp/down|attention/v"  # which compile in half the time
TRAINED = ("cb", "squad", "xsum")  # three classes; written answers, with their ROUGE-L too
NAMES = [name for name, entry in catalogue.CATALOGUE.items() if entry.tfds]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return language.adapt(
        *tiny_texts.model(max_positions=1024), lora_rank=1, lora_pattern=FEW, key=KEY
    )


def first_words(answers):
    """The tiny vocabulary has no word for some verbalizers."""
    known = ("Yes", "No", "Maybe", "bad", "good")
    return answers if set(answers) <= set(known) else ("bad", "good")


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_is_read_and_its_answers_can_be_scored(name, model, tmp_path):
    prepared(name, model, tmp_path)


@pytest.mark.parametrize("name", TRAINED)
def test_a_round_on_a_benchmark_of_each_kind(name, model, tmp_path):
    built = prepared(name, model, tmp_path)
    algorithm = decomfl(built.task.loss, estimators.forward_difference(2, 1e-3), optax.sgd(1e-3))
    simulator = simulation.make_simulator(
        algorithm, built.task, clients_per_round=2, batch_size=4, eval_batch_size=12
    )
    progress = simulation.run(simulator, rounds=2)
    before = evaluation_loss(built, model.trainable)
    assert progress.history[-1].metrics["loss"] == pytest.approx(before, rel=0.2)
    assert int(progress.state.round) == 2


def prepared(name, model, folder):
    """Returns a benchmark's task, from files as TFDS prepares them."""
    text_benchmarks.prepare(folder, name)
    data = catalogue.load(name, folder)
    assert (len(data.train), len(data.test)) == (
        text_benchmarks.NUM_TRAIN,
        text_benchmarks.NUM_TEST,
    )
    entry = catalogue.CATALOGUE[name]
    order, offsets = partition.iid(KEY, np.zeros(len(data.train)), 4)
    if entry.kind == "classification":
        prompt = entry.prompt._replace(answers=first_words(entry.prompt.answers))
        built = language.classification(model, data, prompt, order, offsets)
        classes = len(prompt.answers)
        assert classes == (3 if name == "cb" else 2)
        assert set(np.asarray(built.task.train.examples["label"])) == set(range(classes))
        scores = jax.eval_shape(
            built.scores, model.trainable, jax.tree.map(lambda x: x[:2], built.task.test)
        )
        assert scores.shape == (2, classes)
    else:
        built = language.generation(model, data, entry.prompt, order, offsets, max_new_tokens=8)
        assert built.references is not None and all(built.references)
    assert built.num_truncated == 0
    return built


def evaluation_loss(built, params):
    if built.scores is not None:
        return evaluation.classification(built, params, batch_size=12)["loss"]
    found, written = evaluation.generation(
        built, params, batch_size=12, rouge=built.task.name == "xsum"
    )
    assert len(written) == text_benchmarks.NUM_TEST
    assert 0 <= found["exact_match"] <= found["f1"] + 1e-9 <= 1 + 1e-9
    assert ("rouge_l" in found) == (built.task.name == "xsum")
    return found["loss"]
