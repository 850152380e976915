"""Tasks on texts: what is scored, what is trained, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_texts
from tiny_simulations import assert_replayed, copy

from zofl_jax.algorithms import decomfl
from zofl_jax.data import partition
from zofl_jax.data.text import TextData
from zofl_jax.directions import estimators
from zofl_jax.engine import simulation
from zofl_jax.engine.compilation import compiled
from zofl_jax.models import generation, lora, transformer
from zofl_jax.tasks import encoding, evaluation, language, prompts

PROMPT = prompts.Prompt("{text} It was", ("bad", "good"), "label")
ANSWER = prompts.Prompt("{text} It was", None, "answer")
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model():
    return language.adapt(*tiny_texts.model())


def split(rows, num_clients=4):
    return partition.iid(KEY, np.zeros(len(rows)), num_clients)


def classes(model, data=None, **changes):
    data = data or tiny_texts.data()
    return language.classification(model, data, PROMPT, *split(data.train), **changes)


def answering(model, data=None, **changes):
    """Returns the task of writing "good" or "bad", from the same sentences."""
    words = {0: "bad", 1: "good"}
    data = data or TextData(
        *([r | {"answer": words[r["label"]]} for r in rows] for rows in tiny_texts.data()[:2]),
        "answers",
    )
    return language.generation(model, data, ANSWER, *split(data.train), **changes)


def batch_of(examples, rows=slice(0, 6)):
    return jax.tree.map(lambda x: x[rows], examples)


@functools.partial(jax.jit, static_argnums=0)
def after_all(config, params, tokens):
    scores = transformer.apply(config, params, tokens, tokens >= 0)
    return jax.nn.log_softmax(scores[0, -1])


def log_probabilities(model, ids):
    """Returns log p(next token | ids), one text without any padding, [V]."""
    params = model.params(model.trainable)
    return np.asarray(after_all(model.config, params, np.array(ids)[None]))


def measured(built, batch):
    """Returns loss and metrics."""
    both = jax.jit(lambda *given: (built.task.loss(*given), built.task.metrics(*given)))
    return both(built.model.trainable, batch)


def test_scores_are_those_of_each_prompt_alone(model):
    built = classes(model)
    batch = batch_of(built.task.train.examples)
    scores = np.asarray(jax.jit(built.scores)(model.trainable, batch))
    words = [model.tokenizer.encode(f" {word}", special=False)[0] for word in PROMPT.answers]
    for i, row in enumerate(tiny_texts.data().train[:6]):
        ids = encoding.prompt_ids(model.tokenizer, f"{row['text']} It was")
        expected = log_probabilities(model, ids)[words]
        np.testing.assert_allclose(scores[i] - scores[i, 0], expected - expected[0], atol=1e-5)
        assert batch["label"][i] == row["label"]


@pytest.mark.parametrize("objective", ["cross_entropy", "sequence", "accuracy", "f1"])
def test_objectives_of_classes(model, objective):
    built = classes(model, objective=objective)
    batch = batch_of(built.task.train.examples, slice(0, 16))
    labels = np.asarray(batch["label"])
    rows = tiny_texts.data().train[:16]
    texts = [encoding.prompt_ids(model.tokenizer, f"{row['text']} It was") for row in rows]
    words = [model.tokenizer.encode(f" {word}", special=False)[0] for word in PROMPT.answers]
    whole = np.stack([log_probabilities(model, ids) for ids in texts])
    among = whole[:, words] - np.logaddexp.reduce(whole[:, words], axis=1, keepdims=True)
    right = among.argmax(axis=1) == labels
    f1 = []
    for c in (0, 1):
        both = np.sum((among.argmax(axis=1) == c) & (labels == c))
        f1.append(2 * both / (np.sum(among.argmax(axis=1) == c) + np.sum(labels == c)))
    expected = {
        "cross_entropy": -np.mean(among[np.arange(16), labels]),
        "sequence": -np.mean(whole[np.arange(16), np.array(words)[labels]]),
        "accuracy": 1 - np.mean(right),
        "f1": 1 - np.mean(f1),
    }[objective]
    loss, metrics = measured(built, batch)
    assert loss == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(metrics["loss"], -among[np.arange(16), labels], atol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], right)


def test_the_loss_of_a_written_answer_is_that_of_its_tokens(model):
    built = answering(model)
    batch = batch_of(built.task.train.examples)
    loss, metrics = measured(built, batch)
    losses = np.asarray(metrics["loss"])
    for i, row in enumerate(tiny_texts.data().train[:6]):
        ids = encoding.prompt_ids(model.tokenizer, f"{row['text']} It was")
        answer = model.tokenizer.encode(f" {('bad', 'good')[row['label']]}\n", special=False)
        assert batch["answer_length"][i] == len(answer) > 1
        terms = [-log_probabilities(model, ids + answer[:k])[t] for k, t in enumerate(answer)]
        assert losses[i] == pytest.approx(np.mean(terms), abs=1e-5)
    assert loss == pytest.approx(np.mean(losses), abs=1e-6)


def test_the_f1_objective_counts_what_is_written(model):
    built = answering(model, objective="f1")
    batch = batch_of(built.task.train.examples, slice(0, 4))
    mask = np.arange(batch["tokens"].shape[1]) >= (
        batch["tokens"].shape[1] - np.asarray(batch["length"])[:, None]
    )
    stops = language.stop_ids(model)
    written = generation.generate(
        model.config,
        model.trainable,
        batch["tokens"],
        jnp.asarray(mask),
        built.max_new_tokens,
        eos=stops,
    )
    scores = []
    for ours, theirs in zip(written.tolist(), batch["answer"].tolist(), strict=True):
        ours, theirs = (
            x[: next((i for i, t in enumerate(x) if t in stops), len(x))] for x in (ours, theirs)
        )
        common = sum(min(ours.count(t), theirs.count(t)) for t in set(ours))
        scores.append(2 * common / max(len(ours) + len(theirs), 1))
    loss = jax.jit(built.task.loss)(model.trainable, batch)
    assert loss == pytest.approx(1 - np.mean(scores), abs=1e-6)


def test_only_trained_leaves_are_params():
    config, params, words = tiny_texts.model()
    part = language.adapt(config, params, words, train_only=lambda path: "norm" in path)
    built = classes(part)
    assert set(built.task.init(KEY)) == {"layers", "final_norm"}
    assert set(built.task.init(KEY)["layers"]) == {"attention_norm", "mlp_norm"}
    adapted = language.adapt(config, params, words, lora_rank=2, key=KEY)
    batch = batch_of(built.task.train.examples)
    at_first = [jax.jit(classes(m).scores)(m.trainable, batch) for m in (part, adapted)]
    np.testing.assert_allclose(*at_first, atol=1e-5)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(adapted.trainable)}
    assert names == {"lora_a", "lora_b"}


FEW = "mlp/down|attention/v"  # which compile in half the time


@pytest.mark.parametrize(
    ("estimator", "local_steps"),
    [
        # Bits are promised for the programs that users run.
        pytest.param("forward", 2, marks=pytest.mark.optimized),
        ("forward_gradient", 1),  # gradients of adapters are those of test_lora_methods.py
    ],
)
def test_adapters_learn_and_the_scalars_alone_rebuild_them(estimator, local_steps):
    model = language.adapt(*tiny_texts.model(), lora_rank=4, lora_pattern=FEW, key=KEY)
    built = classes(model)
    chosen = {
        "forward": lambda: estimators.forward_difference(4, 1e-3),
        "forward_gradient": lambda: estimators.forward_gradient(8),
    }[estimator]()
    optimizer = optax.sgd(1.2e-2, momentum=0.9)
    algorithm = decomfl(built.task.loss, chosen, optimizer, local_steps=local_steps)
    simulator = simulation.make_simulator(
        algorithm, built.task, clients_per_round=4, batch_size=16, eval_batch_size=8
    )
    traces, rounds = [], 120 // local_steps
    before = simulator.evaluate(model.trainable)
    progress = simulation.run(
        simulator,
        rounds=rounds,
        eval_every=rounds,
        on_rounds=lambda trace, *_: traces.append(trace),
    )
    assert progress.history[-1].metrics["loss"] < before["loss"] - 0.03
    state = simulator.start(None).state
    for trace in traces:
        state = simulator.replay(state, trace.seeds, trace.broadcasts)
    assert_replayed(copy(state.params), copy(progress.state.params), exact=local_steps > 1)
    assert simulator.sizes[0].params == sum(x.nbytes for x in jax.tree.leaves(model.trainable))


def test_frozen_weights_are_no_constants_of_the_program():
    model = language.adapt(*tiny_texts.model(), lora_rank=1, key=KEY)
    built = classes(model)
    batch = batch_of(built.task.train.examples)
    fn = compiled(built.task.loss, (model.trainable, batch))
    rows, width = model.frozen["embed"]["tokens"]["embedding"].shape
    constants = [line for line in fn.func.as_text().splitlines() if " constant(" in line]
    assert constants
    assert not [line for line in constants if f"[{rows},{width}]" in line]
    np.testing.assert_allclose(
        fn(model.trainable, batch), jax.jit(built.task.loss)(model.trainable, batch), rtol=1e-5
    )


def test_evaluation_agrees_with_the_metrics_and_with_counting(model):
    built = classes(model)
    found = evaluation.classification(built, model.trainable, batch_size=7)
    _, metrics = measured(built, built.task.test)
    assert found["accuracy"] == pytest.approx(float(np.mean(metrics["accuracy"])))
    assert found["loss"] == pytest.approx(float(np.mean(metrics["loss"])), abs=1e-5)
    scores = np.asarray(jax.jit(built.scores)(model.trainable, built.task.test))
    margin = scores[:, 1] - scores[:, 0]
    labels = np.asarray(built.task.test["label"])
    upper = np.argsort(margin)[len(margin) // 2 :]
    expected = np.mean(np.isin(np.arange(len(margin)), upper) == labels)
    assert found["accuracy_median_threshold"] == pytest.approx(expected)


def test_written_answers_are_evaluated_as_text():
    """A model that was trained to write the right word gets exact matches."""
    config, params, words = tiny_texts.model(width=32, mlp_width=64)
    model = language.adapt(config, params, words)
    built = answering(model)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        grads = jax.grad(built.task.loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    batch = batch_of(built.task.train.examples, slice(None))
    state = params, optimizer.init(params)
    for _ in range(60):
        state = step(state, batch)
    counted = []
    found, written = evaluation.generation(
        built, state[0], batch_size=10, watch=counted.append, rouge=True
    )
    assert sum(counted) == len(written) == 24
    assert set(written) <= {"good", "bad"}
    assert found["exact_match"] == found["f1"] == found["rouge_l"] > 0.8
    hot, drawn = evaluation.generation(built, params, key=KEY, temperature=5.0)
    assert hot["exact_match"] < 0.5
    assert len(set(drawn)) > 2


def test_shots_stand_before_every_prompt(model):
    data = tiny_texts.data()
    plain, shown = classes(model), classes(model, shots=data.train[:2])
    rows = [prompts.in_context(PROMPT, data.train[0], data.train[:2])]
    ids = encoding.prompt_ids(model.tokenizer, rows[0])
    assert np.asarray(shown.task.train.examples["length"])[0] == len(ids)
    assert shown.task.train.examples["tokens"][0, -len(ids) :].tolist() == ids
    assert plain.task.train.examples["tokens"].shape < shown.task.train.examples["tokens"].shape


def test_long_texts_lose_their_beginning_and_are_counted(model):
    built = classes(model, max_length=8)
    everything = [row for part in tiny_texts.data()[:2] for row in part]
    lengths = [
        len(encoding.prompt_ids(model.tokenizer, f"{row['text']} It was")) for row in everything
    ]
    assert built.num_truncated == sum(length > 8 for length in lengths) > 0
    assert built.task.train.examples["tokens"].shape[1] == 8
    tail = model.tokenizer.encode(" It was", special=False)
    assert np.all(np.asarray(built.task.test["tokens"])[:, -len(tail) :] == tail)


def test_answers_are_encoded_behind_their_prompts():
    """With SentencePiece's vocabularies, behind a line break words begin in another way."""
    words = tiny_texts.sentencepiece("prepend")
    model = language.LanguageModel(tiny_texts.model()[0], words, {}, {})
    rows = [{"text": "a film?", "label": i, "answer": word} for i, word in enumerate(("No", "Yes"))]
    data = TextData(rows, rows, "questions")
    order = np.arange(2), np.array([0, 2])

    def answers(template):
        prompt = prompts.Prompt(template, None, "answer")
        examples = language.generation(model, data, prompt, *order).task.train.examples
        found = zip(examples["answer"], examples["answer_length"], strict=True)
        return [[words.backend.id_to_token(int(i)) for i in ids[:n]] for ids, n in found]

    assert answers("{text}\n") == [["No", "<0x0A>"], ["Yes", "<0x0A>"]]
    assert answers("{text}") == [["▁No", "<0x0A>"], ["▁Yes", "<0x0A>"]]
    stops = language.stop_ids(model)
    for written in ("▁Yes", "Yes"):
        ids = [words.backend.token_to_id(piece) for piece in (written, "<0x0A>", "▁No")]
        assert language.answer_text(words, ids, stops) == "Yes"


def test_a_mark_with_a_line_break_ends_an_answer(model):
    """As "." with a line break in one token does with Llama 3's and Qwen's vocabularies."""
    words = tiny_texts.tokenizer()
    words.backend.add_tokens([".\n"])
    dot = words.vocab_size - 1
    stops = language.stop_ids(model._replace(tokenizer=words))
    assert {1, dot, *words.encode("\n", special=False)} <= set(stops)
    good = words.encode(" good", special=False)
    assert language.answer_text(words, [*good, dot, *good], stops) == "good."
    assert language.answer_text(words, [*good, 1, *good], stops) == "good"
    assert language.answer_text(words, good, stops) == "good"


def test_verbalizers_are_those_behind_every_prompt(model):
    """Where texts end a prompt, each may be followed in another way."""
    rows = [{"text": text, "label": i} for i, text in enumerate(("a film", "a story\n"))]
    prompt = PROMPT._replace(template="{text}", answers=("Yes", "No"))
    with pytest.raises(ValueError, match=r"behind the prompts ending in 'a film' and 'a story"):
        language.classification(model, TextData(rows, rows, ""), prompt, None, None)
    words = prompt._replace(template="{text}\nThat is?\n")
    chosen = language._verbalizers(model.tokenizer, words, ["a film\nThat is?\n"])
    assert [model.tokenizer.decode([i]) for i in chosen] == ["Yes", "No"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": PROMPT._replace(template="{text} It was ")}, "joins the end of the prompt"),
        ({"prompt": PROMPT._replace(template="{sentence} It was")}, "'sentence'.*has text, label"),
        ({"prompt": PROMPT._replace(answers=("bad", "marvellous"))}, "is not one token but"),
        ({"prompt": ANSWER}, "no verbalizers"),
        ({"data": TextData([], tiny_texts.sentences(4), "nothing")}, "nothing, train has no rows"),
        ({"max_length": 513}, "513 is over the model's 512 positions"),
    ],
)
def test_classification_refuses(model, change, message):
    data = change.pop("data", tiny_texts.data())
    arguments = {"prompt": PROMPT, "order": None, "offsets": None} | change
    with pytest.raises(ValueError, match=message):
        language.classification(model, data, **arguments)


def test_generation_refuses_objectives_of_classes(model):
    with pytest.raises(ValueError, match="use sequence or f1"):
        answering(model, objective="accuracy")


def test_adapt_refuses():
    config, params, words = tiny_texts.model()
    with pytest.raises(ValueError, match="no tokenizer"):
        language.adapt(config, params, None)
    with pytest.raises(ValueError, match="not both"):
        language.adapt(config, params, words, lora_rank=1, train_only=bool)
    with pytest.raises(ValueError, match="matches no matrix"):
        language.adapt(config, params, words, lora_rank=1, lora_pattern="nothing")
    assert lora.merge(language.adapt(config, params, words).params(params)).keys() == params.keys()
