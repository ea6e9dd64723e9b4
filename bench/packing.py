"""Packing and balancing against the planners of NeMo-RL and slime.

Lengths are log-normal, their mean about a fifth of the row, cut at the row: the shape of response
lengths in a reasoning run. Rows are packed by ours (best fit from the longest down, over a sorted
index of free room), by plain first-fit-decreasing, and by the modified first-fit-decreasing of
Johnson and Garey (1985), NeMo-RL's default. Ranks are balanced by ours (longest first to the least
loaded, then exchanges) and by the largest differencing method of Karmarkar and Karp (1982) with
equal counts, which slime and verl use. The peers' methods are written anew from the publications.

With PEERS naming a folder that holds checkouts of NeMo-RL and slime, their own code runs as well.
"""

from __future__ import annotations

import heapq
import importlib.util
import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prorl_nemo.megatron.packing_plan import balance, pack

ROW = 16_384
MEAN = 3_470
SPREAD = 1.0
COUNTS = (512, 2_048, 8_192, 32_768, 65_536)
RANKS = (8, 64)
# The peers' times grow with the square of the number of lengths: beyond this they only take time.
PEERS_UP_TO = {"first-fit-decreasing": 8_192}
REPEATS = 9

Rows = list[list[int]]


@dataclass(frozen=True)
class Packing:
    """One packer at one number of lengths. `lower_bound`: no packer needs fewer rows."""

    method: str
    lengths: int
    milliseconds: float
    rows: int
    lower_bound: int


@dataclass(frozen=True)
class Balance:
    """One balancer. `imbalance`: the largest sum over the mean, less one."""

    method: str
    lengths: int
    ranks: int
    milliseconds: float
    imbalance: float


def main(json_path: Path | None) -> None:
    """Run the bench, print its tables and write the figures to `json_path`."""
    if peers := os.environ.get("PEERS"):
        _add_peers(Path(peers))
    packings = list(_packings())
    balances = list(_balances())
    console = Console()
    console.print(_table("rows of at most 16,384 tokens", packings))
    console.print(_table("sequences over data-parallel ranks", balances))
    if json_path:
        figures = {
            "row_tokens": ROW,
            "packing": [asdict(figure) for figure in packings],
            "balance": [asdict(figure) for figure in balances],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


def lengths(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    location = math.log(MEAN) - SPREAD**2 / 2
    return [min(ROW, max(1, round(draw.lognormvariate(location, SPREAD)))) for _ in range(count)]


def first_fit_decreasing(sizes: list[int], row: int) -> Rows:
    rows: Rows = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for number, left in enumerate(room):
            if sizes[item] <= left:
                rows[number].append(item)
                room[number] -= sizes[item]
                break
        else:
            rows.append([item])
            room.append(row - sizes[item])
    return rows


def modified_first_fit_decreasing(sizes: list[int], row: int) -> Rows:
    """Johnson and Garey, "A 71/60 theorem for bin packing", step by step.

    What the five steps leave over goes, longest first, to the emptiest row, as in NeMo-RL; the
    publication's first-fit would take the square of the number of lengths.
    """
    descending = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    large = [i for i in descending if 2 * sizes[i] > row]
    medium = [i for i in descending if 2 * sizes[i] <= row < 3 * sizes[i]]
    small = [i for i in descending if 3 * sizes[i] <= row < 6 * sizes[i]]
    tiny = [i for i in descending if 6 * sizes[i] <= row]
    rows = [[item] for item in large]
    room = [row - sizes[item] for item in large]

    def put_largest(number: int, items: list[int]) -> bool:
        """Move the largest of `items` (longest first) that fits into the row."""
        for place, item in enumerate(items):
            if sizes[item] <= room[number]:
                rows[number].append(items.pop(place))
                room[number] -= sizes[item]
                return True
        return False

    for number in range(len(rows)):
        if medium and sizes[medium[-1]] <= room[number]:
            put_largest(number, medium)
    for number in reversed(range(len(rows))):
        without_medium = len(rows[number]) == 1
        if without_medium and len(small) > 1:
            if sizes[small[-1]] + sizes[small[-2]] > room[number]:
                continue
            smallest = small.pop()
            rows[number].append(smallest)
            room[number] -= sizes[smallest]
            put_largest(number, small)
    rest = sorted(medium + small + tiny, key=lambda i: -sizes[i])
    for number in range(len(rows)):
        while rest and sizes[rest[-1]] <= room[number]:
            put_largest(number, rest)
    emptiest: list[tuple[int, int]] = []
    for item in rest:
        if emptiest and sizes[item] <= -emptiest[0][0]:
            left, number = emptiest[0]
            rows[number].append(item)
            heapq.heapreplace(emptiest, (left + sizes[item], number))
        else:
            heapq.heappush(emptiest, (sizes[item] - row, len(rows)))
            rows.append([item])
    return rows


def karmarkar_karp(sizes: list[int], ranks: int) -> Rows:
    """Largest differencing into `ranks` sets with the same number of items each.

    A state is one item to a set; the two states of the widest spread become one, the largest set
    of the one joined to the smallest of the other, until a single state is left.
    """
    ascending = sorted(range(len(sizes)), key=lambda i: sizes[i])
    states = []
    for start in range(0, len(ascending), ranks):
        sets = [(sizes[i], [i]) for i in reversed(ascending[start : start + ranks])]
        states.append((sets[-1][0] - sets[0][0], start, sets))
    heapq.heapify(states)
    while len(states) > 1:
        _, serial, first = heapq.heappop(states)
        _, _, second = heapq.heappop(states)
        joined = [
            (a + b, mine + theirs)
            for (a, mine), (b, theirs) in zip(first, reversed(second), strict=True)
        ]
        joined.sort(key=lambda pair: -pair[0])
        heapq.heappush(states, (joined[-1][0] - joined[0][0], serial, joined))
    return [members for _, members in states[0][2]]


PACKERS: dict[str, Callable[[list[int], int], Rows]] = {
    "ours": pack,
    "modified first-fit-decreasing": modified_first_fit_decreasing,
    "first-fit-decreasing": first_fit_decreasing,
}
BALANCERS: dict[str, Callable[[list[int], int], Rows]] = {
    "ours": balance,
    "Karmarkar-Karp, equal counts": karmarkar_karp,
}


def _add_peers(folder: Path) -> None:
    """The planners of NeMo-RL and slime themselves, from checkouts below `folder`."""
    nemo = _module(folder, "nemo_rl/data/packing/algorithms.py")
    slime = _module(folder, "slime/utils/seqlen_balancing.py")

    def modified(sizes: list[int], row: int) -> Rows:
        rows: Rows = nemo.ModifiedFirstFitDecreasingPacker(bin_capacity=row).pack(sizes)
        return rows

    def differencing(sizes: list[int], ranks: int) -> Rows:
        shares: Rows = slime.get_seqlen_balanced_partitions(sizes, ranks, equal_size=True)
        return shares

    PACKERS["NeMo-RL's own modified first-fit-decreasing"] = modified
    BALANCERS["slime's own Karmarkar-Karp"] = differencing


def _module(folder: Path, name: str) -> Any:
    """A file of a checkout as a module, without the package it belongs to and its imports."""
    found = sorted(folder.glob(f"**/{name}"))
    if not found:
        raise SystemExit(f"PEERS={folder} holds no checkout with {name}")
    spec = importlib.util.spec_from_file_location(found[0].stem, found[0])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _packings() -> list[Packing]:
    found = []
    for count in COUNTS:
        sizes = lengths(count)
        for name, packer in PACKERS.items():
            if count > PEERS_UP_TO.get(name, count):
                continue
            milliseconds, rows = _timed(packer, sizes, ROW)
            _check(rows, sizes)
            if any(sum(sizes[i] for i in row) > ROW for row in rows):
                raise AssertionError(f"{name} overfills a row")
            found.append(Packing(name, count, milliseconds, len(rows), -(-sum(sizes) // ROW)))
    return found


def _balances() -> list[Balance]:
    found = []
    for count in COUNTS:
        sizes = lengths(count)
        for ranks in RANKS:
            for name, balancer in BALANCERS.items():
                milliseconds, shares = _timed(balancer, sizes, ranks)
                _check(shares, sizes)
                sums = [sum(sizes[i] for i in share) for share in shares]
                imbalance = max(sums) * ranks / sum(sums) - 1
                found.append(Balance(name, count, ranks, milliseconds, imbalance))
    return found


def _timed(method: Callable[..., Rows], *arguments: object) -> tuple[float, Rows]:
    """Milliseconds of the best of some runs (a single one if it is long), and the result.

    Of processor time: all methods compute on one thread, and the machine may have other work.
    """
    best = math.inf
    for _ in range(REPEATS):
        started = time.process_time()
        result = method(*arguments)
        best = min(best, time.process_time() - started)
        if best > 1:
            break
    return 1e3 * best, result


def _check(parts: Rows, sizes: list[int]) -> None:
    if sorted(item for part in parts for item in part) != list(range(len(sizes))):
        raise AssertionError("an item is lost or used twice")


def _table(title: str, figures: list[Packing] | list[Balance]) -> Table:
    table = Table(title=title)
    for column in asdict(figures[0]):
        table.add_column(column, justify="left" if column == "method" else "right")
    for figure in figures:
        values = asdict(figure).items()
        table.add_row(*(_cell(name, value) for name, value in values))
    return table


def _cell(name: str, value: object) -> str:
    if name == "imbalance":
        return f"{value:.1e}"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)
