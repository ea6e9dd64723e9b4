"""Pretraining's pure parts: working, order of problems, tokenizer, batches, the recipe."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reasoning_gym
import torch
from rich.console import Console

from prorl_nemo.cluster.policy_group import PolicyError
from prorl_nemo.data.chat import (
    FORMAT_INSTRUCTION,
    ChatRenderer,
    PromptDropped,
    chat_messages,
)
from prorl_nemo.errors import FaultError, RecipeError, UserError
from prorl_nemo.megatron.packing import build_row
from prorl_nemo.megatron.row_loss import supervised_row_loss
from prorl_nemo.model_source import check_model_folder
from prorl_nemo.pretraining import run
from prorl_nemo.pretraining.first_model import make_tokenizer, write_first_model
from prorl_nemo.pretraining.problems import Problem, load_problems, step_of
from prorl_nemo.pretraining.run import Encoder, batch_of, exam_row
from prorl_nemo.pretraining.working import working
from prorl_nemo.recipe_pretrain import Pretraining, load_pretraining
from prorl_nemo.training.stopping import StopWatch

RECIPE = Path(__file__).parents[2] / "recipes" / "study" / "pretrain.yaml"

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 2, "kv_heads": 1}
TASKS = [
    {"task": "chain_sum", "problems": 40, "config": {"max_terms": 3, "max_digits": 2}},
    {"task": "syllogism", "problems": 30},
]


def settings(**changes: Any) -> Pretraining:
    raw = {
        "name": "tiny",
        "steps": 4,
        "problems_per_step": 8,
        "tasks": TASKS,
        "shape": {**SHAPE, "vocab_size": 300, "max_positions": 256},
        "exam": {"problems_per_task": 8},
    }
    return Pretraining.model_validate({**raw, **changes})


# ---- working


@pytest.mark.parametrize(
    ("task", "metadata", "steps"),
    [
        ("chain_sum", {"expression": "55 + 98 - 93"}, "55+98=153 153-93=60"),
        ("chain_sum", {"expression": "3 - 9 + 1"}, "3-9=-6 -6+1=-5"),
        ("products", {"expression": "98 * 93"}, "98*90=8820 98*3=294 8820+294=9114"),
        ("gcd", {"numbers": [15, 168]}, "168%15=3 15%3=0"),
        ("gcd", {"numbers": [2, 4, 6]}, None),
        (
            "fraction_simplification",
            {
                "numerator": 12,
                "denominator": 15,
                "reduction_factor": 3,
                "simplified_numerator": 4,
                "simplified_denominator": 5,
            },
            "12/3=4 15/3=5",
        ),
        ("simple_equations", {"equation": "2*z + 16 = 60"}, "2*z=44"),
        ("simple_equations", {"equation": "2*z - 16 = 60"}, "2*z=76"),
        ("simple_equations", {"equation": "3*z = 60"}, None),
        ("number_sequence", {"sequence": [8, -6, -13, -17, -19]}, "-14 -7 -4"),
        ("spell_backward", {"word": "sun"}, None),
        ("base_conversion", {"decimal_value": 161}, "161"),
        ("count_primes", {"primes": []}, None),
        ("count_primes", {"primes": list(range(9))}, None),
        ("syllogism", {"is_valid": True}, None),
    ],
)
def test_working_by_hand(task: str, metadata: dict[str, Any], steps: str | None) -> None:
    assert working(task, metadata) == steps


def test_working_of_real_items_leads_to_their_answers() -> None:
    """Every equation in it is true, and its last value is the answer where it ends in one."""
    checked: Counter[str] = Counter()
    # Not number_sequence: slow to make, and its working has no equation.
    tasks: dict[str, dict[str, Any]] = {
        "chain_sum": {"max_terms": 4, "max_digits": 3},
        "products": {"max_digits": 2},
        "gcd": {"max_numbers": 2},
        "fraction_simplification": {"styles": ["plain"]},
        "simple_equations": {"max_terms": 2},
        "simple_geometry": {"max_sides": 4},
        "count_bits": {"max_n": 200},
        "count_primes": {"max_n": 40},
    }
    for task, config in tasks.items():
        for item in reasoning_gym.create_dataset(task, seed=3, size=40, **config):
            steps = working(task, item["metadata"])
            if steps is None:
                continue
            for left, right in re.findall(r"(\S+)=(-?\d+)(?: |$)", steps):
                if re.fullmatch(r"[-+*%/\d]+", left):
                    assert eval(left) == int(right), steps  # Digits and signs, as just matched.
                    checked["equations"] += 1
            if task in ("chain_sum", "products", "simple_geometry"):
                assert steps.rsplit("=", 1)[1] == item["answer"], (item["question"], steps)
            if task == "gcd":
                assert steps.rsplit("%", 1)[1] == f"{item['answer']}=0"
            if task == "count_bits":
                assert steps.split().count("1") == int(item["answer"])
            if task == "fraction_simplification":
                parts = re.findall(r"=(\d+)", steps)
                assert "/".join(parts) == item["answer"]
            if task == "count_primes":
                assert len(steps.split()) == int(item["answer"])
            checked[task] += 1
    assert checked.keys() == {*tasks, "equations"} and min(checked.values()) >= 10, checked


# ---- problems


def test_problems_are_kept_and_disjoint(tmp_path: Path) -> None:
    train, exam = load_problems(settings(), tmp_path)
    assert Counter(p.task for p in train) == {"chain_sum": 40, "syllogism": 30}
    assert Counter(p.task for p in exam) == {"chain_sum": 8, "syllogism": 8}
    questions = [p.question for p in train + exam]
    assert len(set(questions)) == len(questions)
    assert all(p.response.endswith("</answer>") for p in train)
    # About half of the sums show their steps; none of 40 or all have odds of 1e-12.
    worked = [not p.response.startswith("<answer>") for p in train if p.task == "chain_sum"]
    assert 0 < sum(worked) < 40
    assert load_problems(settings(), tmp_path) == (train, exam)
    written = (tmp_path / "problems.jsonl").stat().st_mtime_ns
    load_problems(settings(), tmp_path)
    assert (tmp_path / "problems.jsonl").stat().st_mtime_ns == written
    # Other settings are other problems, whatever the folder holds.
    none, _ = load_problems(settings(worked_share=0.0), tmp_path)
    assert all(p.response.startswith("<answer>") for p in none)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"task": "chain_sums"}, r"tasks\.0\.task: .*did you mean chain_sum"),
        ({"task": "chain_sum", "config": {"terms": 2}}, r"tasks\.0\.config\.terms"),
        ({"task": "countdown", "config": {"min_numbers": 90}}, r"tasks\.0\.config"),
    ],
)
def test_tasks_that_cannot_be_used(task: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_problems(settings(tasks=[task]), tmp_path)


def test_each_epoch_has_every_problem_once() -> None:
    seen = [i for step in range(1, 8) for i in step_of(counts=[14], size=4, step=step, seed=3)]
    assert sorted(seen[:14]) == sorted(seen[14:]) == list(range(14))
    assert seen[:14] != seen[14:]
    # A step depends on nothing before it, and on the seed.
    assert step_of([14], 4, 5, 3) == seen[16:20]
    assert step_of([14], 4, 5, 4) != seen[16:20]
    # More problems a step than there are: some come twice.
    assert Counter(step_of([3], 7, 1, 0)) == Counter([0, 1, 2] * 2 + step_of([3], 7, 1, 0)[6:])


def test_tasks_have_equal_shares_whatever_they_have_of_problems() -> None:
    steps = [step_of([2, 5, 3], 4, step, 0) for step in range(1, 16)]
    seen = [i for step in steps for i in step]
    of_task = [[i for i in seen if i in range(*span)] for span in ((0, 2), (2, 7), (7, 10))]
    assert [len(found) for found in of_task] == [20, 20, 20]
    # Epochs of each task's own.
    assert [sorted(set(found[:n])) for found, n in zip(of_task, (2, 5, 3), strict=True)] == [
        [0, 1], [2, 3, 4, 5, 6], [7, 8, 9],
    ]  # fmt: skip
    assert Counter(of_task[0]) == {0: 10, 1: 10}


# ---- tokenizer and model


def test_tokenizer() -> None:
    sums = [f"What is {n} + 34 to {'o' * n}x?\n<answer>{n + 34}</answer>" for n in range(60)]
    other = ["Who once?"] + ["Which is sunlight?"] * 59
    tokenizer = make_tokenizer([sums, other], 400, 256)
    assert 256 + 5 < len(tokenizer) < 400

    def pieces(text: str, of: Any = tokenizer) -> list[str]:
        ids = of(text, add_special_tokens=False)["input_ids"]
        return [of.decode([i]) for i in ids]

    # Words of the questions are whole. What they differ in teaches the tokenizer nothing.
    assert pieces("What is sunlight") == ["What", " is", " sunlight"]
    assert pieces("oooox 12") == [*"oooox", " ", "1", "2"]
    assert "once" not in tokenizer.get_vocab()
    # Four merges: enough for one word, which is the one that more of the problems have.
    small = make_tokenizer([["omega"] * 3 + ["alpha"] * 97], 256 + 2 + 3 + 4, 256)
    assert pieces("alpha", small) == ["alpha"] and pieces("omega", small) == [*"omega"]
    for text in ("What is 12 + 34?", "naïve 東京 \n\t 🙂 ١٢", "<answer>46</answer>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    ids = tokenizer("<answer>1246</answer>", add_special_tokens=False)["input_ids"]
    assert pieces("<answer>1246</answer>") == ["<answer>", "1", "2", "4", "6", "</answer>"]
    # Tags survive where special tokens are left out: graders need them.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<answer>1246</answer>"
    renderer = ChatRenderer(tokenizer, 100)
    prompt = renderer.render(chat_messages("What is 1 <answer>?"))
    whole = f"What is 1 <answer>?\n{FORMAT_INSTRUCTION}<|im_end|>"
    assert tokenizer.decode(prompt) == whole
    assert [tokenizer.decode([i]) for i in prompt[-2:]] == [f"\n{FORMAT_INSTRUCTION}", "<|im_end|>"]
    with pytest.raises(PromptDropped):
        renderer.render([{"role": "user", "content": "a <|im_end|>"}])


def test_first_model_is_a_model_and_the_same_for_a_seed(tmp_path: Path) -> None:
    shape, tasks = settings().shape, [["What is 12 + 34?"] * 4]
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        write_first_model(folder, shape, tasks, seed, "bf16")
        check_model_folder(folder)
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["tie_word_embeddings"]
    encoder = Encoder(folders[0], 120)
    # Whoever loads the folder gets the tokens it was trained with.
    made = make_tokenizer(tasks, shape.vocab_size, shape.max_positions)
    for text in ("What is 7?\n\nNow", " don't 🙂 12.5°", "['1',"):
        assert encoder.tokenizer(text)["input_ids"] == made(text)["input_ids"]
    _, response = encoder.encode(Problem("t", "1 + 1", "<answer>2</answer>"))
    assert encoder.tokenizer.decode(response) == "<answer>2</answer><|im_end|>"
    with pytest.raises(PromptDropped):
        encoder.encode(Problem("t", "1 + 1", "2" * 120))


# ---- batches, loss, exam


def test_batches() -> None:
    encoded = [([5, 6, 7], [8, 9]), ([5], [6])]
    answers = batch_of(encoded, "response")
    assert answers.prompts == [[5, 6, 7], [5]] and answers.groups == [[0], [1]]
    assert [r.tolist() for r in answers.responses] == [[8, 9], [6]]
    whole = batch_of(encoded, "all")
    assert whole.prompts == [[5], [5]]
    assert [r.tolist() for r in whole.responses] == [[6, 7, 8, 9], [6]]
    assert whole.response_tokens == 5


def test_supervised_loss_is_the_sum_of_cross_entropies() -> None:
    batch = batch_of([([1, 2], [3, 4]), ([1], [2])], "response")
    row = build_row(batch.items(range(2), shared_prompts=True))
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logprobs = torch.log_softmax(logits, -1)[torch.arange(3), row.targets]
    loss, tokens, figures = supervised_row_loss(row, torch.stack((logprobs, logprobs)))
    expected = torch.nn.functional.cross_entropy(logits, row.targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert int(tokens) == 3 and float(figures["tokens"]) == 3.0
    assert float(figures["loss_sum"]) == pytest.approx(float(expected), rel=1e-6)
    empty, none, nothing = supervised_row_loss(build_row([]), torch.zeros(2, 0))
    assert float(empty) == 0.0 and int(none) == 0 and nothing == {}


def test_exam_by_hand() -> None:
    row = exam_row(["a", "b", "a"], [0.5, 1 / 257, 0.25])
    assert row["validation/mean"] == pytest.approx((0.75 + 1 / 257) / 3)
    assert row["exam/hopeless_share"] == pytest.approx(1 / 3)
    assert row["exam/by_task"] == {"a": 0.375, "b": 1 / 257}
    assert row["exam/hopeless_by_task"] == {"a": 0.0, "b": 1.0}
    assert math.isclose(float(np.mean([0.5, 0.25])), row["exam/by_task"]["a"])


# ---- stops and faults


@pytest.mark.parametrize(
    ("hours", "end", "left"), [(2.0, "", 7200), (None, "4000000000", 4e9), (None, "", None)]
)
def test_it_ends_in_time(
    hours: float | None,
    end: str,
    left: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the recipe's hours, or by the end of the Slurm job."""

    class Watch:
        def __init__(self, stop_seconds: float, seconds_left: float | None = None) -> None:
            assert stop_seconds == 7.0
            assert (seconds_left is None) == (left is None)
            if seconds_left is not None and left is not None:
                now = time.time() if end else 0.0
                assert seconds_left == pytest.approx(left - now, abs=60)
            raise InterruptedError

    monkeypatch.setattr(run, "StopWatch", Watch)
    monkeypatch.setenv("SLURM_JOB_END_TIME", end)
    faults = {"wall_clock_hours": hours, "stop_seconds": 7.0}
    with pytest.raises(InterruptedError):
        run.pretrain(settings(runs_dir=str(tmp_path), faults=faults), Console())


class Faulty(run._Run):
    """Its ranks die at each of `steps`, in turn."""

    def __init__(self, steps: list[int], max_restarts: int) -> None:
        self.settings = settings(faults={"max_restarts": max_restarts})
        self.console, self.steps, self.starts = Console(quiet=True), iter(steps), 0

    def _once(self, stop: StopWatch) -> bool:
        self.starts += 1
        step = next(self.steps, None)
        if step is None:
            return True
        self.step = step
        raise PolicyError("a trainer rank died")


def test_ranks_that_die_are_started_again() -> None:
    faulty = Faulty([3, 3, 5, 5], max_restarts=2)
    assert faulty.to_the_end(StopWatch(1.0)) and faulty.starts == 5
    # As often as the recipe says, without a new step between.
    with pytest.raises(FaultError, match=r"2 restarts have not brought the run past step 5"):
        Faulty([3, 5, 4, 5], max_restarts=2).to_the_end(StopWatch(1.0))
    stopping = StopWatch(1.0)
    stopping.reason = "SIGTERM"
    with pytest.raises(UserError, match=r"SIGTERM: a trainer rank died, before the last step"):
        Faulty([3], max_restarts=2).to_the_end(stopping)


# ---- the recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": {**SHAPE, "heads": 3}}, "heads must divide"),
        ({"shape": {**SHAPE, "hidden_size": 18}}, "must be even"),
        ({"tasks": [TASKS[0], TASKS[0]]}, "listed twice"),
        ({"tasks": []}, "tasks"),
        ({"steps": 0}, "steps"),
        ({"policy": {"optimizer": {"warmup_steps": 4}}}, "warmup_steps"),
        ({"worked_share": 1.5}, "worked_share"),
    ],
)
def test_recipes_that_cannot_be_honoured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_the_study_recipe() -> None:
    recipe = load_pretraining(RECIPE, [])
    assert recipe.training_recipe(Path("x")).policy == recipe.policy
    with pytest.raises(RecipeError, match="did you mean problems_per_step"):
        load_pretraining(RECIPE, ["problem_per_step=3"])
