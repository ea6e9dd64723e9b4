"""The recipe's `data` and `validation` sections turned into prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from prorl_nemo.data.chat import ChatRenderer
from prorl_nemo.data.mixture import PromptStream
from prorl_nemo.data.reasoning_gym_source import ReasoningGymGenerator, ReasoningGymSource
from prorl_nemo.recipe import Recipe
from prorl_nemo.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RunPrompts(NamedTuple):
    """Training prompts, endless; and validation prompts, the same for every run and seed."""

    stream: PromptStream
    validation: list[Prompt]


def load_prompts(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    on_drop: Callable[[str, str], None] | None = None,
    generator: ReasoningGymGenerator | None = None,
) -> RunPrompts:
    """All prompts of a run.

    Args:
        tokenizer: of the policy, with a chat template (`chat.load_tokenizer`).
        on_drop: called with (prompt id, reason) for every training prompt left out.
        generator: a process to share; by default one of its own.

    Raises:
        RecipeError: an unknown task or setting, or a task without enough questions.
    """
    data = recipe.data
    renderer = ChatRenderer(tokenizer, data.max_prompt_tokens)
    generator = generator or ReasoningGymGenerator()
    sources = [
        ReasoningGymSource(
            source.task,
            source.config,
            size=source.size,
            seed=recipe.seed,
            renderer=renderer,
            generator=generator,
            worked_examples=data.worked_examples,
            system_prompt=data.system_prompt,
            key=f"data.sources.{index}",
        )
        for index, source in enumerate(data.sources)
    ]
    return RunPrompts(
        stream=PromptStream(sources, [s.weight for s in data.sources], recipe.seed, on_drop),
        validation=[
            prompt
            for source in sources
            for prompt in source.held_out(recipe.validation.prompts_per_task)
        ],
    )
