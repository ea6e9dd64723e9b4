"""Prompts that keep being solved by all samples, or by none, come less often (our choice).

Such a group is rejected and its tokens are spent for nothing, and a prompt that gave no signal k
times in a row will probably give none the next time. It is passed over in most epochs, not in all:
the policy changes, and what was hopeless may become possible.

The price: the prompts that remain no longer follow the weights of `data.sources` exactly, and
scores over them are not those of the whole data. So it is off unless a recipe asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prorl_nemo.records import Prompt
from prorl_nemo.rollout.protocol import PromptSource
from prorl_nemo.rollout.seeds import sample_seed


class PromptHistory:
    """A prompt source that passes over part of the prompts without signal.

    Args:
        source: where prompts come from, epoch after epoch.
        run_seed: of the run; with prompt and epoch it decides what is passed over.
        in_a_row: decided groups without signal, one after the other, that make a prompt rare.
        draw_share: share of the epochs in which a rare prompt still comes, above 0.

    Attributes:
        passed_over: draws saved so far.
    """

    def __init__(
        self, source: PromptSource, run_seed: int, in_a_row: int, draw_share: float
    ) -> None:
        self._source = source
        self._run_seed = run_seed
        self._in_a_row = in_a_row
        self._draw_share = draw_share
        self._without_signal: dict[str, int] = {}
        self.passed_over = 0

    def draw(self) -> tuple[Prompt, int]:
        """The next prompt that is not passed over, and its epoch."""
        while True:
            prompt, epoch = self._source.draw()
            if not self._passes_over(prompt.prompt_id, epoch):
                return prompt, epoch
            self.passed_over += 1

    def put_back(self, prompts: list[tuple[Prompt, int]]) -> None:
        """Return prompts to the head of the queue; they were undecided and will come."""
        self._source.put_back(prompts)

    def record(self, decided: Iterable[tuple[str, bool]]) -> None:
        """Learn from a batch: (prompt id, whether its group carried signal), in order."""
        for prompt_id, signal in decided:
            if signal:
                self._without_signal.pop(prompt_id, None)
            else:
                self._without_signal[prompt_id] = self._without_signal.get(prompt_id, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """All that later draws depend on, besides the source; JSON-able."""
        return {"without_signal": dict(self._without_signal), "passed_over": self.passed_over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._without_signal = dict(state["without_signal"])
        self.passed_over = state["passed_over"]

    def _passes_over(self, prompt_id: str, epoch: int) -> bool:
        """The same answer for a prompt and epoch however often it is asked: a prompt put back
        must come again, and a resumed run must draw the same."""
        if self._without_signal.get(prompt_id, 0) < self._in_a_row:
            return False
        # A number of its own for the draw: the samples have the indices from 0 on.
        return sample_seed(self._run_seed, prompt_id, epoch, -1) >= self._draw_share * 2**63
