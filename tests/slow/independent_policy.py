"""The policy's log-probs and updates, computed again in the plainest way.

One process, transformers, one sequence at a time, whole logits, autograd and torch's AdamW.
Shares no line with prorl_nemo: what agrees with this has the right numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCAB = 301
TEMPERATURE = 1.2
PROMPT_LENGTHS = (7, 1, 9, 4, 12, 6)
RESPONSE_LENGTHS = ((3, 6, 1), (8, 2, 5), (4, 4, 9), (1, 2, 12), (7, 3, 5), (6, 11, 2))
MINIBATCHES = 3
LEARNING_RATE = 1e-3
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
KL_COEFFICIENT, KL_CLAMP = 0.1, 10.0
ICEPOP_LOW, ICEPOP_HIGH = 0.5, 5.0
WEIGHT_DECAY, CLIP_GRAD = 0.1, 1.0
BETAS = (0.9, 0.999)
# Adam's first update is g / (|g| + eps): with the usual 1e-8, a gradient smaller than its own
# rounding (about 1e-9 here) would move a weight by any part of the learning rate.
EPS = 1e-5

# Every figure a split can get wrong differs from the others: heads x head_dim is not hidden,
# groups are fewer than heads, widths are no powers of two, 301 divides by none of the ranks.
SHAPES: dict[str, dict[str, int]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    # Three key/value heads: two ranks add a fourth.
    "llama-3kv": {
        "hidden_size": 36,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
    },
    "qwen2": {
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 12,
    },
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "llama-3kv": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


@dataclass
class Data:
    """A rollout: lists over samples, but `prompts` and `groups` over groups."""

    prompts: list[list[int]]
    groups: list[list[int]]
    responses: list[np.ndarray]
    advantages: list[float]
    old: list[np.ndarray]
    engine: list[np.ndarray]
    reference: list[np.ndarray]


@dataclass
class Expected:
    """What every layout must find: log-probs and entropy, then each update's figures."""

    data: Data
    logprobs: list[np.ndarray]
    entropy: list[np.ndarray]
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]
    trained: dict[str, torch.Tensor]


def make_model(family: str, tied: bool, folder: Path, **config: Any) -> torch.nn.Module:
    """A tiny random fp32 model, saved to `folder`, whose every weight matters."""
    make_config, make = CLASSES[family]
    torch.manual_seed(0)
    model = make(
        make_config(
            vocab_size=VOCAB,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            **(SHAPES[family] | config),
        )
    ).float()
    for parameter in model.parameters():
        mean, std = (0.0, 0.15) if parameter.dim() > 1 else (1.0, 0.1)
        torch.nn.init.normal_(parameter, mean, std)
    model.save_pretrained(folder)
    return model


def make_data(model: torch.nn.Module) -> tuple[Data, list[np.ndarray], list[np.ndarray]]:
    """A rollout of the model, with what it finds for it.

    Old, engine and reference log-probs lie near the model's own, so that the clip bounds and
    the bounds of the importance weights each hold back some tokens and let others pass.
    """
    draw = np.random.RandomState(1)
    prompts = [draw.randint(0, VOCAB, n).tolist() for n in PROMPT_LENGTHS]
    responses = [
        draw.randint(0, VOCAB, n).astype(np.int64) for group in RESPONSE_LENGTHS for n in group
    ]
    # The padded tail of the vocabulary begins right after its last token.
    responses[0][0] = VOCAB - 1
    size = len(RESPONSE_LENGTHS[0])
    groups = [list(range(g * size, (g + 1) * size)) for g in range(len(prompts))]
    data = Data(prompts, groups, responses, draw.randn(len(responses)).tolist(), [], [], [])
    logprobs, entropy = [], []
    for sample in range(len(responses)):
        with torch.no_grad():
            found = _logprobs(model, data, sample)
        logprobs.append(found[0].numpy())
        entropy.append(found[1].numpy())
    for found_logprobs in logprobs:
        noise = draw.randn(3, len(found_logprobs)).astype(np.float32)
        data.old.append(found_logprobs + 0.3 * noise[0])
        data.engine.append(data.old[-1] + 0.7 * noise[1])
        data.reference.append(found_logprobs + 0.5 * noise[2])
    return data, logprobs, entropy


def train(model: torch.nn.Module, data: Data) -> tuple[list[float], list[float]]:
    """MINIBATCHES updates of the model; the loss sum and gradient norm of each."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
    )
    losses, norms = [], []
    per_update = len(data.groups) // MINIBATCHES
    for update in range(MINIBATCHES):
        groups = data.groups[update * per_update : (update + 1) * per_update]
        samples = [sample for group in groups for sample in group]
        loss = torch.stack([_loss(model, data, s) for s in samples]).sum()
        tokens = sum(len(data.responses[s]) for s in samples)
        optimizer.zero_grad()
        (loss / tokens).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP_GRAD)))
        losses.append(float(loss.detach()))
        optimizer.step()
    return losses, norms


def _logprobs(model: torch.nn.Module, data: Data, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = next(p for p, group in zip(data.prompts, data.groups, strict=True) if sample in group)
    response = torch.from_numpy(data.responses[sample])
    logits = model(torch.cat((torch.tensor(prompt), response))[None]).logits[0]
    table = torch.log_softmax(logits[len(prompt) - 1 : -1] / TEMPERATURE, dim=-1)
    entropy = -(table.exp() * table).sum(-1)
    return table[torch.arange(len(response)), response], entropy


def _loss(model: torch.nn.Module, data: Data, sample: int) -> torch.Tensor:
    logprobs, _ = _logprobs(model, data, sample)
    old, engine, reference = (
        torch.from_numpy(x[sample]) for x in (data.old, data.engine, data.reference)
    )
    advantage = data.advantages[sample]
    ratio = torch.exp(logprobs - old)
    clipped = torch.clamp(ratio, 1 - CLIP_LOW, 1 + CLIP_HIGH)
    policy = torch.maximum(-advantage * ratio, -advantage * clipped)
    importance = torch.exp(old - engine)
    keep = (importance >= ICEPOP_LOW) & (importance <= ICEPOP_HIGH)
    kl = 0.5 * torch.clamp(logprobs - reference, -KL_CLAMP, KL_CLAMP) ** 2
    return (policy * importance * keep + KL_COEFFICIENT * kl).sum()


def expected(family: str, tied: bool, folder: Path) -> Expected:
    """Make the model, save it to `folder`, and compute everything."""
    model = make_model(family, tied, folder)
    data, logprobs, entropy = make_data(model)
    before = _copy(model)
    losses, norms = train(model, data)
    return Expected(data, logprobs, entropy, losses, norms, before, _copy(model))


def _copy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by Hugging Face name; a tied head under both its names."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
