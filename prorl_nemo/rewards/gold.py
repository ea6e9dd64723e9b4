r"""A response that a record's own grader must give full marks, where the record tells one.

For `prorl check`, which proves with it that graders and sandbox work on this machine.
"""

from __future__ import annotations

import json
from typing import Any

from prorl_nemo.rewards.code_tests import read_tests
from prorl_nemo.rewards.math import gold_answers


def gold_response(grading: dict[str, Any]) -> str | None:
    """The gold answer in the form that the grader reads; None where the record has none.

    Raises:
        GradingError: the record is malformed.
    """
    kind = grading.get("kind")
    if kind == "math":
        return rf"\boxed{{{gold_answers(grading)[0]}}}"
    if kind == "multiple_choice":
        return rf"\boxed{{{grading['answer']}}}"
    if kind == "reasoning_gym":
        answer = grading["entry"]["answer"]
        return None if answer is None else f"<answer>{answer}</answer>"
    if kind == "code":
        program = _table(grading)
        return None if program is None else f"```python\n{program}\n```"
    return None


def known_item(kind: str) -> tuple[dict[str, Any], str] | None:
    """A record with its gold response, for kinds whose records tell none."""
    if kind == "instructions":
        names = ["punctuation:no_comma", "length_constraints:number_words"]
        arguments = [{}, {"num_words": 3, "relation": "at least"}]
        record = {"kind": kind, "instruction_id_list": names, "kwargs": arguments}
        return record, "no commas here"
    if kind == "code":
        tests = [{"input": "3", "output": "9"}, {"input": "4", "output": "16"}]
        return {"kind": kind, "tests": tests}, "```python\nprint(int(input()) ** 2)\n```"
    if kind == "reasoning_gym":
        entry = {"question": "1 + 1?", "answer": "2", "metadata": {}}
        return {"kind": kind, "task": "chain_sum", "entry": entry}, "<answer>2</answer>"
    return None


def _table(grading: dict[str, Any]) -> str | None:
    """A program that looks each test's output up; it proves the way through the sandbox."""
    tests = read_tests(grading)
    if tests.programs and tests.language in (None, "python"):
        pairs = {given.decode(): output for given, output in tests.programs}
        return f"import sys\nprint({pairs!r}[sys.stdin.read()])"
    if tests.calls:
        pairs = {json.dumps(arguments): value for arguments, value in tests.calls}
        return (
            f"import json\ndef {tests.entry_point}(*arguments):\n"
            f"    return {pairs!r}[json.dumps(list(arguments))]"
        )
    return None
