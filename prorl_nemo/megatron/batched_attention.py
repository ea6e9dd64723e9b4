"""Attention of a packed row in few padded batches: torch SDPA, on CPU and GPU.

The default on both. `policy.attention: flex` takes one kernel for a whole row in its place, on GPUs
alone (flex_row.py): torch has no backward pass of FlexAttention on CPU.

A stretch is a run of tokens that look at the same tokens before them: a plain sequence, a shared
prompt, or one response behind its prompt. Each is a product of its own, so nothing that a mask
would hide is computed. One call for each costs more than its arithmetic, though, and the backward
pass of a slice writes zeros for the whole row: with 64 sequences of 40 tokens these zeros were more
than half of a training step. So stretches of like lengths are one padded batch, gathered from the
row and scattered back at once. Our choice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from prorl_nemo.megatron.packing import PackedRow, Tree

# A stretch joins a batch whose longest has at most a third, or 16, more keys. Beyond 768 keys
# arithmetic outweighs calls, and a stretch is padded no more.
_FILLED_SHARE = 0.75
_FEW_TOKENS = 16
_LONG = 768


class Stretch(NamedTuple):
    """Consecutive queries of a row, and the keys of the last of them.

    Attributes:
        held: offset of the first query among the tokens this rank holds.
        queries: how many.
        prompt: (start, stop) in the whole row of what all of them see; empty without a shared
            prompt.
        own: (start, stop) in the whole row of the other keys; its last tokens are the queries.
    """

    held: int
    queries: int
    prompt: tuple[int, int]
    own: tuple[int, int]

    @property
    def keys(self) -> int:
        """How many tokens the last query sees."""
        return self.prompt[1] - self.prompt[0] + self.own[1] - self.own[0]


class Batch(NamedTuple):
    """Stretches of like lengths, each padded at its end with its own last token.

    Attributes:
        size, queries, keys: how many stretches, and the most of each that one has.
        before: [stretches, 1, 1], keys before each one's first query.
        masked: whether any has keys before its first query: the others are plainly causal.
    """

    size: int
    queries: int
    keys: int
    before: Tensor
    masked: bool


class Layout(NamedTuple):
    """The batches of a row; places are those of all batches, end to end.

    Attributes:
        batches: in the order of their places.
        query_index: [query places], the held token at each.
        key_index: [key places], the row's token at each.
        places: [held tokens], the query place of each.
    """

    batches: tuple[Batch, ...]
    query_index: Tensor
    key_index: Tensor
    places: Tensor


def attend_in_batches(
    q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scale: float | None
) -> Tensor:
    """Causal attention inside each tree of a row, responses blind to each other.

    On CPU in fp32: torch's bf16 kernel there is several times slower on short sequences and no
    faster on long ones, and gradients of a shared prompt add up without rounding.

    Args:
        q: [1, heads, held tokens, dim].
        k, v: [1, groups, tokens, dim] of the whole row.

    Returns:
        [1, heads, held tokens, dim] in the type of q.
    """
    heads = q.shape[1]
    plan = layout(row.trees, row.pieces, q.device)

    def gathered(x: Tensor, index: Tensor, sizes: Iterable[tuple[int, int]]) -> list[Tensor]:
        """[stretches, heads, longest, dim] of each batch."""
        # An embedding's backward adds rows in parallel, that of plain indexing one by one.
        tokens = x[0].transpose(0, 1).flatten(1)
        places = F.embedding(index, tokens if x.is_cuda else tokens.float())
        places = places.unflatten(-1, (x.shape[1], -1)).repeat_interleave(heads // x.shape[1], 1)
        shapes = list(sizes)
        return [
            part.unflatten(0, shape).transpose(1, 2)
            for part, shape in zip(places.split([n * m for n, m in shapes]), shapes, strict=True)
        ]

    key_sizes = [(batch.size, batch.keys) for batch in plan.batches]
    queries = gathered(q, plan.query_index, [(b.size, b.queries) for b in plan.batches])
    keys = gathered(k, plan.key_index, key_sizes)
    values = gathered(v, plan.key_index, key_sizes)
    parts = []
    for batch, query, key, value in zip(plan.batches, queries, keys, values, strict=True):
        mask = _mask(batch) if batch.masked else None
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        parts.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    whole = F.embedding(plan.places, torch.cat(parts))
    return whole.unflatten(-1, (heads, -1)).transpose(0, 1)[None].to(q.dtype)


def _mask(batch: Batch) -> Tensor:
    """[stretches, 1, queries, keys] bool, True where a query may look."""
    device = batch.before.device
    last = torch.arange(batch.queries, device=device)[:, None] + batch.before
    return (torch.arange(batch.keys, device=device) <= last)[:, None]


@functools.lru_cache(maxsize=64)
def layout(
    trees: tuple[Tree, ...], pieces: tuple[tuple[int, int], ...], device: torch.device
) -> Layout:
    """How a rank's share of a row is computed; the same for every layer.

    Args:
        trees, pieces: a PackedRow's.
        device: of the tensors.
    """
    groups: list[list[Stretch]] = []
    for stretch in sorted(stretches(trees, pieces), key=_order, reverse=True):
        if not groups or not _joins(stretch, groups[-1][0]):
            groups.append([])
        groups[-1].append(stretch)
    batches, query_index, key_index = [], [], []
    for group in groups:
        queries, keys = max(s.queries for s in group), group[0].keys
        before = torch.tensor([s.keys - s.queries for s in group])[:, None, None]
        # Known here: to ask a GPU would wait for it, in every layer.
        masked = bool(before.any())
        batches.append(Batch(len(group), queries, keys, before.to(device), masked))
        for s in group:
            query_index.append(_padded([(s.held, s.held + s.queries)], queries))
            key_index.append(_padded([s.prompt, s.own], keys))
    index = np.concatenate(query_index)
    # Where a stretch is padded with its last token, that token has several places: the first.
    places = np.unique(index, return_index=True)[1]
    return Layout(
        tuple(batches),
        *(torch.from_numpy(x).to(device) for x in (index, np.concatenate(key_index), places)),
    )


def stretches(trees: Iterable[Tree], pieces: Iterable[tuple[int, int]]) -> Iterator[Stretch]:
    """All tokens of the pieces, in order, each in one stretch."""
    held = 0
    for start, stop in pieces:
        for tree in trees:
            for prompt, own in _runs(tree):
                first, last = max(start, own[0]), min(stop, own[1])
                if first < last:
                    yield Stretch(held + first - start, last - first, prompt, (own[0], last))
        held += stop - start


def _runs(tree: Tree) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(shared prompt, tokens) of each run of a tree."""
    stop = tree.start + tree.length
    if len(tree.responses) < 2:
        yield (tree.start, tree.start), (tree.start, stop)
        return
    prompt = (tree.start, tree.start + tree.prompt)
    yield (tree.start, tree.start), prompt
    start = prompt[1]
    for length in tree.responses:
        yield prompt, (start, start + length)
        start += length


def _order(stretch: Stretch) -> tuple[bool, int]:
    """Those that need a mask by themselves, each kind by length."""
    return stretch.keys > stretch.queries, stretch.keys


def _joins(stretch: Stretch, longest: Stretch) -> bool:
    if _order(stretch)[0] != _order(longest)[0]:
        return False
    if longest.keys > _LONG:
        return (stretch.keys, stretch.queries) == (longest.keys, longest.queries)
    return stretch.keys >= min(_FILLED_SHARE * longest.keys, longest.keys - _FEW_TOKENS)


def _padded(ranges: Iterable[tuple[int, int]], length: int) -> NDArray[np.int64]:
    """The ranges' numbers, and the last of them until there are `length`."""
    numbers = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    padded = np.full(length, numbers[-1])
    padded[: len(numbers)] = numbers
    return padded
