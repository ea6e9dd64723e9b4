"""What needs no model: grading stored samples again, and comparing two evaluations."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prorl_nemo.evaluation.estimators import NOT_ASKED
from prorl_nemo.evaluation.result import (
    BenchmarkResult,
    ModelsCompared,
    compare_models,
    read_samples,
)
from prorl_nemo.evaluation.suite import DEFINITIONS, changed_lines, find_protocol, under_protocol
from prorl_nemo.harness.outputs import (
    chosen_numbers,
    reported_name,
    reported_numbers,
    write_results,
)
from prorl_nemo.harness.runner import open_graders, verdict_of
from prorl_nemo.harness.store import (
    SAMPLES,
    locked,
    read_manifest,
    read_store,
    replace_file,
    sample_rows,
)
from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.rewards.verdict import Verdict

_AHEAD = 256  # responses in flight: enough to keep the graders busy, little memory


def regrade(
    folder: Path,
    *,
    protocol: str | None = None,
    definitions: Path = DEFINITIONS,
    workers: int | None = None,
    sandbox: str = "auto",
    reported_as: str | None = None,
    beside: Sequence[str] = (),
) -> tuple[list[BenchmarkResult], int]:
    """Grade an evaluation's samples again, without generating, and write its figures anew.

    Args:
        protocol: read the samples under another protocol; its figures get files of their own.

    Returns:
        the figures, and how many samples have another score or verdict than before.
    """
    read_manifest(folder)  # Refuses a folder of something else before the lock makes one.
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        reported = reported_numbers(definitions)
        manifest, suite = read_store(folder)
        thinking = {
            row["item"] for row in sample_rows(folder) if row["prompt"].rstrip().endswith("<think>")
        }
        records = {
            item.item_id: {**item.grading, "thinking": True}
            if item.item_id in thinking
            else item.grading
            for part in suite.parts
            for item in part.items.items
        }
        graders = stack.enter_context(open_graders(suite, workers, sandbox))
        changed = 0

        def lines() -> Iterator[str]:
            nonlocal changed
            for before, row in _graded_again(folder, records, graders):
                changed += any(before[key] != row[key] for key in ("score", "verdict", "answer"))
                yield json.dumps(row, separators=(",", ":")) + "\n"

        replace_file(folder / SAMPLES, lines())
        name = str(manifest["model"]["name"])
        own = reported_name(reported, name, reported_as)
        numbers = chosen_numbers(reported, own, beside)
        suffix = ""
        if protocol is not None:
            suite = under_protocol(suite, find_protocol(definitions, protocol))
            manifest = suite.manifest(manifest["model"])
            suffix = f".{suite.protocol.name}"
        results = write_results(folder, manifest, suite, numbers, own, suffix)
    return results, changed


def compare(a: Path, b: Path) -> tuple[list[ModelsCompared], list[str], tuple[str, str]]:
    """The paired test of two evaluations.

    Returns:
        by benchmark; what else than the model differs between the two; the names of both.
    """
    manifests, suites, samples = [], [], []
    for folder in (a, b):
        manifest, suite = read_store(folder)
        manifests.append(manifest)
        suites.append(suite)
        samples.append(read_samples(suite, sample_rows(folder)))
    compared = compare_models(suites[0], samples[0], suites[1], samples[1])
    common = {found.name for found in compared}
    unlike = changed_lines(*(_comparable(manifest, common) for manifest in manifests))
    names = tuple(str(m["model"]["name"]) for m in manifests)
    first, second = (
        (f"{names[0]} (1)", f"{names[1]} (2)") if names[0] == names[1] else (names[0], names[1])
    )
    return compared, unlike, (first, second)


def _graded_again(
    folder: Path, records: dict[str, dict[str, Any]], graders: GraderPool
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(row before, row after) in the file's order, with a bounded number in flight."""
    waiting: deque[tuple[dict[str, Any], Future[Verdict] | None]] = deque()

    def finish() -> tuple[dict[str, Any], dict[str, Any]]:
        row, future = waiting.popleft()
        if future is None:
            return row, row
        return row, verdict_of(row, records[row["item"]], future)

    for number, row in enumerate(sample_rows(folder)):
        record = records.get(row["item"])
        future = None
        # What was not asked has no response to grade again.
        if record is not None and not row["reason"].startswith(NOT_ASKED):
            future = graders.submit(str(number), record, row["response"], training=False)
        waiting.append((row, future))
        if len(waiting) >= _AHEAD:
            yield finish()
    while waiting:
        yield finish()


def _comparable(manifest: dict[str, Any], common: set[str]) -> dict[str, Any]:
    """What decides the figures of the benchmarks in common, but for the model."""
    fields = ("definition", "items_sha256", "samples")
    generator = manifest["model"].get("generator", {})
    return {
        "protocol": {name: manifest["protocol"][name] for name in ("sampling", "scoring")},
        "seed": manifest["seed"],
        # A server's address and the name it serves are those of the model.
        "generator": {key: generator[key] for key in generator.keys() - {"url", "served"}},
        "benchmarks": {
            name: {field: manifest["benchmarks"][name][field] for field in fields}
            for name in common
        },
    }
