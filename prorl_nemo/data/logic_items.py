"""Reasoning Gym items ahead of time: the logic domain of ProRL, 37,000 prompts of 96 tasks.

Generating is too slow for the training loop (some items take half a minute), so it is done before,
with a limit per item. Each task has a file of its own, to which items are appended as they come: a
build that was killed goes on at the item it had reached, and makes the same items as one that
was not.

Narrow tasks have fewer different questions than their share; the others then give more.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prorl_nemo.data.reasoning_gym_generator import GeneratorDied, ReasoningGymGenerator
from prorl_nemo.data.record import Record
from prorl_nemo.errors import RecipeError

# ProRL trains on 96 tasks and does not name them. acre, boxnet and game_of_life_halting are held
# out there, and puzzle24 is plotted with them. The other choices are ours: composite is no task of
# its own; arc_agi and gsm_symbolic repeat benchmarks; coin_flip, kakurasu and survo are younger
# than the paper.
_NAMES = """
    ab advanced_geometry aiw arc_1d base_conversion basic_arithmetic bf binary_alternation
    binary_matrix bitwise_arithmetic caesar_cipher calendar_arithmetic chain_sum circuit_logic
    codeio color_cube_rotation complex_arithmetic count_bits count_primes countdown course_schedule
    cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships
    figlet_font fraction_simplification futoshiki game_of_life gcd graph_color group_anagrams
    intermediate_integration isomorphic_strings jugs knight_swap knights_knaves largest_island lcm
    leg_counting letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix maze
    mini_sudoku modulo_grid n_queens needle_haystack number_filtering number_format number_sequence
    number_sorting palindrome_generation palindrome_partitioning path_star polynomial_equations
    polynomial_multiplication pool_matrix power_function prime_factorization products
    propositional_logic quantum_lock ransom_note rearc rectangle_count rotate_matrix rotten_oranges
    rubiks_cube rush_hour self_reference sentence_reordering shortest_path simple_equations
    simple_geometry simple_integration sokoban spell_backward spiral_matrix string_insertion
    string_manipulation string_splitting string_synthesis sudoku syllogism time_intervals
    tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting zebra_puzzles
"""
TASKS = tuple(_NAMES.split())
# Generated first, so that none of them is left to one process at the end.
_SLOW = ("zebra_puzzles", "sokoban", "knight_swap", "number_sequence", "futoshiki", "sudoku")

_SIZE = 1000
# A task ends when this many items in a row bring no new question, or fail.
_IN_VAIN = 300
_DEATHS = 5


@dataclass
class TaskFile:
    """A task's items so far.

    Every number tried has a line: an entry with its split, a failure, or a question that was
    there before. So a resumed build gives up on a narrow task where the whole one would.
    """

    path: Path
    task: str
    config: dict[str, Any]
    seed: int
    entries: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {"train": [], "held_out": []}
    )
    next: int = 0
    exhausted: bool = False
    failures: int = 0
    _questions: set[bytes] = field(default_factory=set)
    _in_vain: int = 0
    _deaths: int = 0

    def read(self) -> None:
        """Take in what the file holds; a last line that was cut is removed."""
        if not self.path.exists():
            return
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                self.take(row)
        os.truncate(self.path, whole)

    def take(self, row: dict[str, Any]) -> None:
        """Count an item: a new question, one that was there, or a failure."""
        self.next = row["number"] + 1
        if "entry" not in row:
            self.failures += "failed" in row
            self._in_vain += 1
            self._deaths = self._deaths + 1 if row.get("died") else 0
            self.exhausted = self._in_vain >= _IN_VAIN or self._deaths >= _DEATHS
            return
        self._in_vain = self._deaths = 0
        self._questions.add(_digest(row["entry"]))
        split = "held_out" if row["split"] == "held_out" else "train"
        self.entries[split].append(row["entry"] | {"number": row["number"]})

    def knows(self, entry: dict[str, Any]) -> bool:
        return _digest(entry) in self._questions

    def has(self, train: int, held_out: int) -> bool:
        enough = len(self.entries["train"]) >= train and len(self.entries["held_out"]) >= held_out
        return enough or self.exhausted


def generate(
    folder: Path,
    tasks: dict[str, dict[str, Any]],
    *,
    count: int,
    held_out: int,
    seed: int,
    seconds_per_item: float,
    workers: int,
    on_item: Callable[[int], None] = lambda done: None,
) -> list[TaskFile]:
    """Make `count` different training questions in all, and `held_out` of each task.

    Args:
        folder: where the tasks' files are, from this build or an interrupted one.
        tasks: name to settings.
        workers: generating processes.
        on_item: called with the number of training questions so far.

    Returns:
        The tasks' files, in the order of names.

    Raises:
        RecipeError: an unknown task or setting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [TaskFile(_path(folder, t, c, seed), t, c, seed) for t, c in sorted(tasks.items())]
    for file in files:
        file.read()
    progress = _Progress(files, count, on_item)
    generators: list[ReasoningGymGenerator] = []
    local = threading.local()

    def start() -> None:
        local.generator = ReasoningGymGenerator(seconds_per_item)
        generators.append(local.generator)

    def extend(file: TaskFile, quota: int) -> None:
        _extend(file, quota, held_out, local.generator, progress)

    try:
        with ThreadPoolExecutor(workers, initializer=start) as executor:
            try:
                while True:
                    quota = share([_most(file) for file in files], count)
                    short = [f for f in files if not f.has(quota, held_out)]
                    if not short:
                        return files
                    short.sort(key=lambda f: (f.task not in _SLOW, f.task))
                    waiting = [executor.submit(extend, file, quota) for file in short]
                    for future in waiting:
                        future.result()
            except BaseException:
                progress.stop = True
                executor.shutdown(cancel_futures=True)
                raise
    finally:
        for generator in generators:
            generator.close()


def share(most: list[int | None], count: int) -> int:
    """The equal share of each task so that all together give `count`.

    Args:
        most: what each task has at most; None: no end is known.

    Returns:
        The least level with sum(min(level, most)) >= count; the largest of `most` if there is none.
    """
    left, tasks = count, len(most)
    level = 0
    for bound in sorted(bound for bound in most if bound is not None):
        if (bound - level) * tasks >= left:
            break
        left -= (bound - level) * tasks
        level, tasks = bound, tasks - 1
    return level - (-left // tasks) if tasks else level


def _most(file: TaskFile) -> int | None:
    return len(file.entries["train"]) if file.exhausted else None


def _digest(entry: dict[str, Any]) -> bytes:
    question = " ".join(entry["question"].split()).casefold()
    return hashlib.blake2b(question.encode("utf-8", "replace"), digest_size=12).digest()


def _path(folder: Path, task: str, config: dict[str, Any], seed: int) -> Path:
    """Another seed or other settings make other items, so another file."""
    settings = hashlib.blake2b(json.dumps([config, seed], sort_keys=True).encode(), digest_size=6)
    return folder / f"{task}-{settings.hexdigest()}.jsonl"


class _Progress:
    def __init__(self, files: list[TaskFile], count: int, on_item: Callable[[int], None]) -> None:
        self.stop = False
        self._files, self._count, self._on_item = files, count, on_item
        self.tick()

    def tick(self) -> None:
        done = sum(len(file.entries["train"]) for file in self._files)
        self._on_item(min(done, self._count))


def _extend(
    file: TaskFile, quota: int, held_out: int, generator: ReasoningGymGenerator, progress: _Progress
) -> None:
    """Generate until the task has its quota or gives nothing new."""
    _check(file, generator)
    with file.path.open("ab") as out:
        while not file.has(quota, held_out) and not progress.stop:
            number = file.next
            row: dict[str, Any]
            try:
                answer = generator.ask(
                    op="numbered",
                    task=file.task,
                    config=file.config,
                    seed=str(file.seed),
                    size=_SIZE,
                    number=number,
                )
                if "dropped" in answer:
                    row = {"failed": answer["dropped"]}
                elif file.knows(answer["entry"]):
                    row = {"repeated": True}
                else:
                    row = {"entry": answer["entry"], "split": answer["split"]}
            except GeneratorDied as death:
                row = {"failed": str(death), "died": True}
            row["number"] = number
            file.take(row)
            out.write(json.dumps(row).encode() + b"\n")
            out.flush()
            progress.tick()


def _check(file: TaskFile, generator: ReasoningGymGenerator) -> None:
    key = f"data.build.sources: reasoning_gym task {file.task}"
    try:
        answer = generator.ask(op="check", task=file.task, config=file.config)
    except GeneratorDied as death:
        raise RecipeError(f"{key}: reasoning-gym cannot be used ({death})") from None
    if "version" not in answer:
        what, found = next(iter(answer.items()))
        known = f": {found}" if isinstance(found, str) else ""
        raise RecipeError(f"{key}: {what.replace('_', ' ')}{known}")


def records(files: list[TaskFile], held_out: int) -> Iterator[tuple[str, Record]]:
    """(split, record) of all items: every training question, and `held_out` of each task."""
    for file in files:
        for split, most in (("held_out", held_out), ("train", None)):
            for entry in file.entries[split][:most]:
                entry = dict(entry)
                number = entry.pop("number")
                record_id = f"reasoning_gym/{file.task}/{number}"
                grading = {"kind": "reasoning_gym", "task": file.task, "entry": entry}
                if file.config:
                    grading["config"] = file.config
                question = entry["question"].rstrip()
                yield split, Record(record_id, "logic", file.task, question, grading)
