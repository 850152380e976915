"""What the reference shows of the sources as they are: doctests as code, comments of fields."""

import re
from typing import Any

import griffe

COMMENT = re.compile(r"  # (?!noqa|type:|fmt:)(\S.*)$")


class Sources(griffe.Extension):
    """Changes what is found in the sources before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Puts fences around doctests, and takes the comment behind a field as its docstring."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
        elif isinstance(obj, griffe.Attribute) and obj.lines:
            comment = COMMENT.search(obj.lines[-1])
            if comment:
                obj.docstring = griffe.Docstring(comment[1], lineno=obj.endlineno, parent=obj)


def fenced(text: str) -> str:
    r"""Returns a docstring with fences around its doctests: from `>>>` to the next empty line.

    >>> fenced("One.\n\n>>> 1 + 1\n2\n").splitlines()
    ['One.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if not inside and line.startswith(">>>"):
            lines.append("```pycon")
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)
