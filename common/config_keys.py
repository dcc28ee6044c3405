"""What a configuration class offers: its dotted keys, their types in words, and the nearest one to a name.

A configuration is a tree of dataclasses; each leaf field is one key, written ``model.hidden_size`` in messages, nested
in YAML, and ``--model.hidden_size`` (or ``--model.hidden-size``) on the command line. Only the standard library is
imported.
"""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

REQUIRED = dataclasses.MISSING
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}


@dataclasses.dataclass(frozen=True)
class ConfigKey:
    """One leaf of a configuration tree: dotted ``name``, declared ``type``, ``default`` (REQUIRED if it has none)."""

    name: str
    type: Any
    default: Any

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The types the value may have: the members of a union, or the type alone."""
        return _members(self.type)

    @property
    def optional(self) -> bool:
        """Whether null is a value of this key."""
        return type(None) in self.alternatives

    @property
    def item_type(self) -> Any:
        """The type of one item when the key holds a list or a tuple, else None."""
        for member in self.alternatives:
            if typing.get_origin(member) in (list, tuple):
                return typing.get_args(member)[0]
        return None

    @property
    def expected(self) -> str:
        """The type in words, as used in error messages: ``a whole number``, ``one of random, family``."""
        return " or ".join(_in_words(member) for member in self.alternatives)


def config_keys(config_class: type, prefix: str = "", defaults: Any = None) -> dict[str, ConfigKey]:
    """Return {dotted name: ConfigKey} of every leaf of the dataclass tree, in the order written.

    ``defaults`` is an instance to take the defaults from, as a section's ``default_factory`` may change some.
    """
    keys: dict[str, ConfigKey] = {}
    for name, hint, declared in config_fields(config_class):
        default = declared if defaults is None else getattr(defaults, name)
        if dataclasses.is_dataclass(hint):
            keys |= config_keys(typing.cast(type, hint), f"{prefix}{name}.", None if default is REQUIRED else default)
        else:
            keys[prefix + name] = ConfigKey(prefix + name, hint, default)
    return keys


def config_fields(config_class: type) -> list[tuple[str, Any, Any]]:
    """Return (name, resolved type, default or REQUIRED) of each field that the constructor takes."""
    hints = typing.get_type_hints(config_class)
    found = []
    for field in dataclasses.fields(config_class):
        if field.init:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            found.append((field.name, hints[field.name], default))
    return found


def section_names(keys: typing.Iterable[str]) -> set[str]:
    """Return the names that hold keys: ``model`` of ``model.hidden_size``."""
    parts = [name.split(".") for name in keys]
    return {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Return {dotted key: value} as nested mappings, sections in the order they come."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        level = tree
        for section in sections:
            level = level.setdefault(section, {})
        level[last] = value
    return tree


def same_name(name: str) -> str:
    """Return a key as declared: ``num-layers`` and ``num_layers`` are one key."""
    return name.replace("-", "_")


def takes_text(value_type: Any) -> bool:
    """Whether a value of this type is the text itself, not to be read as YAML (str, paths, literals of strings)."""
    members = [member for member in _members(value_type) if member is not type(None)]
    return all(
        member in (str, Path)
        or (typing.get_origin(member) is typing.Literal and all(isinstance(a, str) for a in typing.get_args(member)))
        for member in members
    )


def holds_misplaced_text(value: Any, value_type: Any) -> bool:
    """Whether the value, or an item of it, is text where the type has numbers, true or false, or a list."""
    members = _members(value_type)
    if isinstance(value, str):
        return all(
            member in (int, float, bool, type(None)) or typing.get_origin(member) in (list, tuple, dict)
            for member in members
        )
    if isinstance(value, list):
        item_types = [typing.get_args(member)[0] for member in members if typing.get_origin(member) in (list, tuple)]
        return any(holds_misplaced_text(item, item_type) for item in value for item_type in item_types)
    return False


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Return the known name closest to ``name`` (difflib's ratio over the whole name and over its last part).

    A name whose last part is right but whose section is missing or wrong (``hidden_size`` for ``model.hidden_size``)
    is taken to mean that key; where the section is right, its keys come before those of others. Raises ValueError when
    nothing is known.
    """

    def likeness(candidate: str) -> float:
        ratio = difflib.SequenceMatcher(None, given, candidate).ratio()
        section, _, key = candidate.rpartition(".")
        last = difflib.SequenceMatcher(None, given_key, key).ratio()
        return ratio + last + (0.5 if section and section == given_section else 0.0)

    given = same_name(name)
    given_section, _, given_key = given.rpartition(".")
    return max(known, key=likeness)


def _members(value_type: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or the type alone."""
    if typing.get_origin(value_type) in (typing.Union, types.UnionType):
        return typing.get_args(value_type)
    return (value_type,)


def _in_words(value_type: Any) -> str:
    """Say what a value of this type looks like."""
    arguments = typing.get_args(value_type)
    if typing.get_origin(value_type) is typing.Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if typing.get_origin(value_type) in (list, tuple):
        fixed = typing.get_origin(value_type) is tuple and Ellipsis not in arguments
        return f"a list of {f'{len(arguments)} ' if fixed else ''}values, each {_in_words_of_union(arguments[0])}"
    if value_type is dict or typing.get_origin(value_type) is dict:
        return "a mapping"
    return _WORDS.get(value_type, str(value_type))


def _in_words_of_union(value_type: Any) -> str:
    """Say what a value of this type or union looks like."""
    return " or ".join(_in_words(member) for member in _members(value_type))
