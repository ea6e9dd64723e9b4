"""Small data sets in the public layouts, easy enough for a model of 135M to succeed sometimes.

`python -m prorl_nemo.data.toy_domains FOLDER`, then `prorl data build recipes/smoke/domains.yaml`:
mathematics, code and instructions on two cores, through the real build and the real graders.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def mathematics(rng: random.Random) -> Iterator[Row]:
    """One-digit sums with their result: what can be learned in a few steps is to box it."""
    for a in range(1, 10):
        for b in range(1, 10):
            check = rng.choice(("Repeat this", "Write this", "Say this"))
            problem = f"{a} + {b} = \\boxed{{{a + b}}}. {check}."
            yield {"problem": problem, "answer": str(a + b)}


# Name, what it returns in words, and in Python.
_FUNCTIONS = (
    ("add", "the sum of a and b", "a + b"),
    ("subtract", "a minus b", "a - b"),
    ("multiply", "the product of a and b", "a * b"),
    ("largest", "the larger of a and b", "max(a, b)"),
    ("smallest", "the smaller of a and b", "min(a, b)"),
    ("remainder", "the remainder of a divided by b", "a % b"),
    ("quotient", "a divided by b, without the remainder", "a // b"),
    ("equal", "whether a equals b", "a == b"),
    ("power", "a to the power of b", "a ** b"),
    ("distance", "the absolute difference of a and b", "abs(a - b)"),
)


def code(rng: random.Random) -> Iterator[Row]:
    """Functions of two numbers, each asked for with every other one as an example."""
    for name, meaning, expression in _FUNCTIONS:
        for shown, shown_meaning, shown_expression in _FUNCTIONS:
            if shown == name:
                continue
            question = (
                f"Write `{shown}(a, b)`, which returns {shown_meaning}.\n"
                f"```python\ndef {shown}(a, b):\n    return {shown_expression}\n```\n"
                f"Write `{name}(a, b)`, which returns {meaning}."
            )
            inputs = [[rng.randint(1, 9), rng.randint(1, 9)] for _ in range(4)]
            values = [eval(expression, {"a": a, "b": b}) for a, b in inputs]
            tests = {"fn_name": name, "inputs": inputs, "outputs": [[v] for v in values]}
            yield {
                "data_source": "toy",
                "ability": "code",
                "prompt": [{"role": "user", "content": question}],
                "reward_model": {"style": "rule", "ground_truth": json.dumps(tests)},
                "extra_info": {"split": "train"},
            }


_SUBJECTS = ("dogs", "cats", "rain", "winter", "bread", "music", "trains", "books", "trees", "fish")
_INSTRUCTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Do not use any commas.", "punctuation:no_comma", {}),
    ("Use lowercase letters only.", "change_case:english_lowercase", {}),
    ("Write everything in capital letters.", "change_case:english_capital", {}),
    (
        "Use fewer than 20 words.",
        "length_constraints:number_words",
        {"num_words": 20, "relation": "less than"},
    ),
    ("Put your whole answer in double quotation marks.", "startend:quotation", {}),
)


def instructions(rng: random.Random) -> Iterator[Row]:
    """A sentence on a subject under one or two of five instructions."""
    for subject in _SUBJECTS:
        for number in (1, 1, 2, 2):
            chosen = rng.sample(_INSTRUCTIONS, number)
            words = " ".join(text for text, _, _ in chosen)
            yield {
                "input": [
                    {"role": "user", "content": f"Write a sentence about {subject}. {words}"}
                ],
                "args": {
                    "instruction_id_list": [name for _, name, _ in chosen],
                    "instruction_kwargs": [arguments for _, _, arguments in chosen],
                },
                "category": "instruction following",
            }


def write(folder: Path) -> None:
    """The three data sets, as files of the layouts that `prorl data build` reads."""
    files = {
        "deepscaler/deepscaler.jsonl": mathematics,
        "eurus/train.jsonl": code,
        "nemotron/instruction_following.jsonl": instructions,
    }
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) for row in rows(random.Random(name))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
