"""The text of ``--help`` for a configuration class: every key with its type, default and docstring."""

import dataclasses
import shutil
import textwrap
import typing
from typing import Any

from megaprot.common.config_keys import REQUIRED, ConfigKey, config_fields, config_keys
from megaprot.common.config_yaml import values_to_yaml

_GENERAL = """\
usage: {program} [--config NAME_OR_FILE ...] [--KEY VALUE ...]

{description}

  --config NAME_OR_FILE ...
      A YAML file{recipes}; several merge in order, and flags win over all of them.
  --print_config
      Print the configuration that would be used, as YAML, and stop.
  -h, --help
      Show this text and stop.
"""


def help_text(config_class: type, program: str, description: str, recipe_names: typing.Sequence[str]) -> str:
    """Return the help of a command: usage, description, then one section a dataclass of the tree.

    A key's text is its attribute docstring or its line under ``Attributes:`` or ``Args:`` in the class docstring.
    """
    recipes = f" or a recipe ({', '.join(recipe_names)})" if recipe_names else ""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    general = _GENERAL.format(program=program, description=description, recipes=recipes)
    lines = [_wrap(line, width) for line in general.splitlines()]
    _add_section(lines, config_class, config_keys(config_class), "", width)
    return "\n".join(lines) + "\n"


def _add_section(lines: list[str], config_class: type, keys: dict[str, ConfigKey], prefix: str, width: int) -> None:
    """Append the class's own keys under its docstring's first line, then its sections'."""
    from docstring_parser import parse_from_object

    docstring = parse_from_object(config_class)
    texts = {parameter.arg_name: parameter.description or "" for parameter in docstring.params}
    sections = []
    lines += ["", _wrap((docstring.short_description or config_class.__name__).rstrip(".:") + ":", width)]
    for name, hint, _ in config_fields(config_class):
        if dataclasses.is_dataclass(hint):
            sections.append((typing.cast(type, hint), f"{prefix}{name}."))
            continue
        key = keys[prefix + name]
        lines.append(f"  --{key.name} VALUE" + (" ..." if key.item_type else ""))
        text = " ".join([*texts.get(name, "").split(), f"({key.expected}; {_default_text(key.default)})"])
        lines.append(_wrap("      " + text, width))
    for section, inner in sections:
        _add_section(lines, section, keys, inner, width)


def _default_text(default: Any) -> str:
    """Say what the key is when not given."""
    if default is REQUIRED:
        return "required"
    return " ".join(values_to_yaml({"default": default}).split())


def _wrap(line: str, width: int) -> str:
    """Wrap one line at ``width`` columns, following lines indented like the first."""
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(line.strip(), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
