"""Writes the language model of a run as a Hugging Face folder.

    python -m experiments.export --workdir=runs/reviews --out=tuned

The folder holds weights, configuration and tokenizer, and is read by transformers and by
`--model=hf:tuned`. LoRA adapters are added into the weights; with `--adapter` they are written
alone, as peft reads them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from zofl_jax.configuration.config import Config
from zofl_jax.configuration.experiment import build, rebuild
from zofl_jax.core import Params
from zofl_jax.runs.directory import read_flags

from . import devices, entry

flags.DEFINE_string("workdir", None, "Run directory.", required=True)
flags.DEFINE_string("out", None, "Folder to write; it must not exist or be empty.", required=True)
flags.DEFINE_integer("round", None, "Rounds done; the last logged one unless given.")
flags.DEFINE_bool("adapter", False, "Write the LoRA adapters alone, as peft reads them.")

if TYPE_CHECKING:
    from zofl_jax.tasks.language import LanguageModel

FLAGS = flags.FLAGS


def main() -> None:
    """Rebuilds the model of a round and writes it."""
    workdir, out = Path(FLAGS.workdir), Path(FLAGS.out)
    with entry.user_errors():
        config = Config.from_flat(read_flags(workdir))
    if config.kind != "texts":
        raise entry.UserError(
            f"{workdir} trained on --task={config.task}, not a language model; "
            "experiments.replay saves its params as .npz"
        )
    if FLAGS.adapter and not config.lora_rank:
        raise entry.UserError(
            f"--adapter: {workdir} trained without adapters (--lora_rank=0); leave --adapter out"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise entry.UserError(f"--out={out} exists and is not an empty folder; name another")
    with entry.user_errors():
        experiment = build(config, devices.chosen())
    assert experiment.language is not None
    state, done, _ = rebuild(workdir, experiment, FLAGS.round, nearest=True, note=entry.note)
    model = experiment.language.model
    try:
        _write(out, model, state.params, str(config.model))
    except OSError as error:
        raise entry.UserError(f"--out={out} can't be written ({error})") from error
    print(f"wrote the model after {done} rounds to {out}")


def _write(out: Path, model: "LanguageModel", trained: Params, base: str) -> None:
    from zofl_jax.models import lora, weights

    params = model.params(trained)
    if FLAGS.adapter:
        name = base.removeprefix("hf:") if base.startswith("hf:") else None
        lora.save_peft(str(out), model.config, params, name)
    else:
        weights.save_hf(str(out), model.config, lora.merge(params), model.tokenizer)


if __name__ == "__main__":
    entry.run(main)
