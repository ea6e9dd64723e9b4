"""Which prompts come less often, by hand and in shares."""

from __future__ import annotations

import json

import pytest

from bench.simulated_engine import SimulatedFleet, SimulatedGrader, SimulatedPrompts, World
from prorl_nemo.rollout.dynamic_sampler import DynamicSampler
from prorl_nemo.rollout.group_collector import Sampling
from prorl_nemo.rollout.prompt_history import PromptHistory


def epochs_of(history: PromptHistory, prompt_id: str, epochs: int, size: int) -> set[int]:
    """Epochs, out of the next ones, in which a prompt comes."""
    seen: set[int] = set()
    while True:
        prompt, epoch = history.draw()
        if epoch >= epochs:
            return seen
        if prompt.prompt_id == prompt_id:
            seen.add(epoch)


def test_a_prompt_without_signal_comes_in_its_share_of_the_epochs() -> None:
    history = PromptHistory(SimulatedPrompts(size=3), 7, in_a_row=2, draw_share=0.25)
    history.record([("1", False), ("2", False), ("1", True), ("1", False), ("2", False)])
    # 1 had signal in between; 2 has had none twice.
    seen = epochs_of(history, "2", 2000, 3)
    # Binomial: deviation sqrt(2000 * 0.25 * 0.75) = 19.
    assert abs(len(seen) - 500) < 4 * 19
    # The loop ended at prompt 0 of epoch 2000.
    assert history.passed_over == 2000 - len(seen)


def test_others_come_every_epoch_in_their_order() -> None:
    history = PromptHistory(SimulatedPrompts(size=4), 7, in_a_row=1, draw_share=0.25)
    history.record([("2", False)])
    drawn = [history.draw()[0].prompt_id for _ in range(60)]
    assert [i for i in drawn if i != "2"] == (["0", "1", "3"] * 20)[: 60 - drawn.count("2")]


def test_signal_brings_a_prompt_back() -> None:
    history = PromptHistory(SimulatedPrompts(size=2), 7, in_a_row=1, draw_share=0.01)
    history.record([("0", False)])
    history.record([("0", True)])
    assert [history.draw()[0].prompt_id for _ in range(6)] == ["0", "1"] * 3


def test_what_is_put_back_comes_again_and_state_goes_on() -> None:
    prompts = SimulatedPrompts(size=50)
    history = PromptHistory(prompts, 7, in_a_row=1, draw_share=0.5)
    history.record((str(i), False) for i in range(50))
    first = [history.draw() for _ in range(30)]
    state = json.loads(json.dumps(history.state_dict()))
    restored = PromptHistory(prompts, 7, in_a_row=1, draw_share=0.5)
    restored.load_state_dict(state)
    restored.put_back(first)
    assert [restored.draw() for _ in range(30)] == first
    assert restored.passed_over == history.passed_over


@pytest.mark.parametrize("draw_share", [0.1, 1.0])
def test_fewer_groups_are_rejected_with_a_history(draw_share: float) -> None:
    """40 prompts, 40 % with signal, seen several times; a share of 1 is no history at all."""
    prompts = SimulatedPrompts(size=40)
    fleet = SimulatedFleet(World(median_tokens=50), 2, slots=64)

    def sampler() -> DynamicSampler:
        history = PromptHistory(prompts, 7, in_a_row=1, draw_share=draw_share)
        return DynamicSampler(fleet, SimulatedGrader(), prompts, 7, history=history)

    batches = []
    first = sampler()
    state = first.state_dict()
    for _ in range(12):
        first.load_state_dict(json.loads(json.dumps(state)))
        batches.append(first.sample_batch(8, Sampling(8, 1.2, 8192)))
        state = first.state_dict()
        first = sampler()  # As a resumed run does.
    assert (sum(batch.passed_over for batch in batches) > 0) == (draw_share < 1)
    for batch in batches:
        assert [i for i, kept in batch.decided if kept] == [
            group.prompt.prompt_id for group in batch.groups
        ]
        assert sum(not kept for _, kept in batch.decided) == batch.rejected
    late = sum(batch.rejected for batch in batches[6:])
    # Six batches of 8 kept; without a history 60 % of all groups are rejected, about 72.
    assert late < 30 if draw_share == 0.1 else late > 50
