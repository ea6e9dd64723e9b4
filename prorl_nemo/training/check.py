"""`prorl check`: is this set-up numerically right, on this machine, before it costs GPU-hours?

A small real rollout is sampled, graded, trained on and synced, and each stage's
figures are compared with an independent computation. Each line is a name, a
figure, a limit and a verdict.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from prorl_nemo.cluster.placement import reserve
from prorl_nemo.cluster.policy_group import PolicyGroup
from prorl_nemo.model_source import resolve_model
from prorl_nemo.recipe import Policy, Recipe
from prorl_nemo.records import Prompt
from prorl_nemo.rewards.gold import gold_response, known_item
from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.rewards.sandbox.probe import attempts, working_backend
from prorl_nemo.rollout.dynamic_sampler import DynamicSampler
from prorl_nemo.rollout.group_collector import Sampling
from prorl_nemo.training.batch import StepSettings, TrainingBatch
from prorl_nemo.training.check_batch import (
    GRADIENT_LIMIT,
    MISMATCH_LIMIT,
    first_groups,
    made_up_batch,
    mean_difference,
    token_differences,
    transformers_logprobs,
)
from prorl_nemo.training.preflight import check_resources
from prorl_nemo.training.session import Session, open_session, start_ray
from prorl_nemo.training.stage_rules import recipe_stages

# Samples enough for a standard error of the mean mismatch well below its limit.
_PROMPTS = 10
_SAMPLES = 4
# Groups computed a second, slower way: by transformers, by one rank with nothing shared, and
# trained on.
_COMPARED_GROUPS = 2


@dataclass(frozen=True)
class Line:
    """One verdict.

    Attributes:
        limit: the figure must not exceed it; None where the figure is a yes (1) or no (0).
        detail: what was compared, for people.
    """

    name: str
    figure: float
    limit: float | None
    ok: bool
    detail: str


def run_check(recipe: Recipe, json_file: Path | None = None) -> bool:
    """Run every check, print the table, and write the lines to `json_file` if given.

    Returns:
        whether all are ok.

    Raises:
        UserError: what `prorl train` would refuse as well.
    """
    folder = resolve_model(recipe.model)
    check_resources(recipe, folder)
    console = Console()
    started = time.monotonic()
    lines: list[Line] = []
    with console.status("starting") as status:
        for line in _lines(recipe, folder, status.update):
            lines.append(line)
            console.print(
                f"[{'green' if line.ok else 'red'}]{'ok' if line.ok else 'FAILED':>6}[/]"
                f"  {line.name}"
            )
    console.print(_table(recipe, lines))
    console.print(f"{len(lines)} checks in {time.monotonic() - started:.0f} s")
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    return all(line.ok for line in lines)


def _lines(recipe: Recipe, folder: Path, status: Callable[[str], None]) -> Iterator[Line]:
    with open_session(recipe, folder, lambda e, d: None, status) as session:
        batch, norm = yield from _session_lines(session, status)
    # Once the run's ranks and engines are gone: a GPU that holds them has no room for another rank.
    status("gradient on one rank")
    yield _gradient_line(recipe, folder, batch, norm)


def _session_lines(
    session: Session, status: Callable[[str], None]
) -> Generator[Line, None, tuple[TrainingBatch, float]]:
    """Returns a batch, and the gradient norm that the recipe's layout finds for it."""
    recipe = session.recipe
    status("graders")
    yield from _graders(session.graders, session.prompts.validation, recipe.grading.sandbox)
    status("sampling")
    batch = _sample(session)
    status("trainer against transformers")
    batch.old_logprobs, _ = session.policy.logprobs(batch)
    batch.reference_logprobs = batch.old_logprobs
    some = first_groups(batch, _COMPARED_GROUPS)
    # Packed as it will be after the update: what must be equal then is equal to the last bit.
    some.old_logprobs, _ = session.policy.logprobs(some)
    some.reference_logprobs = some.old_logprobs
    yield _within(
        "trainer log-probs against transformers",
        mean_difference(some.old_logprobs, transformers_logprobs(session.folder, some)),
        MISMATCH_LIMIT[_arithmetic(recipe.policy)],
        "mean |difference|, same tokens, transformers in fp32",
    )
    yield _engine_line("before an update", recipe, batch)
    norm = session.policy.gradient_norm(some, _settings(recipe))
    status("an update")
    records = session.policy.train(some, _settings(recipe, learning_rate=1e-5))
    yield _yes(
        "updates are finite",
        not any(record["skipped"] for record in records),
        f"gradient norms {', '.join(format(r['grad_norm'], '.3g') for r in records)}",
    )
    session.sync_weights(1)
    status("weights of the engines")
    yield from _weight_lines(session)
    status("sampling with new weights")
    after = _sample(session)
    after.old_logprobs, _ = session.policy.logprobs(after)
    yield _engine_line("after an update", recipe, after)
    status("reference")
    yield from _reference_lines(session.policy, some, recipe.policy.fp8 == "delayed")
    return some, norm


def _graders(graders: GraderPool, prompts: Sequence[Prompt], sandbox: str) -> Iterator[Line]:
    """For one prompt of each task the gold answer must score 1 and an empty response 0.

    Where the record tells no gold answer (instructions, some tasks), another one of its kind is
    graded in its place.
    """
    chosen = {prompt.task: prompt for prompt in prompts}
    if any(prompt.domain == "code" for prompt in chosen.values()):
        backend = working_backend(sandbox)
        yield _yes(
            f"sandbox for code: {backend.name}",
            backend.name == "none" or not attempts(backend),
            "unprotected, as grading.allow_unsafe says"
            if backend.name == "none"
            else "a program inside tried to read, write, connect, signal and start processes",
        )
    for task, prompt in chosen.items():
        record, gold, what = prompt.grading, gold_response(prompt.grading), "gold answer"
        if gold is None:
            known = known_item(prompt.grading["kind"])
            assert known is not None
            (record, gold), what = known, "a known answer of the same kind"
        full, nothing = graders.grade_many([(record, gold), (prompt.grading, "")])
        yield _yes(
            f"grader: {task} ({prompt.domain})",
            full.score == 1.0 and nothing.score == 0.0,
            f"{what} {full.score:g} ({full.reason}), empty response {nothing.score:g}",
        )


def _sample(session: Session) -> TrainingBatch:
    """A few groups from the engines, with advantages made up, as a training batch."""
    recipe = session.recipe
    stage = recipe_stages(recipe).at(1)
    sampler = DynamicSampler(
        session.fleet, session.graders, session.prompts.stream, recipe.seed + session.version
    )
    held_out = session.prompts.validation
    # Every n-th, so that all tasks are seen: they are listed one after the other.
    chosen = held_out[:: max(1, len(held_out) // _PROMPTS)][:_PROMPTS]
    prompts = [(prompt, 0) for prompt in chosen]
    groups = sampler.sample_all(
        prompts, Sampling(_SAMPLES, stage.temperature, stage.max_response_tokens)
    )
    if recipe.rollout.sleep_in_updates:
        session.fleet.sleep()  # As in a step: what follows may need the engines' memory.
    return made_up_batch(groups, stage.temperature)


def _engine_line(when: str, recipe: Recipe, batch: TrainingBatch) -> Line:
    kinds = _arithmetic(recipe.policy), recipe.rollout.precision or recipe.policy.precision
    limit = max(MISMATCH_LIMIT[kind] for kind in kinds)
    off = token_differences(batch.old_logprobs, batch.engine_logprobs)
    error = off.std() / np.sqrt(len(off))
    return _within(
        f"engine log-probs against the trainer's, {when}",
        off.mean(),
        limit,
        f"mean |difference| at temperature {batch.temperature:g} over {len(off)} sampled "
        f"tokens, standard error {error:.2g}",
    )


def _gradient_line(recipe: Recipe, folder: Path, batch: TrainingBatch, here: float) -> Line:
    """Gradient norm of the recipe's layout against one rank, one sequence at a time."""
    plain = recipe.model_copy(deep=True)
    plain.policy = recipe.policy.on_one_rank()
    plain.policy.shared_prompts = False
    plain.policy.tokens_per_microbatch = 1
    plain.policy.fp8, plain.policy.attention = None, "sdpa"
    # What the recipe spreads over its ranks is all on one: main weights, moments, activations.
    plain.policy.recompute = "full"
    plain.rollout.engines = plain.rollout.tensor_parallel = 1
    plain.rollout.weight_transfer = "host"
    with _policy(plain, folder) as single:
        # Its own log-probs as the old ones, as in training: the ratio is then exactly 1 in both.
        old, _ = single.logprobs(batch)
        own = replace(batch, old_logprobs=old, reference_logprobs=old)
        there = single.gradient_norm(own, _settings(recipe))
    return _within(
        "gradient norm against one rank, one sequence at a time",
        abs(here - there) / there,
        GRADIENT_LIMIT[_arithmetic(recipe.policy)],
        f"relative difference of {here:.6g} and {there:.6g}",
    )


def _weight_lines(session: Session) -> Iterator[Line]:
    dtype = session.fleet.settings.dtype
    expected = session.policy.weight_checksums(dtype)
    for index, found in enumerate(session.fleet.weights_checksum()):
        wrong = [name for name, checksum in expected.items() if found.get(name) != checksum]
        yield _within(
            f"weights of engine {index} that differ from the trainer's",
            len(wrong),
            0,
            f"of {len(expected)} tensors" + (f": {', '.join(wrong[:3])}" if wrong else ""),
        )
        head = found.get("lm_head.weight")
        embedding = expected.get("model.embed_tokens.weight")
        yield _yes(
            f"output head of engine {index} is fresh",
            head == expected.get("lm_head.weight", embedding),
            "checksum of what the head multiplies with, tied or not",
        )


def _reference_lines(
    policy: PolicyGroup, batch: TrainingBatch, delayed: bool = False
) -> Iterator[Line]:
    """After an update the reference still gives the old log-probs; after a reset the new ones.

    Args:
        delayed: the FP8 scales have moved on in the update, with the same weights.
    """
    reference, _ = policy.logprobs(batch, "reference")
    yield _within(
        "reference unchanged by an update",
        mean_difference(reference, batch.old_logprobs),
        MISMATCH_LIMIT["fp8"] if delayed else 0.0,
        "mean |difference| to the log-probs before the update",
    )
    now, _ = policy.logprobs(batch)
    yield _yes(
        "policy changed by the update",
        mean_difference(now, batch.old_logprobs) > 0,
        f"mean |difference| {mean_difference(now, batch.old_logprobs):.3g}",
    )
    policy.reset_reference()
    reference, _ = policy.logprobs(batch, "reference")
    yield _within(
        "reference equals the policy after a reset",
        mean_difference(reference, now),
        0.0,
        "mean |difference|",
    )


def _settings(recipe: Recipe, learning_rate: float = 0.0) -> StepSettings:
    algorithm = recipe.algorithm
    return StepSettings(learning_rate, algorithm.clip_low, algorithm.clip_high, minibatches=2)


def _arithmetic(policy: Policy) -> str:
    """What the layers' products are computed in."""
    return "fp8" if policy.fp8 else policy.precision


@contextmanager
def _policy(recipe: Recipe, folder: Path) -> Iterator[PolicyGroup]:
    """The recipe's policy alone, in the places that a run would give it."""
    with ExitStack() as stack:
        if not ray.is_initialized():
            start_ray()
            stack.callback(ray.shutdown)
        placement = stack.enter_context(reserve(recipe, folder))
        group = PolicyGroup(recipe, folder, placement)
        stack.callback(group.shutdown)
        yield group


def _within(name: str, figure: float, limit: float, detail: str) -> Line:
    # Written so that NaN fails.
    return Line(name, float(figure), float(limit), bool(figure <= limit), detail)


def _yes(name: str, ok: bool, detail: str) -> Line:
    return Line(name, float(ok), None, bool(ok), detail)


def _table(recipe: Recipe, lines: Sequence[Line]) -> Table:
    table = Table(
        title=f"prorl check: {recipe.name}, {recipe.policy.precision}, {recipe.policy.layout}"
    )
    for column in ("check", "figure", "limit", "", "what"):
        table.add_column(column, justify="right" if column in ("figure", "limit") else "left")
    for line in lines:
        figure = ("yes" if line.ok else "no") if line.limit is None else f"{line.figure:.3g}"
        limit = "" if line.limit is None else f"{line.limit:g}"
        verdict = "[green]ok[/]" if line.ok else "[bold red]FAILED[/]"
        table.add_row(line.name, figure, limit, verdict, line.detail)
    return table
