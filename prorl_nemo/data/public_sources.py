r"""ProRL's public data sets: where they are, under which licence, and how a row is read.

Sources: ProRL, table 4; the data sets' own cards. Each reader takes a row as it is published and
returns (task, problem, grading record); it knows every layout the set was seen in. The last one
reads problems of one's own, in this project's layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prorl_nemo.data.record import INSTRUCTIONS, BadRowError, SkippedRow
from prorl_nemo.rewards.extraction import final_part, last_box
from prorl_nemo.rewards.math import MAX_ANSWER

Row = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """A row, read.

    Attributes:
        agreement: (grading record, response) that has to be graded as right for the row to be
            used.
        domain: of the row, where the data set has none of its own.
    """

    task: str
    problem: str
    grading: dict[str, Any]
    agreement: tuple[dict[str, Any], str] | None = None
    domain: str | None = None


@dataclass(frozen=True)
class PublicSource:
    """A data set of the hub, or problems of one's own.

    Attributes:
        domain: empty where each row names its own.
        repository: its name there; empty for one's own.
        files: patterns of the files of its training split.
        rows: how many it has, as published; for people.
    """

    name: str
    domain: str
    repository: str
    files: tuple[str, ...]
    licence: str
    rows: str
    read: Callable[[Row], Reading]


def text_of(value: Any) -> str:
    """The user's text of a prompt: a text, or the one user turn of a chat."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        asked = [turn.get("content") for turn in value if turn.get("role") == "user"]
        if len(asked) > 1 or any(turn.get("role") == "assistant" for turn in value):
            raise SkippedRow("more than one turn")
        if asked and isinstance(asked[0], str):
            return asked[0]
    raise BadRowError("no text where the problem should be")


def field(row: Row, *names: str) -> Any:
    """The first of these fields that the row has. Raises BadRowError."""
    if not isinstance(row, dict):
        raise BadRowError(f"no object with {' or '.join(names)}")
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise BadRowError(f"no field {' or '.join(names)}")


def decoded(value: Any, name: str) -> Any:
    """A value that some layouts hold as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRowError(f"{name} is not JSON") from None


def gold_answer(value: Any) -> str:
    r"""A gold answer as text, without its box."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRowError("the answer is no text or number")
    gold = str(value).strip()
    gold = last_box(gold) or gold
    if not gold:
        raise BadRowError("the answer is empty")
    if len(gold) > MAX_ANSWER:
        raise BadRowError(f"the answer has {len(gold)} characters, {MAX_ANSWER} are allowed")
    return gold


def _deepscaler(row: Row) -> Reading:
    gold = gold_answer(field(row, "answer"))
    return Reading("deepscaler", text_of(field(row, "problem")), {"kind": "math", "answer": gold})


# What DAPO wrapped its problems in: it asks for "Answer: ...", we for a box.
_DAPO_BEFORE = re.compile(r"^Solve the following math problem step by step\..*?\n\n", re.DOTALL)
_DAPO_AFTER = re.compile(r"\s*Remember to put your answer on its own line after .*$", re.DOTALL)


def _dapo(row: Row) -> Reading:
    problem = text_of(field(row, "prompt", "problem"))
    problem = _DAPO_AFTER.sub("", _DAPO_BEFORE.sub("", problem, count=1)).strip()
    model = row.get("reward_model")
    given = model.get("ground_truth") if isinstance(model, dict) else None
    gold = gold_answer(field(row, "label", "answer", "solution") if given is None else given)
    return Reading("dapo_math", problem, {"kind": "math", "answer": gold})


_EURUS_AFTER = re.compile(
    r"\s*Write Python code to solve the problem\. Present the code in.*$", re.S
)


def _eurus(row: Row) -> Reading:
    if row.get("ability") != "code":
        raise SkippedRow("not code")
    extra = row.get("extra_info")
    if isinstance(extra, dict) and extra.get("split") not in (None, "train"):
        raise SkippedRow("not of the training split")
    model = field(row, "reward_model")
    tests = decoded(field(decoded(model, "reward_model"), "ground_truth"), "ground_truth")
    if not isinstance(tests, dict):
        raise BadRowError("ground_truth is no object")
    problem = _EURUS_AFTER.sub("", text_of(field(row, "prompt"))).strip()
    origin = re.sub(r"\W+", "_", str(row.get("data_source") or "code")).lower()
    return Reading(f"eurus_{origin}", problem, _eurus_tests(tests))


def _eurus_tests(tests: Row) -> dict[str, Any]:
    inputs, outputs = field(tests, "inputs"), field(tests, "outputs")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
        raise BadRowError("inputs and outputs are not lists of the same length")
    name = tests.get("fn_name")
    if not name:
        pairs = zip(map(_lines, inputs), map(_lines, outputs), strict=True)
        return {"kind": "code", "tests": [{"input": i, "output": o} for i, o in pairs]}
    if any(not isinstance(arguments, list) for arguments in inputs):
        raise BadRowError("the arguments of a function's test are no list")
    # The convention of APPS and TACO: a result is wrapped in a list of one.
    if all(isinstance(output, list) and len(output) == 1 for output in outputs):
        outputs = [output[0] for output in outputs]
    return {
        "kind": "code",
        "entry_point": str(name).rpartition(".")[2],
        "tests": [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)],
    }


def _lines(value: Any) -> str:
    """Standard input or output of a test; some rows list its lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise BadRowError("a test's input or output is no text")
    return value


_SHORT = 200
_JUDGED = re.compile(r"r1.*(match|consist|correct|agree)", re.IGNORECASE)


def _scp(row: Row) -> Reading:
    r"""Kept where R1's answer is found equal to the reference.

    The paper asked GPT-4o. Where a copy of the data holds such a verdict, it counts; elsewhere the
    math grader decides, which accepts less. The reference is the box of the published solution,
    or the solution itself when it is as short as an answer.
    """
    verdicts = {
        str(row[key]).lower() for key in row if _JUDGED.search(key) and row[key] is not None
    }
    if verdicts & {"false", "no", "0"}:
        raise SkippedRow("judged not to agree")
    problem = text_of(field(row, "problem"))
    response = text_of(field(row, "r1_response", "r1_solution"))
    solution = text_of(field(row, "solution", "extract_solution", "extracted_solution"))
    boxed = last_box(solution)
    reference = boxed or solution.strip()
    answer = last_box(final_part(response))
    if verdicts and answer:
        return Reading("scp", problem, {"kind": "math", "answer": gold_answer(answer)})
    if not answer or not reference or (not boxed and len(reference) > _SHORT):
        raise SkippedRow("no short answer to compare")
    gold = gold_answer(reference)
    agreement = ({"kind": "math", "answer": gold}, rf"\boxed{{{answer}}}")
    golds = list(dict.fromkeys((gold, gold_answer(answer))))
    return Reading("scp", problem, {"kind": "math", "answer": golds}, agreement)


def _nemotron(row: Row) -> Reading:
    problem = text_of(field(row, "input", "prompt"))
    arguments = decoded(row.get("args") or row, "args")
    if not isinstance(arguments, dict):
        raise BadRowError("args is no object")
    names = decoded(field(arguments, "instruction_id_list"), "instruction_id_list")
    kwargs = decoded(field(arguments, "instruction_kwargs", "kwargs"), "instruction_kwargs")
    if not isinstance(kwargs, list):
        raise BadRowError("instruction_kwargs is no list")
    given = []
    for item in kwargs:
        mapping = decoded(item, "instruction_kwargs") or {}
        if not isinstance(mapping, dict):
            raise BadRowError("instruction_kwargs holds something that is no object")
        given.append({key: value for key, value in mapping.items() if value is not None})
    grading = {"kind": "instructions", "instruction_id_list": names, "kwargs": given}
    return Reading("nemotron_instructions", problem, grading | {"prompt": problem})


def _own(row: Row) -> Reading:
    """A record as this project keeps it; a Parquet file may hold `grading` as JSON text."""
    domain, task = field(row, "domain"), field(row, "task")
    if domain not in INSTRUCTIONS:
        raise BadRowError(f"domain {domain!r} is none of {', '.join(INSTRUCTIONS)}")
    if not isinstance(task, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", task):
        raise BadRowError(f"task {task!r}: use letters, digits, dot, dash and underscore")
    grading = decoded(field(row, "grading"), "grading")
    if not isinstance(grading, dict):
        raise BadRowError("grading is no object")
    return Reading(task, text_of(field(row, "problem")), grading, domain=domain)


SOURCES = {
    source.name: source
    for source in (
        PublicSource(
            "deepscaler",
            "math",
            "agentica-org/DeepScaleR-Preview-Dataset",
            ("deepscaler.json", "deepscaler*.jsonl", "*.parquet"),
            "MIT",
            "40,315",
            _deepscaler,
        ),
        PublicSource(
            "dapo_math",
            "math",
            "BytedTsinghua-SIA/DAPO-Math-17k",
            ("data/dapo-math-17k.parquet", "dapo-math-17k*.jsonl"),
            "Apache-2.0",
            "17,398 different, each published about a hundred times",
            _dapo,
        ),
        PublicSource(
            "eurus_code",
            "code",
            "PRIME-RL/Eurus-2-RL-Data",
            ("data/train-*.parquet", "train*.jsonl"),
            "MIT",
            "26,758 of code, beside 455,261 of mathematics that are left out",
            _eurus,
        ),
        PublicSource(
            "scp",
            "stem",
            "EricLu/SCP-116K",
            ("*.jsonl", "*.parquet"),
            "CC-BY-NC-SA-4.0",
            "116,756 in the first release, 274,000 later; ProRL kept 25,000",
            _scp,
        ),
        PublicSource(
            "nemotron_instructions",
            "instructions",
            "nvidia/Llama-Nemotron-Post-Training-Dataset",
            ("RL/instruction_following/*.jsonl",),
            "CC-BY-4.0",
            "56,339; ProRL took 10,000",
            _nemotron,
        ),
        PublicSource("records", "", "", (), "not stated", "one's own", _own),
    )
}
