"""A parser of the commands' arguments, from YAML files and the command line."""

import argparse
import difflib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging

from ..compat import ShortHelpFormatter, actions_of

TRUTH_VALUES = {"yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"}  # what HfArgumentParser reads as one

logger = logging.get_logger(__name__)


class HelpFormatter(ShortHelpFormatter):
    """Show HfArgumentParser's arguments.

    Its flags convert by a function of their own.
    """

    flag_types = (bool, string_to_bool)


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    positionals: Mapping[str, dict[str, Any]] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Read `POSITIONAL... [FILE.yaml] [--argument value ...]`.

    Arguments win over the file, and the file wins over the defaults. The file may stand anywhere among them. An
    argument that a dataclass names among its `_former_names` is read under its new name, with a warning.

    Args:
        dataclass_types: one instance of each is returned, in this order.
        argv: default: the command line.
        prog: the command's name in messages. Default: the script's.
        positionals: names of positional arguments and argparse's keywords for each. If a dataclass has a field of that
            name, the field holds it; the others are in a namespace that is returned last.
        description: of the command, for `--help`.

    Raises:
        SystemExit: with a message, as argparse does, for a file that is missing or no mapping, for an unknown key (the
            message names the nearest known one) and for everything that the dataclasses refuse.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    positionals = positionals or {}
    shown = (f"{name.upper()} ..." if "nargs" in given else name.upper() for name, given in positionals.items())
    usage = " ".join(("%(prog)s", *shown, "[FILE.yaml] [--argument value ...]"))
    parser = HfArgumentParser(
        cast(Any, dataclass_types), prog=prog, usage=usage, description=description, formatter_class=HelpFormatter
    )
    # Show an argument that is positional here once, as such.
    for action in actions_of(parser):
        if action.dest in positionals:
            action.help = argparse.SUPPRESS
    for name, keywords in positionals.items():
        parser.add_argument(name, **keywords)
    former_names = {old: new for of in dataclass_types for old, new in getattr(of, "_former_names", {}).items()}
    argv = [_with_new_name(argument, former_names) for argument in argv]
    # A YAML file's values become the defaults.
    path, argv = _take_file(parser, argv)
    if path is not None:
        values = _read_file(parser, path, former_names)
        actions = {action.dest: action for action in actions_of(parser) if action.dest != "help"}
        for name, value in values.items():
            if name not in actions:
                nearest = difflib.get_close_matches(str(name), actions, n=1)
                parser.error(f"{path}: {name} is no argument." + (f" Did you mean {nearest[0]}?" if nearest else ""))
            actions[name].required = False
            # argparse converts a default that is a string like an argument. So a number is checked too.
            if isinstance(value, dict) or (isinstance(value, list) and actions[name].nargs is None):
                values[name] = json.dumps(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                values[name] = str(value)
        parser.set_defaults(**values)
    # Refuse what is unknown before anything is converted.
    argv = _with_positionals_first(parser, _with_flags_set(parser, argv))
    _, unknown = parser.parse_known_args(argv)
    for name in unknown:
        options = [option for action in actions_of(parser) for option in action.option_strings]
        nearest = difflib.get_close_matches(name.split("=")[0], options, n=1)
        parser.error(f"{name} is no argument." + (f" Did you mean {nearest[0]}?" if nearest else ""))
    try:
        return parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))


def _with_new_name(argument: str, former_names: Mapping[str, str]) -> str:
    """Translate an argument's former name, with a warning."""
    name, equals, value = argument.partition("=")
    old = name.removeprefix("--").replace("-", "_")
    if not name.startswith("--") or old not in former_names:
        return argument
    _warn_of_former_name(name, f"--{former_names[old]}")
    return f"--{former_names[old]}{equals}{value}"


def _warn_of_former_name(old: str, new: str) -> None:
    logger.warning(f"{old} is now called {new}. The old name still works; it will go with version 1.")


def _take_file(parser: HfArgumentParser, argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Take the YAML file out of the arguments.

    It is the one that is no other argument's value.
    """
    no_value = {option for action in actions_of(parser) if _is_flag(action) for option in action.option_strings}
    files: list[str] = []
    others: list[str] = []
    is_value = False
    for argument in argv:
        is_file = argument.endswith((".yaml", ".yml")) and not argument.startswith("-") and not is_value
        (files if is_file else others).append(argument)
        is_value = argument.startswith("--") and "=" not in argument and argument not in no_value
    if len(files) > 1:
        parser.error(f"{' and '.join(files)} are several files of arguments: give one.")
    return Path(files[0]) if files else None, others


def _read_file(parser: HfArgumentParser, path: Path, former_names: Mapping[str, str]) -> dict[str, Any]:
    """Read a YAML file's values, under present names."""
    if not path.is_file():
        parser.error(f"{path} does not exist.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"{path} can't be read as YAML: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"{path} must hold 'argument: value' lines.")
    for old in former_names.keys() & values.keys():
        _warn_of_former_name(f"{path}: {old}", former_names[old])
    return {former_names.get(name, name): value for name, value in values.items()}


def _is_flag(action: argparse.Action) -> bool:
    """Say whether an argument needs no value."""
    return action.type is string_to_bool or action.nargs == 0


def _with_flags_set(parser: HfArgumentParser, argv: Sequence[str]) -> list[str]:
    """Read `--json` as `--json true`, whatever comes after it.

    HfArgumentParser would take a positional argument for the flag's value.
    """
    flags = [action for action in actions_of(parser) if action.type is string_to_bool]
    options = {option for action in flags for option in action.option_strings}
    result: list[str] = []
    for argument, following in zip_longest(argv, argv[1:], fillvalue=""):
        result.append(argument)
        if argument in options and following.lower() not in TRUTH_VALUES:
            result.append("true")
    return result


def _with_positionals_first(parser: HfArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put positional arguments before all options.

    argparse would give each that takes any number what stands before the first option, and refuse the others.
    """
    takes = {option: action.nargs for action in actions_of(parser) for option in action.option_strings}
    first: list[str] = []
    others: list[str] = []
    values: int | float = 0  # that the last option takes yet
    for place, argument in enumerate(argv):
        if argument == "--":
            return [*others, "--", *first, *argv[place + 1 :]]
        if argument.startswith("-") and argument.partition("=")[0] in takes:
            nargs = takes[argument.partition("=")[0]]
            values = 0 if "=" in argument else math.inf if nargs in ("*", "+") else 1 if nargs in (None, "?") else 0
            others.append(argument)
        elif values:
            values -= 1
            others.append(argument)
        else:
            first.append(argument)
    return [*first, *others]
