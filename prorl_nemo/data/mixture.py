"""The stream of training prompts: a weighted mixture with an exact, saved cursor.

Which source comes next is not drawn at random: it is the one furthest behind its
share, so after n draws every share is exact to within one prompt, counted from the
last change of the shares (stages may change them). Within a source, prompts come
epoch by epoch, each different question once an epoch.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from prorl_nemo.data.chat import PromptDropped
from prorl_nemo.errors import RecipeError, UserError
from prorl_nemo.records import Prompt


class PromptSource(Protocol):
    """Training prompts, by slot; each slot always gives the same prompt.

    Prompt ids end in `/<slot>`; what stands before is the same for all, and of no other source.

    Attributes:
        task: what the source is called in weights and figures.
    """

    task: str
    size: int

    @property
    def fingerprint(self) -> str: ...

    def prompt(self, slot: int) -> Prompt:
        """Raises PromptDropped for a prompt that cannot be used."""
        ...


class _Cursor:
    """One source's place in its epochs.

    The first epoch goes through the slots in order and finds out which of them hold a usable
    question not seen before; later epochs shuffle those.
    """

    def __init__(self, source: PromptSource, seed: int) -> None:
        self.source = source
        self._seed = seed
        self.epoch = 0
        self.position = 0
        self.usable: list[int] = []
        self._questions: set[str] = set()  # Only the first epoch needs them.
        self._order: Sequence[int] = range(source.size)

    def next(self, dropped: Callable[[int, str], None]) -> tuple[int, Prompt]:
        """The next slot and its prompt; `epoch` tells which epoch it belongs to."""
        while True:
            if self.position == len(self._order):
                self._begin_epoch(self.epoch + 1)
            slot = self._order[self.position]
            self.position += 1
            try:
                prompt = self.source.prompt(slot)
            except PromptDropped as reason:
                dropped(slot, str(reason))
                continue
            if self.epoch == 0:
                question = _digest(prompt)
                if question in self._questions:
                    continue
                self._questions.add(question)
                self.usable.append(slot)
            return slot, prompt

    def _begin_epoch(self, epoch: int) -> None:
        if not self.usable:
            raise RecipeError(
                f"data.sources: no prompt of {self.source.task} can be used; see the dropped "
                "prompts: raise data.max_prompt_tokens or change the task's config"
            )
        self.epoch, self.position = epoch, 0
        self._questions.clear()
        shuffled = sorted(self.usable)
        random.Random(f"{self._seed}/{self.source.task}/{epoch}").shuffle(shuffled)
        self._order = shuffled

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "usable": list(self.usable),
            "questions": sorted(self._questions),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usable = list(state["usable"])
        if state["epoch"]:
            self._begin_epoch(state["epoch"])
        else:
            self.epoch, self._order = 0, range(self.source.size)
        self.position = state["position"]
        self._questions = set(state["questions"])


class PromptStream:
    """Endless training prompts from several sources.

    Args:
        sources: the tasks; `weights` (one each, positive) are their relative shares.
        seed: the run's seed; decides the order of prompts within an epoch.
        on_drop: called with (prompt id, reason) when a prompt is left out for good.
    """

    def __init__(
        self,
        sources: Sequence[PromptSource],
        weights: Sequence[float],
        seed: int,
        on_drop: Callable[[str, str], None] | None = None,
    ) -> None:
        if not sources or len(sources) != len(weights) or min(weights) <= 0:
            raise RecipeError("data.sources: give at least one source, each with a weight above 0")
        self._cursors = [_Cursor(source, seed) for source in sources]
        # The shares of the recipe, which a checkpoint belongs to, and those in force.
        self._own_shares = [weight / sum(weights) for weight in weights]
        self._shares = self._own_shares
        self._on_drop = on_drop
        self._drawn = [0] * len(sources)
        # What had been drawn when the shares in force began: they speak of what comes after.
        self._drawn_before = [0] * len(sources)
        self._dropped: dict[str, str] = {}
        # (source, slot, epoch) of prompts that were given back, with the prompt.
        self._queue: deque[tuple[tuple[int, int, int], Prompt]] = deque()
        self._index: dict[str, int] = {}  # Of a source, by the beginning of its prompts' ids.

    def draw(self) -> tuple[Prompt, int]:
        """The next prompt, and the epoch (of its source, from 0) it is drawn in.

        Raises:
            RecipeError: a source has no usable prompt at all.
        """
        if self._queue:
            place, prompt = self._queue.popleft()
        else:
            index = self._furthest_behind()
            cursor = self._cursors[index]
            slot, prompt = cursor.next(lambda slot, reason: self._drop(index, slot, reason))
            self._drawn[index] += 1
            place = (index, slot, cursor.epoch)
        self._index[prompt.prompt_id.rpartition("/")[0]] = place[0]
        return prompt, place[2]

    def set_weights(self, weights: Sequence[float]) -> None:
        """Change the mixture from the next draw on; cursors and epochs go on.

        Args:
            weights: one for each source, in their order; 0 leaves a source out. Those that are in
                force already change nothing.

        Raises:
            RecipeError: another number of weights, a negative one, or none above 0.
        """
        if len(weights) != len(self._cursors) or min(weights) < 0 or sum(weights) <= 0:
            raise RecipeError(
                f"weights: {list(weights)} for {len(self._cursors)} entries of data.sources; give "
                "each one that is not negative, and one that is above 0"
            )
        shares = [weight / sum(weights) for weight in weights]
        if shares != self._shares:
            self._shares, self._drawn_before = shares, list(self._drawn)

    def put_back(self, drawn: Sequence[tuple[Prompt, int]]) -> None:
        """Return prompts to the head of the queue; they come again first, in the order given.

        Raises:
            ValueError: a prompt of another stream, or one that is in the queue already.
        """
        waiting = {place for place, _ in self._queue}
        returned = []
        for prompt, epoch in drawn:
            source, _, slot = prompt.prompt_id.rpartition("/")
            index = self._index.get(source)
            if index is None:
                raise ValueError(f"put_back: {prompt.prompt_id} was not drawn from this stream")
            place = (index, int(slot), epoch)
            if place in waiting:
                raise ValueError(f"put_back: {prompt.prompt_id}, epoch {epoch}, is there already")
            waiting.add(place)
            returned.append((place, prompt))
        self._queue.extendleft(reversed(returned))

    @property
    def drawn(self) -> dict[str, int]:
        """Prompts drawn of each task; those put back count once."""
        return {c.source.task: n for c, n in zip(self._cursors, self._drawn, strict=True)}

    @property
    def drawn_shares(self) -> dict[str, float]:
        """Share of each task in the prompts drawn so far."""
        total = max(sum(self._drawn), 1)
        return {task: count / total for task, count in self.drawn.items()}

    @property
    def dropped(self) -> dict[str, str]:
        """Prompts left out so far, with the reason."""
        return dict(self._dropped)

    def state_dict(self) -> dict[str, Any]:
        """All that the next draws depend on, as JSON-able values."""
        return {
            "sources": self._fingerprints(),
            "cursors": [cursor.state_dict() for cursor in self._cursors],
            "drawn": list(self._drawn),
            "drawn_before": list(self._drawn_before),
            "shares": list(self._shares),
            "dropped": dict(self._dropped),
            "queue": [list(place) for place, _ in self._queue],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken. Prompts that were out then are not drawn
        again in their epoch, unless they are put back.

        Raises:
            UserError: the state belongs to other sources; nothing is changed.
        """
        ours = self._fingerprints()
        if state["sources"] != ours:
            saved = state["sources"]
            raise UserError(
                "data: the checkpoint was written with other prompts; continue with the settings "
                "and the reasoning-gym version it names, or start a new run.\n"
                f"  checkpoint: {'; '.join(s for s in saved if s not in ours) or 'another order'}\n"
                f"  now: {'; '.join(s for s in ours if s not in saved) or 'another order'}"
            )
        for cursor, cursor_state in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state_dict(cursor_state)
        self._drawn = list(state["drawn"])
        self._drawn_before = list(state["drawn_before"])
        self._shares = list(state["shares"])
        self._dropped = dict(state["dropped"])
        self._queue.clear()
        for index, slot, epoch in state["queue"]:
            prompt = self._cursors[index].source.prompt(slot)
            self._queue.append(((index, slot, epoch), prompt))

    def _fingerprints(self) -> list[str]:
        return [
            f"{cursor.source.fingerprint}, share {share:.6g}"
            for cursor, share in zip(self._cursors, self._own_shares, strict=True)
        ]

    def _furthest_behind(self) -> int:
        drawn = [n - m for n, m in zip(self._drawn, self._drawn_before, strict=True)]
        coming = sum(drawn) + 1
        # A source of share 0 is never behind, but would tie with one that is ahead.
        behind = [
            share * coming - n if share else -math.inf
            for share, n in zip(self._shares, drawn, strict=True)
        ]
        return behind.index(max(behind))

    def _drop(self, index: int, slot: int, reason: str) -> None:
        prompt_id = f"{self._cursors[index].source.task}/{slot}"
        self._dropped[prompt_id] = reason
        if self._on_drop is not None:
            self._on_drop(prompt_id, reason)


def _digest(prompt: Prompt) -> str:
    """Eight bytes tell questions apart: 10,000 of them collide once in 10**11 runs."""
    return hashlib.blake2b(prompt.messages[-1]["content"].encode(), digest_size=8).hexdigest()
