"""Buckets of one weight update, from the calls that bring them to the thread that loads them."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from concurrent.futures import Future

from prorl_nemo.rollout.complete_weights import EngineError
from prorl_nemo.rollout.weights import Bucket

BUCKET_TIMEOUT_SECONDS = 300.0
"""Silence of the sender after which a weight update has failed."""
_WAITING = 4


class WeightStream:
    """What one thread puts in, another one takes out by iterating; few buckets wait in between."""

    def __init__(self) -> None:
        self._buckets: queue.Queue[tuple[Bucket, ...] | None] = queue.Queue(maxsize=_WAITING)

    def put(self, parts: tuple[Bucket, ...] | None, update: Future[None]) -> None:
        """Wait for room, and hand over a bucket's parts, or None after the last.

        Args:
            update: what the other thread does with them.

        Raises:
            EngineError: it takes no more, or what it raised itself.
        """
        deadline = time.monotonic() + BUCKET_TIMEOUT_SECONDS
        while not update.done():
            try:
                self._buckets.put(parts, timeout=0.2)
                return
            except queue.Full:
                if time.monotonic() > deadline:
                    raise EngineError("the engine takes no more weights") from None
        # Done before its last bucket: it failed, and this raises why.
        update.result()

    def __iter__(self) -> Iterator[tuple[Bucket, ...]]:
        """Raises EngineError after BUCKET_TIMEOUT_SECONDS of silence."""
        while True:
            try:
                parts = self._buckets.get(timeout=BUCKET_TIMEOUT_SECONDS)
            except queue.Empty:
                raise EngineError(f"no weights for {BUCKET_TIMEOUT_SECONDS:.0f} seconds") from None
            if parts is None:
                return
            yield parts
