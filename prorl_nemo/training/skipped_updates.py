"""Updates that were skipped because a gradient was NaN or infinite: counted, kept, and limited.

One now and then costs nothing. Many in a row mean that nothing is learned any more, so the run
stops, with everything the trainer was given for them in `skipped/`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prorl_nemo.errors import UserError
from prorl_nemo.training.batch import TrainingBatch
from prorl_nemo.training.metrics import plain

logger = logging.getLogger(__name__)


class SkippedUpdates:
    """How many updates in a row were skipped up to now.

    Args:
        folder: `skipped/` of the run directory; made when it is needed.
        limit: of updates in a row.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.in_a_row = 0

    def count(
        self,
        step: int,
        batch: TrainingBatch,
        minibatches: int,
        records: Sequence[dict[str, float]],
    ) -> None:
        """Look at the updates of a step, and save the samples of those that were skipped.

        Args:
            minibatches: into how many the batch was asked to be cut.
            records: what the trainer said of each update.

        Raises:
            UserError: the limit is reached.
        """
        rows: list[dict[str, Any]] = []
        reached = False
        for update, record in enumerate(records):
            self.in_a_row = self.in_a_row + 1 if record["skipped"] else 0
            if record["skipped"]:
                groups = batch.minibatches(minibatches)[update]
                rows += ({"step": step, "update": update} | row for row in _rows(batch, groups))
            reached |= self.in_a_row >= self.limit
        path = self.folder / f"step_{step:06d}.jsonl"
        if rows:
            _write(path, rows)
        if reached:
            raise UserError(
                f"policy.optimizer.max_skipped_updates: {self.limit} updates in a row had NaN or "
                f"infinite gradients, the last in step {step}; their samples are in {path}. Lower "
                "the learning rate or use fp32, and resume from the last checkpoint"
            )


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Samples that cannot be written are lost; that must not end the run."""
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows))
    except OSError as error:
        logger.warning("%s: samples of skipped updates are lost (%s)", path, error)


def _rows(batch: TrainingBatch, groups: range) -> Iterator[dict[str, Any]]:
    """All the trainer was given for each sample of these groups; NaN and infinity are null."""
    for group in groups:
        for sample in batch.groups[group]:
            figures = {
                "old_logprobs": batch.old_logprobs[sample],
                "reference_logprobs": batch.reference_logprobs[sample],
                "engine_logprobs": batch.engine_logprobs[sample],
            }
            yield {
                "group": group,
                "prompt_ids": batch.prompts[group],
                "response_ids": batch.responses[sample].tolist(),
                "advantage": batch.advantages[sample],
                "finite": all(bool(np.isfinite(figure).all()) for figure in figures.values()),
                **{name: figure.tolist() for name, figure in figures.items()},
            }
