"""What every entry point does before and after its own work."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags

from zofl_jax.runs.directory import RunError

flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder for compiled functions, '' for none; by default zofl_jax in the user's cache folder.",
)


class UserError(Exception):
    """The work can't be done as asked; the message is for the user and names the remedy."""


def run(main: Callable[[], None], interrupted: str = "stopped") -> None:
    """Parses the flags and runs `main`; errors a user can mend end it with one sentence.

    `interrupted` is what Ctrl-C answers.
    """

    def checked(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unknown argument {argv[1]!r}; options are flags, as in --seed=1")
        # absl shows Python's log records of level INFO; JAX tells at that level which
        # accelerators it did not find.
        logging.getLogger("jax").setLevel(logging.WARNING)
        folder = flags.FLAGS.compilation_cache
        if folder is None:
            folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or default_cache()
        if folder:
            jax.config.update("jax_compilation_cache_dir", str(folder))
        try:
            main()
        except (RunError, UserError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print(f"\n{interrupted}", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    app.run(checked)


def default_cache() -> Path:
    """Returns the folder for compiled functions in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zofl_jax" / "xla"
