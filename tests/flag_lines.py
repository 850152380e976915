"""What the entry points make of a command line."""

from absl.testing import flagsaver

from experiments import entry, flags
from zofl_jax.configuration import experiment
from zofl_jax.configuration.config import Config


def resolve(*arguments: str) -> Config:
    """Returns the config of `experiments.train` with these arguments."""
    with flagsaver.flagsaver():
        flags.FLAGS(["train", *arguments])
        return flags.config()


def build(*arguments: str) -> experiment.Experiment:
    """Returns what it builds."""
    with entry.user_errors():
        return experiment.build(resolve(*arguments))
