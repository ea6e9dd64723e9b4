"""The items of a benchmark: found, read, counted and held against their hash.

Our choice: the hash is of the content (problem and grading record), not of a file, so that a JSON
and a Parquet copy of one set are the same and a single changed answer is not. Items are named and
ordered by their content too: order and format of a file change neither seeds nor results, and the
first few are a fixed random subset.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from prorl_nemo.data.reasoning_gym_generator import GeneratorDied, ReasoningGymGenerator
from prorl_nemo.data.record import BadRowError, SkippedRow
from prorl_nemo.data.row_files import rows
from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.benchmark import Benchmark, Data
from prorl_nemo.evaluation.readers import canonical, read_row

# Every run of every model sits the same exam; training has other seeds and another split.
_EXAM_SEED = "evaluation"
# Slots tried for each item wanted: a generator may fail on some.
_SLOTS_PER_ITEM = 4


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        item_id: `<benchmark>/<hash of the content>`, or `<benchmark>/<task>/<slot>`.
        prompt: the user's turn.
        grading: the grader's record (docs/rewards.md).
        group: the task of Reasoning Gym; the benchmark elsewhere.
    """

    item_id: str
    prompt: str
    grading: dict[str, Any]
    group: str


@dataclass(frozen=True)
class Items:
    """The items of a benchmark, in the order of their ids.

    Attributes:
        sha256: of their content, all of them, also where a limit left some out.
        total: how many there are without the limit.
        pinned: the hash was checked. False where the definition has none.
    """

    items: list[Item]
    sha256: str
    total: int
    pinned: bool

    @property
    def whole(self) -> bool:
        return len(self.items) == self.total


def load_items(
    benchmark: Benchmark, data_dir: Path | None = None, limit: int | None = None
) -> Items:
    """Find and check a benchmark's items.

    Args:
        data_dir: folder that holds the files; needed unless a package or the hub has them.
        limit: at most this many; of Reasoning Gym, so many over all tasks, at least one of each.

    Raises:
        UserError: not found, unreadable, a wrong count, or other items than the definition's.
    """
    if limit is not None and limit < 1:
        raise UserError(f"items: must be at least 1, found {limit}")
    if benchmark.data.origin == "generated":
        return _generated(benchmark, limit)
    seen: dict[str, int] = {}
    named: list[tuple[str, str, Item]] = []
    with ExitStack() as stack:
        for path in _files(benchmark, data_dir, stack):
            for problem, grading in _read(path, benchmark):
                line = canonical(problem, grading)
                digest = hashlib.sha256(line.encode()).hexdigest()[:16]
                seen[digest] = seen.get(digest, 0) + 1
                again = f"-{seen[digest]}" if seen[digest] > 1 else ""
                item_id = f"{benchmark.name}/{digest}{again}"
                prompt = benchmark.prompt_for(problem.strip())
                named.append((item_id, line, Item(item_id, prompt, grading, benchmark.name)))
    return _checked(benchmark, named, limit)


def _checked(benchmark: Benchmark, named: list[tuple[str, str, Item]], limit: int | None) -> Items:
    data = benchmark.data
    named.sort(key=lambda entry: entry[0])
    lines = sorted(line for _, line, _ in named)
    sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if data.items not in (None, len(named)) or not named:
        raise UserError(
            f"{benchmark.name}: found {len(named)} items, the benchmark has {data.items}; "
            f"take the files of {data.name} at {data.revision}"
        )
    if data.sha256 not in (None, sha256):
        raise UserError(
            f"{benchmark.name}: the items are not those of {data.name} at {data.revision} "
            f"(sha256 of their content {sha256}, expected {data.sha256})"
        )
    items = [item for _, _, item in named]
    return Items(items[:limit], sha256, len(items), data.sha256 is not None)


def _files(benchmark: Benchmark, data_dir: Path | None, stack: ExitStack) -> list[Path]:
    data = benchmark.data
    if data.origin == "package":
        _check_version(data.name, data.revision, benchmark.name)
        folder = resources.files(data.name.replace("-", "_"))
        return [stack.enter_context(resources.as_file(folder.joinpath(f))) for f in data.files]
    if data_dir is not None:
        return _files_in(data_dir, benchmark)
    if data.origin == "hub":
        return _files_in(_download(benchmark), benchmark)
    raise UserError(
        f"{benchmark.name}: its items are in the repository {data.name} at {data.revision}; "
        f"give a folder that holds {data.files[0]} with --data-dir"
    )


def _files_in(folder: Path, benchmark: Benchmark) -> list[Path]:
    """What matches the first pattern that anything matches, in a folder named after the benchmark
    or its data set if there is one: copies of several sets may share a folder and file names."""
    data = benchmark.data
    for place in (folder / benchmark.name, folder / data.name.rpartition("/")[2], folder):
        if place.is_file():
            return [place]
        for pattern in data.files:
            # The folders of a pattern count: a repository may hold train/math.json too.
            found = sorted(f for f in place.rglob(Path(pattern).name) if f.match(pattern))
            if found:
                return found
    raise UserError(
        f"{benchmark.name}: {folder} holds none of {', '.join(data.files)} "
        f"(of {data.name} at {data.revision})"
    )


def _download(benchmark: Benchmark) -> Path:
    from huggingface_hub import snapshot_download

    data = benchmark.data
    try:
        return Path(
            snapshot_download(
                data.name,
                repo_type="dataset",
                revision=data.revision,
                allow_patterns=data.files,
            )
        )
    except Exception as error:  # The client lets errors of several HTTP libraries through.
        reason = str(error).strip().partition("\n")[0][:300]
        raise UserError(
            f"{benchmark.name}: {data.name} cannot be downloaded ({reason}); download it elsewhere "
            "and give its folder with --data-dir"
        ) from None


def _check_version(package: str, wanted: str, benchmark: str) -> None:
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{benchmark}: needs the package {package}=={wanted}") from None
    if found != wanted:
        raise UserError(f"{benchmark}: needs {package}=={wanted}, found {found}")


def _read(path: Path, benchmark: Benchmark) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in rows(path):
        try:
            if isinstance(row, BadRowError):
                raise row
            yield read_row(row, benchmark.data)
        except SkippedRow:
            continue
        except BadRowError as error:
            raise UserError(f"{benchmark.name}: {path}, row {number}: {error}") from None


def _generated(benchmark: Benchmark, limit: int | None) -> Items:
    """Items of Reasoning Gym: of each task the first that its generator can make."""
    data = benchmark.data
    _check_version(data.name, data.revision, benchmark.name)
    taken = taken_per_task(data, limit)
    generator = ReasoningGymGenerator()
    try:
        named = [
            entry
            for task in sorted(data.tasks)
            for entry in _task_items(benchmark, generator, task, taken)
        ]
    finally:
        generator.close()
    if taken == data.items_per_task:
        return _checked(benchmark, named, None)
    named.sort(key=lambda entry: entry[0])
    sha256 = hashlib.sha256("\n".join(line for _, line, _ in named).encode()).hexdigest()
    return Items([item for _, _, item in named], sha256, data.items or 0, False)


def taken_per_task(data: Data, limit: int | None) -> int:
    """Generated items of each task where at most `limit` of all are wanted: at least one."""
    most = data.items_per_task or 1
    return most if limit is None else max(1, min(most, limit // len(data.tasks)))


def items_under(data: Data, total: int, limit: int | None) -> int:
    """How many of `total` items a limit leaves."""
    if limit is None:
        return total
    return taken_per_task(data, limit) * len(data.tasks) if data.tasks else min(total, limit)


def _task_items(
    benchmark: Benchmark, generator: ReasoningGymGenerator, task: str, count: int
) -> list[tuple[str, str, Item]]:
    found: list[tuple[str, str, Item]] = []
    failure = ""
    size = _SLOTS_PER_ITEM * (benchmark.data.items_per_task or 1)
    for slot in range(size):
        if len(found) == count:
            break
        try:
            answer = generator.ask(
                op="item",
                task=task,
                config={},
                seed=_EXAM_SEED,
                size=size,
                split="held_out",
                slot=slot,
            )
        except GeneratorDied as death:
            answer = {"dropped": str(death)}
        if "dropped" in answer:
            failure = answer["dropped"]
            continue
        entry = answer["entry"]
        problem = entry["question"].rstrip()
        grading = {"kind": "reasoning_gym", "task": task, "entry": entry}
        item_id = f"{benchmark.name}/{task}/{slot:04d}"
        item = Item(item_id, benchmark.prompt_for(problem), grading, task)
        found.append((item_id, canonical(problem, grading), item))
    if len(found) < count:
        raise UserError(
            f"{benchmark.name}: {task} gave {len(found)} items of {count} ({failure or 'no more'})"
        )
    return found
