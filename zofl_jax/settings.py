"""Settings: values with a default, a bound and a sentence of help, declared where they are read.

A group of settings is a frozen dataclass whose fields are made by `setting`:

    @dataclasses.dataclass(frozen=True)
    class Options:
        pool_size: int = setting(4096, "Seeds in the pool.", least=1)

Command-line flags, their help, the checks and a run's `flags.json` follow from the declaration.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Value = str | float | int | bool | None


class Setting(NamedTuple):
    """One setting.

    Attributes:
      name: of the field, and of the flag.
      default: its value unless a kind of task, a method or the user says otherwise; None where
        what is taken instead is found out from other settings.
      help: one sentence or two.
      kind: int, float, bool or str.
      choices: the values that it can have, if they are few.
      within: a bound in words, as "in [0, 1)", and whether a value is inside.
    """

    name: str
    default: Value
    help: str
    kind: type
    choices: tuple[str, ...] | None
    within: tuple[str, Callable[[Any], bool]] | None

    def checked(self, value: Any) -> Value:
        """Returns a value in the setting's own type.

        Raises:
          ValueError: if it is of another type, no choice, not finite, or out of bounds.

        >>> Setting("rank", 1, "", int, None, at_least(1)).checked(0)
        Traceback (most recent call last):
        ValueError: --rank must be >= 1, got 0
        """
        if value is None and self.default is None:
            return None
        if self.choices and value not in self.choices:
            raise ValueError(f"--{self.name} must be {' or '.join(self.choices)}, got {value!r}")
        value = self._typed(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{self.name} must be finite, got {value}")
        if self.within and not self.within[1](value):
            raise ValueError(f"--{self.name} must be {self.within[0]}, got {value}")
        return value

    def _typed(self, value: Any) -> Value:
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if self.kind is float and hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
            return float(value)  # a NumPy or JAX scalar
        if self.kind is str and hasattr(value, "__fspath__"):
            return str(value)
        if type(value) is not self.kind:
            names = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
            raise ValueError(f"--{self.name} must be {names[self.kind]}, got {value!r}")
        return typing.cast(Value, value)


def at_least(least: float) -> tuple[str, Callable[[Any], bool]]:
    """Returns the bound `>= least`, for `setting`."""
    return f">= {least:g}", lambda value: value >= least


def positive() -> tuple[str, Callable[[Any], bool]]:
    """Returns the bound `> 0`, for `setting`."""
    return "positive", lambda value: value > 0


def share(*, below_one: bool = False) -> tuple[str, Callable[[Any], bool]]:
    """Returns the bound [0, 1], or [0, 1) where one is too much, for `setting`."""
    if below_one:
        return "in [0, 1)", lambda value: 0 <= value < 1
    return "in [0, 1]", lambda value: 0 <= value <= 1


def setting(
    default: Value,
    help: str,
    *,
    choices: typing.Iterable[str] | None = None,
    within: tuple[str, Callable[[Any], bool]] | None = None,
    least: float | None = None,
) -> Any:
    """Returns the field of a group of settings.

    Args:
      default: see `Setting`.
      help: for people, ends with a full stop.
      choices: see `Setting`.
      within: see `Setting`.
      least: short for `within=at_least(least)`.
    """
    within = at_least(least) if least is not None else within
    chosen = None if choices is None else tuple(choices)
    metadata = {"help": help, "choices": chosen, "within": within}
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def settings_of(group: type) -> Mapping[str, Setting]:
    """Returns the settings that a group declares or inherits, by name.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Options:
    ...     pool_size: int = setting(4096, "Seeds in the pool.", least=1)
    >>> settings_of(Options)["pool_size"].default
    4096
    """
    hints = typing.get_type_hints(group)
    return types.MappingProxyType(
        {
            field.name: Setting(
                field.name,
                typing.cast(Value, field.default),
                kind=_kind(hints[field.name]),
                **field.metadata,
            )
            for field in dataclasses.fields(group)
            if "help" in field.metadata
        }
    )


def _kind(hint: Any) -> type:
    """Returns int for int, int | None and the like; str for Literals."""
    parts = [part for part in typing.get_args(hint) or (hint,) if part is not type(None)]
    return parts[0] if parts[0] in (int, float, bool) else str
