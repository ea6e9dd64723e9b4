"""Questions of one Reasoning Gym task (the logic domain of ProRL, section 3.4).

Items are generated when they are asked for, by slot, and each slot always gives
the same item: 2,000 prompts of eight tasks cost nothing before the first draw,
and a resumed run needs no list of questions. Training prompts follow the run's
seed. Held-out prompts do not: every run of every seed sits the same exam.
"""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

from prorl_nemo.data.chat import ChatRenderer, PromptDropped, chat_messages
from prorl_nemo.data.reasoning_gym_generator import ReasoningGymGenerator, TaskItems
from prorl_nemo.errors import RecipeError
from prorl_nemo.records import Prompt

# Held-out prompts have a seed of their own and take the first slots, however many they are.
_EXAM_SEED = "held_out"
_EXAM_SLOTS = 1000

# Slots from which a prompt's worked examples are chosen.
_EXAMPLES = 16


class ReasoningGymSource:
    """One task: training prompts by slot, and held-out prompts.

    Args:
        task: registered name of the task.
        config: the task's own settings.
        size: slots of the training split. Slots may repeat a question (narrow tasks do);
            the mixture passes over repetitions.
        seed: the run's seed.
        renderer: makes the tokens.
        generator: shared by all sources.
        key: where the recipe speaks of this source, for error messages.

    Raises:
        RecipeError: unknown task, unknown or wrong setting.
    """

    domain = "logic"

    def __init__(
        self,
        task: str,
        config: dict[str, Any],
        *,
        size: int,
        seed: int,
        renderer: ChatRenderer,
        generator: ReasoningGymGenerator,
        worked_examples: int = 0,
        system_prompt: str | None = None,
        key: str = "data.sources",
    ) -> None:
        self.task = task
        self.size = size
        self._config = config
        self._seed = seed
        self._renderer = renderer
        self._worked_examples = worked_examples
        self._system_prompt = system_prompt
        self._key = key
        self._examples: dict[str, list[tuple[str, str]]] = {}
        self._items = TaskItems(task, config, generator, key)
        self.version = self._items.version

    @property
    def fingerprint(self) -> str:
        """What the prompts depend on: a saved cursor is worthless under another one."""
        settings = {
            "config": self._config,
            "size": self.size,
            "seed": self._seed,
            "worked_examples": self._worked_examples,
            "system_prompt": self._system_prompt,
            "max_prompt_tokens": self._renderer.max_prompt_tokens,
        }
        return f"{self.task} {json.dumps(settings)} of reasoning-gym {self.version}"

    def prompt(self, slot: int) -> Prompt:
        """The training prompt of a slot, 0 <= slot < size. Raises PromptDropped."""
        entry = self._entry("train", slot, str(self._seed))
        return self._make(f"reasoning_gym/{self.task}/{slot}", entry, str(self._seed), slot)

    def held_out(self, count: int) -> list[Prompt]:
        """`count` prompts with different questions, none of which training ever shows.

        Raises:
            RecipeError: the task has fewer.
        """
        prompts: list[Prompt] = []
        questions: set[str] = set()
        reasons: set[str] = set()
        for slot in range(_EXAM_SLOTS):
            if len(prompts) == count:
                break
            try:
                entry = self._entry("held_out", slot, _EXAM_SEED)
                if entry["question"] not in questions:
                    prompt_id = f"reasoning_gym/{self.task}/held_out-{slot}"
                    prompts.append(self._make(prompt_id, entry, _EXAM_SEED, slot))
                    questions.add(entry["question"])
            except PromptDropped as dropped:
                reasons.add(str(dropped))
        if len(prompts) < count:
            why = f" ({'; '.join(sorted(reasons))})" if reasons else ""
            raise RecipeError(
                f"validation.prompts_per_task: {self.task} has only {len(prompts)} different "
                f"held-out questions{why}; ask for at most that many, or widen {self._key}.config"
            )
        return prompts

    def _make(self, prompt_id: str, entry: dict[str, Any], seed: str, slot: int) -> Prompt:
        messages = chat_messages(
            entry["question"].rstrip(), self._examples_for(seed, slot), self._system_prompt
        )
        return Prompt(
            prompt_id=prompt_id,
            domain=self.domain,
            task=self.task,
            messages=messages,
            token_ids=self._renderer.render(messages),
            grading={
                "kind": "reasoning_gym",
                "task": self.task,
                "config": self._config,
                "entry": entry,
            },
        )

    def _examples_for(self, seed: str, slot: int) -> list[tuple[str, str]]:
        """Worked examples of a prompt. They differ between prompts: with fixed ones, copying
        their answers would be a habit worth learning."""
        if not self._worked_examples:
            return []
        if seed not in self._examples:
            self._examples[seed] = self._example_pool(seed)
        rng = random.Random(f"{seed}/{self.task}/{slot}")
        return rng.sample(self._examples[seed], self._worked_examples)

    def _example_pool(self, seed: str) -> list[tuple[str, str]]:
        pool: dict[str, str] = {}
        for slot in range(max(_EXAMPLES, 2 * self._worked_examples)):
            with contextlib.suppress(PromptDropped):
                entry = self._entry("examples", slot, seed)
                if not isinstance(entry["answer"], str):
                    raise RecipeError(
                        f"data.worked_examples: {self.task} has no reference answers to show; "
                        f"set it to 0, or leave {self._key} out"
                    )
                pool[entry["question"].rstrip()] = entry["answer"]
        if len(pool) < self._worked_examples:
            raise RecipeError(
                f"data.worked_examples: {self.task} has only {len(pool)} questions to show as "
                f"examples; lower it, or widen {self._key}.config"
            )
        return list(pool.items())

    def _entry(self, split: str, slot: int, seed: str) -> dict[str, Any]:
        size = _EXAM_SLOTS if seed == _EXAM_SEED else self.size
        return self._items.entry(split, slot, seed, size)
