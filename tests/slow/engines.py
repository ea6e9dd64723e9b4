"""What tests of real engines share: tiny models, requests, and transformers as the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prorl_nemo.rollout.engine_settings import EngineSettings
from prorl_nemo.rollout.fleet import Fleet
from prorl_nemo.rollout.protocol import GenerationRequest, GenerationResult
from prorl_nemo.rollout.weights import pack_buckets, weight_checksums

MODEL_LEN = 256
PROMPTS = [[11, 42, 300, 7], [5] * 70 + [9], [400, 401, 402]]


def settings(folder: Path, dtype: str = "float32", **changes: Any) -> EngineSettings:
    options = {"kv_cache_bytes": 64 << 20, "threads": 1, **changes}
    return EngineSettings(str(folder), dtype, MODEL_LEN, **options)


def request(name: str, prompt: int = 0, seed: int = 1, **changes: Any) -> GenerationRequest:
    options = {"temperature": 1.2, "max_tokens": 40, **changes}
    return GenerationRequest(name, PROMPTS[prompt], seed, **options)


def collect(fleet: Fleet, count: int) -> dict[str, GenerationResult]:
    """Exactly `count` results, and no more after them."""
    results: list[GenerationResult] = []
    while len(results) < count:
        results += fleet.poll(1.0)
    results += fleet.poll(0.6)
    assert len(results) == len({r.request_id for r in results}) == count
    return {r.request_id: r for r in results}


def generate(fleet: Fleet, requests: list[GenerationRequest]) -> dict[str, GenerationResult]:
    fleet.submit(requests)
    return collect(fleet, len(requests))


def reference_logprobs(
    model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float, top_p: float
) -> torch.Tensor:
    """Log-probabilities [response] under the sampling distribution, by sorting and summing."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    found = []
    for position, token in enumerate(response, start=len(prompt) - 1):
        probabilities = torch.softmax(logits[position] / temperature, -1)
        order = probabilities.argsort(descending=True)
        before = probabilities[order].cumsum(0) - probabilities[order]
        nucleus = order[before < top_p]
        assert token in nucleus
        found.append((probabilities[token] / probabilities[nucleus].sum()).log())
    return torch.stack(found)


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Other weights, of the same scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise.to(weight.dtype), alpha=0.3 * float(weight.std()))


def send(fleet: Fleet, model: PreTrainedModel, version: int) -> dict[str, str]:
    """Update the fleet in many small buckets; returns the checksums it should have."""
    dtype = getattr(torch, fleet.settings.dtype)
    fleet.update_weights(version, pack_buckets(model.named_parameters(), dtype, 60_000))
    return weight_checksums(model.state_dict().items(), dtype)
