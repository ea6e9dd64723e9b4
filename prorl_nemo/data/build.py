"""`prorl data build`: public data sets in, checked and deduplicated prompts with a manifest out.

1. Each file of each source is read into a part: one record a row, each checked by its grader.
   A part that exists for the same file and settings is used again, so a build resumes.
2. Over all parts in the recipe's order: a problem that was there before is left out, and so is one
   that an evaluation set asks. Of the rest each task sets some aside for validation.
3. What is chosen is written as shards, and the manifest puts them in force.

Which records are held out, and which are taken when there is a limit, follows from the hash of
the problem: the same whatever order or machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prorl_nemo.data import logic_items
from prorl_nemo.data.contamination import EvaluationSets
from prorl_nemo.data.parts import Part, read_source
from prorl_nemo.data.record import Record
from prorl_nemo.data.shards import FORMAT, ShardWriter, write_manifest
from prorl_nemo.errors import RecipeError
from prorl_nemo.recipe import Recipe
from prorl_nemo.recipe_data import Build, BuildSource

REPORT = "removed.jsonl"


@dataclass
class SourceState:
    """What became of one source's records.

    Attributes:
        about: its entry in the manifest.
        places: digest of each usable record, to its task and its split if that is fixed.
    """

    about: dict[str, Any]
    parts: list[Part]
    limit: int | None
    places: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def build(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """Build the data that the recipe's `data.build` describes.

    Returns:
        the manifest.

    Raises:
        RecipeError: no such section, a source that cannot be read, or too many bad rows.
        UserError: a file that cannot be read.
    """
    settings = recipe.data.build
    if settings is None:
        raise RecipeError("data.build: the recipe has no such section; say what to build and where")
    folder = Path(settings.folder).expanduser()
    console = console or Console()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            return _build(recipe, settings, folder, console)
    except Timeout:
        raise RecipeError(f"data.build.folder: another build is writing {folder}") from None
    except OSError as error:
        raise RecipeError(f"data.build.folder: {folder}: {error.strerror or error}") from None


def _build(recipe: Recipe, settings: Build, folder: Path, console: Console) -> dict[str, Any]:
    # Before hours of reading: a wrong path is a slip that is soon mended.
    evaluation = EvaluationSets(settings.evaluation, settings.ngram, settings.overlap)
    if not settings.evaluation:
        console.print("data.build.evaluation is empty: nothing is compared with evaluation sets")
    with (
        (folder / f".{REPORT}.writing").open("w", encoding="utf-8") as report,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):
        sources = [
            _read(recipe, settings, source, index, folder, progress)
            for index, source in enumerate(settings.sources)
        ]
        _report_bad_rows(sources, report)
        _sift(sources, evaluation, report, progress)
        chosen = _choose(sources, settings.held_out)
        shards, tasks = _write(sources, chosen, folder, progress)
    os.replace(folder / f".{REPORT}.writing", folder / REPORT)
    manifest = {
        "format": FORMAT,
        "built_with": {
            name: importlib.metadata.version(name) for name in ("reasoning-gym", "if-verifiable")
        },
        "seed": recipe.seed,
        "settings": settings.model_dump(mode="json"),
        "sources": [state.about | dict(sorted(state.counts.items())) for state in sources],
        "evaluation_questions": dict(evaluation.counts),
        "tasks": tasks,
        "shards": shards,
    }
    write_manifest(folder, manifest)
    return manifest


def _read(
    recipe: Recipe,
    settings: Build,
    source: BuildSource,
    index: int,
    folder: Path,
    progress: Progress,
) -> SourceState:
    bar = progress.add_task(source.source, total=None)
    if source.source != "reasoning_gym":
        about, parts = read_source(
            source,
            folder / ".parts",
            key=f"data.build.sources.{index}",
            max_bad_share=settings.max_bad_share,
            on_row=lambda: progress.advance(bar),
        )
        return SourceState(about, parts, source.limit)
    assert source.limit is not None
    progress.update(bar, total=source.limit)
    files = logic_items.generate(
        folder / ".parts" / "reasoning_gym",
        source.tasks or {task: {} for task in logic_items.TASKS},
        count=source.limit,
        held_out=settings.held_out,
        seed=recipe.seed,
        seconds_per_item=source.seconds_per_item,
        workers=os.cpu_count() or 1,
        on_item=lambda done: progress.update(bar, completed=done),
    )
    failures = {file.task: file.failures for file in files if file.failures}
    narrow = {file.task: len(file.entries["train"]) for file in files if file.exhausted}
    about = {
        "source": source.source,
        "licence": "Apache-2.0",
        "failed_items": failures,
        "tasks_without_more_questions": narrow,
    }
    held_out = settings.held_out
    return SourceState(about, [Part(lambda: logic_items.records(files, held_out))], source.limit)


def _report_bad_rows(sources: list[SourceState], report: Any) -> None:
    for state in sources:
        for part in state.parts:
            for line, reason in part.bad_rows:
                row = {"file": part.file, "line": line, "reason": f"bad row: {reason}"}
                report.write(json.dumps({"source": state.about["source"], **row}) + "\n")


def _sift(
    sources: list[SourceState], evaluation: EvaluationSets, report: Any, progress: Progress
) -> None:
    """Find every source's usable records: new, and not asked by an evaluation set."""
    seen: dict[str, str] = {}
    bar = progress.add_task("duplicates, evaluation sets", total=None)
    for state in sources:
        for part in state.parts:
            state.counts.update(part.counts)
            for split, record in part.records():
                progress.advance(bar)
                digest = record.digest
                if digest in seen:
                    state.counts["duplicates"] += 1
                    if seen[digest] != record.gold_digest:
                        state.counts["duplicates_with_another_answer"] += 1
                    continue
                seen[digest] = record.gold_digest
                match = evaluation.match(record.problem) if len(evaluation) else None
                if match:
                    state.counts["contaminated"] += 1
                    found = {
                        "source": state.about["source"],
                        "record": record.record_id,
                        "reason": f"asked by {match.question}",
                        "share": round(match.share, 3),
                        "problem": record.problem[:200],
                    }
                    report.write(json.dumps(found) + "\n")
                    continue
                state.places[digest] = (record.task, split)


def _choose(sources: list[SourceState], held_out: int) -> dict[str, str]:
    """Digest to split, of all records that are written."""
    chosen: dict[str, str] = {}
    for state in sources:
        # Split by the generator already, or by hash: the smallest of a task are held out.
        exam = {d for d, (_, split) in state.places.items() if split == "held_out"}
        free: dict[str, list[str]] = defaultdict(list)
        for digest, (task, split) in state.places.items():
            if split is None:
                free[task].append(digest)
        for digests in free.values():
            exam.update(sorted(digests)[: min(held_out, len(digests) // 10)])
        train = sorted(state.places.keys() - exam)
        state.counts["beyond_limit"] = max(0, len(train) - (state.limit or len(train)))
        chosen |= dict.fromkeys(exam, "held_out")
        chosen |= dict.fromkeys(train[: state.limit], "train")
    if "train" not in chosen.values():
        raise RecipeError("data.build.sources: no training prompt is left; see what was removed")
    return chosen


def _write(
    sources: list[SourceState], chosen: dict[str, str], folder: Path, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, dict[str, dict[str, int]]]]:
    """Write the chosen records; (shards, counts by domain, task and split)."""
    bar = progress.add_task("writing", total=len(chosen))
    writers: dict[tuple[str, str], ShardWriter] = {}
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    with ExitStack() as stack:
        for state, record in _all(sources):
            # The first of equal problems is the chosen one.
            split = chosen.pop(record.digest, None)
            if split is None:
                continue
            key = (record.domain, split)
            if key not in writers:
                writers[key] = ShardWriter(folder, *key)
                stack.callback(writers[key].close)
            writers[key].write(record)
            state.counts[split] += 1
            counts[record.domain][record.task][split] += 1
            progress.advance(bar)
    shards = [shard for key in sorted(writers) for shard in writers[key].shards]
    tasks = {
        domain: {task: dict(sorted(found.items())) for task, found in sorted(by_task.items())}
        for domain, by_task in sorted(counts.items())
    }
    return shards, tasks


def _all(sources: list[SourceState]) -> Iterator[tuple[SourceState, Record]]:
    for state in sources:
        for part in state.parts:
            for _, record in part.records():
                yield state, record
