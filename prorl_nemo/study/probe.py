"""What a model can solve at all: hundreds of samples of each held-out prompt, by the engines alone.

Yue et al. (arXiv 2504.13837) compare RL with its base model at large k. ProRL (arXiv 2505.24864,
section 4) claims tasks that its base model never solves. So here the same prompts are asked
before the first step and after the last one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
import torch

from prorl_nemo.data.chat import load_tokenizer
from prorl_nemo.data.prompts import load_prompts
from prorl_nemo.errors import UserError
from prorl_nemo.recipe import Recipe
from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.rollout.dynamic_sampler import DynamicSampler
from prorl_nemo.rollout.engine_settings import EngineSettings
from prorl_nemo.rollout.fleet import Fleet
from prorl_nemo.rollout.group_collector import Sampling
from prorl_nemo.study.compact import Counts
from prorl_nemo.study.plan import Probe
from prorl_nemo.training.session import start_ray

# Of its own: the samples are no run's, and the same for each model that is asked.
_SEED = 256


def probe(
    recipe: Recipe, folder: Path, settings: Probe, should_stop: Callable[[], bool]
) -> Counts | None:
    """How many of `settings.samples` samples at temperature 1 are right, for each prompt.

    Right is a full score. The response limit is the longest of the recipe's stages.

    Args:
        folder: of a Hugging Face model.
        should_stop: asked between tasks.

    Returns:
        the counts, or None if it was stopped.

    Raises:
        UserError: a prompt that the engines refuse.
    """
    asked = {"prompts_per_task": settings.prompts_per_task}
    validation = recipe.validation.model_copy(update=asked)
    recipe = recipe.model_copy(update={"validation": validation})
    prompts = load_prompts(recipe, load_tokenizer(folder))
    sampling = Sampling(settings.samples, 1.0, recipe.longest_response)
    with ExitStack() as stack:
        kinds = sorted({prompt.grading["kind"] for prompt in prompts.validation})
        graders = GraderPool(
            recipe.grading.workers or 1, preload=kinds, sandbox=recipe.grading.sandbox
        )
        stack.callback(graders.close)
        if not ray.is_initialized():
            start_ray()
            stack.callback(ray.shutdown)
        rollout = recipe.rollout
        place = {"num_cpus": 0}
        if torch.cuda.is_available():
            place["num_gpus"] = rollout.tensor_parallel
        fleet = Fleet(
            EngineSettings.from_recipe(recipe, folder),
            rollout.engines,
            actor_options=[place] * rollout.engines,
            hang_seconds=rollout.engine_hang_seconds,
            max_restarts=rollout.max_engine_restarts,
            restart_window=rollout.engine_restart_window,
        )
        stack.callback(fleet.shutdown)
        sampler = DynamicSampler(fleet, graders, prompts.stream, _SEED, on_event=_refused)
        counts: Counts = {}
        # A task at once: some thousand samples keep the engines full to the last few, and fit.
        for _, of_task in itertools.groupby(prompts.validation, key=lambda prompt: prompt.task):
            if should_stop():
                return None
            for group in sampler.sample_all([(prompt, 0) for prompt in of_task], sampling):
                counts[group.prompt.prompt_id] = sum(score == 1.0 for score in group.scores)
    return counts


def _refused(event: str, details: dict[str, Any]) -> None:
    """A prompt that is not asked would be missing in every comparison, unseen."""
    if event == "prompt_dropped":
        raise UserError(f"probe: {details['prompt_id']} cannot be asked: {details['reason']}")
