"""`prorl pretrain`: the trainer's ranks, a cross-entropy loss, a model folder at the end.

The same Megatron policy, packed rows, optimizer and checkpoints as `prorl train`. An exam is
exact and needs no samples: the chance that a response at temperature 1 is the reference response is
the product of its tokens' probabilities. That is the least share of samples that are right: another
working, or none, may lead to the answer too.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console

from prorl_nemo.cluster.placement import reserve
from prorl_nemo.cluster.policy_group import PolicyError, PolicyGroup
from prorl_nemo.data.chat import (
    ChatRenderer,
    PromptDropped,
    chat_messages,
    load_tokenizer,
)
from prorl_nemo.errors import FaultError, UserError
from prorl_nemo.export import write_model
from prorl_nemo.model_source import check_model_folder
from prorl_nemo.pretraining.first_model import write_first_model
from prorl_nemo.pretraining.problems import Problem, load_problems, step_of
from prorl_nemo.recipe_pretrain import Pretraining
from prorl_nemo.schedule.learning_rate import learning_rate
from prorl_nemo.training.batch import TrainingBatch
from prorl_nemo.training.metrics import RunLog
from prorl_nemo.training.run_dir import open_run_dir
from prorl_nemo.training.run_state import Checkpoints
from prorl_nemo.training.session import start_ray
from prorl_nemo.training.stopping import OutOfTime, StopWatch, seconds_left

UNSOLVED_IN = 256
"""Samples in which a hopeless problem's reference response is expected less than once."""

Encoded = tuple[list[int], list[int]]


def pretrain(settings: Pretraining, console: Console) -> Path | None:
    """Train to the last step, or until stopped; resumes.

    Returns:
        the model's folder, or None if it was stopped (and saved).

    Raises:
        UserError: anything about recipe, machine or run directory that has to be changed; a run
            that stopped without its last checkpoint.
        FaultError: its ranks keep dying.
    """
    run_dir, faults = settings.run_dir, settings.faults
    stop = StopWatch(faults.stop_seconds, seconds_left(faults.wall_clock_hours, os.environ))
    with open_run_dir(settings), RunLog(run_dir) as log, stop.listening():
        checkpoints = Checkpoints(run_dir / "checkpoints", keep_last=1)
        try:
            train, exam = load_problems(
                settings, run_dir, lambda task: console.print(f"problems of {task}")
            )
            first = run_dir / "first"
            precision = settings.policy.precision
            write_first_model(first, settings.shape, _texts(train), settings.seed, precision)
            check_model_folder(first)
            run = _Run(settings, first, train, exam, log, checkpoints, console)
            if not run.to_the_end(stop):
                return None
        except OutOfTime:
            raise UserError(
                f"{stop.reason}: the last step could not be saved within faults.stop_seconds "
                f"({faults.stop_seconds:g}); the same command resumes from the checkpoint before"
            ) from None
        finally:
            checkpoints.close()
    model = run_dir / "model"
    if not model.exists():
        about = {
            "run": settings.name,
            "step": settings.steps,
            "pretrained": True,
            # Where it was made is nobody else's business.
            "recipe": settings.model_dump(mode="json", exclude={"runs_dir"}),
        }
        last = checkpoints.path(settings.steps) / "policy"
        write_model(last, first, model, precision, about)
    return model


def _texts(problems: list[Problem]) -> Iterator[list[str]]:
    """Those of each task."""
    for _, of_task in itertools.groupby(problems, key=lambda problem: problem.task):
        yield [f"{problem.question}\n{problem.response}" for problem in of_task]


class Encoder:
    """Problems as token ids, rendered as a training run will render them.

    Args:
        tokens: longest prompt and answer together.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        self.tokenizer = load_tokenizer(folder)
        self._renderer = ChatRenderer(self.tokenizer, tokens)
        self._tokens = tokens

    def encode(self, problem: Problem) -> Encoded:
        """Prompt, and response with its end of turn. Raises PromptDropped."""
        prompt = self._renderer.render(chat_messages(problem.question))
        ids: list[int] = self.tokenizer(problem.response, add_special_tokens=False)["input_ids"]
        response = [*ids, int(self.tokenizer.eos_token_id)]
        if len(prompt) + len(response) > self._tokens:
            raise PromptDropped("longer than shape.max_positions")
        return prompt, response


def batch_of(encoded: list[Encoded], loss_on: str) -> TrainingBatch:
    """Sequences of their own, predicted from the answer on (`response`) or throughout (`all`)."""
    if loss_on == "all":
        encoded = [(prompt[:1], [*prompt[1:], *response]) for prompt, response in encoded]
    responses = [np.asarray(response, dtype=np.int64) for _, response in encoded]
    return TrainingBatch(
        prompts=[prompt for prompt, _ in encoded],
        groups=[[index] for index in range(len(encoded))],
        responses=responses,
        engine_logprobs=[np.zeros(len(r), dtype=np.float32) for r in responses],
        advantages=[0.0] * len(encoded),
        temperature=1.0,
    )


class _Run:
    """The loop, over as many starts of the ranks as it takes."""

    def __init__(
        self,
        settings: Pretraining,
        first: Path,
        train: list[Problem],
        exam: list[Problem],
        log: RunLog,
        checkpoints: Checkpoints,
        console: Console,
    ) -> None:
        self.settings, self.first, self.log = settings, first, log
        self.checkpoints, self.console = checkpoints, console
        self.encoder = Encoder(first, settings.shape.max_positions)
        self.train = train
        # In the order of the recipe's tasks, as `load_problems` gives them.
        self.counts = list(Counter(problem.task for problem in train).values())
        self.exam = self._usable(exam)
        self.step, self.save_seconds = 0, 0.0

    def _usable(self, problems: list[Problem]) -> list[tuple[Problem, Encoded]]:
        """Problems with their tokens; those that are too long are left out."""
        usable = []
        for problem in problems:
            with suppress(PromptDropped):
                usable.append((problem, self.encoder.encode(problem)))
        if not usable:
            raise UserError(
                f"shape.max_positions: of {len(problems)} problems none is short enough; raise it"
            )
        return usable

    def to_the_end(self, stop: StopWatch) -> bool:
        """Whether all steps are done; False if it was asked to stop, and saved."""
        restarts, reached = 0, -1
        while True:
            try:
                return self._once(stop)
            except PolicyError as fault:
                if reason := stop.should_stop(0.0):
                    raise UserError(
                        f"{reason}: {fault}, before the last step was saved; the same command "
                        "resumes from the last checkpoint"
                    ) from fault
                restarts = 1 if self.step > reached else restarts + 1
                reached = max(reached, self.step)
                if restarts > self.settings.faults.max_restarts:
                    raise FaultError(
                        f"faults.max_restarts: {fault}; {restarts - 1} restarts have not brought "
                        f"the run past step {reached}. The same command resumes from the last "
                        "checkpoint"
                    ) from fault
                self.console.print(f"step {self.step}: {fault}; starting again")

    def _once(self, stop: StopWatch) -> bool:
        """From the newest checkpoint on."""
        settings = self.settings
        newest, damaged = self.checkpoints.newest_whole()
        for step, damage in damaged.items():
            self.console.print(f"checkpoint of step {step} is damaged and not used: {damage}")
        self.log.truncate_after(newest or -1)
        self.step = newest or 0
        if newest == settings.steps:
            return True
        with ExitStack() as stack:
            if not ray.is_initialized():
                start_ray()
                stack.callback(ray.shutdown)
            recipe = settings.training_recipe(self.first)
            # On GPUs each rank is given its own.
            placement = stack.enter_context(reserve(recipe, self.first))
            policy = PolicyGroup(recipe, self.first, placement)
            stack.callback(policy.shutdown)
            if newest is not None:
                policy.load(self.checkpoints.path(newest) / "policy")
            while self.step < settings.steps:
                self._step(policy)
                last = self.step == settings.steps
                if last or self.step % settings.exam.interval == 0:
                    self._examine(policy)
                reason = stop.should_stop(self.save_seconds)
                if last or reason or self.step % settings.checkpoint.interval == 0:
                    self._save(policy)
                if reason and not last:
                    return False
        return True

    def _step(self, policy: PolicyGroup) -> None:
        settings, optimizer = self.settings, self.settings.policy.optimizer
        self.step += 1
        rate = learning_rate(
            self.step,
            peak=optimizer.learning_rate,
            total_steps=settings.steps,
            schedule=optimizer.schedule,
            warmup_steps=optimizer.warmup_steps,
            decay_steps=optimizer.decay_steps,
            floor=optimizer.min_learning_rate,
        )
        chosen = step_of(self.counts, settings.problems_per_step, self.step, settings.seed)
        # Encoded as they are needed: all of them at once would take as long as a minute of steps.
        usable = self._usable([self.train[index] for index in chosen])
        batch = batch_of([encoded for _, encoded in usable], settings.loss_on)
        started = time.monotonic()
        record = policy.supervise(batch, rate)
        if record["skipped"]:
            raise UserError(
                f"policy.optimizer.learning_rate: gradients of step {self.step} are not finite; "
                "lower it, or set policy.precision=fp32"
            )
        self.log.metrics(
            {
                "kind": "train",
                "step": self.step,
                "policy/loss": record["loss_sum"] / record["tokens"],
                "policy/grad_norm": record["grad_norm"],
                "policy/learning_rate": rate,
                "pretrain/problems": len(usable),
                "pretrain/predicted_tokens": int(record["tokens"]),
                "time/step": time.monotonic() - started,
            }
        )

    def _examine(self, policy: PolicyGroup) -> None:
        logprobs, _ = policy.logprobs(batch_of([pair for _, pair in self.exam], "response"))
        chances = [math.exp(float(each.sum(dtype=np.float64))) for each in logprobs]
        row = exam_row([problem.task for problem, _ in self.exam], chances)
        self.log.metrics({**row, "step": self.step})
        by_task = ", ".join(f"{t} {v:.2f}" for t, v in row["exam/by_task"].items())
        self.console.print(
            f"step {self.step}: reference response at temperature 1: {row['validation/mean']:.3f}; "
            f"less than once in {UNSOLVED_IN}: {row['exam/hopeless_share']:.3f} ({by_task})"
        )

    def _save(self, policy: PolicyGroup) -> None:
        started = time.monotonic()
        self.checkpoints.begin(self.step, {"step": self.step}, policy.begin_save)
        outcome = self.checkpoints.wait()
        self.save_seconds = time.monotonic() - started
        if outcome is not None and outcome.error is not None:
            raise UserError(f"checkpoint: {outcome.path} could not be written ({outcome.error})")


def exam_row(tasks: list[str], chances: list[float]) -> dict[str, Any]:
    """Figures of an exam: chances of the reference response, by task and over all problems."""
    by_task: dict[str, list[float]] = {}
    for task, chance in zip(tasks, chances, strict=True):
        by_task.setdefault(task, []).append(chance)
    return {
        "kind": "validation",
        "validation/mean": statistics.fmean(chances),
        "exam/hopeless_share": statistics.fmean(c * UNSOLVED_IN < 1 for c in chances),
        "exam/by_task": {task: statistics.fmean(values) for task, values in by_task.items()},
        "exam/hopeless_by_task": {
            task: statistics.fmean(c * UNSOLVED_IN < 1 for c in values)
            for task, values in by_task.items()
        },
    }
