"""Fine-tuning a language model: classification by verbalizers, and short written answers.

    model = language.adapt(*weights.load("gguf:model.gguf"))
    built = language.classification(model, data, prompt, order, offsets)
    simulator = simulation.make_simulator(decomfl(built.task.loss, ...), built.task, ...)

A prompt is a text made from a row of the data; a class is scored by the probability of its
verbalizer, one token, as the next one (Schick & Schütze 2021; Malladi et al. 2023, arXiv
2305.17333). The params of the task are the trained leaves alone: directions, updates and logs
never see the others.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zofl_jax.core import Array, Batch, LossFn, MetricsFn, Params, PRNGKey, Task
from zofl_jax.data import partition
from zofl_jax.data.text import Row, TextData
from zofl_jax.models import lora, transformer
from zofl_jax.models.architectures import Config
from zofl_jax.models.generation import generate
from zofl_jax.models.tokenizers import Tokenizer
from zofl_jax.tasks import encoding, objectives, prompts

Objective = Literal["cross_entropy", "sequence", "accuracy", "f1"]

END = "\n"
"""What ends a written answer."""


class LanguageModel(NamedTuple):
    """A language model and which of its params are trained."""

    config: Config
    tokenizer: Tokenizer
    trainable: Params
    frozen: Params  # {} where all are trained

    def params(self, trainable: Params) -> Params:
        """Returns the whole model's params, with these trained ones."""
        return lora.combine(trainable, self.frozen) if self.frozen else trainable


class LanguageTask(NamedTuple):
    """A task on texts and what evaluation needs beside it.

    Attributes:
      task: its examples are {"tokens": [n, T] padded on the left, "length": [n]} and "label"
        [n] or "answer" [n, A] with "answer_length" [n]. The test set is in order of length.
      model: as it was given.
      scores: (params, batch) -> the classes' scores [B, C]; None for written answers.
      references: the right answers to each text of the test set; None for classes.
      max_new_tokens: the tokens of the longest reference answer; 1 for classes.
      num_truncated: texts of both splits that lost their beginning.
    """

    task: Task
    model: LanguageModel
    scores: Callable[[Params, Batch], Array] | None
    references: list[list[str]] | None
    max_new_tokens: int
    num_truncated: int


def adapt(
    config: Config,
    params: Params,
    tokenizer: Tokenizer | None,
    *,
    train_only: Callable[[str], bool] | None = None,
    lora_rank: int = 0,
    lora_alpha: float = 16.0,
    lora_pattern: str = r"attention/(q|v)/kernel",
    key: PRNGKey | None = None,
) -> LanguageModel:
    """Returns a model of which all params, some leaves, or low-rank adapters are trained.

    Args:
      config: from `weights.load`, as are the next two.
      params: the whole model's.
      tokenizer: the model's.
      train_only: path -> whether that leaf is trained.
      lora_rank: of adapters for the matrices whose path matches `lora_pattern`; 0 for none.
      lora_alpha: see `lora.add`.
      lora_pattern: likewise.
      key: draws the adapters.

    Raises:
      ValueError: for a model without a tokenizer, both ways of training a part, or a pattern
        that matches nothing.
    """
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: take a folder or file that holds one")
    trainable: Params = params
    frozen: Params = {}
    if lora_rank and train_only is not None:
        raise ValueError("train either some of the leaves or LoRA adapters, not both")
    if lora_rank:
        key = jax.random.key(0) if key is None else key
        trainable, frozen = lora.add(params, lora_pattern, lora_rank, lora_alpha, key)
    elif train_only is not None:
        trainable, frozen = lora.split(params, train_only)
    return LanguageModel(config, tokenizer, trainable, frozen)


def classification(
    model: LanguageModel,
    data: TextData,
    prompt: prompts.Prompt,
    order: np.ndarray,
    offsets: np.ndarray,
    *,
    objective: Objective = "cross_entropy",
    max_length: int | None = None,
    shots: Sequence[Row] = (),
) -> LanguageTask:
    """Returns the task of choosing among a prompt's verbalizers.

    The metrics are the accuracy and the cross-entropy among the verbalizers, whatever the
    objective.

    Args:
      model: from `adapt`.
      data: rows of both splits.
      prompt: with `answers`.
      order: int32 [n], rows sorted by client, see `core.ClientData`.
      offsets: int32 [num_clients + 1], where each client's begin.
      objective: what the clients lower: the cross-entropy among the verbalizers, that of the
        verbalizer in the whole vocabulary ("sequence"), 1 − accuracy, or 1 − macro F1.
      max_length: tokens of the longest prompt, the model's limit unless given.
      shots: rows shown with their answers before every prompt.

    Raises:
      ValueError: for an empty split, a column or label the data lacks, a verbalizer that isn't
        one token, or a length over the model's limit.
    """
    if prompt.answers is None:
        raise ValueError("the prompt has no verbalizers: give it some, or use `generation`")
    texts = _prompts(data, prompt, shots)
    candidates = _verbalizers(model.tokenizer, prompt, texts)
    ids = [encoding.prompt_ids(model.tokenizer, text) for text in texts]
    examples, num_truncated = _examples(model, data, ids, max_length, reserved=0)
    for part, rows in zip(examples, (data.train, data.test), strict=True):
        part["label"] = prompts.class_ids(prompt, rows).astype(np.int32)
    sizes = _buckets(examples)

    def next_token(params: Params, batch: Batch, among: Sequence[int] | None) -> Array:
        """Returns the scores of the token after each prompt, [B, C] or [B, V]."""
        whole = model.params(params)

        def evaluate(tokens: Array, mask: Array) -> Array:
            features = transformer.hidden(model.config, whole, tokens, mask)[:, -1]
            return transformer.logits(model.config, whole, features, among)

        return encoding.in_buckets(evaluate, batch["tokens"], batch["length"], sizes)

    def scores(params: Params, batch: Batch) -> Array:
        return next_token(params, batch, candidates.tolist())

    def loss(params: Params, batch: Batch) -> Array:
        if objective == "sequence":
            words = jnp.asarray(candidates)[batch["label"]]
            return objectives.cross_entropy(next_token(params, batch, None), words)
        return objectives.CLASSIFICATION[objective](scores(params, batch), batch["label"])

    def metrics(params: Params, batch: Batch) -> dict[str, Array]:
        found, labels = scores(params, batch), batch["label"]
        return {
            "loss": optax.softmax_cross_entropy_with_integer_labels(found, labels),
            "accuracy": jnp.argmax(found, axis=-1) == labels,
        }

    task, _ = _task(model, data.name, examples, order, offsets, loss, metrics)
    return LanguageTask(task, model, scores, None, 1, num_truncated)


def generation(
    model: LanguageModel,
    data: TextData,
    prompt: prompts.Prompt,
    order: np.ndarray,
    offsets: np.ndarray,
    *,
    objective: Objective = "sequence",
    max_length: int | None = None,
    max_new_tokens: int = 32,
    shots: Sequence[Row] = (),
) -> LanguageTask:
    """Returns the task of writing a short answer, such as SQuAD's.

    The metric is the cross-entropy of the first reference answer and of its end, a line
    break; `evaluation.py` writes answers and compares them.

    Args:
      model: from `adapt`.
      data: rows of both splits.
      prompt: without `answers`; its label is the column with the right answer or answers.
      order: as for `classification`.
      offsets: likewise.
      objective: the cross-entropy of the answer's tokens, mean over them ("sequence"), or
        1 − the F1 of the tokens written greedily ("f1"), which has no gradient.
      max_length: tokens of the longest prompt with its answer, the model's limit unless given.
      max_new_tokens: answers are cut to this many tokens.
      shots: rows shown with their answers before every prompt.

    Raises:
      ValueError: for an empty split, a column the data lacks, or a length over the limit.
    """
    if objective not in ("sequence", "f1"):
        raise ValueError(f"written answers have no objective {objective!r}: use sequence or f1")
    config, tokenizer = model.config, model.tokenizer
    texts = _prompts(data, prompt, shots)
    references = [prompts.references(prompt, rows) for rows in (data.train, data.test)]
    first = [answers[0] for part in references for answers in part]
    pairs = [
        encoding.continued(tokenizer, text, prompts.continuation(text, answer) + END)
        for text, answer in zip(texts, first, strict=True)
    ]
    encoded = encoding.pad_right([ids for _, ids in pairs], max_new_tokens, tokenizer.pad_id)
    reserved = encoded.tokens.shape[1]
    ids = [ids for ids, _ in pairs]
    examples, num_truncated = _examples(model, data, ids, max_length, reserved)
    cut = len(data.train)
    for part, rows in zip(examples, (slice(None, cut), slice(cut, None)), strict=True):
        part["answer"], part["answer_length"] = encoded.tokens[rows], encoded.length[rows]
    sizes = _buckets(examples)

    def sequence(params: Params, batch: Batch) -> Array:
        """Returns the mean cross-entropy of each answer's tokens, [B]."""
        whole, answer = model.params(params), batch["answer"]
        real = jnp.arange(answer.shape[1]) < batch["answer_length"][:, None]

        def evaluate(tokens: Array, mask: Array) -> Array:
            # The last token is only predicted, never read.
            tokens = jnp.concatenate([tokens, answer[:, :-1]], axis=1)
            mask = jnp.concatenate([mask, real[:, 1:]], axis=1)
            features = transformer.hidden(config, whole, tokens, mask)[:, -answer.shape[1] :]
            scores = transformer.logits(config, whole, features)
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, answer)
            return jnp.mean(losses, axis=1, where=real)

        return encoding.in_buckets(evaluate, batch["tokens"], batch["length"], sizes)

    stops = stop_ids(model)

    def written(params: Params, batch: Batch) -> Array:
        """Returns what the model writes greedily, int32 [B, A], -1 after its end."""

        def evaluate(tokens: Array, mask: Array) -> Array:
            return generate(config, model.params(params), tokens, mask, reserved, eos=stops)

        found = encoding.in_buckets(evaluate, batch["tokens"], batch["length"], sizes)
        return _before(jnp.isin(found, jnp.asarray(stops)), found)

    def loss(params: Params, batch: Batch) -> Array:
        if objective == "sequence":
            return jnp.mean(sequence(params, batch))
        answer = batch["answer"]
        ends = jnp.arange(reserved) >= batch["answer_length"][:, None]
        ends |= jnp.isin(answer, jnp.asarray(stops))
        return objectives.token_f1_loss(written(params, batch), _before(ends, answer), fill=-1)

    def metrics(params: Params, batch: Batch) -> dict[str, Array]:
        return {"loss": sequence(params, batch)}

    task, by_length = _task(model, data.name, examples, order, offsets, loss, metrics)
    right = [references[1][i] for i in by_length]
    return LanguageTask(task, model, None, right, reserved, num_truncated)


def encoded_texts(model: LanguageModel, texts: Sequence[str], limit: int) -> Batch:
    """Returns texts as {"tokens": int32 [n, T], "length": int32 [n]}, padded on the left.

    Those of more than `limit` tokens, or than the model's positions, lose their beginning.
    """
    ids = [encoding.prompt_ids(model.tokenizer, text) for text in texts]
    kept = len(model.tokenizer.prefix)
    most = min(limit, model.config.max_positions)
    encoded = encoding.pad_left(ids, most, model.tokenizer.pad_id, kept)
    return {"tokens": encoded.tokens, "length": encoded.length}


def next_token_loss(model: LanguageModel) -> LossFn:
    """Returns (params, what `encoded_texts` returns) -> the mean cross-entropy of each next token.

    The mean is over a text's tokens and then over texts, which are evaluated one by one: the scores
    of all tokens of a text are as many as its length times the vocabulary.
    """

    def of_one(params: Params, tokens: Array, length: Array) -> Array:
        whole, size = model.params(params), tokens.size
        mask = jnp.arange(size) >= size - length
        features = transformer.hidden(model.config, whole, tokens[None], mask[None])[:, :-1]
        scores = transformer.logits(model.config, whole, features)[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[1:])
        # A text of one token has no next one.
        real = mask[:-1]
        return jnp.sum(jnp.where(real, losses, 0)) / jnp.maximum(jnp.sum(real), 1)

    def loss(params: Params, batch: Batch) -> Array:
        one = jax.checkpoint(functools.partial(of_one, params))
        losses: Array = jax.lax.map(lambda each: one(*each), (batch["tokens"], batch["length"]))
        return jnp.mean(losses)

    return loss


def stop_ids(model: LanguageModel) -> tuple[int, ...]:
    r"""Returns the tokens that end a written answer: those with a line break, and ends of texts.

    A vocabulary may have many line breaks: ".\n" is one token of Llama 3's and Qwen's.
    """
    tokenizer = model.tokenizer
    breaks = (i for i in range(tokenizer.vocab_size) if END in tokenizer.decode([i]))
    ends = {*model.config.eos_ids, tokenizer.eos_id, *breaks}
    return tuple(sorted(i for i in ends if i is not None))


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], stops: Collection[int]) -> str:
    """Returns what a model wrote, as text without whitespace around it.

    Args:
      tokenizer: the model's.
      ids: of the tokens written, and of whatever stands behind their end.
      stops: from `stop_ids`.
    """
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    with_end = tokenizer.decode(ids[: end + 1])  # which may hold a mark before a line break
    return (with_end if END in with_end else tokenizer.decode(ids[:end])).split(END)[0].strip()


def _task(
    model: LanguageModel,
    name: str,
    examples: tuple[dict[str, Any], dict[str, Any]],
    order: np.ndarray,
    offsets: np.ndarray,
    loss: LossFn,
    metrics: MetricsFn,
) -> tuple[Task, np.ndarray]:
    """Returns the task with its test set in order of length, and that order."""
    train, test = examples
    by_length = np.argsort(test["length"], kind="stable")
    task = Task(
        name,
        lambda key: model.trainable,
        loss,
        metrics,
        partition.client_data(train, order, offsets),
        jax.tree.map(lambda x: x[by_length], test),
        functools.partial(transformer.layout, model.config),
    )
    return task, by_length


def _prompts(data: TextData, prompt: prompts.Prompt, shots: Sequence[Row]) -> list[str]:
    """Returns the prompts of both splits."""
    for split, rows in (("train", data.train), ("test", data.test)):
        prompts.check(prompt, rows, f"{data.name}, {split}")
    shown = prompts.demonstrations(prompt, shots)
    return [shown + prompts.render(prompt, row) for row in [*data.train, *data.test]]


def _verbalizers(tokenizer: Tokenizer, prompt: prompts.Prompt, texts: Sequence[str]) -> np.ndarray:
    """Returns the token of each verbalizer behind the prompts, int32 [C]."""
    assert prompt.answers is not None
    # Where all prompts end in the same words, the first one stands for all.
    texts = texts[:1] if prompts.ends_in_words(prompt.template) else texts
    found = None
    for text in texts:
        answers = [prompts.continuation(text, answer) for answer in prompt.answers]
        ids = encoding.single_tokens(tokenizer, answers, text)
        found = ids if found is None else found
        if np.any(ids != found):
            raise ValueError(
                f"behind the prompts ending in {texts[0][-20:]!r} and {text[-20:]!r} the "
                "verbalizers are different tokens: let the template end in words, as in "
                f"{prompt.template.rstrip() + ' It was'!r}"
            )
    assert found is not None
    return found


def _examples(
    model: LanguageModel,
    data: TextData,
    ids: Sequence[Sequence[int]],
    max_length: int | None,
    reserved: int,
) -> tuple[tuple[dict[str, Any], dict[str, Any]], int]:
    """Returns the padded prompts of both splits, and how many were truncated."""
    limit = max_length or model.config.max_positions
    if limit > model.config.max_positions:
        raise ValueError(
            f"max_length={limit} is over the model's {model.config.max_positions} positions: "
            "lower it"
        )
    kept = len(model.tokenizer.prefix)
    encoded = encoding.pad_left(ids, limit - reserved, model.tokenizer.pad_id, kept)
    cut = len(data.train)
    parts = [
        {"tokens": encoded.tokens[rows], "length": encoded.length[rows]}
        for rows in (slice(None, cut), slice(cut, None))
    ]
    return (parts[0], parts[1]), encoded.num_truncated


def _buckets(examples: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    lengths = np.concatenate([part["length"] for part in examples])
    return encoding.buckets(lengths, examples[0]["tokens"].shape[1])


def _before(ends: Array, tokens: Array) -> Array:
    """Returns tokens [B, N] with -1 from the first end of each row on."""
    return jnp.where(jnp.cumsum(ends, axis=1) > 0, -1, tokens)
