"""Takes the commands out of the pages, and has the entry points read their flags.

Run as a program it reads commands from standard input and says what is wrong with each; see
`complaints`.
"""

import argparse
import ast
import configparser
import contextlib
import functools
import io
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]

PROGRAMS = ("python", ".venv/bin/python", "make", "pip", "source", "cd", "git")
"""What a command of a page may start with."""

# Tells each command that a shell would run, the number of its words and the words, and runs none.
RECORDER = "record() { printf '%s\\0' $# \"$@\"; }\n" + "".join(
    f'function {name} {{ record {name} "$@"; }}\n' for name in PROGRAMS
)


class Command(NamedTuple):
    """The words of a command, and the page that it is on."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


FLAGFILES = ROOT / "experiments" / "flagfiles"


def markdown() -> list[Path]:
    """Returns the pages in Markdown that tell what to run."""
    named = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
    return [*(ROOT / name for name in named), *(ROOT / "docs").glob("*.md")]


def all_pages() -> list[Path]:
    """Returns all pages: Markdown, and modules and files of flags that say how to run them."""
    return [
        *markdown(),
        *sorted(FLAGFILES.glob("*.flags")),
        *sorted((ROOT / "experiments").glob("*.py")),
        *sorted((ROOT / "benchmarks").glob("*.py")),
    ]


def text_of(page: Path) -> str:
    """Returns what a page says: all of it, a module's docstring, a flagfile's remarks."""
    text = page.read_text()
    if page.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    if page.suffix == ".flags":
        remarks = [line[1:] for line in text.splitlines() if line.startswith("#")]
        return "\n".join(re.sub(r"^  +(?=\S)", "    ", line) for line in remarks)
    return text


def code_of(text: str) -> tuple[list[str], list[str]]:
    """Returns the blocks of a page that aren't in Python, and its code inside sentences."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
    blocks = [body for language, body in fence.findall(text) if language != "python"]
    text = fence.sub("", text)
    indented = re.compile(r"(?:^    .*\n?)+", re.M)
    blocks += [re.sub(r"^    ", "", b, flags=re.M) for b in indented.findall(text)]
    spans = re.findall(r"`([^`]+)`", indented.sub("", text))
    return blocks, [" ".join(span.split()) for span in spans]


def is_command(line: str) -> bool:
    """Returns whether a line starts as a command does."""
    return line.strip().startswith(tuple(f"{name} " for name in PROGRAMS))


@functools.cache
def commands() -> list[Command]:
    """Returns the commands of all pages, each once, as a shell takes them apart.

    Loops and variables are the shell's own. A word like RUN stands for the reader's own.
    """
    found: dict[Command, None] = {}
    for page in all_pages():
        blocks, spans = code_of(text_of(page))
        scripts = [b for b in blocks if any(map(is_command, b.splitlines()))]
        scripts += filter(is_command, spans)
        name = str(page.relative_to(ROOT))
        for words in _expanded("\n".join(scripts), name) if scripts else ():
            found[Command(name, tuple(words))] = None
    return list(found)


def _expanded(script: str, page: str) -> Iterator[list[str]]:
    ended = subprocess.run(
        ["bash", "-euc", f"PATH=\n{RECORDER}{script}"],
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise ValueError(f"{page}: the shell can't run its commands: {ended.stderr.strip()}")
    words = iter(ended.stdout.split("\0")[:-1])
    for count in words:
        yield list(itertools.islice(words, int(count)))


def flags_in_sentences() -> list[tuple[str, str]]:
    """Returns the flags that Markdown pages name, with the page: ("README.md", "--rank=1")."""
    found = {}
    for page in markdown():
        _, spans = code_of(page.read_text())
        for span in filter(lambda span: span.startswith("--"), spans):
            words = re.findall(r"--(?:[^\s']|'[^']*')+", span)
            found |= {(str(page.relative_to(ROOT)), word): None for word in words}
    return list(found)


def path_of(module: str) -> Path:
    """Returns where a module is, from the checkout's root."""
    return Path(*module.split(".")).with_suffix(".py")


def make_targets() -> set[str]:
    """Returns what make can be asked for."""
    rules = re.findall(r"^([a-z0-9_]+):", (ROOT / "Makefile").read_text(), re.M)
    return set(rules)


def setup_options() -> configparser.ConfigParser:
    """Returns what setup.cfg says."""
    read = configparser.ConfigParser()
    read.read(ROOT / "setup.cfg")
    return read


def complaint(words: Sequence[str]) -> str | None:
    """Returns what is wrong with a command, but for its module's flags, or None."""
    program, *rest = words
    if program == "python":
        path = path_of(rest[1]) if rest[0] == "-m" else Path(rest[0])
        given = (ROOT / path).is_file() or rest[1:2] == ["benchmarks.NAME"]
        return None if given else f"there is no {path}"
    if program == "make":
        targets = [word for word in rest if "=" not in word and not word.startswith("-")]
        unknown = set(targets) - make_targets()
        return f"the Makefile has no {', '.join(sorted(unknown))}" if unknown else None
    if program == "pip":
        match = re.fullmatch(r"install -e \.(?:\[([\w,]+)\])?", " ".join(rest))
        if not match:
            return "the package is on no index, so it's installed by pip install -e '.[EXTRA]'"
        named = set((match[1] or "").split(",")) - {""}
        unknown = named - set(setup_options()["options.extras_require"])
        return f"setup.cfg has no extra {', '.join(sorted(unknown))}" if unknown else None
    if program == "source":
        return None if rest == [".venv/bin/activate"] else "make makes .venv alone"
    return f"{program} is nothing that the pages' environments promise"


class _Read(BaseException):
    """An entry point has read its command line; what would follow is its work."""


class Answer(NamedTuple):
    """What an entry point says of a command line."""

    complaint: str | None
    taken: list[str]  # of the flags asked for, those that it takes


def answers(module_commands: list[list[str]], asked: list[str]) -> list[Answer]:
    """Returns what entry points say of their flags, without doing their work.

    Takes a process of its own, and for each module one forked from that, so that the heavy
    packages are imported once.

    Args:
      module_commands: of each command the words after `python -m`.
      asked: flags like "--rank" or "--rank=1", of which each entry point tells those it takes.
    """
    by_module: dict[str, list[list[str]]] = {}
    for module, *arguments in module_commands:
        by_module.setdefault(module, []).append(arguments)
    ended = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([by_module, asked]),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    told = {module: iter(each) for module, each in json.loads(ended.stdout).items()}
    return [Answer(*next(told[module])) for module, *_ in module_commands]


def _main() -> None:
    by_module, asked = json.load(sys.stdin)
    from experiments import entry  # noqa: F401
    from zofl_jax.engine import simulation  # noqa: F401  # and with them what takes long

    print(json.dumps({m: _forked(m, commands, asked) for m, commands in by_module.items()}))


def _forked(module: str, commands: list[list[str]], asked: list[str]) -> list[Answer]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            told = _answers(module, commands, asked)
        except BaseException as error:
            told = [_complains(error)] * len(commands)
        with os.fdopen(writing, "w") as out:
            json.dump(told, out)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answered:
        told = json.load(answered)
    os.waitpid(child, 0)
    return told


def _answers(module: str, commands: list[list[str]], asked: list[str]) -> list[Answer]:
    """Runs a module up to where it reads its command line, and there reads all of `commands`."""
    from absl import app, flags
    from absl.testing import flagsaver

    from experiments import entry

    if not re.search(r"[Pp]arser\(|\.run\(main", (ROOT / path_of(module)).read_text()):
        return [Answer("reads no command line" if each else None, []) for each in commands]
    parse_args = argparse.ArgumentParser.parse_args

    def read(*_: Any, **__: Any) -> None:
        app.define_help_flags()
        raise _Read([_quietly(lambda each=each: read_flags(each)) for each in commands])

    def read_flags(arguments: list[str]) -> Answer:
        with flagsaver.flagsaver():
            rest = flags.FLAGS([module, *arguments])[1:]
            if module == "experiments.launch_local":
                (answer,) = _forked("experiments.train", [rest], asked)
                return answer
            own = vars(sys.modules["__main__"])
            if rest:
                raise entry.UserError(f"unknown argument {rest[0]!r}")
            if "parse_methods" in own:
                own["parse_methods"](flags.FLAGS.method)
            elif "task" in flags.FLAGS:
                from experiments import flags as settings

                settings.config()
            return Answer(None, [flag for flag in asked if _takes(flags.FLAGS, flag)])

    def read_arguments(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        names = re.findall(r"--[\w-]+", parser.format_help())
        taken = [flag for flag in asked if flag.split("=")[0] in names]

        def read_each(arguments: list[str]) -> Answer:
            parse_args(parser, arguments)
            return Answer(None, taken)

        raise _Read([_quietly(lambda each=each: read_each(each)) for each in commands])

    argparse.ArgumentParser.parse_args = read_arguments  # type: ignore[assignment]
    entry.run = app.run = read  # type: ignore[assignment]
    sys.argv = [module]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except _Read as end:
        return end.args[0]
    raise AssertionError(f"{module} did not read its command line")


def _quietly(read: Callable[[], Answer]) -> Answer:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return read()
    except SystemExit:  # --help ends so without a word to stderr
        return Answer(said.getvalue().strip() or None, [])
    except Exception as error:
        return _complains(error)


def _complains(error: BaseException) -> Answer:
    return Answer(f"{type(error).__name__}: {error}", [])


def _takes(defined: Any, flag: str) -> bool:
    """Returns whether a flag is defined, and can have its value, if one is named."""
    name, equals, value = flag.removeprefix("--").partition("=")
    if not equals:
        return name in defined or name.removeprefix("no") in defined
    if name not in defined:
        return False
    if not re.fullmatch(r"[A-Z_:]+", value):  # for the reader to fill in
        try:
            defined[name].parse(value.strip("'"))
        except ValueError:
            return False
    return True


if __name__ == "__main__":
    _main()
