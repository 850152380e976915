"""The settings of a run as command-line flags, for the entry points that import this module.

Flags and their help are those of `zofl_jax.configuration.config` and of the methods.
`config()` is where they end: nothing below an entry point reads a flag.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from absl import flags

from zofl_jax.algorithms import METHODS
from zofl_jax.configuration.config import GROUPS, Config, everything, general
from zofl_jax.configuration.kinds import KINDS
from zofl_jax.configuration.resolve import resolve
from zofl_jax.settings import Setting, settings_of

from .entry import described, user_errors

FLAGS = flags.FLAGS


_DEFINE: dict[Any, Callable[..., Any]] = {
    "choices": flags.DEFINE_enum,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    str: flags.DEFINE_string,
}


class LineError(Exception):
    """The flags of a method in a comparison can't be read."""


def define(flag_values: flags.FlagValues) -> None:
    """Defines a flag for each setting."""
    for setting in everything().values():
        common: dict[str, Any] = {"flag_values": flag_values}
        help = f"{setting.help}{_defaults(setting)}"
        if setting.choices:
            common["enum_values"] = setting.choices
        _DEFINE["choices" if setting.choices else setting.kind](
            setting.name, setting.default, help=help, **common
        )


def given(flag_values: flags.FlagValues = FLAGS) -> dict[str, Any]:
    """Returns the values of those flags of settings that differ from their own defaults."""
    return {
        name: flag_values[name].value
        for name in everything()
        if not flag_values[name].using_default_value
    }


@user_errors()
def config() -> Config:
    """Returns the config of this process's flags.

    Raises:
      UserError: for flags that no check of a single one can find wrong.
    """
    return resolve(given())


def parse(tokens: Sequence[str]) -> dict[str, Any]:
    """Returns the settings that a line gives, apart from this process's flags.

    Args:
      tokens: as on a command line.

    Raises:
      LineError: for what is no flag of a setting, or no value of one.
    """
    own = flags.FlagValues()
    define(own)
    try:
        rest = own(["method", *tokens])[1:]
    except flags.Error as error:
        name: str | None = getattr(error, "flagname", None)  # of one that is unknown
        outside = f"--{name} is no flag of a single method; give it outside"
        raise LineError(outside if name and name in FLAGS else str(error)) from None
    if rest:
        raise LineError(f"{rest[0]} is no flag of a single method; give it outside")
    return {name: own[name].value for name in everything() if own[name].present}


@user_errors()
def config_of_method(tokens: Sequence[str]) -> Config:
    """Returns the config of a method in a comparison, which shares this process's flags.

    Args:
      tokens: its own flags, as on a command line.

    Raises:
      LineError: for flags that can't be read, or are none of a single method.
      UserError: for flags that don't go together.
    """
    own = parse(tokens)
    if "seed" in own:
        raise LineError("--seed is no flag of a single method; give it outside")
    shared = {name: value for name, value in given().items() if name not in own}
    return resolve({**shared, **own}, shared=shared)


def help_of_settings() -> str:
    """Returns the help of all settings, in groups."""
    lines = []
    for title, settings in _groups():
        lines.append(f"\n{title}:")
        for setting in settings:
            help = setting.help + _defaults(setting)
            lines += described(setting.name, help, setting.default, setting.choices or ())
    return "\n".join(lines)


def _groups() -> Iterator[tuple[str, Collection[Setting]]]:
    for group in GROUPS:
        yield (group.__doc__ or group.__name__).strip(" .\n"), settings_of(group).values()
    seen: set[str] = set(general())
    for method in METHODS.values():
        own = [setting for name, setting in settings_of(method.options).items() if name not in seen]
        readers = [
            m.name for m in METHODS.values() if own and own[0].name in settings_of(m.options)
        ]
        seen |= {setting.name for setting in own}
        if own:
            yield f"Of {', '.join(readers)} alone", own


def _defaults(setting: Setting) -> str:
    """Returns the defaults of a setting by method and kind of task, for its help."""
    found: dict[Any, list[str]] = {}
    for kind in KINDS.values():
        if setting.name in kind.defaults:
            found.setdefault(kind.defaults[setting.name], []).append(kind.name)
    for method in METHODS.values():
        if setting.name in method.fixed:
            found.setdefault(f"always {method.fixed[setting.name]}", []).append(method.name)
        elif setting.name in method.defaults:
            found.setdefault(method.defaults[setting.name], []).append(method.name)
    if not found:
        return ""
    parts = [f"{', '.join(names)}: {value}" for value, names in found.items()]
    return f" Unless given, {'; '.join(parts)}."


define(FLAGS)
