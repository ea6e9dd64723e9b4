"""YAML in which nothing surprises: the core schema of YAML 1.2, without repeated keys or aliases.

Our choice. PyYAML reads YAML 1.1, where `on` is true, `1:30` is ninety, `1e-5` is a string and
the last of two equal keys wins in silence. Aliases are refused because an override of one place
would change the other too, and because ten lines of them expand to gigabytes.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

YAMLError = yaml.YAMLError

_TAG = "tag:yaml.org,2002:"
# Name, pattern, first characters ("" is the empty scalar). Tried in this order: what looks like an
# integer looks like a float too.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
)


def load_yaml(text: str) -> Any:
    """The one document of `text`: mappings with distinct keys, lists and scalars.

    Raises:
        YAMLError: bad syntax, a repeated key, an alias, a tag beyond the core schema, several
            documents, an absurd depth or number; one line that says where.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise YAMLError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise YAMLError(where + what) from None
    except yaml.reader.ReaderError as error:
        raise YAMLError(f"character {error.position + 1}: {error.reason}") from None


def dump_yaml(value: Any) -> str:
    """Text that `load_yaml` and any reader of YAML 1.1 read back as `value` (JSON's types)."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the resolvers and constructors set below."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor}: write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag != _TAG + "str":
                raise _refusal("a key must be a word; put it in quotes", key_node)
            if key_node.value in seen:
                raise _refusal(f"the key {key_node.value!r} is given twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        try:
            return int(text, 0) if text[1:2] in ("o", "x") else int(text)
        except ValueError:  # More digits than Python converts, or a tag on something else.
            raise _refusal(f"no integer: {text:.40}", node) from None

    def construct_float(self, node: Any) -> float:
        text = self.construct_scalar(node)
        try:
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        except ValueError:
            raise _refusal(f"no number: {text:.40}", node) from None

    def construct_bool(self, node: Any) -> bool:
        return bool(self.construct_scalar(node).lower() == "true")


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would not read as a string."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {}
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
_CONSTRUCTORS: dict[str, Any] = {
    "null": yaml.SafeLoader.construct_yaml_null,
    "bool": _Loader.construct_bool,
    "int": _Loader.construct_int,
    "float": _Loader.construct_float,
    "str": yaml.SafeLoader.construct_yaml_str,
    "seq": yaml.SafeLoader.construct_yaml_seq,
    "map": yaml.SafeLoader.construct_yaml_map,
}
for _name, _construct in _CONSTRUCTORS.items():
    _Loader.add_constructor(_TAG + _name, _construct)
_UNKNOWN: Any = yaml.SafeLoader.construct_undefined
_Loader.add_constructor(None, _UNKNOWN)


def _refusal(problem: str, node: Any) -> YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
