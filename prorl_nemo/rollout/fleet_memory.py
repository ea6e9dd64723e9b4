"""What a fleet keeps for engines to come: their weights, and how many were replaced already."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import ray


class KeptWeights:
    """The current weights, for an engine that takes another one's place.

    Args:
        version: that the engine's samples are marked with.
        buckets: each as references to its parts; None: `again` gives them.
        again: see `Fleet.update_weights`.
    """

    def __init__(
        self,
        version: int,
        buckets: list[tuple[Any, ...]] | None,
        again: Callable[[], Iterable[Any]] | None,
    ) -> None:
        self.version, self._buckets, self._again = version, buckets, again

    def send(self, actor: Any) -> None:
        """Have an engine's actor load them, before any call made later."""
        if self._buckets is None:
            assert self._again is not None
            self._buckets = [references(bucket) for bucket in self._again()]
        actor.call.remote("begin_update", self.version)
        for parts in self._buckets:
            actor.call.remote("load_bucket", *parts)
        actor.call.remote("finish_update")


class Restarts:
    """Counts failures of engines within the last `window` seconds."""

    def __init__(self, most: int, window: float) -> None:
        self.most, self.window = most, window
        self._times: deque[float] = deque()

    def one_more(self) -> int:
        """Note a failure; returns how many there are now."""
        now = time.monotonic()
        self._times.append(now)
        while self._times[0] < now - self.window:
            self._times.popleft()
        return len(self._times)


def references(bucket: Any) -> tuple[Any, ...]:
    """The parts of a bucket in the object store."""
    return bucket if isinstance(bucket, tuple) else (ray.put(bucket),)
