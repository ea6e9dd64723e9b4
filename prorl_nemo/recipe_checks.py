"""What is wrong between keys of a recipe that are right one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prorl_nemo.recipe import Recipe


def contradictions(recipe: Recipe) -> Iterator[str]:
    """Messages, each of which names the key and the way out."""
    return chain(
        _batch(recipe), _loss(recipe), _rollout(recipe), _schedule(recipe), _stages(recipe)
    )


def _batch(recipe: Recipe) -> Iterator[str]:
    algorithm, rollout, policy = recipe.algorithm, recipe.rollout, recipe.policy
    prompts, minibatches = rollout.prompts_per_step, algorithm.minibatches
    if prompts % minibatches:
        yield (
            f"algorithm.minibatches: {minibatches} does not divide rollout.prompts_per_step "
            f"({prompts})"
        )
    samples = min(s.samples_per_prompt or rollout.samples_per_prompt for s in recipe.stages)
    items = prompts // minibatches * (1 if policy.shared_prompts else samples)
    if items < policy.data_parallel:
        yield (
            f"algorithm.minibatches: a minibatch of {prompts // minibatches} prompts leaves "
            f"some of the {policy.data_parallel} data-parallel ranks without work; use fewer "
            "minibatches, more rollout.prompts_per_step or a smaller policy.data_parallel"
        )
    labels = [source.label for source in recipe.data.sources]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        yield f"data.sources: {', '.join(twice)} is listed twice; give a task one entry"


def _loss(recipe: Recipe) -> Iterator[str]:
    algorithm, policy, rollout = recipe.algorithm, recipe.policy, recipe.rollout
    if policy.logits == "bf16" and policy.precision != "bf16":
        yield "policy.logits: bf16 belongs to policy.precision=bf16; set it or remove the key"
    if algorithm.importance.low >= algorithm.importance.high:
        yield "algorithm.importance.low must be below algorithm.importance.high"
    if algorithm.kl.estimator == "k1" and algorithm.kl.coefficient > 0:
        yield (
            "algorithm.kl.estimator: the gradient of k1 is zero on average, so it holds "
            "nothing back; use k2 or k3, or set algorithm.kl.coefficient=0"
        )
    overlong = recipe.shaping.overlong
    limit = min(s.max_response_tokens or rollout.max_response_tokens for s in recipe.stages)
    if overlong and overlong.buffer_tokens > limit:
        yield (
            f"shaping.overlong.buffer_tokens: {overlong.buffer_tokens} exceeds the shortest "
            f"response limit ({limit})"
        )


def _rollout(recipe: Recipe) -> Iterator[str]:
    rollout = recipe.rollout
    if rollout.surplus == "carry_over":
        if recipe.algorithm.importance.method == "none":
            yield (
                "rollout.surplus: carry_over trains on samples of an older policy, which only "
                "an importance weight corrects; set algorithm.importance.method=icepop or tis"
            )
        if rollout.deterministic:
            yield (
                "rollout.surplus: what carry_over finds half-done depends on the clock, so "
                "rollout.deterministic needs rollout.surplus=requeue"
            )
    if rollout.deterministic and rollout.engines > 1:
        yield (
            "rollout.deterministic: several engines share prompts by their load, which differs "
            "from run to run; set rollout.engines=1"
        )


def _schedule(recipe: Recipe) -> Iterator[str]:
    optimizer, saving = recipe.policy.optimizer, recipe.checkpoint
    if (optimizer.schedule == "wsd") != (optimizer.decay_steps > 0):
        yield (
            "policy.optimizer.decay_steps: belongs to policy.optimizer.schedule=wsd, which "
            "needs it; set both or neither"
        )
    lowest = min(s.learning_rate or optimizer.learning_rate for s in recipe.stages)
    if optimizer.schedule != "constant" and optimizer.min_learning_rate > lowest:
        yield (
            f"policy.optimizer.min_learning_rate: {optimizer.min_learning_rate:g} is above the "
            f"lowest peak rate of a stage ({lowest:g}); lower it"
        )
    if saving.keep_every and saving.keep_every % saving.interval:
        yield (
            f"checkpoint.keep_every: {saving.keep_every} is no multiple of "
            f"checkpoint.interval ({saving.interval}), so no such steps are saved"
        )


def _stages(recipe: Recipe) -> Iterator[str]:
    schedule = recipe.policy.optimizer.schedule
    trained = [source.label for source in recipe.data.trained]
    for number, stage in enumerate(recipe.stages):
        unknown = sorted(set(stage.weights or ()) - set(trained))
        if unknown:
            yield (
                f"stages.{number}.weights: {', '.join(unknown)} is not in data.sources, or "
                f"not trained on; there are {', '.join(trained)}"
            )
        if stage.ends_when_stalled and schedule not in ("constant", "inverse_sqrt"):
            yield (
                f"stages.{number}.ends_when_stalled: policy.optimizer.schedule={schedule} "
                "decays to a last step that is not known then; use constant"
            )
    if recipe.stages[0].reset_at_start:
        yield "stages.0.reset_at_start: there is nothing to reset before the first step"
    own = [stage.reference_reset for stage in recipe.stages if stage.reference_reset]
    if not recipe.checkpoint.keep_best and any(
        section.source == "best" for section in [recipe.reference_reset, *own]
    ):
        yield "reference_reset.source: best needs checkpoint.keep_best: true"
