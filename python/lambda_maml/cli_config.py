"""`--config FILE.toml` of every command: options by their long names, in one table for each command."""

from __future__ import annotations

import difflib
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .cli_types import PLACE
from .extras import wanted

__all__ = ["with_config"]

_MOST_BYTES = 1 << 20
_OWN = ("config", "print_config")  # options of a command that no file gives


def with_config(command: click.Command, group: click.Group) -> click.Command:
    """A command of a group with `--config` and `--print-config`. What the command line says wins over the file."""
    command.params += [
        click.Option(
            ["--config"], type=PLACE, is_eager=True, expose_value=False, metavar="FILE.toml",
            callback=functools.partial(_take, group),
            help=f"Take options from the table [{command.name}] of this file; what is given here wins.",
        ),
        click.Option(
            ["--print-config"], is_flag=True, expose_value=False, callback=_remember,
            help="Print the options that would hold, as such a file, and end.",
        ),
    ]  # fmt: skip
    command.callback = _or_printed(command.callback)
    return command


def _take(group: click.Group, ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """The file's values become the command's defaults. All of the file is checked, other commands' tables too."""
    if path is None:
        return
    tables = {}
    for name, table in _read(path).items():
        if name not in group.commands:
            near = _near(name, group.commands)
            raise ValueError(f"{path}: {name}: no command has this name{near}: tables are {', '.join(group.commands)}")
        if not isinstance(table, Mapping):
            raise ValueError(f"{path}: {name} is {_shown(table)}, expected a table: write [{name}] above its options")
        tables[name] = _values(path, name, group.commands[name], table)
    ctx.default_map = tables.get(str(ctx.command.name), {})


def _read(path: Path) -> dict[str, Any]:
    """What a TOML file holds. Raises ValueError with the place of a fault, OSError where it cannot be read."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no file: --config takes a TOML file")
    if path.exists() and path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path}: has {path.stat().st_size} bytes, options take at most {_MOST_BYTES}")
    with wanted("cli", "--config below Python 3.11"):
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return found
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a TOML file (byte {error.start} is not UTF-8)") from error
    except (ValueError, RecursionError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: not a TOML file ({told}): text stands in quotes, lists in brackets") from error


def _values(path: Path, name: str, command: click.Command, table: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of the command's parameters. Raises ValueError for a key or a value that it does not take."""
    options = {_key(option): option for option in command.params if isinstance(option, click.Option)}
    options = {key: option for key, option in options.items() if option.name not in _OWN}
    found = {}
    for key, value in table.items():
        option = options.get(key)
        if option is None:
            raise ValueError(f"{path}: {name}.{key}: {_unknown(key, command, options)}")
        expected = _expected(option)
        if not _is(option, value):
            raise ValueError(f"{path}: {name}.{key} is {_shown(value)}, expected {expected}")
        try:
            option.type_cast_value(click.Context(command), value)
        except click.BadParameter as error:
            told = error.message.rstrip(".")
            raise ValueError(f"{path}: {name}.{key} is {_shown(value)}: {told}; expected {expected}") from error
        found[str(option.name)] = value
    return found


def _key(option: click.Option) -> str:
    """What the file calls an option: its first long name."""
    return next(name for name in option.opts if name.startswith("--"))[2:]


def _unknown(key: str, command: click.Command, options: Mapping[str, click.Option]) -> str:
    for right, option in options.items():
        if f"--{key}" in option.secondary_opts:
            return f"write {right} = false"
    for argument in command.params:
        if isinstance(argument, click.Argument) and key == argument.name:
            return f"it is no option: give {argument.make_metavar(click.Context(command))} on the command line"
    told = f"{_near(key.replace('_', '-'), options)}: --help lists its options"
    return f"{command.name} has no such option{told}"


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _kind(option: click.Option) -> tuple[tuple[type, ...], str]:
    """The types that TOML has for an option's value, and their word."""
    kind = option.type
    if option.is_flag:
        return (bool,), "true or false"
    if isinstance(kind, click.Choice):
        return (str,), f"one of {', '.join(map(json.dumps, kind.choices))}"
    if isinstance(kind, (click.types.IntParamType, click.types.FloatParamType)):
        whole = isinstance(kind, click.types.IntParamType)
        types: tuple[type, ...] = (int,) if whole else (int, float)
        return types, f"a {'whole ' if whole else ''}number{_limits(kind)}"
    return (str,), "text in quotes"


def _limits(kind: click.ParamType) -> str:
    if not isinstance(kind, (click.IntRange, click.FloatRange)):
        return ""
    least = "" if kind.min is None else f"{' above' if kind.min_open else ' from'} {kind.min:g}"
    most = "" if kind.max is None else f"{' below' if kind.max_open else ' to'} {kind.max:g}"
    return least + most


def _expected(option: click.Option) -> str:
    if isinstance(option.type, click.Tuple):
        return f"a list of {option.nargs} numbers"
    word = _kind(option)[1]
    return f"a list of {word}" if option.multiple else word


def _is(option: click.Option, value: Any) -> bool:
    """Whether a value has the type that the command line would give it."""
    if isinstance(option.type, click.Tuple):
        return isinstance(value, list) and len(value) == option.nargs and all(type(v) in (int, float) for v in value)
    types = _kind(option)[0]
    if option.multiple:
        return isinstance(value, list) and all(type(v) in types for v in value)
    return type(value) in types


def _shown(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 60 else f"{told[:60]}..."


def _remember(ctx: click.Context, _: click.Parameter, wish: bool) -> None:
    ctx.meta[__name__] = wish


def _or_printed(callback: Any) -> Any:
    """The callback, or with `--print-config` its options as TOML."""

    @functools.wraps(callback)
    def either(*args: Any, **options: Any) -> Any:
        ctx = click.get_current_context()
        if ctx.meta.get(__name__):
            click.echo(_toml(ctx))
            return None
        return callback(*args, **options)

    return either


def _toml(ctx: click.Context) -> str:
    """The options of a command that have a value."""
    lines = [f"[{ctx.command.name}]"]
    for param in ctx.command.params:
        value = ctx.params.get(str(param.name))
        if isinstance(param, click.Option) and param.name not in _OWN and value is not None:
            lines.append(f"{_key(param)} = {_written(value)}")
    return "\n".join(lines)


def _written(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
