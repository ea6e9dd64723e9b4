"""Settings files: strict YAML, command-line overrides, a pydantic schema, errors that name the key.

Our choice, because people meet a framework through its errors: each names the
key as the user would write it, what was found there, and what would do.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from prorl_nemo.errors import RecipeError
from prorl_nemo.strict_yaml import YAMLError, load_yaml

_LARGEST_FILE = 1 << 20  # bytes; a recipe has a few thousand
_PACKAGE = Path(__file__).parent

# Pydantic speaks of Python's types; a user writes YAML.
_WORDS = {
    "model_type": "must be a mapping of keys, or left out for its defaults",
    "dict_type": "must be a mapping of keys",
    "list_type": "must be a list, each entry after a dash",
    "tuple_type": "must be a list, each entry after a dash",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be a text; put it in quotes",
    "finite_number": "must be a finite number",
    "extra_forbidden": "unknown key",
    "missing": "required, but missing",
}


class Section(BaseModel):
    """A part of a settings file: unknown keys are refused, numbers are finite, nothing is coerced
    (`true` is no number, and neither is `"8"`)."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, validate_default=True, strict=True
    )

    @field_validator("*")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a text must not hold NUL characters")
        return value


Schema = TypeVar("Schema", bound=Section)


def load_settings(schema: type[Schema], path: Path, overrides: Sequence[str] = ()) -> Schema:
    """Read a file and apply `section.key=value` overrides (values are YAML) in their order.

    `recipes/...` is looked for in the package too, so that an installed command needs no checkout.

    Raises:
        RecipeError: unreadable file, bad YAML, unknown key, wrong type or value out of range;
            the message names every key at fault and what to do.
    """
    if path.parts[:1] == ("recipes",) and not os.path.exists(path):
        path = _PACKAGE / path if os.path.exists(_PACKAGE / path) else path
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; give the YAML file in it") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > _LARGEST_FILE:
        raise RecipeError(f"{path}: larger than {_LARGEST_FILE >> 20} MiB; is it the right file?")
    try:
        raw = load_yaml(text)
    except YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: must be a mapping of keys, found {_shown(raw)}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_settings(schema, raw, str(path))


def parse_settings(schema: type[Schema], raw: dict[str, Any], origin: str) -> Schema:
    """Check settings given as a mapping. Raises RecipeError as `load_settings` does."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(schema, e) for e in error.errors()]
        raise RecipeError(f"{origin}:\n  " + "\n  ".join(lines)) from None


def section_of(annotation: Any) -> type[Section] | None:
    """The section inside a key's type (`X`, `X | None`, `list[X]`); None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (section_of(argument) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in found if section), None)


def changed_keys(before: Any, now: Any, prefix: str = "") -> dict[str, list[Any]]:
    """Keys whose values differ, as {dotted key: [before, now]}; lists are compared whole, and
    a key that one side lacks is None there."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {prefix: [before, now]}
    found: dict[str, list[Any]] = {}
    for key in [*before, *(k for k in now if k not in before)]:
        name = f"{prefix}.{key}" if prefix else key
        found |= changed_keys(before.get(key), now.get(key), name)
    return found


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *parents, leaf = key.split(".")
    if not separator or "" in (*parents, leaf):
        raise RecipeError(f"override {override!r}: write it as section.key=value")
    try:
        value = load_yaml(text)
    except YAMLError as error:
        raise RecipeError(f"override {override!r}: not valid YAML: {error}") from None
    node: Any = raw
    for part in parents:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[_place(node, part, override)]
        if not isinstance(node, dict | list):
            raise RecipeError(f"override {override!r}: {part} is a value, it has no keys below it")
    if isinstance(node, dict):
        node.setdefault(leaf, None)
    node[_place(node, leaf, override)] = value


def _place(node: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    """`part` as an index of `node`."""
    if isinstance(node, dict):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise RecipeError(
            f"override {override!r}: the list has entries 0 to {len(node) - 1}, not {part!r}"
            if node
            else f"override {override!r}: the list is empty"
        )
    return int(part)


def _explain(schema: type[Section], error: Any) -> str:
    """One line of pydantic's verdict, as the user would put it."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    kind = error["type"]
    message = _WORDS.get(kind) or error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{key}: {message}; {_suggestion(schema, location)}"
    if kind == "missing":
        return f"{key}: {message}"
    message = re.sub(r"^\w+ should", "must", message).replace(" after validation", "")
    return f"{key}: {message} (found {_shown(error['input'])})" if key else message


def _shown(value: Any) -> str:
    words = {None: "nothing", True: "true", False: "false"}
    plain = value is None or isinstance(value, bool)
    return words[value] if plain else f"{value!r:.80}"


def _suggestion(schema: type[Section], location: list[str]) -> str:
    """What an unknown key may have been meant to be: a neighbour, or one of that name elsewhere."""
    *parents, leaf = location
    section: type[Section] | None = schema
    for part in parents:
        if section and part in section.model_fields:
            section = section_of(section.model_fields[part].annotation)
    known = list(section.model_fields) if section else []
    near = difflib.get_close_matches(leaf, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    keys = list(_keys(schema))
    leaves = {key.rpartition(".")[2] for key in keys}
    near = difflib.get_close_matches(leaf, sorted(leaves), n=1, cutoff=0.8)
    if near:
        elsewhere = [key for key in keys if key.rpartition(".")[2] == near[0]]
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    return "known keys: " + ", ".join(sorted(known))


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """All dotted keys, entries of lists as number 0."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner:
            entry = ".0." if "list" in str(field.annotation) else "."
            yield from _keys(inner, prefix + name + entry)
        else:
            yield prefix + name
