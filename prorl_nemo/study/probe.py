"""What a model can solve at all: hundreds of samples of each held-out prompt, by the engine alone.

Yue et al. (arXiv 2504.13837) compare RL with its base model at large k. ProRL (arXiv 2505.24864,
section 4) claims tasks that its base model never solves. So here the same prompts are asked
before the first step and after the last one.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import ray

from prorl_nemo.data.chat import load_tokenizer
from prorl_nemo.data.prompts import load_prompts
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


def probe(recipe: Recipe, folder: Path, settings: Probe) -> Counts:
    """How many of `settings.samples` samples at temperature 1 are right, for each prompt.

    Right is a full score. The response limit is the longest of the recipe's stages.

    Args:
        folder: of a Hugging Face model.
    """
    asked = {"prompts_per_task": settings.prompts_per_task}
    validation = recipe.validation.model_copy(update=asked)
    recipe = recipe.model_copy(update={"validation": validation})
    prompts = load_prompts(recipe, load_tokenizer(folder))
    limits = [s.max_response_tokens or recipe.rollout.max_response_tokens for s in recipe.stages]
    sampling = Sampling(settings.samples, 1.0, max(limits))
    with ExitStack() as stack:
        kinds = sorted({prompt.grading["kind"] for prompt in prompts.validation})
        graders = GraderPool(
            recipe.grading.workers or 1, preload=kinds, sandbox=recipe.grading.sandbox
        )
        stack.callback(graders.close)
        if not ray.is_initialized():
            start_ray()
            stack.callback(ray.shutdown)
        engines = EngineSettings.from_recipe(recipe, folder)
        fleet = Fleet(engines, 1, actor_options=[{"num_cpus": 0}])
        stack.callback(fleet.shutdown)
        sampler = DynamicSampler(fleet, graders, prompts.stream, _SEED)
        counts: Counts = {}
        for prompt in prompts.validation:
            # One by one: hundreds of samples fill the engine, and memory stays small.
            for group in sampler.sample_all([(prompt, 0)], sampling):
                counts[prompt.prompt_id] = sum(score == 1.0 for score in group.scores)
    return counts
