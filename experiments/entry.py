"""What every entry point does before and after its own work."""

import contextlib
import gc
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence

import jax
import tqdm
from absl import app, flags

from zofl_jax.data import cache
from zofl_jax.engine.exhaustion import OutOfMemoryError
from zofl_jax.runs.directory import RunError

flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder for compiled functions, '' for none; by default zofl_jax in the user's cache folder.",
)

WIDTH = 88
"""Of help."""


class UserError(Exception):
    """The work can't be done as asked; the message is for the user and names the remedy."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns the library's complaints about its arguments into messages for the user."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error


def note(sentence: str) -> None:
    """Tells the user, above a progress bar if there is one."""
    tqdm.tqdm.write(f"note: {sentence}", file=sys.stderr)


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
            folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache.compiled()
        if not gc.get_freeze_count():
            gc.freeze()  # what was imported is no garbage, and need not be gone through again
        if folder:
            jax.config.update("jax_compilation_cache_dir", str(folder))
        try:
            main()
        except (RunError, UserError, OutOfMemoryError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print(f"\n{interrupted}", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    if any(argument in ("--help", "-help", "-h", "--helpshort") for argument in sys.argv[1:]):
        print(help_text(sys.modules[main.__module__].__doc__ or ""))
    else:
        app.run(checked)


def help_text(doc: str) -> str:
    """Returns the help of a command: what it does, its own flags, and the settings it takes."""
    settings = sys.modules.get(f"{__package__}.flags")  # only where the command takes them
    own = {
        flag.name: flag
        for module, listed in flags.FLAGS.flags_by_module_dict().items()
        if not module.startswith("absl") and module != getattr(settings, "__name__", None)
        for flag in listed
    }
    lines = [doc.strip(), "\nOf this command:"]
    for name in sorted(own):
        lines += described(name, own[name].help, own[name].default)
    if settings:
        lines.append(settings.help_of_settings())
    return "\n".join(lines)


def described(name: str, help: str, default: object, choices: Sequence[str] = ()) -> list[str]:
    """Returns the lines of help of one flag."""
    shown = "" if default in (None, "") else f" (default: {default})"
    text = f"{help} One of {', '.join(choices)}." if choices else help
    indent = " " * 6
    return [
        f"  --{name}{shown}",
        *textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent),
    ]
