"""How good a language model is at a task: classes by their scores, written answers by text."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax.core import Array, Batch, Params, PRNGKey
from zofl_jax.data import batches as data_batches
from zofl_jax.engine.compilation import compiled
from zofl_jax.models.generation import generate
from zofl_jax.tasks import answers, language

Watcher = Callable[[int], None]


def classification(
    built: language.LanguageTask,
    params: Params,
    *,
    batch_size: int = 32,
    watch: Watcher = lambda n: None,
) -> dict[str, float | None]:
    """Returns accuracy and mean cross-entropy over the test set.

    "accuracy_median_threshold" is the accuracy of two classes when half of the texts are called
    the second class, those that score it highest: what the model knows apart from its
    preference for one of the words. None for more classes.

    Args:
      built: from `language.classification`.
      params: of the task.
      batch_size: texts at once.
      watch: called with the number of texts done since the last call.
    """
    assert built.scores is not None
    scores = np.concatenate(list(_over_test(built.scores, built, params, batch_size, watch)))
    labels = np.asarray(built.task.test["label"])
    normalised = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    threshold = None
    if scores.shape[1] == 2:
        margin = scores[:, 1] - scores[:, 0]
        threshold = float(np.mean((margin > np.median(margin)) == labels))
    return {
        "accuracy": float(np.mean(scores.argmax(axis=1) == labels)),
        "accuracy_median_threshold": threshold,
        "loss": float(-np.mean(normalised[np.arange(len(labels)), labels])),
    }


def generation(
    built: language.LanguageTask,
    params: Params,
    *,
    rouge: bool = False,
    match_numbers: bool = False,
    key: PRNGKey | None = None,
    temperature: float = 0.0,
    batch_size: int = 32,
    watch: Watcher = lambda n: None,
) -> tuple[dict[str, float | None], list[str]]:
    """Returns metrics of the answers written to the test set's prompts, and the answers.

    The metrics are exact match (also as "accuracy") and token F1 as SQuAD normalises text,
    ROUGE-L where asked for, and the cross-entropy of the reference.

    Args:
      built: from `language.generation`.
      params: of the task.
      rouge: whether to compute ROUGE-L, which needs the package rouge-score.
      match_numbers: answers with other numbers get no F1, DROP's rule.
      key: draws the tokens.
      temperature: 0 takes the likeliest token.
      batch_size: prompts at once.
      watch: called with the number of prompts done since the last call.
    """
    assert built.references is not None
    key = jax.random.key(0) if key is None else key
    stops = language.stop_ids(built.model)

    def both(params: Params, batch: Batch) -> tuple[Array, Array]:
        tokens, length = batch["tokens"], batch["length"]
        mask = jnp.arange(tokens.shape[1]) >= tokens.shape[1] - length[:, None]
        written = generate(
            built.model.config,
            built.model.params(params),
            tokens,
            mask,
            built.max_new_tokens,
            jax.random.fold_in(key, batch["index"][0]),
            temperature,
            stops,
        )
        return written, built.task.metrics(params, batch)["loss"]

    written: list[str] = []
    losses: list[Any] = []
    for ids, loss in _over_test(both, built, params, batch_size, watch):
        losses.extend(loss)
        tokenizer, ends = built.model.tokenizer, frozenset(stops)
        written += [language.answer_text(tokenizer, row, ends) for row in ids.tolist()]
    pairs = list(zip(written, built.references, strict=True))
    matches = float(np.mean([answers.exact_match(ours, right) for ours, right in pairs]))
    f1 = [answers.token_f1(ours, right, match_numbers) for ours, right in pairs]
    found: dict[str, float | None] = {
        "accuracy": matches,
        "accuracy_median_threshold": None,
        "loss": float(np.mean(losses)),
        "exact_match": matches,
        "f1": float(np.mean(f1)),
    }
    if rouge:
        found["rouge_l"] = float(np.mean([answers.rouge_l(ours, right) for ours, right in pairs]))
    return found, written


def _over_test(
    fn: Callable[[Params, Batch], Any],
    built: language.LanguageTask,
    params: Params,
    batch_size: int,
    watch: Watcher,
) -> Iterator[Any]:
    """Yields fn of each batch of the test set, without the filling of the last one."""
    n = len(built.task.test["length"])
    test = built.task.test | {"index": np.arange(n, dtype=np.int32)}
    batches, mask = data_batches.evaluation_batches(test, min(batch_size, n))
    evaluate = None
    for i, real in enumerate(mask):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        evaluate = evaluate or compiled(fn, (params, batch))
        out = evaluate(params, batch)
        yield jax.tree.map(lambda x, real=real: np.asarray(x)[real], out)
        watch(int(real.sum()))
