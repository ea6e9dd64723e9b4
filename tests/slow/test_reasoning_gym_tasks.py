"""Every task of Reasoning Gym, from the generating process to the grader."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from prorl_nemo.data.chat import ChatRenderer, PromptDropped, in_answer_tags, load_tokenizer
from prorl_nemo.data.reasoning_gym_generator import ReasoningGymGenerator
from prorl_nemo.data.reasoning_gym_source import ReasoningGymSource
from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.tiny_model import tiny_model

# They have no single right answer to show; their scorers judge any proposal.
WITHOUT_REFERENCE = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
# Seconds for an item.
SLOW = {"sokoban", "number_sequence", "zebra_puzzles", "knight_swap"}
JUNK = ["", "nan", "garbage", "[]", "9**9**9", "\x00", "x" * 30_000]


def _tasks() -> list[str]:
    """Registered names, read from the library's source: importing it takes seconds."""
    spec = importlib.util.find_spec("reasoning_gym")
    assert spec is not None and spec.submodule_search_locations
    names = set()
    for path in Path(spec.submodule_search_locations[0]).rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("DATASET_NAME = "):
                names.add(line.partition('"')[2].rstrip('"'))
    return sorted(names - {"composite"})  # Composite has no questions of its own.


def test_reference_answers_get_full_marks_and_junk_none(tmp_path: Path) -> None:
    tasks = _tasks()
    assert len(tasks) >= 100
    tokenizer = load_tokenizer(tiny_model("llama", tmp_path / "m", layers=1))
    renderer = ChatRenderer(tokenizer, 100_000)
    generator = ReasoningGymGenerator()
    right, junk = [], []
    for task in tasks:
        source = ReasoningGymSource(
            task, {}, size=1000, seed=7, renderer=renderer, generator=generator
        )
        for slot in range(1 if task in SLOW else 3):
            try:
                prompt = source.prompt(slot)
            except PromptDropped as dropped:
                pytest.fail(f"{task}: {dropped}")
            # As it comes out of a samples file or a checkpoint.
            grading = json.loads(json.dumps(prompt.grading))
            answer = grading["entry"]["answer"]
            assert (answer is None) is (task in WITHOUT_REFERENCE), task
            if answer is not None:
                right.append((grading, in_answer_tags(answer)))
        if task not in WITHOUT_REFERENCE:
            junk += [(grading, in_answer_tags(text)) for text in JUNK]
    generator.close()
    assert len(right) >= 250
    # Generous limits: a loaded machine must not decide about agreement.
    with GraderPool(2, soft_limit_s=30, hard_limit_s=60) as pool:
        verdicts = pool.grade_many(right + junk)
    graded = [
        (grading["task"], response[:80], verdict.score, verdict.reason)
        for (grading, response), verdict in zip(right + junk, verdicts, strict=True)
    ]
    assert [line for line in graded[: len(right)] if line[2] != 1.0] == []
    assert [line for line in graded[len(right) :] if line[2] == 1.0] == []
