"""Worked problems of Reasoning Gym tasks: question and response, made once and kept.

Training problems come from the split that RL trains on, so what RL validates on was never seen
here either (data/reasoning_gym_worker.py says how questions are split).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prorl_nemo.data.chat import PromptDropped, in_answer_tags
from prorl_nemo.data.reasoning_gym_generator import ReasoningGymGenerator, TaskItems
from prorl_nemo.errors import RecipeError
from prorl_nemo.pretraining.working import working
from prorl_nemo.recipe_pretrain import Pretraining

# Settings that decide which problems there are.
_DECIDES: Any = {
    "seed": True,
    "tasks": True,
    "worked_share": True,
    "exam": {"problems_per_task"},
}
# Slots looked at for each problem that is wanted, before a task counts as too narrow.
_SLOTS_PER_PROBLEM = 4
# A task with fewer different problems than this would be learnt by heart.
_FEWEST = 16


@dataclass(frozen=True)
class Problem:
    """A question and its response: some working perhaps, and the answer in its tags."""

    task: str
    question: str
    response: str


def load_problems(
    settings: Pretraining, folder: Path, on_task: Callable[[str], None] = lambda task: None
) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, in the order of the recipe's tasks.

    Kept in `folder` as JSON lines, written when they are not there.

    Raises:
        RecipeError: an unknown task or setting, a task without reference answers, or one with
            fewer different questions than an exam needs.
    """
    wanted = hashlib.sha256(
        json.dumps(settings.model_dump(include=_DECIDES), sort_keys=True).encode()
    ).hexdigest()
    file = folder / "problems.jsonl"
    found = _read(file, wanted)
    if found is None:
        generator = ReasoningGymGenerator()
        try:
            found = {"train": [], "held_out": []}
            for index, task in enumerate(settings.tasks):
                on_task(task.task)
                items = TaskItems(task.task, task.config, generator, f"tasks.{index}")
                found["train"] += _problems(items, "train", task.problems, settings)
                found["held_out"] += _problems(
                    items, "held_out", settings.exam.problems_per_task, settings
                )
        finally:
            generator.close()
        aside = file.with_suffix(".part")
        with aside.open("w", encoding="utf-8") as out:
            out.write(json.dumps({"of": wanted}) + "\n")
            for split, problems in found.items():
                for problem in problems:
                    out.write(json.dumps({"split": split, **asdict(problem)}) + "\n")
        aside.replace(file)
    return found["train"], found["held_out"]


def _read(file: Path, wanted: str) -> dict[str, list[Problem]] | None:
    """What the file holds, or None if it is not there or of other settings."""
    if not file.exists():
        return None
    found: dict[str, list[Problem]] = {"train": [], "held_out": []}
    with file.open(encoding="utf-8") as lines:
        if json.loads(next(lines)) != {"of": wanted}:
            return None
        for line in lines:
            row: dict[str, Any] = json.loads(line)
            found[row.pop("split")].append(Problem(**row))
    return found


def _problems(items: TaskItems, split: str, count: int, settings: Pretraining) -> Iterator[Problem]:
    """Up to `count` problems with different questions."""
    seen: set[str] = set()
    # Not the seed of any RL run: its questions may be met here, in no known order.
    seed, slots = f"pretraining/{settings.seed}", _SLOTS_PER_PROBLEM * count
    for slot in range(slots):
        if len(seen) == count:
            break
        try:
            entry = items.entry(split, slot, seed, slots)
        except PromptDropped:
            continue
        if not isinstance(entry["answer"], str) or not entry["answer"].strip():
            raise RecipeError(
                f"{items.key}.task: {items.task} gives no reference answers to learn from; leave "
                "it out"
            )
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield _problem(items.task, entry, settings)
    if len(seen) < min(count, _FEWEST):
        raise RecipeError(
            f"{items.key}.config: {items.task} has only {len(seen)} different questions in the "
            f"{split} split; widen it"
        )


def _problem(task: str, entry: dict[str, Any], settings: Pretraining) -> Problem:
    question = entry["question"].rstrip()
    steps = working(task, entry["metadata"])
    # By the question itself, so that another number of problems changes none of them.
    worked = random.Random(f"{settings.seed}/{question}").random() < settings.worked_share
    before = steps if steps and worked else ""
    return Problem(task, question, before + in_answer_tags(entry["answer"]))


def step_of(counts: Sequence[int], size: int, step: int, seed: int) -> list[int]:
    """The problems of a step (from 1): tasks in turn, so each has the same share.

    A task's problems come all of them once an epoch of that task, each epoch in a new order. A
    pure function of its arguments, so a resumed run needs nothing but its step.

    Args:
        counts: problems of each task; they are numbered through, task by task.
        size: problems of a step.
    """
    orders: dict[tuple[int, int], Sequence[int]] = {}
    chosen = []
    for place in range((step - 1) * size, step * size):
        turn, task = divmod(place, len(counts))
        epoch, position = divmod(turn, counts[task])
        if (task, epoch) not in orders:
            shuffled = random.Random(f"{seed}/{task}/{epoch}")
            orders[task, epoch] = shuffled.sample(range(counts[task]), counts[task])
        chosen.append(sum(counts[:task]) + orders[task, epoch][position])
    return chosen
