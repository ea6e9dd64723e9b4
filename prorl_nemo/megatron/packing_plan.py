"""Which sequences go into which row of which rank. Pure; no torch, no Megatron.

Items are dealt to the data-parallel ranks by estimated cost, then each rank's items are packed
into as few rows as best-fit-decreasing finds. Both take O(n log n): a step of 8,192 sequences
is planned in some 20 ms, on every rank alike (`python -m bench packing`).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class TrainingItem:
    """A prompt and one or more of its responses, to be computed together.

    Attributes:
        prompt_ids: prompt tokens (at least one).
        responses: response tokens, one list for each sample (none empty).
        sample_ids: the index of each sample in the rollout batch, by which its
            per-token figures are looked up.
    """

    prompt_ids: Tokens
    responses: Sequence[Tokens]
    sample_ids: Sequence[int]

    @property
    def tokens(self) -> int:
        """Of the prompt, once, and all responses."""
        return len(self.prompt_ids) + sum(len(r) for r in self.responses)


@dataclass(frozen=True)
class CostModel:
    """What an item costs, in any unit: a linear part, and the quadratic one of attention.

    Attributes:
        token: the layers' matrices, for each token.
        target: the output head, for each response token.
        pair: attention, for each token and token it looks at.
    """

    token: float = 1.0
    target: float = 0.0
    pair: float = 0.0

    def of(self, item: TrainingItem) -> float:
        """The cost of an item, its prompt computed once for all responses."""
        prompt = len(item.prompt_ids)
        targets = [len(response) for response in item.responses]
        pairs = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in targets)
        return self.token * (prompt + sum(targets)) + self.target * sum(targets) + self.pair * pairs


def plan_rows(
    items: Sequence[TrainingItem],
    budget: int,
    ranks: int,
    cost: CostModel,
    rows_per_rank: int = 1,
) -> list[list[list[int]]]:
    """For each data-parallel rank, its rows as lists of item indices.

    A rank with fewer than `rows_per_rank` rows gets the same items in smaller rows, and where
    there are too few items, empty rows: a rank that takes no part would leave the others
    waiting in a collective.
    """
    plan = []
    for share in balance([cost.of(item) for item in items], ranks):
        sizes = [items[i].tokens for i in share]
        rows, room = pack(sizes, budget), budget
        while len(rows) < min(rows_per_rank, len(share)):
            room = max(room // 2, 1)
            rows = pack(sizes, room)
        rows += [[]] * (rows_per_rank - len(rows))
        plan.append([[share[i] for i in row] for row in rows])
    return plan


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of at most `budget` tokens, as few as best-fit-decreasing finds.

    An item longer than the budget gets a row of its own. Returns, for each row, the indices of
    its items, longest first; the result depends on nothing but the sizes.
    """
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    smallest = sizes[order[-1]] if order else 0
    rows: list[list[int]] = []
    # Open rows by the tokens that still fit, and those numbers in order. A row too full for
    # the smallest item is forgotten.
    open_rows: dict[int, list[list[int]]] = {}
    rooms: list[int] = []
    for index in order:
        size = sizes[index]
        place = bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            row = open_rows[room].pop()
            row.append(index)
            if not open_rows[room]:
                del rooms[place]
        else:
            room, row = budget, [index]
            rows.append(row)
        left = room - size
        if left >= smallest:
            candidates = open_rows.setdefault(left, [])
            if not candidates:
                insort(rooms, left)
            candidates.append(row)
    return rows


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Deal items to ranks so that the largest sum is near the mean.

    Longest first to the least loaded rank (Graham 1969), then exchanges that take from the most
    loaded. Returns the item indices of each rank, in increasing order.
    """
    values = np.asarray(costs, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0.0, rank) for rank in range(ranks)]
    for place, cost in enumerate(values[order].tolist()):
        load, rank = heap[0]
        dealt[rank].append(place)
        heapq.heapreplace(heap, (load + cost, rank))
    shares = [order[places] for places in dealt]
    if len(values) > ranks > 1:
        loads = np.zeros(ranks)
        for load, rank in heap:
            loads[rank] = load
        _exchange(values, shares, loads)
    return [np.sort(share).tolist() for share in shares]


def _exchange(
    costs: NDArray[np.float64], shares: list[NDArray[np.int64]], loads: NDArray[np.float64]
) -> None:
    """Swap an item of the most loaded rank for a lighter one elsewhere while that helps.

    Args:
        shares: the items of each rank, from the most to the least costly; kept so.
        loads: the sum of each rank's costs; kept so.
    """
    # Under a token in millions; four swaps a rank are more than it takes to get there.
    enough = 1e-7 * loads.mean()
    for _ in range(4 * len(shares)):
        heaviest = int(loads.argmax())
        heavy = costs[shares[heaviest]]
        for other in np.argsort(loads, kind="stable").tolist():
            gap = loads[heaviest] - loads[other]
            if gap <= enough:
                return
            light = costs[shares[other]]
            swap = _best_swap(heavy, light, gap)
            if swap:
                break
        else:
            return
        mine, theirs = swap
        moved = heavy[mine] - light[theirs]
        a, b = shares[heaviest][mine], shares[other][theirs]
        shares[heaviest][mine], shares[other][theirs] = b, a
        for rank in (heaviest, other):
            share = shares[rank]
            shares[rank] = share[np.argsort(-costs[share], kind="stable")]
        loads[heaviest] -= moved
        loads[other] += moved


def _best_swap(
    heavy: NDArray[np.float64], light: NDArray[np.float64], gap: float
) -> tuple[int, int] | None:
    """Positions of the two items whose costs differ by as near half the gap as can be.

    Both lists of costs are in descending order.
    """
    if not len(light):
        return None
    ideal = heavy - gap / 2
    after = len(light) - light[::-1].searchsorted(ideal)
    near = np.stack((np.maximum(after - 1, 0), np.minimum(after, len(light) - 1)))
    off = np.abs(light[near] - ideal)
    best = int(off.argmin())
    side, mine = divmod(best, len(heavy))
    # Off by half the gap or more, the swap moves nothing or only turns the two ranks round.
    if off[side, mine] >= 0.499 * gap:
        return None
    return mine, int(near[side, mine])


def items_of_group(
    prompt_ids: Tokens,
    responses: Sequence[Tokens],
    sample_ids: Sequence[int],
    shared_prompt: bool,
    budget: int | None = None,
) -> list[TrainingItem]:
    """A group as items: one for each response, or as many to a prompt as `budget` tokens hold."""
    if not shared_prompt:
        bundles = [[i] for i in range(len(responses))]
    elif budget is None:
        bundles = [list(range(len(responses)))]
    else:
        room = max(budget - len(prompt_ids), 1)
        bundles = [sorted(row) for row in pack([len(r) for r in responses], room)]
    return [
        TrainingItem(prompt_ids, [responses[i] for i in bundle], [sample_ids[i] for i in bundle])
        for bundle in bundles
    ]
