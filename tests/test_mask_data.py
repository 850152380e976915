"""Masks from public data (MEERKAT): what they hang on, and that they hold under privacy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_texts
from flag_lines import build, resolve

from zofl_jax.configuration import public
from zofl_jax.configuration.phases import _mask
from zofl_jax.data import sources
from zofl_jax.directions import scaling
from zofl_jax.engine import simulation
from zofl_jax.models import transformer
from zofl_jax.tasks import language

FLAGS = ("--mask=sensitivity", "--mask_density=0.01", "--num_clients=6", "--clients_per_round=2")
SMALL = ("--num_perturbations=2", "--local_steps=1", "--model=softmax")


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    """Public images: the digits upside down, as an .npz file."""
    data = sources.digits()
    path = tmp_path_factory.mktemp("public") / "digits.npz"
    arrays = {
        "x_train": data.train["image"][:300, ::-1],
        "y_train": data.train["label"][:300],
        "x_test": data.test["image"][:10],
        "y_test": data.test["label"][:10],
    }
    np.savez(path, **arrays)
    return path


def mask_of(experiment, config):
    return _mask(config, experiment.task, experiment.simulator.root, experiment.calibration)


def test_the_mask_is_that_of_the_public_examples_alone(digits_file):
    """The largest squares of their gradient, whatever examples the clients have."""
    flags = (*FLAGS, *SMALL, f"--mask_data=npz:{digits_file}")
    config = resolve(*flags)
    experiment = build(*flags)
    found = mask_of(experiment, config)
    task, few = experiment.task, np.load(digits_file)
    batch = {"image": few["x_train"][:256], "label": few["y_train"][:256].astype(np.int32)}
    params = task.init(experiment.simulator.root.init)
    expected = scaling.sensitivity_mask(task.loss, params, jax.tree.map(jnp.asarray, batch), 0.01)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, expected)),
                                                    strict=True))  # fmt: skip
    others = task._replace(
        train=task.train._replace(
            examples=jax.tree.map(lambda x: np.roll(x, 7, 0), task.train.examples)
        )
    )
    again = _mask(config, others, experiment.simulator.root, experiment.calibration)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, again)),
                                                    strict=True))  # fmt: skip
    own = _mask(config, task, experiment.simulator.root, None)
    assert any((np.asarray(a) != b).any() for a, b in zip(*map(jax.tree.leaves, (found, own)),
                                                          strict=True))  # fmt: skip
    assert "mask's public data" in experiment.inputs()


def test_it_holds_under_privacy_and_moves_nothing_else(digits_file):
    """At 0.1 % of 650 params: one of each leaf; the others stay, and ε is that of the scalars."""
    flags = (*FLAGS, *SMALL, "--dp=client", f"--mask_data=npz:{digits_file}")
    flags = (*flags, "--mask_density=0.001", "--momentum=0")
    experiment = build(*flags)
    start = jax.tree.map(np.asarray, experiment.task.init(experiment.simulator.root.init))
    progress = simulation.run(experiment.simulator, rounds=3)
    moved = jax.tree.map(lambda a, b: np.asarray(a) != b, progress.state.params, start)
    assert [int(m.sum()) for m in jax.tree.leaves(moved)] == [1, 1]
    assert np.isfinite(progress.history[-1].epsilon)
    with pytest.raises(Exception, match="name public ones by --mask_data"):
        resolve(*FLAGS, "--dp=client")


def test_what_is_no_public_data_of_the_kind_is_refused(digits_file, tmp_path):
    sensitive = "--mask=sensitivity"
    for flags, message in [
        (["--mask_data=idx:/data"], "--mask_data has no effect with --mask=none"),
        ([sensitive, "--mask_data=digits"], "is what the clients' own examples are from"),
        ([sensitive, "--mask_data=sst2"], "--mask_data=sst2 is no source of images: use digits"),
        ([sensitive, "--mask_data=lines.txt"], "lines.txt is a file of texts, and --task=digits"),
        ([sensitive, "--task=sst2", "--model=gguf:x", "--mask_data=idx:x"], "no source of texts"),
        ([sensitive, "--task=quadratic", "--mask_data=digits"], "no effect with --task=quadratic"),
    ]:
        with pytest.raises(Exception, match=message):
            resolve(*flags)
    data = sources.digits()
    wide = tmp_path / "wide.npz"
    image = np.repeat(data.train["image"][:20], 2, axis=2)
    np.savez(wide, x_train=image, y_train=data.train["label"][:20], x_test=image,
             y_test=data.train["label"][:20])  # fmt: skip
    with pytest.raises(Exception, match=r"has images \[8, 16, 1\] of 10 classes, and --task=digi"):
        build(*FLAGS, *SMALL, f"--mask_data=npz:{wide}")


def test_texts_give_the_loss_of_each_next_token(tmp_path):
    """Against the scores of whole texts, padding left out; a line a text, the first 64 of them."""
    model = language.adapt(*tiny_texts.model())
    lines = tmp_path / "lines.txt"
    texts = [row["text"] for row in tiny_texts.sentences(70)]
    lines.write_text("\n\n".join(texts))
    config = resolve("--task=sst2", "--model=gguf:x", "--mask=sensitivity", f"--mask_data={lines}")
    found = public.of_texts(config, model)
    assert len(found.batch["length"]) == 64

    @jax.jit
    def chances(ids):
        scores = transformer.apply(model.config, model.trainable, ids, jnp.ones_like(ids, bool))
        return jax.nn.log_softmax(scores[0, :-1])

    losses = []
    for text in texts[:64]:
        ids = np.asarray(model.tokenizer.encode(text))
        losses.append(-np.mean(np.asarray(chances(ids[None]))[np.arange(ids.size - 1), ids[1:]]))
    actual = float(jax.jit(found.loss_fn)(model.trainable, found.batch))
    np.testing.assert_allclose(actual, np.mean(losses), rtol=1e-4)
    mask = scaling.sensitivity_mask(found.loss_fn, model.trainable, found.batch, 0.001)
    assert all(m.any() for m in jax.tree.leaves(mask))
    lines.write_text("\n")
    with pytest.raises(ValueError, match="has no texts: name another source"):
        public.of_texts(config, model)
    with pytest.raises(ValueError, match=r"can't be read .* give a file of UTF-8 text"):
        public.of_texts(config.replace(mask_data=str(tmp_path / "none.txt")), model)
