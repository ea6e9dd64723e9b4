"""FLOPs, MFU and memory of a step: by hand, and against a count of a model's own layers."""

from __future__ import annotations

import numpy as np
import pytest

from prorl_nemo.megatron.layout import ModelSpec
from prorl_nemo.planning.hardware import GIB, GPUS
from prorl_nemo.planning.shapes import KNOWN
from prorl_nemo.training.batch import TrainingBatch
from prorl_nemo.training.step_metrics import hardware_figures, model_flops, peak_flops

R1 = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]


def batch(prompts: list[int], samples: int, response: int) -> TrainingBatch:
    count = len(prompts) * samples
    return TrainingBatch(
        prompts=[[1] * length for length in prompts],
        groups=[list(range(g * samples, (g + 1) * samples)) for g in range(len(prompts))],
        responses=[np.zeros(response, dtype=np.int64)] * count,
        engine_logprobs=[],
        advantages=[0.0] * count,
        temperature=1.0,
    )


def counted(spec: ModelSpec, prompt: int, response: int) -> float:
    """6 FLOPs a weight and token, 12 a pair, head dimension and head; the head for responses."""
    query, kv = spec.heads * spec.head_dim, 2 * spec.groups * spec.head_dim
    weights = spec.layers * (
        spec.hidden * (query + kv) + query * spec.hidden + 3 * spec.hidden * spec.ffn
    )
    tokens = prompt + response
    causal = sum(range(1, tokens + 1))
    attention = 12 * spec.layers * spec.heads * spec.head_dim * causal
    return 6.0 * weights * tokens + 6.0 * spec.vocab * spec.hidden * response + attention


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_against_a_count_token_by_token(name: str) -> None:
    found = model_flops(KNOWN[name], batch([100, 30], 3, 500))
    expected = 3 * (counted(KNOWN[name], 100, 500) + counted(KNOWN[name], 30, 500))
    # The cost model takes half the square for the triangle of pairs: one part in 2 x 530 less.
    assert found == pytest.approx(expected, rel=2e-3)


def test_by_hand() -> None:
    """A model of 1.78B, of which 1.31B are in layers: 64 responses of 1,000 behind 100 tokens."""
    work = batch([100] * 4, 16, 1000)
    flops = model_flops(R1, work)
    # 6 x (1.31e9 x 1,100 + 2.33e8 x 1,000) x 64 plus attention of about a tenth.
    assert flops == pytest.approx(6.7e14, rel=0.1)
    row = hardware_figures(R1, work, 2.0, [("NVIDIA H100 80GB HBM3", GIB), ("other", 3 * GIB)])
    assert row["throughput/train_tflops"] == pytest.approx(flops / 2 / 2 / 1e12)
    assert row["throughput/mfu"] == pytest.approx(flops / 2 / 2 / 989e12)
    assert row["memory/trainer_peak_gib"] == 3.0 and row["memory/host_free_gib"] > 0


def test_no_peak_no_mfu() -> None:
    row = hardware_figures(R1, batch([5], 2, 5), 1.0, [("cpu", GIB)])
    assert "throughput/mfu" not in row and row["throughput/train_tflops"] > 0
    assert "throughput/train_tflops" not in hardware_figures(R1, batch([], 2, 5), 1.0, [("cpu", 1)])
    assert peak_flops("NVIDIA B200") == 2250e12 and peak_flops("NVIDIA L4") is None


def test_the_peak_of_every_gpu_is_its_own() -> None:
    for name, gpu in GPUS.items():
        assert peak_flops(f"NVIDIA {name.upper()} 80GB HBM3") == gpu.bf16_flops
