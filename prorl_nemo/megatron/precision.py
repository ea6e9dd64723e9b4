"""FP8 matrices through Transformer Engine: what a recipe may ask for, and what it becomes.

Scaling: one factor for a tensor, from its history (`delayed`, Micikevicius et al., arXiv
2209.05433), one for each block of 128 values (`blockwise`, DeepSeek-V3, arXiv 2412.19437, section
3.3), one for each 32 values, in hardware (`mxfp8`, Rouhani et al., arXiv 2310.10537). Only the
products of the layers are in FP8: weights, moments, norms, attention and the output head stay as
they are.

Imports neither torch nor Megatron. Megatron-Core's own layers ignore its FP8 settings without a
word, so a recipe that cannot be honoured is refused here, before a worker starts.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from prorl_nemo.errors import RecipeError
from prorl_nemo.megatron.layout import ModelSpec, padded_groups
from prorl_nemo.recipe import Policy


@dataclass(frozen=True)
class _Scaling:
    """A way of scaling.

    Attributes:
        generation: compute capability it begins with.
        hardware: the same, for people.
        multiple: sizes of a product must be multiples of this.
        megatron: settings of TransformerConfig.
    """

    generation: tuple[int, int]
    hardware: str
    multiple: int
    megatron: dict[str, Any]


# hybrid: E4M3 forward and E5M2, of wider range, for gradients. Finer scaling needs no range.
_SCALINGS = {
    "delayed": _Scaling(
        (8, 9),
        "Ada, Hopper or newer",
        16,
        {
            "fp8": "hybrid",
            "fp8_recipe": "delayed",
            # Transformer Engine's own defaults; Megatron's would look at the last step only.
            "fp8_amax_history_len": 1024,
            "fp8_amax_compute_algo": "max",
            # Maxima are all-reduced after every row. Data-parallel ranks may have different numbers
            # of rows, and would wait for each other; those that share a row's tokens have the same.
            "tp_only_amax_red": True,
        },
    ),
    "blockwise": _Scaling(
        (9, 0), "Hopper or newer", 16, {"fp8": "e4m3", "fp8_recipe": "blockwise"}
    ),
    "mxfp8": _Scaling((10, 0), "Blackwell or newer", 32, {"fp8": "e4m3", "fp8_recipe": "mxfp8"}),
}


def check_fp8(
    policy: Policy, spec: ModelSpec, engine: bool, capability: tuple[int, int] | None
) -> None:
    """Refuse an FP8 setting that this machine or model cannot honour.

    Args:
        engine: Transformer Engine is installed.
        capability: of the GPU the policy will run on; None without one.

    Raises:
        RecipeError: naming the key and what is missing.
    """
    if policy.fp8 is None:
        return
    scaling = _SCALINGS[policy.fp8]
    if not engine:
        raise RecipeError(
            "policy.fp8: needs Transformer Engine, which is not installed; remove the key or use "
            "the GPU container"
        )
    if capability is None or capability < scaling.generation:
        found = "there is none" if capability is None else f"this one is {_dotted(capability)}"
        raise RecipeError(
            f"policy.fp8: {policy.fp8} needs a GPU of compute capability "
            f"{_dotted(scaling.generation)} ({scaling.hardware}), {found}; "
            "choose another scaling or remove the key"
        )
    if policy.precision != "bf16":
        raise RecipeError("policy.fp8: belongs to policy.precision=bf16; set it or remove the key")
    tp = policy.tensor_parallel
    groups = padded_groups(spec, tp)
    sizes = {
        "hidden size": spec.hidden,
        "feed-forward width of a rank": spec.ffn // tp,
        "attention width of a rank": groups * (spec.heads // spec.groups) * spec.head_dim // tp,
    }
    for what, size in sizes.items():
        if size % scaling.multiple:
            raise RecipeError(
                f"policy.fp8: the model's {what} ({size}) is no multiple of {scaling.multiple}, "
                f"as {policy.fp8} products need; remove the key"
            )


def check_attention(policy: Policy, capability: tuple[int, int] | None) -> None:
    """Refuse FlexAttention where torch has no backward pass for it. Raises RecipeError."""
    if policy.attention == "flex" and capability is None:
        raise RecipeError("policy.attention: flex needs a GPU, and there is none; set it to sdpa")


def transformer_engine_installed() -> bool:
    """Without importing it, which takes seconds."""
    return importlib.util.find_spec("transformer_engine") is not None


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the least capable GPU here, by nvidia-smi; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        found = [line.strip().split(".") for line in answer.stdout.splitlines() if line.strip()]
        return min((int(major), int(minor)) for major, minor in found)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def megatron_settings(policy: Policy) -> dict[str, Any]:
    """What TransformerConfig gets for the recipe's FP8 scaling; nothing without one."""
    return dict(_SCALINGS[policy.fp8].megatron) if policy.fp8 else {}


def row_multiple(policy: Policy) -> int:
    """Rows are padded to a multiple of this many tokens, so that every rank holds equal parts.

    Sequence-parallel ranks share a row's tokens, context-parallel ranks hold two pieces each, and
    an FP8 product wants whole blocks of tokens from each.
    """
    multiple = _SCALINGS[policy.fp8].multiple if policy.fp8 else 1
    if policy.sequence_parallel:
        multiple *= policy.tensor_parallel
    if policy.context_parallel > 1:
        multiple *= 2 * policy.context_parallel
    return multiple


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
