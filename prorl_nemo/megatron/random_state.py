"""The random state of a trainer rank, saved beside its tensors.

Nothing in a step draws from it today: samples are seeded by what they are, and the model has no
dropout. It is saved so that this stays an observation and does not become a condition. A run that
goes on in another number of ranks starts from the recipe's seed instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def save(folder: Path, rank: int) -> None:
    """Write `rng_NNNNN.pt` of this rank."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {
            "cuda": torch.cuda.get_rng_state(),
            "tracker": get_cuda_rng_tracker().get_states(),
        }
    torch.save(state, _path(folder, rank))


def load(folder: Path, rank: int, ranks: int) -> None:
    """Restore what `save` wrote, if it was written by as many ranks."""
    if len(list(folder.glob("rng_*.pt"))) != ranks:
        return
    state = torch.load(_path(folder, rank), weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
        get_cuda_rng_tracker().set_states(state["tracker"])


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rng_{rank:05d}.pt"
