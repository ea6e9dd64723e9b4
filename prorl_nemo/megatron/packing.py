"""Packed rows: many sequences, and prompts shared by a group, in one [1, tokens] row.

A row is a list of trees. A tree is a prompt followed by the responses of its
group; each response attends to the prompt and to itself, with the positions it
would have alone. A plain sequence is a tree with one response. The log-prob of
a response's first token comes from the prompt's last token, so a shared prompt
is computed once for all its responses, forward and backward: exact, because
attention is the only place where tokens meet.

Our own layout; packing without sharing follows the usual `thd` practice. With
context parallelism a rank holds two pieces of the row, one from each end, so that
every rank has as many earlier tokens to look at as any other (the balance of
Llama 3, arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from prorl_nemo.megatron.packing_plan import TrainingItem


@dataclass(frozen=True)
class Tree:
    """Where one prompt and its responses lie in a row (token offsets and lengths)."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def length(self) -> int:
        """In tokens."""
        return self.prompt + sum(self.responses)


@dataclass
class PackedRow(PackedSeqParams):
    """One micro-batch, or a context-parallel rank's pieces of it.

    Passed through Megatron as its `packed_seq_params`. `qkv_format` is not `thd`: attention
    gets [tokens, 1, heads, dim] and rotates by each token's own position (see layers.py). `trees`,
    `tokens`, `sample_ids` and `sample_lengths` describe the whole row on every rank.

    Attributes:
        input_ids: [1, held tokens].
        position_ids: [held tokens], each token's position in its own sequence.
        trees: the layout, in order.
        tokens: length of the whole row.
        pieces: (start, stop) of the stretches of the row this rank holds, in order.
        hidden_index: [held targets], index, among the held tokens, of the hidden state that
            predicts each target.
        targets: [held targets], response tokens in order of (item, response, position).
        target_index: [held targets], the number of each among the targets of the whole row.
        sample_ids, sample_lengths: the sample of each run of the row's targets, and its length.
        temperature: divides the logits, as it did when the responses were sampled.
        block_mask: FlexAttention's, made by the first layer that needs it (flex_row.py).
    """

    input_ids: Tensor = field(default_factory=lambda: torch.empty(0))
    position_ids: Tensor = field(default_factory=lambda: torch.empty(0))
    trees: tuple[Tree, ...] = ()
    tokens: int = 0
    pieces: tuple[tuple[int, int], ...] = ()
    hidden_index: Tensor = field(default_factory=lambda: torch.empty(0))
    targets: Tensor = field(default_factory=lambda: torch.empty(0))
    target_index: Tensor = field(default_factory=lambda: torch.empty(0))
    sample_ids: tuple[int, ...] = ()
    sample_lengths: tuple[int, ...] = ()
    temperature: float = 1.0
    block_mask: Any = None

    def to(self, device: torch.device) -> PackedRow:
        """The row with its tensors on `device`."""
        names = ("input_ids", "position_ids", "hidden_index", "targets", "target_index")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def build_row(
    items: Sequence[TrainingItem], temperature: float = 1.0, multiple_of: int = 1
) -> PackedRow:
    """Lay out `items` in one row, padded with token 0 to a multiple that ranks can share.

    The padding is a tree of its own, so nothing attends to it. No items give a row of padding,
    which takes part in every collective and adds nothing.

    Raises:
        ValueError: a prompt or a response without tokens.
    """
    ids: list[NDArray[np.int64]] = []
    positions: list[NDArray[np.int64]] = []
    hidden: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int64]] = []
    trees: list[Tree] = []
    length = 0
    for item in items:
        if not len(item.prompt_ids) or not all(len(r) for r in item.responses):
            raise ValueError("a prompt and each of its responses need at least one token")
        start, prompt = length, len(item.prompt_ids)
        ids.append(np.asarray(item.prompt_ids))
        positions.append(np.arange(prompt))
        length += prompt
        for response in item.responses:
            ids.append(np.asarray(response))
            targets.append(ids[-1])
            positions.append(np.arange(prompt, prompt + len(response)))
            hidden.append(np.arange(length - 1, length + len(response) - 1))
            # The first token is predicted by the prompt's last, wherever the response lies.
            hidden[-1][0] = start + prompt - 1
            length += len(response)
        trees.append(Tree(start, prompt, tuple(len(r) for r in item.responses)))
    padding = -length % multiple_of if items else multiple_of
    if padding:
        trees.append(Tree(length, padding, ()))
        ids.append(np.zeros(padding, dtype=np.int64))
        positions.append(np.arange(padding))
    return PackedRow(
        qkv_format="sbhd",
        input_ids=_joined(ids)[None],
        position_ids=_joined(positions),
        trees=tuple(trees),
        tokens=length + padding,
        pieces=((0, length + padding),),
        hidden_index=_joined(hidden),
        targets=_joined(targets),
        target_index=torch.arange(sum(map(len, targets))),
        sample_ids=tuple(i for item in items for i in item.sample_ids),
        sample_lengths=tuple(len(r) for item in items for r in item.responses),
        temperature=temperature,
    )


def _joined(parts: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]))


def context_share(row: PackedRow, rank: int, ranks: int) -> PackedRow:
    """The part of a whole row that context-parallel rank `rank` holds.

    The row is cut into 2 x ranks equal pieces; a rank holds one from the front and its mirror
    image from the back.

    Raises:
        ValueError: the row's length is no multiple of 2 x ranks, or prompts are shared.
    """
    if ranks == 1:
        return row
    if row.tokens % (2 * ranks) or any(len(tree.responses) > 1 for tree in row.trees):
        raise ValueError("context parallelism needs rows of plain sequences, padded to 2 x ranks")
    size = row.tokens // (2 * ranks)
    pieces = tuple((n * size, (n + 1) * size) for n in (rank, 2 * ranks - 1 - rank))
    held = torch.cat([torch.arange(start, stop) for start, stop in pieces])
    place = torch.full((row.tokens,), -1).index_copy(0, held, torch.arange(len(held)))
    mine = torch.nonzero(place[row.hidden_index] >= 0).squeeze(1)
    return replace(
        row,
        input_ids=row.input_ids[:, held],
        position_ids=row.position_ids[held],
        pieces=pieces,
        hidden_index=place[row.hidden_index[mine]],
        targets=row.targets[mine],
        target_index=mine,
    )
