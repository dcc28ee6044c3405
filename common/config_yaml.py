"""Configurations as YAML text: a reader stricter than YAML 1.1, and a writer whose text reads back the same.

PyYAML is imported when used, so that a program that only prints its help does not wait for it.
"""

import re
from pathlib import Path
from typing import Any

from megaprot.common.config_keys import config_keys, nested
from megaprot.common.errors import InputError

# YAML 1.2's floating-point numbers: unlike in 1.1, an exponent needs neither a point before it nor a sign.
_NUMBER = re.compile(r"^(?:[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)|\.nan)$")
_WHOLE_NUMBER = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_NUMBER_STARTS = "-+.0123456789"
_FLOAT_TAG = "tag:yaml.org,2002:float"


def load_yaml(path: Path) -> Any:
    """Return the data of a YAML file; raises InputError when it cannot be read.

    Stricter than YAML 1.1: ``1e-4`` is a number, ``010`` and ``1:30`` are not, only true and false are booleans
    (``off`` and ``no`` are text), and a key written twice in one mapping is an error, not the last one winning.
    """
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_strict_loader())
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{path} is not valid YAML ({line}{error.problem}); correct that line") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML text file; give a recipe written in YAML") from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); check the path and its permissions") from error


def parse_yaml_value(text: str) -> Any:
    """Return the YAML value of a flag's text, or the text itself when it is no YAML (a type check then names it)."""
    import yaml

    try:
        return yaml.load(text, Loader=_strict_loader())
    except yaml.YAMLError:
        return text


def config_to_yaml(config: Any) -> str:
    """Return a configuration as YAML text that ``--config`` reads back to an equal one."""
    values: dict[str, Any] = {}
    for name in config_keys(type(config)):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        values[name] = value
    return values_to_yaml(values)


def values_to_yaml(values: dict[str, Any]) -> str:
    """Return {dotted key: value} as nested YAML text of plain data (paths as text, tuples as lists on one line)."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            """Return True: a value that occurs twice is written twice."""
            return True

    # text that the reader above would take for a number is put in quotes
    Dumper.add_implicit_resolver(_FLOAT_TAG, _NUMBER, list(_NUMBER_STARTS))
    # a line end such as U+0085 comes back as a space unless it is escaped, which only double quotes allow
    Dumper.add_representer(str, _represent_text)
    Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))
    tree = nested({name: _plain(value) for name, value in values.items()})
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=10**6)


def _represent_text(dumper: Any, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


def _plain(value: Any) -> Any:
    """Return the value as YAML has it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _strict_loader() -> Any:
    """Return a yaml.SafeLoader subclass with the rules of :func:`load_yaml`."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """Return a mapping; raises an error for a key that stands in it twice."""
            seen: set[Any] = set()
            for key_node in (pair[0] for pair in node.value if isinstance(pair[0], yaml.ScalarNode)):
                key = self.construct_object(key_node)
                if key in seen:
                    problem = f"key {key!r} is written twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key)
            return super().construct_mapping(node, deep)

    kept = {"tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"}
    StrictLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in kept]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    StrictLoader.add_implicit_resolver(_FLOAT_TAG, _NUMBER, list(_NUMBER_STARTS))
    StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", _WHOLE_NUMBER, list(_NUMBER_STARTS))
    StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), list("tf"))
    return StrictLoader
