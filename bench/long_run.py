"""The run directory of 3,000 imagined steps, through the writers that training uses.

Three stages, a reset every 300 steps, a penalty cycle of 100 on and 500 off, a decision about a
reset after each step, crashes after which the work since the last 50th step is done again.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import yaml

from prorl_nemo.training.metrics import RunLog

STAGES = [("warm up", 1000, 2048), ("longer answers", 1200, 4096), ("hard problems", 800, 8192)]
TASKS = ["spell_backward", "chain_sum", "basic_arithmetic", "number_sorting", "leg_counting"]
DOMAINS = ["code", "instructions", "logic", "math", "stem"]


def write_run(run_dir: Path, seed: int, steps: int = 3000, crashes: tuple[int, ...] = ()) -> Path:
    """A run directory as training writes it; the same for the same seed. `crashes`: the steps after
    which the process dies."""
    noise = random.Random(seed)
    recipe = {
        "name": run_dir.name,
        "seed": seed,
        "model": "smollm2-135m-instruct",
        "policy": {"optimizer": {"learning_rate": 2e-6, "betas": [0.9, 0.999]}},
        "data": {"sources": [{"kind": "reasoning_gym", "task": task} for task in TASKS]},
        "stages": [{"name": n, "steps": s, "max_response_tokens": t} for n, s, t in STAGES],
    }
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    pending = list(crashes)
    step, clock = 0, 1.76e9 + 1e6 * seed
    log = RunLog(run_dir)
    log.event("run_started", 0, time=clock, fingerprint="9f2c")
    log.metrics(_validation_row(0, clock, noise))
    while step < steps:
        step += 1
        row = _train_row(step, clock, noise)
        clock += row["time/step"]
        if step == 1 or _stage(step - 1) < row["stage"]:
            log.event("stage_started", step, time=clock, stage=row["stage"],
                      stage_name=row["stage_name"])  # fmt: skip
        if step % 600 in (1, 101):
            log.event("cosine_penalty", step, time=clock, on=step % 600 == 1)
        log.metrics(row)
        spike = 3 * _usual_kl(step % 300) if step % 300 > 100 else None
        if step % 300:
            log.event("reset_decision", step, time=clock, reset=False,
                      figures={"step": step, "steps_since_reset": step % 300, "resets": step // 300,
                               "kl": row["policy/kl"], "kl_median": spike and spike / 3,
                               "kl_threshold": spike, "kl_spikes": 0, "validation": 0.5,
                               "best_validation": 0.51, "best_step": 50,
                               "evaluations_since_best": 1})  # fmt: skip
        if step % 300 == 0:
            log.event("reference_reset", step, time=clock, trigger="interval",
                      figures={"kl": row["policy/kl"]})  # fmt: skip
        if step % 50 == 0:
            log.metrics(_validation_row(step, clock, noise))
            log.samples(step, [_sample_row(step, noise) for _ in range(30)])
            log.event("checkpoint_saved", step, time=clock, seconds=3.2,
                      path=f"checkpoints/step_{step:06d}")  # fmt: skip
        if step in pending:
            pending.remove(step)
            log.close()
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write('{"kind":"train","st')
            log = RunLog(run_dir)
            step, clock = step - step % 50, clock + 5000
            log.truncate_after(step)
            log.event("resumed", step, time=clock)
    log.event("finished", steps, time=clock)
    log.close()
    return run_dir


def _stage(step: int) -> int:
    ends = [sum(s for _, s, _ in STAGES[: i + 1]) for i in range(len(STAGES))]
    return sum(step > end for end in ends)


def _usual_kl(since_reset: int) -> float:
    return 2e-5 * float(since_reset**0.9)


def _skill(step: int) -> float:
    return 0.12 + 0.42 * (1 - math.exp(-step / 900)) + 0.06 * _stage(step)


def _train_row(step: int, clock: float, noise: random.Random) -> dict[str, Any]:
    stage = _stage(step)
    name, _, limit = STAGES[stage]
    since_reset = (step - 1) % 300 + 1
    penalty = (step - 1) % 600 < 100
    skill = _skill(step)
    length = limit * (0.16 + 0.1 * (1 - math.exp(-step / 700))) * (0.9 if penalty else 1)
    length *= math.exp(noise.gauss(0, 0.06))
    reward = skill + noise.gauss(0, 0.03)
    generate = length / 90 * math.exp(noise.gauss(0, 0.08))
    seconds = {
        "generate": generate, "logprobs": 0.11 * generate, "reference": 0.1 * generate,
        "train": 0.5 * generate, "sync": 0.6, "checkpoint": 3.2 if step % 50 == 0 else 0.0,
    }  # fmt: skip
    generated = int(length * 64)
    return {
        "kind": "train", "step": step, "time": clock, "stage": stage, "stage_name": name,
        "reward/raw_mean": reward, "reward/shaped_mean": reward - 0.02 + 0.05 * penalty,
        **{f"reward/raw/{task}": min(max(skill + 0.08 * (i - 2) + noise.gauss(0, 0.08), 0), 1)
           for i, task in enumerate(TASKS)},
        **{f"reward/domain/{domain}": min(max(skill + 0.1 * (i - 2) + noise.gauss(0, 0.04), 0), 1)
           for i, domain in enumerate(DOMAINS)},
        **{f"rollout/kept_domain/{domain}": 0.72 - 0.3 * skill + noise.gauss(0, 0.08)
           for domain in DOMAINS},
        "rollout/kept_share": 0.72 - 0.3 * skill + noise.gauss(0, 0.04),
        "rollout/groups_kept": 64, "rollout/groups_rejected": int(64 * skill),
        "rollout/response_tokens_mean": length, "rollout/response_limit": limit,
        "rollout/response_tokens_max": min(limit, int(length * noise.uniform(2.6, 5))),
        "rollout/truncated_share": max(0.09 * math.exp(-step / 500) + noise.gauss(0.01, 0.006), 0),
        "rollout/generated_tokens": generated, "rollout/trained_tokens": int(0.6 * generated),
        "shaping/cosine_on": int(penalty), "shaping/dropped_groups": noise.choice([0, 0, 0, 1]),
        "policy/loss": noise.gauss(-0.002, 0.004),
        "policy/kl": _usual_kl(since_reset) * math.exp(noise.gauss(0, 0.15)),
        "policy/entropy": 0.55 + 0.5 * math.exp(-step / 800) + noise.gauss(0, 0.02),
        "policy/clip_share_low": 0.0009 * math.exp(noise.gauss(0, 0.2)),
        "policy/clip_share_high": 0.0021 * math.exp(noise.gauss(0, 0.2)),
        "policy/ratio_mean": 1 + noise.gauss(0, 0.0004),
        "policy/grad_norm": None if step == 700
        else 0.25 * math.exp(noise.gauss(0, 0.2)) * (30 if noise.random() < 0.002 else 1),
        "policy/learning_rate": 2e-6 * min(step / 10, 1),
        "policy/skipped_updates": int(step == 700),
        "mismatch/mean_abs": 0.009 * math.exp(noise.gauss(0, 0.1)),
        "mismatch/p99": 0.06 * math.exp(noise.gauss(0, 0.15)),
        "mismatch/token_mult_prob_error": 1.011 + noise.gauss(0, 0.001),
        "mismatch/gen_kl": 4e-4 * math.exp(noise.gauss(0, 0.2)),
        "mismatch/out_of_bounds_share": abs(noise.gauss(0, 2e-4)),
        **{f"time/{phase}": value for phase, value in seconds.items()},
        "time/step": sum(seconds.values()),
        "throughput/generated_tokens_per_second": generated / generate,
        "throughput/trained_tokens_per_second": 0.6 * generated / seconds["train"],
    }  # fmt: skip


def _validation_row(step: int, clock: float, noise: random.Random) -> dict[str, Any]:
    skill = _skill(step) - 0.02
    return {
        "kind": "validation", "step": step, "time": clock, "validation/samples": 200,
        "validation/mean": skill + noise.gauss(0, 0.012), "validation/stderr": 0.012,
        **{f"validation/{task}": min(max(skill + 0.08 * (i - 2) + noise.gauss(0, 0.03), 0), 1)
           for i, task in enumerate(TASKS)},
        **{f"validation/domain/{domain}": max(skill + 0.1 * (i - 2) + noise.gauss(0, 0.02), 0)
           for i, domain in enumerate(DOMAINS)},
        **{f"validation/domain_stderr/{domain}": 0.025 for domain in DOMAINS},
        "validation/truncated_share": 0.06 * math.exp(-step / 500),
        "validation/response_tokens_mean": 500 + 200 * _stage(step), "time/validate": 20.0,
    }  # fmt: skip


def _sample_row(step: int, noise: random.Random) -> dict[str, Any]:
    a, b = noise.randint(100, 999), noise.randint(100, 999)
    right = noise.random() < _skill(step)
    cut = not right and noise.random() < 0.2
    answer = a + b if right else a + b + noise.choice([-10, 1, 100])
    thought = f"<think>\nAdd the units, then the tens: {a} + {b}.\n{a} + {b} = {answer}\n</think>\n"
    return {
        "step": step, "prompt_id": f"reasoning_gym/chain_sum/{a}", "domain": "logic",
        "task": noise.choice(TASKS), "finish_reason": "length" if cut else "stop",
        "messages": [
            {"role": "system", "content": "Think first, then answer between <answer> tags."},
            {"role": "user", "content": f"What is {a} + {b}?"},
        ],
        "response": thought[:40] if cut else f"{thought}The sum is <answer>{answer}</answer>.",
        "score": float(right), "shaped": 0.93 if right else 0.0,
        "advantage": noise.gauss(0.9 if right else -0.6, 0.2), "tokens": noise.randint(40, 400),
        "reason": "answer matches" if right else f"expected {a + b}, found {answer}",
    }  # fmt: skip
