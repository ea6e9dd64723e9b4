"""What the model is, read from its Hugging Face config, and whether a layout can hold it.

Imports neither Megatron nor torch, so that a recipe that cannot work is refused
in a moment. Whatever of a config is not mapped is refused by name: a property
that is silently ignored gives a policy that is not the model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prorl_nemo.errors import ModelError, RecipeError
from prorl_nemo.megatron.packing_plan import CostModel
from prorl_nemo.recipe import Policy

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies were stretched (see rope.py); names as in Hugging Face configs.

    Attributes:
        original_positions: context before the stretching (yarn, llama3).
        attention_factor: of rotated queries and keys; None for YaRN's own (yarn).
    """

    kind: Literal["linear", "yarn", "llama3"]
    factor: float
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


# Keys of each kind besides `factor`: those it must have, and those it may.
_ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "linear": (set(), set()),
    "yarn": (
        {"original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "attention_factor", "truncate"},
    ),
    "llama3": (
        {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
        set(),
    ),
}


@dataclass(frozen=True)
class ModelSpec:
    """A dense decoder of a known family.

    Attributes:
        rope_scaling: None for plain rotary positions.
        max_positions: tokens (prompt and response together) the model was made for.
        parameters: their number, from the shapes.
    """

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    rope_scaling: RopeScaling | None = None

    @property
    def parameters(self) -> int:
        """Of the matrices; norms and biases are left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (attention + 3 * self.hidden * self.ffn) + embeddings


def read_model_spec(folder: Path) -> ModelSpec:
    """Read `config.json`. Raises ModelError for a model this project does not map."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {path} cannot be read ({error})") from None
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise ModelError(
            f"model: {path} has model_type {family!r}; mapped families: {', '.join(FAMILIES)}"
        )
    _refuse_unmapped(config, path)
    heads = _positive(config, "num_attention_heads", path)
    hidden = _positive(config, "hidden_size", path)
    groups = _positive(config, "num_key_value_heads", path, default=heads)
    if heads % groups or ("head_dim" not in config and hidden % heads):
        raise ModelError(
            f"model: {path}: num_attention_heads ({heads}) must be a multiple of "
            f"num_key_value_heads ({groups}) and, without a head_dim, divide hidden_size ({hidden})"
        )
    return ModelSpec(
        family=family,
        layers=_positive(config, "num_hidden_layers", path),
        hidden=hidden,
        ffn=_positive(config, "intermediate_size", path),
        heads=heads,
        groups=groups,
        head_dim=_positive(config, "head_dim", path, default=hidden // heads),
        vocab=_positive(config, "vocab_size", path),
        norm_eps=float(_positive(config, "rms_norm_eps", path, kind=float)),
        rope_theta=float(_positive(_rope(config), "rope_theta", path, kind=float)),
        max_positions=_positive(config, "max_position_embeddings", path),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_scaling=_rope_scaling(config, path),
    )


def _positive(
    config: dict[str, Any],
    key: str,
    path: Path,
    *,
    default: int | None = None,
    kind: type[float] = int,
) -> Any:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < math.inf:
        raise ModelError(f"model: {path}: {key} must be a positive number, found {value!r}")
    return value


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rope settings, where transformers 5 (`rope_parameters`) and 4 keep them."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = dict(found) if isinstance(found, dict) else {"rope_type": found}
    if "rope_theta" not in rope:
        rope["rope_theta"] = config.get("rope_theta", 10000.0)
    return rope


def _rope_kind(config: dict[str, Any]) -> Any:
    rope = _rope(config)
    return rope.get("rope_type", rope.get("type")) or "default"


def _rope_scaling(config: dict[str, Any], path: Path) -> RopeScaling | None:
    rope, kind = _rope(config), _rope_kind(config)
    if kind == "default":
        return None
    required, optional = _ROPE_KEYS[kind]
    numbers = {"factor", *required, *(key for key in optional & set(rope) if key != "truncate")}
    figures: dict[str, Any] = {
        key: _positive(rope, key, path, kind=float)
        for key in sorted(numbers)
        if key in required | {"factor"} or rope[key] is not None
    }
    if "original_max_position_embeddings" in figures:
        figures["original_positions"] = figures.pop("original_max_position_embeddings")
    if figures.get("low_freq_factor", 1.0) == figures.get("high_freq_factor", 4.0):
        raise ModelError(f"model: {path}: low_freq_factor and high_freq_factor must differ")
    return RopeScaling(kind=kind, truncate=bool(rope.get("truncate", True)), **figures)


def _unmapped_rope_keys(config: dict[str, Any]) -> list[str]:
    """Keys of the rope settings that would be ignored (YaRN's mscale, ...)."""
    rope, kind = _rope(config), _rope_kind(config)
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        return []
    required, optional = _ROPE_KEYS[kind]
    known = {"rope_theta", "rope_type", "type", "factor", "partial_rotary_factor"}
    return sorted(set(rope) - known - required - optional)


def _refuse_unmapped(config: dict[str, Any], path: Path) -> None:
    kind = _rope_kind(config)
    rope_keys = _unmapped_rope_keys(config)
    # Written by transformers for every model; 1 is the whole head.
    part = "partial_rotary_factor"
    rotated = _rope(config).get(part) or config.get(part) or 1
    unmapped = {
        f"{part} {rotated!r}": rotated != 1,
        f"rope_type {kind!r}": kind not in ("default", *_ROPE_KEYS),
        f"{', '.join(rope_keys)} of rope_type {kind!r}": bool(rope_keys),
        "sliding windows": bool(config.get("use_sliding_window")),
        "attention_bias": config["model_type"] != "qwen2" and bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        f"hidden_act {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        "quantization_config": "quantization_config" in config,
    }
    found = [name for name, present in unmapped.items() if present]
    if found:
        raise ModelError(f"model: {path} uses {', '.join(found)}, which this project does not map")


def cost_model(spec: ModelSpec) -> CostModel:
    """FLOPs of a training step's parts, forward and backward.

    A product costs 2 FLOPs for each weight (or pair of tokens and channel), backward twice as
    much; the output head is computed once more in backward.
    """
    attention = spec.hidden * spec.head_dim * (2 * spec.heads + 2 * spec.groups)
    return CostModel(
        token=6.0 * spec.layers * (attention + 3 * spec.hidden * spec.ffn),
        target=8.0 * spec.vocab * spec.hidden,
        pair=12.0 * spec.layers * spec.heads * spec.head_dim,
    )


def padded_vocab(spec: ModelSpec, tensor_parallel: int) -> int:
    """Vocabulary rounded up to a multiple of the tensor-parallel size, no further."""
    return -(-spec.vocab // tensor_parallel) * tensor_parallel


def padded_groups(spec: ModelSpec, tensor_parallel: int) -> int:
    """Query groups (key/value heads) rounded up to a multiple of the tensor-parallel size.

    An added group has zero weights, so its values are zero and so is every gradient to and from
    it: it stays zero, and neither the function nor the gradient norm changes. Our choice, so that
    a model of 9 heads in 3 groups, as SmolLM2-135M is, can be split in two.
    """
    return -(-spec.groups // tensor_parallel) * tensor_parallel


def check_layout(policy: Policy, spec: ModelSpec) -> None:
    """Refuse a layout that does not divide the model, or that Megatron would compute wrongly.

    Raises:
        RecipeError: naming the key, the figures and the values that would do.
    """
    tp, pp = policy.tensor_parallel, policy.pipeline_parallel
    problems = []
    if not _tensor_parallel_fits(spec, tp):
        what = (
            f"{spec.ffn} feed-forward width" if spec.ffn % tp else f"{spec.groups} key/value heads"
        )
        possible = [n for n in range(1, spec.groups + 1) if _tensor_parallel_fits(spec, n)]
        problems.append(
            f"policy.tensor_parallel: {tp} does not divide the model's {what}; "
            f"possible: {', '.join(map(str, possible))}"
        )
    if spec.layers % pp:
        problems.append(
            f"policy.pipeline_parallel: {pp} does not divide the model's {spec.layers} layers; "
            f"possible: {_divisors(spec.layers)}"
        )
    elif spec.layers // pp % policy.virtual_pipeline:
        problems.append(
            f"policy.virtual_pipeline: {policy.virtual_pipeline} does not divide the "
            f"{spec.layers // pp} layers of a pipeline rank; possible: "
            f"{_divisors(spec.layers // pp)}"
        )
    if policy.virtual_pipeline > 1 and pp == 1:
        problems.append(
            "policy.virtual_pipeline: interleaves pipeline ranks, of which there is one; set it "
            "to 1 or raise policy.pipeline_parallel"
        )
    if policy.sequence_parallel and tp == 1:
        problems.append(
            "policy.sequence_parallel: shares tokens between tensor-parallel ranks, of which there "
            "is one; set it to false or raise policy.tensor_parallel"
        )
    if policy.context_parallel > 1 and policy.shared_prompts:
        problems.append(
            "policy.context_parallel: cannot cut a row with shared prompts; set "
            "policy.shared_prompts=false, or policy.context_parallel=1"
        )
    if policy.context_parallel > 1 and policy.attention == "flex":
        problems.append(
            "policy.attention: flex computes whole rows, which context parallelism cuts; set it to "
            "sdpa, or policy.context_parallel=1"
        )
    if problems:
        raise RecipeError("\n  ".join(problems))


def _tensor_parallel_fits(spec: ModelSpec, ranks: int) -> bool:
    """Key/value heads that do not divide are padded (`padded_groups`), but not past one a rank."""
    return spec.ffn % ranks == 0 and (spec.groups % ranks == 0 or spec.groups > ranks)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
