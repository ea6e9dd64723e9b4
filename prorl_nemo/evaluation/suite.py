"""What an evaluation asks: benchmarks under a protocol, as options and files say it.

The manifest (`evaluation.json` of an evaluation's folder) pins everything that a number depends on:
model, protocol, definitions, items, seed. An evaluation is resumed only under an equal one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.benchmark import (
    Benchmark,
    Protocol,
    check_names,
    load_benchmarks,
    load_protocols,
)
from prorl_nemo.evaluation.items import Item, Items, items_under, load_items, taken_per_task
from prorl_nemo.settings_file import changed_keys, load_settings, parse_settings

DEFINITIONS = Path(__file__).parents[1] / "eval"
"""Benchmarks, protocols and reported numbers of this project."""


@dataclass(frozen=True)
class Changes:
    """What a command changes of a protocol; None leaves it as it is.

    Samples and items are part of every result (avg@n of so many items). The others make the
    protocol another one, and its label says so.
    """

    samples: int | None = None
    items: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class Part:
    """A benchmark of a suite.

    Attributes:
        samples: of each item.
        strict: partial credit counts as 0.
    """

    benchmark: Benchmark
    items: Items
    samples: int
    strict: bool

    @property
    def metric(self) -> str:
        """As the reported tables name it: avg (strict) or reward."""
        return "avg" if self.strict else "reward"


@dataclass(frozen=True)
class Suite:
    """Everything that is to be answered, under one protocol.

    Attributes:
        label: the protocol's name, with what was changed of its sampling.
    """

    protocol: Protocol
    label: str
    seed: int
    parts: list[Part]

    @property
    def total(self) -> int:
        """Samples in all."""
        return sum(len(part.items.items) * part.samples for part in self.parts)

    def manifest(self, model: dict[str, Any]) -> dict[str, Any]:
        """What the numbers depend on, JSON-able."""
        return {
            "model": model,
            "protocol": {"label": self.label, **self.protocol.model_dump(mode="json")},
            "seed": self.seed,
            "benchmarks": {
                part.benchmark.name: {
                    "definition": part.benchmark.model_dump(mode="json"),
                    "items_sha256": part.items.sha256,
                    "items_pinned": part.items.pinned,
                    "items": len(part.items.items),
                    "items_in_all": part.items.total,
                    "samples": part.samples,
                    "strict": part.strict,
                }
                for part in self.parts
            },
        }

    def item_records(self) -> list[dict[str, Any]]:
        """The items as they are kept beside the samples, to be graded again without their data."""
        return [
            {
                "item": item.item_id,
                "benchmark": part.benchmark.name,
                "group": item.group,
                "prompt": item.prompt,
                "grading": item.grading,
            }
            for part in self.parts
            for item in part.items.items
        ]


def load_suite(
    definitions: Path,
    protocol: str,
    names: Sequence[str] = (),
    data_dir: Path | None = None,
    changes: Changes = Changes(),
    seed: int = 0,
) -> Suite:
    """Read a protocol and the items of its benchmarks.

    Args:
        definitions: folder with `benchmarks/` and `protocols/`.
        protocol: a name under `protocols/`, or a file.
        names: benchmarks; empty: those of the protocol, and all there are where it lists none.

    Raises:
        UserError: an unknown name, a value out of range, or items that cannot be had.
    """
    known = load_benchmarks(definitions)
    chosen, label = changed(find_protocol(definitions, protocol), changes)
    if len(set(names)) != len(names):
        raise UserError("--benchmarks: a benchmark is named twice")
    wanted = list(names) or chosen.benchmarks or sorted(known)
    for name in wanted:
        if name not in known:
            raise UserError(
                f"--benchmarks: there is no benchmark {name!r}; there are {', '.join(known)}"
            )
        # samples_for may name others, but a protocol that lists its benchmarks means only them.
        if chosen.benchmarks and name not in chosen.benchmarks:
            raise UserError(
                f"--benchmarks: the protocol {chosen.name} says nothing about {name}; it has "
                f"{', '.join(chosen.benchmarks)}"
            )
    parts = []
    for name in wanted:
        benchmark = known[name]
        items = load_items(benchmark, data_dir, chosen.items)
        samples = chosen.samples_of(benchmark)
        parts.append(Part(benchmark, items, samples, chosen.strict(benchmark)))
    return Suite(chosen, label, seed, parts)


def find_protocol(definitions: Path, name: str) -> Protocol:
    """A protocol by its name under `definitions`, or from a file of one's own."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return check_names(load_settings(Protocol, Path(name)), definitions)
    protocols = load_protocols(definitions)
    if name not in protocols:
        raise UserError(
            f"--protocol: there is no protocol {name!r}; there are {', '.join(protocols)}, or give "
            "a file"
        )
    return protocols[name]


def changed(protocol: Protocol, changes: Changes) -> tuple[Protocol, str]:
    """A protocol with the changes of a command, checked as a whole, and its label."""
    raw = protocol.model_dump(mode="json")
    sampling = {
        key: value
        for key in ("temperature", "top_p", "max_tokens")
        if (value := getattr(changes, key)) is not None and value != raw["sampling"][key]
    }
    raw["sampling"] |= sampling
    if changes.samples is not None:
        raw |= {"samples": changes.samples, "samples_for": {}}
    if changes.items is not None:
        raw["items"] = changes.items
    label = protocol.name
    if sampling:
        label += f" ({', '.join(f'{key} {value:g}' for key, value in sampling.items())})"
    return parse_settings(Protocol, raw, "protocol"), label


def stored_suite(manifest: dict[str, Any], records: Sequence[dict[str, Any]]) -> Suite:
    """The suite that a manifest and the items beside it describe.

    Raises:
        UserError: they are damaged, or of another version.
    """
    try:
        raw = dict(manifest["protocol"])
        label = str(raw.pop("label"))
        protocol = parse_settings(Protocol, raw, "protocol")
        by_benchmark: dict[str, list[Item]] = {name: [] for name in manifest["benchmarks"]}
        for record in records:
            by_benchmark[record["benchmark"]].append(
                Item(record["item"], record["prompt"], record["grading"], record["group"])
            )
        parts = []
        for name, about in manifest["benchmarks"].items():
            items = Items(
                by_benchmark[name],
                about["items_sha256"],
                about["items_in_all"],
                about["items_pinned"],
            )
            if len(items.items) != about["items"]:
                raise UserError(f"{name}: {len(items.items)} items are kept of {about['items']}")
            benchmark = parse_settings(Benchmark, about["definition"], name)
            parts.append(Part(benchmark, items, about["samples"], about["strict"]))
        return Suite(protocol, label, int(manifest["seed"]), parts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the evaluation's folder is damaged or of another version ({error!r})"
        ) from None


def under_protocol(suite: Suite, protocol: Protocol) -> Suite:
    """The same samples read under another protocol: fewer of them, or scored otherwise.

    Raises:
        UserError: the protocol samples otherwise, or asks for more than there is.
    """
    if protocol.sampling != suite.protocol.sampling:
        lines = changed_lines(
            suite.protocol.sampling.model_dump(mode="json"),
            protocol.sampling.model_dump(mode="json"),
        )
        raise UserError(
            f"--protocol: {protocol.name} samples otherwise than these were ({'; '.join(lines)}); "
            "evaluate anew under it"
        )
    parts = []
    for part in suite.parts:
        benchmark, items = part.benchmark, part.items
        if protocol.benchmarks and benchmark.name not in protocol.benchmarks:
            continue
        wanted, there = protocol.samples_of(benchmark), len(items.items)
        most = items_under(benchmark.data, items.total, protocol.items)
        if wanted > part.samples or there < most:
            raise UserError(
                f"--protocol: {protocol.name} wants {wanted} samples of {most} items of "
                f"{benchmark.name}; there are {part.samples} of {there}"
            )
        fewer = replace(items, items=_first(items.items, benchmark, protocol.items))
        parts.append(Part(benchmark, fewer, wanted, protocol.strict(benchmark)))
    if not parts:
        raise UserError(f"--protocol: {protocol.name} is about none of these benchmarks")
    return Suite(protocol, protocol.name, suite.seed, parts)


def _first(items: list[Item], benchmark: Benchmark, limit: int | None) -> list[Item]:
    """The subset that `load_items` takes under a limit: of generated items so many of each task."""
    tasks = benchmark.data.tasks
    if limit is None or not tasks:
        return items[:limit]
    per_task, taken = taken_per_task(benchmark.data, limit), dict.fromkeys(tasks, 0)
    chosen = []
    for item in items:
        taken[item.group] += 1
        if taken[item.group] <= per_task:
            chosen.append(item)
    return chosen


def changed_lines(before: Any, now: Any) -> list[str]:
    """Dotted keys in which two manifests differ, with both values cut short."""
    return [
        f"{key}: {there!r:.100} there, {here!r:.100} now"
        for key, (there, here) in sorted(changed_keys(before, now).items())
    ]
