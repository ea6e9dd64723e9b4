"""Which sequences go into which row, and which rows to which rank. Pure; no torch, no Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingItem:
    """A prompt and one or more of its responses, to be computed together.

    Attributes:
        prompt_ids: prompt tokens (at least one).
        responses: response tokens, one list for each sample (none empty).
        sample_ids: the index of each sample in the rollout batch, by which its
            per-token figures are looked up.
    """

    prompt_ids: Sequence[int]
    responses: Sequence[Sequence[int]]
    sample_ids: Sequence[int]

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(r) for r in self.responses)


def pack(items: Sequence[TrainingItem], budget: int) -> list[list[int]]:
    """Put items into as few rows of at most `budget` tokens as first-fit-decreasing finds.

    An item longer than the budget gets a row of its own. Returns, for each row,
    the indices of its items in increasing order; rows in order of their first
    item, so the result depends on nothing but the lengths.
    """
    order = sorted(range(len(items)), key=lambda i: (-items[i].tokens, i))
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        size = items[index].tokens
        for row, left in enumerate(room):
            if size <= left:
                rows[row].append(index)
                room[row] -= size
                break
        else:
            rows.append([index])
            room.append(budget - size)
    for row in rows:
        row.sort()
    return sorted(rows, key=lambda row: row[0])


def split_over_ranks(rows: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal rows (given by their cost) to `ranks`, longest first to the least loaded.

    Returns the row indices of each rank, in increasing order.
    """
    load = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(rows)), key=lambda i: (-rows[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], len(shares[r]), r))
        shares[rank].append(index)
        load[rank] += rows[index]
    return [sorted(share) for share in shares]


def items_of_group(
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    sample_ids: Sequence[int],
    shared_prompt: bool,
) -> list[TrainingItem]:
    """A group as one item with a shared prompt, or as one item for each response."""
    if shared_prompt:
        return [TrainingItem(prompt_ids, responses, sample_ids)]
    return [
        TrainingItem(prompt_ids, [response], [sample])
        for response, sample in zip(responses, sample_ids, strict=True)
    ]
