"""The recipe's `data` and `validation` sections turned into prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prorl_nemo.data.built_source import BuiltData, BuiltSource, tasks_of_entries
from prorl_nemo.data.chat import ChatRenderer
from prorl_nemo.data.mixture import PromptStream
from prorl_nemo.data.reasoning_gym_generator import ReasoningGymGenerator
from prorl_nemo.data.reasoning_gym_source import ReasoningGymSource
from prorl_nemo.recipe import Recipe
from prorl_nemo.recipe_data import Source
from prorl_nemo.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RunPrompts(NamedTuple):
    """The prompts of a run.

    Attributes:
        stream: to train on, endless.
        validation: the same for every run and seed.
        never_trained: tasks that are only validated.
    """

    stream: PromptStream
    validation: list[Prompt]
    never_trained: frozenset[str] = frozenset()


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
        UserError: data that was not built, or has changed since.
    """
    data = recipe.data
    opened = _Opened(recipe, ChatRenderer(tokenizer, data.max_prompt_tokens), generator)
    sources = [opened.source(index, source) for index, source in enumerate(data.sources)]
    held_out = [source.held_out(recipe.validation.prompts_per_task) for source in sources]
    trained = [source for source, entry in zip(sources, data.sources, strict=True) if entry.train]
    return RunPrompts(
        stream=PromptStream(trained, [s.weight for s in data.trained], recipe.seed, on_drop),
        validation=[prompt for prompts in held_out for prompt in prompts],
        never_trained=frozenset(
            prompt.task
            for prompts, entry in zip(held_out, data.sources, strict=True)
            for prompt in prompts
            if not entry.train
        ),
    )


class _Opened:
    """What the entries of the mixture share: the renderer, the generator, the built folders."""

    def __init__(
        self, recipe: Recipe, renderer: ChatRenderer, generator: ReasoningGymGenerator | None
    ) -> None:
        self._recipe, self._renderer = recipe, renderer
        self._generator = generator or ReasoningGymGenerator()
        self._folders: dict[Path, BuiltData] = {}

    def source(self, index: int, source: Source) -> ReasoningGymSource | BuiltSource:
        key = f"data.sources.{index}"
        return self._built(source, key) if source.kind == "built" else self._generated(source, key)

    def _generated(self, source: Source, key: str) -> ReasoningGymSource:
        data = self._recipe.data
        assert source.task is not None
        return ReasoningGymSource(
            source.task,
            source.config,
            size=source.size,
            seed=self._recipe.seed,
            renderer=self._renderer,
            generator=self._generator,
            worked_examples=data.worked_examples,
            system_prompt=data.system_prompt,
            key=key,
        )

    def _built(self, source: Source, key: str) -> BuiltSource:
        data = self._recipe.data
        assert source.domain is not None
        folder = self._folder(source)
        if folder not in self._folders:
            where = f"{key}.folder" if source.folder else "data.build.folder"
            self._folders[folder] = BuiltData(folder, where)
        named = {
            other.task
            for other in data.sources
            if other.kind == "built" and other.task and self._folder(other) == folder
        }
        built = self._folders[folder]
        tasks = tasks_of_entries(built, source.domain, named, source.task, key)
        return BuiltSource(
            built,
            source.domain,
            source.label,
            tasks,
            seed=self._recipe.seed,
            renderer=self._renderer,
            system_prompt=data.system_prompt,
        )

    def _folder(self, source: Source) -> Path:
        build = self._recipe.data.build
        given = source.folder or (build.folder if build else "")
        return Path(given).expanduser().absolute()
