"""Read a command's configuration from recipes and flags with jsonargparse, and end commands with one sentence.

jsonargparse checks and converts the values. What it lacks is done here, before it sees anything: unknown keys are
answered with the nearest right one, ``-`` and ``_`` read the same, a list takes several values after its flag, recipes
are found by name, null is refused where the type has none, and no usage dump hides the message.
"""

import copy
import dataclasses
import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from megaprot.common.config_help import help_text
from megaprot.common.config_keys import (
    REQUIRED,
    ConfigKey,
    config_fields,
    config_keys,
    holds_misplaced_text,
    nearest,
    nested,
    same_name,
    section_names,
    takes_text,
)
from megaprot.common.config_yaml import load_yaml, parse_yaml_value, values_to_yaml
from megaprot.common.errors import InputError, MegaprotError

if TYPE_CHECKING:  # imported when used: `megaprot --help` does without
    from jsonargparse import ArgumentParser

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class _Given:
    """A value as given, and where: ``value`` is plain data, ``source`` a file's name or the flag."""

    value: Any
    source: str


def parse_config(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    program: str,
    description: str,
    recipes: Path | None = None,
) -> Config:
    """Return an instance of the dataclass tree ``config_class``, made from its defaults, recipes and flags.

    ``--config`` takes a YAML file or the name of a file in the folder ``recipes`` (without ``.yaml``); several merge in
    order, key by key. Flags (``--model.hidden_size 640``) win over every ``--config``, wherever they stand; a repeated
    flag wins over the earlier one, but of a list key adds to it. A flag of a true-or-false key alone means true.
    ``--help`` and ``--print_config`` print and raise SystemExit(0). Raises InputError, one sentence, for an unknown
    key, a value of the wrong type, a missing file or recipe, or a required key that is not given.
    """
    keys = config_keys(config_class)
    flags = _split_flags(argv)
    if any(name == "help" for name, _ in flags):
        print(help_text(config_class, program, description, list(_shipped(recipes))), end="")
        raise SystemExit(0)
    given: dict[str, _Given] = {}
    for name, texts in flags:
        if name == "config":
            for text in texts or [""]:
                given |= _read_recipe(_find_recipe(text, recipes), keys)
    given |= _read_flags([flag for flag in flags if flag[0] not in ("config", "print_config")], keys)
    print_only = any(name == "print_config" for name, _ in flags)
    values = _checked_values(given, keys, allow_missing=print_only)
    if print_only:
        print(values_to_yaml(values), end="")
        raise SystemExit(0)
    return _instantiate(config_class, values)


def run_command(program: str, function: Callable[[], None]) -> int:
    """Call ``function`` and return the process's exit status: 0, or that of the error it ended with.

    An InputError or RunError becomes the line ``PROGRAM: error: SENTENCE`` on standard error; Ctrl-C returns 130. Among
    several processes (RANK set) wrong input is the same everywhere, so it is said once a node; a rank's own failure
    is said by that rank. Any other exception is a defect of Megaprot and keeps its traceback.
    """
    rank, local_rank = os.environ.get("RANK"), os.environ.get("LOCAL_RANK")
    try:
        function()
    except MegaprotError as error:
        if rank is None or rank == "0":
            print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        elif local_rank == "0" or not isinstance(error, InputError):
            print(f"{program}: error: {error} (rank {rank} on {socket.gethostname()})", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def run_command_module(program: str, module: ModuleType, argv: Sequence[str]) -> int:
    """Run a command module on its arguments and return the exit status, as :func:`run_command` does.

    Such a module has ``CONFIG`` (a dataclass), ``run(config)`` and, if it ships recipes, ``RECIPES`` (their folder);
    the first line of its docstring describes the command.
    """
    description = (module.__doc__ or "").strip().split("\n")[0]

    def parse_and_run() -> None:
        recipes = getattr(module, "RECIPES", None)
        module.run(parse_config(module.CONFIG, argv, program=program, description=description, recipes=recipes))

    return run_command(program, parse_and_run)


def _split_flags(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Split ``--name value ...`` and ``--name=value`` into (name as declared, values), in order."""
    flags: list[tuple[str, list[str]]] = []
    for token in argv:
        if not _is_unicode(token):
            raise InputError(f"the argument {token!a} is no UTF-8 text, which all that is written is: rename it")
        if token == "-h":
            flags.append(("help", []))
        elif re.match(r"--[^\s=]", token):
            name, equals, value = token[2:].partition("=")
            flags.append((same_name(name), [value] if equals else []))
        elif re.match(r"-[A-Za-z]", token):
            raise InputError(f"unknown flag {token!r}; flags start with two dashes, and --help lists them")
        elif flags and flags[-1][0] not in ("help", "print_config"):
            flags[-1][1].append(token)
        else:
            raise InputError(f"unexpected argument {token!r}; every value follows a flag, and --help lists the flags")
    return flags


def _is_unicode(text: str) -> bool:
    """Tell whether an argument, of whose bytes Python makes surrogates where they are no UTF-8, can be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_flags(flags: list[tuple[str, list[str]]], keys: dict[str, ConfigKey]) -> dict[str, _Given]:
    """Return {key: value given} of the flags; raises InputError for an unknown key or a wrong number of values."""
    given: dict[str, _Given] = {}
    for name, texts in flags:
        if name not in keys:
            if name in section_names(keys):
                inner = next(key for key in keys if key.startswith(f"{name}."))
                raise InputError(f"--{name} is a section, not a key; give its keys, such as --{inner}")
            best = nearest(name, [*keys, "config", "print_config", "help"])
            raise InputError(f"unknown flag --{name}; did you mean --{best}? (--help lists all)")
        key = keys[name]
        if key.item_type is not None:
            value = _read_items(key, texts)
            earlier = given.get(name)
            if earlier is not None and isinstance(earlier.value, list) and isinstance(value, list):
                value = earlier.value + value
        elif not texts and bool in key.alternatives:
            value = True
        elif len(texts) == 1:
            value = _read_text(texts[0], key.type)
        else:
            got = "got none" if not texts else "got " + ", ".join(repr(text) for text in texts)
            raise InputError(f"--{name} takes one value ({key.expected}), but {got}")
        given[name] = _Given(value, f"--{name}")
    return given


def _read_items(key: ConfigKey, texts: list[str]) -> Any:
    """Return the items of a list key: ``a b c``, or one YAML list ``[a, b, c]``, or null where the type has it."""
    if not texts:
        raise InputError(f"--{key.name} takes one or more values ({key.expected}), but got none")
    if len(texts) == 1 and (texts[0].startswith("[") or (key.optional and texts[0] == "null")):
        return parse_yaml_value(texts[0])
    return [_read_text(text, key.item_type) for text in texts]


def _read_text(text: str, value_type: Any) -> Any:
    """Return the plain value a flag's text stands for; text types take it as it is (null where the type has it)."""
    if takes_text(value_type):
        return None if text == "null" and ConfigKey("", value_type, REQUIRED).optional else text
    return parse_yaml_value(text)


def _shipped(recipes: Path | None) -> dict[str, Path]:
    """Return {name: file} of the recipes in a folder, by name."""
    return {path.stem: path for path in sorted(recipes.glob("*.yaml"))} if recipes else {}


def _find_recipe(name: str, recipes: Path | None) -> Path:
    """Return the file ``--config NAME`` means: a shipped recipe's name first, then a path."""
    shipped = _shipped(recipes)
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file():
        return path
    if not name:
        problem = "--config takes a file or a recipe's name, but got none"
    elif path.is_dir():
        problem = f"--config {name} is a folder, not a YAML file"
    else:
        problem = f"there is no file {name!r} for --config" + (" and no recipe of that name" if recipes else "")
    if not shipped:
        raise InputError(f"{problem}; give the path of a YAML file")
    hint = f"did you mean {nearest(path.stem, shipped)}? " if path.stem else ""
    raise InputError(f"{problem}; {hint}(recipes: {', '.join(shipped)})")


def _read_recipe(path: Path, keys: dict[str, ConfigKey]) -> dict[str, _Given]:
    """Return {key: value given} of a YAML file; raises InputError for what is not a key of the configuration."""
    data = load_yaml(path)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no 'key: value' lines at its top; write a recipe as a YAML mapping")
    given: dict[str, _Given] = {}
    sections = section_names(keys)

    def flatten(mapping: dict[Any, Any], prefix: str) -> None:
        for part, value in mapping.items():
            name = prefix + same_name(str(part))
            if name in keys:
                given[name] = _Given(value, str(path))
            elif name not in sections:
                raise InputError(f"unknown key {name!r} in {path}; did you mean {nearest(name, [*keys, *sections])!r}?")
            elif isinstance(value, dict):
                flatten(value, name + ".")
            elif value is not None:  # an empty section is an empty mapping
                raise InputError(f"{name!r} in {path} is a section; write its keys below it, not the value {value!r}")

    flatten(data, "")
    return given


def _checked_values(given: dict[str, _Given], keys: dict[str, ConfigKey], allow_missing: bool) -> dict[str, Any]:
    """Return {key: value} of all keys, defaults included, each of its declared type by jsonargparse's check."""
    from jsonargparse import ArgumentError

    missing = [key for key in keys.values() if key.default is REQUIRED and key.name not in given]
    if missing and not allow_missing:
        raise InputError(f"--{missing[0].name} is required ({missing[0].expected}); give it as a flag or in --config")
    # jsonargparse lets null pass anywhere, reads quoted text as numbers, and a list key's text as a file of items
    for name, entry in given.items():
        if holds_misplaced_text(entry.value, keys[name].type) or (entry.value is None and not keys[name].optional):
            raise _wrong_type(keys[name], entry)
    try:
        # a copy: jsonargparse converts lists in place, and messages quote what was given
        checked = _build_parser(keys).parse_object(nested({n: copy.deepcopy(e.value) for n, e in given.items()}))
    except ArgumentError as error:
        match = re.search(r'Parser key "([^"]+)"', str(error))
        if match is None or match[1] not in given:
            raise InputError(" ".join(str(error).split())) from error
        raise _wrong_type(keys[match[1]], given[match[1]]) from error
    return {name: checked[name] for name in keys}


def _wrong_type(key: ConfigKey, entry: _Given) -> InputError:
    """Return the error for a value that is not of the key's type."""
    name = f"--{key.name}" if entry.source.startswith("--") else f"{key.name!r} in {entry.source}"
    as_yaml = "null" if entry.value is None else str(entry.value).lower()
    shown = as_yaml if entry.value is None or isinstance(entry.value, bool) else repr(entry.value)
    return InputError(f"{name} must be {key.expected}, but got {shown}")


def _instantiate(config_class: type[Config], values: dict[str, Any], prefix: str = "") -> Config:
    """Build the dataclass tree from checked values."""
    arguments = {}
    for name, hint, _ in config_fields(config_class):
        nested = dataclasses.is_dataclass(hint)
        arguments[name] = _instantiate(hint, values, f"{prefix}{name}.") if nested else values[prefix + name]
    return config_class(**arguments)


def _build_parser(keys: dict[str, ConfigKey]) -> "ArgumentParser":
    """Return the jsonargparse parser that checks types, with one argument a key."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, default_env=False)
    for key in keys.values():
        default = {} if key.default is REQUIRED else {"default": key.default}
        parser.add_argument(f"--{key.name}", type=key.type, **default)
    return parser
