"""docs/recipes.md and docs/pretraining.md from their schemas: `python -m prorl_nemo.recipe_docs`.

Our choice: made, not written, so that it cannot be out of date; a test compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prorl_nemo.recipe import Recipe
from prorl_nemo.recipe_pretrain import Pretraining
from prorl_nemo.settings_file import Section
from prorl_nemo.training.run_dir import RESUMABLE

_INTRODUCTION = """\
# Recipes

One YAML file describes one experiment. This page lists every key; it is made from \
`prorl_nemo/recipe.py` by `python -m prorl_nemo.recipe_docs`.

    prorl train recipes/quickstart.yaml                                   # the file as it is
    prorl train recipes/quickstart.yaml seed=2 name=second                # overrides: key=value
    prorl train recipes/quickstart.yaml policy.optimizer.learning_rate=1e-5 stages.0.steps=5
    prorl train recipes/quickstart.yaml 'shaping.overlong={buffer_tokens: 8}'

* A key that is not listed is an error, with the one that was probably meant. So is a value of \
another type: `true` is no number, and `"8"` is none either.
* YAML is read as version 1.2: `on`, `off`, `yes` and `no` are texts, `1e-5` is a number. A key \
given twice and an alias (`*name`) are errors.
* Values of overrides are YAML. Entries of lists are named by their number, from 0. The last of \
several overrides of a key counts.
* `null` switches off what may be null.
* A step is a rollout step: one batch of samples, then `algorithm.minibatches` optimizer updates.
* The recipe with all defaults filled in is kept as `recipe.yaml` in the run's folder. A run goes \
on only with the recipe it began with, but for the keys marked ↻: they change where and how fast \
it computes, not what.

"""


_PRETRAINING = """\
# Pretraining

`prorl pretrain RECIPE` makes a small model of one's own: untrained weights of Qwen2's \
architecture, a small tokenizer, and next-token prediction on worked \
problems of Reasoning Gym, by the ranks, packed rows, optimizer and checkpoints of `prorl train`. \
It is there for studies that need thousands of steps on two cores, which no published model is \
small enough for. This page is made from `prorl_nemo/recipe_pretrain.py`.

    prorl pretrain recipes/study/pretrain.yaml            # resumes where it stopped
    prorl train RECIPE model=runs/study-pretrain/model    # what it writes is a model folder

* Training problems come from the split of questions that RL trains on; those of the exam, as all \
that RL validates on, never occur.
* Where a task has short steps that lead to its answer (sums from left to right, Euclid's \
remainders, ...: `prorl_nemo/pretraining/working.py`), a share of the responses shows them before \
the answer.
* The tokenizer is a byte-level BPE of the words that at least 2 % of a task's problems have: they \
become one token each, and what questions differ in does not shape the tokens. Digits are apart; \
the answer's tags and the line that asks for them are one token each. Its rules for cutting text \
are Qwen2's: transformers loads the tokenizer of any folder of that model type with those.
* Weights begin normal with deviation 1/√(fan-in): GPT-2's 0.02, meant for widths above 1,000, \
learns more slowly here.
* The loss is the mean cross-entropy over the tokens that are predicted. A step is one update.
* An exam gives the exact chance that a response at temperature 1 is the reference response, \
without sampling: the least share of samples that are right. `metrics.jsonl` has it by task.
* The same recipe gives the same model on the same kind of machine, stopped and resumed or not.

"""


def render(schema_of: type[Section] = Recipe, introduction: str = _INTRODUCTION) -> str:
    """A page as text."""
    schema = schema_of.model_json_schema()
    parts = [introduction]
    for path, section in _sections(schema, schema, ""):
        title = f"## `{path}`\n\n{_sentence(section)}\n\n" if path else "## The file\n\n"
        rows = [_row(schema, section, path, key) for key in section["properties"]]
        parts.append(
            title + "| key | value | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        )
    return "".join(parts).rstrip() + "\n"


def _sections(schema: Any, section: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, section) of a section and all below it, in the order of the recipe."""
    yield path, section
    for key, entry in section["properties"].items():
        inner, in_list = _inner(schema, entry)
        if inner:
            number = ".N" if in_list else ""
            yield from _sections(schema, inner, f"{path}.{key}{number}".lstrip("."))


def _inner(schema: Any, entry: Any) -> tuple[Any, bool]:
    """The section a key holds, if it does, and whether it holds a list of them."""
    if "$ref" in entry:
        return schema["$defs"][entry["$ref"].rpartition("/")[2]], False
    for option in entry.get("anyOf", ()):
        if "$ref" in option:
            return _inner(schema, option)
    items = entry.get("items", {})
    return (_inner(schema, items)[0], True) if "$ref" in items else (None, False)


def _row(schema: Any, section: Any, path: str, key: str) -> str:
    entry = section["properties"][key]
    dotted = f"{path}.{key}".lstrip(".")
    inner, in_list = _inner(schema, entry)
    if inner:
        value = f"{'list of ' if in_list else ''}[section](#{_anchor(dotted, in_list)})"
        value += " or null" if "anyOf" in entry else ""
        default = "required" if key in section.get("required", ()) else "its defaults"
        if "default" in entry and entry["default"] is None:
            default = "`null`"
    else:
        value = _value(entry)
        default = f"`{_plain(entry['default'])}`" if "default" in entry else "required"
    meaning = entry.get("description") or _sentence(inner)
    mark = " ↻" if dotted in RESUMABLE else ""
    return f"| `{key}`{mark} | {value} | {default} | {meaning} |".replace("\n", " ")


def _anchor(dotted: str, in_list: bool) -> str:
    """The anchor that GitHub gives to the section's heading."""
    return (dotted + (".n" if in_list else "")).replace(".", "").lower()


def _value(entry: Any) -> str:
    if "anyOf" in entry:
        return " or ".join(_value(option) for option in entry["anyOf"])
    if "const" in entry or "enum" in entry:
        return ", ".join(f"`{v}`" for v in entry.get("enum", [entry.get("const")]))
    if "prefixItems" in entry:
        return f"list of {len(entry['prefixItems'])}: {_value(entry['prefixItems'][0])}"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "`true` or `false`",
        "string": "text",
        "object": "mapping",
        "array": "list",
        "null": "null",
    }
    bounds = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
    }
    found = [
        f"{sign} {_plain(entry[bound])}"
        for bound, sign in bounds.items()
        # The bound of all counts is there against slips, and would only be noise here.
        if bound in entry and entry[bound] < 1_000_000_000
    ]
    return " ".join([words[entry["type"]], ", ".join(found)]).strip()


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(_plain(v) for v in value)}]"
    return '""' if value == "" else str(value)


def _sentence(section: Any) -> str:
    return " ".join(section.get("description", "").split())


def render_pretraining() -> str:
    """docs/pretraining.md as text."""
    return render(Pretraining, _PRETRAINING)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    for name, page in (("recipes.md", render()), ("pretraining.md", render_pretraining())):
        (folder / name).write_text(page, encoding="utf-8")
        print(folder / name)
