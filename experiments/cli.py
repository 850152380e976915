"""`zofl COMMAND`, the commands of an installed package.

    zofl train --task=digits --algorithm=decomfl
    zofl train --help

Each command is the module of its name beside this one.
"""

import ast
import runpy
import sys
from pathlib import Path

COMMANDS = (
    *("train", "compare", "replay", "evaluate", "export", "fetch"),
    *("launch_local", "plan", "theory"),
)


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print(overview())
    elif name in COMMANDS:
        sys.argv = [f"zofl {name}", *sys.argv[2:]]
        runpy.run_module(f"{__package__}.{name}", run_name="__main__", alter_sys=False)
    else:
        sys.exit(f"error: there is no command {name!r}; use one of {', '.join(COMMANDS)}")


def overview() -> str:
    """Returns a line for each command, the first of its module's docstring."""
    lines = ["zofl COMMAND [--help]", ""]
    for name in COMMANDS:
        text = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        first = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
        lines.append(f"  {name:<13} {first}")
    return "\n".join(lines)
