"""Rows of benchmark files as (problem, grading record), in every layout the sets are seen in.

Published copies of one set differ in field names and wrapping, not in content; a reader takes them
all, and `items` checks by count and hash that the content is the one meant.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import random
import zlib
from collections.abc import Callable
from typing import Any

from prorl_nemo.data.public_sources import SOURCES, decoded, field, gold_answer, text_of
from prorl_nemo.data.record import BadRowError, SkippedRow
from prorl_nemo.evaluation.benchmark import Data

Row = dict[str, Any]
Read = tuple[str, dict[str, Any]]

# LiveCodeBench's hidden tests, unpacked; the largest problem stays below.
_MOST_TEST_BYTES = 512 << 20


def read_row(row: Row, data: Data) -> Read:
    """Read one row.

    Raises:
        BadRowError: it should be usable and is not.
        SkippedRow: it does not belong to the benchmark.
    """
    return _READERS[data.reader](row, data)


def _math(row: Row, data: Data) -> Read:
    """MATH, AIME, AMC, Minerva, OlympiadBench, GSM8K. A list of answers: any of them is right."""
    problem = text_of(field(row, "problem", "question", "Problem"))
    answer = field(row, "answer", "expected_answer", "final_answer", "Answer")
    if isinstance(answer, str) and "####" in answer:
        # GSM8K: a solution with the integer last, some with commas between the thousands.
        answer = answer.rpartition("####")[2].replace(",", "")
    golds = [gold_answer(a) for a in answer] if isinstance(answer, list) else gold_answer(answer)
    return problem, {"kind": "math", "answer": golds}


def _gpqa(row: Row, data: Data) -> Read:
    """The choices in an order drawn from the question: position tells nothing, and every run has
    the same order."""
    question = text_of(field(row, "Question", "question")).strip()
    right = text_of(field(row, "Correct Answer")).strip()
    wrong = [text_of(field(row, f"Incorrect Answer {n}")).strip() for n in (1, 2, 3)]
    choices = [right, *wrong]
    if len(set(choices)) != len(choices):
        raise BadRowError("two choices are the same")
    random.Random(hashlib.sha256(question.encode()).digest()).shuffle(choices)
    letters = "ABCD"[: len(choices)]
    lines = [f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True)]
    grading = {"kind": "multiple_choice", "answer": letters[choices.index(right)]}
    return "\n".join([question, "", *lines]), grading | {"choices": choices}


def _ifeval(row: Row, data: Data) -> Read:
    prompt = text_of(field(row, "prompt"))
    names = field(row, "instruction_id_list")
    given = field(row, "kwargs")
    if not isinstance(given, list) or not all(isinstance(item, dict | None) for item in given):
        raise BadRowError("kwargs is no list of objects")
    # Tables hold every key for every instruction, empty where it has none.
    kwargs = [{k: v for k, v in (item or {}).items() if v is not None} for item in given]
    grading = {"kind": "instructions", "instruction_id_list": names, "kwargs": kwargs}
    return prompt, grading | {"prompt": prompt}


def _humaneval(row: Row, data: Data) -> Read:
    """HumanEval and the HumanEval+ data set of the same layout."""
    prompt, name, test = (text_of(field(row, key)) for key in ("prompt", "entry_point", "test"))
    checks = [f"{test}\ncheck({name})"]
    return prompt, {"kind": "code", "entry_point": name, "setup": prompt, "checks": checks}


def _programs(row: Row, data: Data) -> Read:
    """Programs from standard input to standard output: pairs, or two lists."""
    tests = decoded(field(row, "tests"), "tests")
    if isinstance(tests, dict):
        inputs, outputs = field(tests, "inputs"), field(tests, "outputs")
        if not (isinstance(inputs, list) and isinstance(outputs, list)):
            raise BadRowError("inputs and outputs are no lists")
        if len(inputs) != len(outputs):
            raise BadRowError("inputs and outputs differ in number")
        tests = [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    return text_of(field(row, "problem")), {"kind": "code", "tests": tests}


def _eurus(row: Row, data: Data) -> Read:
    """The validation half of Eurus-2-RL-Data, one of its four origins."""
    if row.get("ability") != "code" or row.get("data_source") != data.select:
        raise SkippedRow(f"not of {data.select}")
    extra = row.get("extra_info")
    if isinstance(extra, dict) and extra.get("split") == "train":
        raise SkippedRow("of the training split")
    # Its reader refuses what is marked as anything but training data.
    reading = SOURCES["eurus_code"].read({**row, "extra_info": None})
    return reading.problem, reading.grading


def _livecodebench(row: Row, data: Data) -> Read:
    day = text_of(field(row, "contest_date"))[:10]
    if not (data.since or "") <= day <= (data.until or ""):
        raise SkippedRow("outside the window of dates")
    problem = text_of(field(row, "question_content"))
    tests = [
        *_test_list(field(row, "public_test_cases"), "public_test_cases"),
        *_test_list(_unpacked(field(row, "private_test_cases")), "private_test_cases"),
    ]
    if not tests:
        raise BadRowError("no tests")
    metadata = decoded(row.get("metadata") or {}, "metadata")
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    pairs = [(text_of(field(t, "input")), text_of(field(t, "output"))) for t in tests]
    if not name:
        programs = [{"input": i, "output": o} for i, o in pairs]
        return problem, {"kind": "code", "tests": programs}
    calls = [
        {
            "input": [decoded(line, "a test's argument") for line in i.split("\n")],
            "output": decoded(o, "a test's output"),
        }
        for i, o in pairs
    ]
    starter = row.get("starter_code")
    shown = f"\n\n```python\n{starter}\n```" if isinstance(starter, str) and starter else ""
    ask = f"{problem}{shown}\n\nWrite `{name}` as a function of the module, without a class."
    return ask, {"kind": "code", "entry_point": name, "tests": calls}


def _test_list(value: Any, name: str) -> list[Row]:
    tests = decoded(value, name)
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        raise BadRowError(f"{name} is no list of objects")
    return tests


class _TextOnly(pickle.Unpickler):
    """A pickle may call anything that it names; this one may name nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"names {module}.{name}")


def _unpacked(value: Any) -> Any:
    """Hidden tests: JSON, or (as published) JSON in a pickle in zlib in base64."""
    if not isinstance(value, str) or value.lstrip().startswith("["):
        return value
    try:
        inflater = zlib.decompressobj()
        data = inflater.decompress(base64.b64decode(value, validate=True), _MOST_TEST_BYTES)
        if inflater.unconsumed_tail:
            raise BadRowError("private_test_cases is too large")
        return _TextOnly(io.BytesIO(data)).load()
    except BadRowError:
        raise
    # Bytes that are no pickle make the unpickler raise almost anything.
    except Exception as error:
        raise BadRowError(f"private_test_cases cannot be unpacked ({error})") from None


_READERS: dict[str, Callable[[Row, Data], Read]] = {
    "math": _math,
    "gpqa": _gpqa,
    "ifeval": _ifeval,
    "humaneval": _humaneval,
    "programs": _programs,
    "eurus": _eurus,
    "livecodebench": _livecodebench,
}


def canonical(problem: str, grading: dict[str, Any]) -> str:
    """One line that is equal for equal items, whatever file they came in."""
    return json.dumps([problem.strip(), grading], sort_keys=True, ensure_ascii=True)
