"""The `rollout` section of a recipe: sampling, engines, what becomes of surplus and faults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prorl_nemo.recipe_data import Positive, Threads
from prorl_nemo.settings_file import Section


class History(Section):
    """Prompts solved by all samples or by none, again and again, come less often."""

    in_a_row: Positive = Field(
        3, description="Groups of a prompt without signal, one after the other, that make it rare."
    )
    draw_share: float = Field(
        0.25, gt=0, le=1, description="Share of the epochs in which a rare prompt still comes."
    )


class Rollout(Section):
    """Sampling with vLLM."""

    prompts_per_step: int = Field(
        256, ge=1, le=65536, description="Groups with signal that a step trains on."
    )
    samples_per_prompt: int = Field(16, ge=2, le=1024, description="Responses of a group.")
    max_response_tokens: Positive = Field(8192, description="Response limit, end of turn included.")
    temperature: float = Field(1.2, gt=0, le=2, description="ProRL v1: 1.2.")
    engines: int = Field(1, ge=1, le=4096, description="vLLM engines, a process each.")
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="GPUs of one node that share each matrix of an engine; on CPU, processes.",
    )
    engine_threads: Threads | None = Field(
        None, description="CPU threads per engine; default: cores divided by engines."
    )
    precision: Literal["bf16", "fp32"] | None = Field(
        None, description="The engine's type; default: the policy's."
    )
    fp32_head: bool = Field(
        True, description="Logits in fp32 in the engine too; bf16 rounds one of 16 by up to 0.06."
    )
    kv_cache_mib: Positive | None = Field(
        None, description="KV cache per engine; default: 512 on CPU, gpu_memory_share on GPU."
    )
    gpu_memory_share: float = Field(
        0.5, gt=0, le=1, description="Share of the GPU's memory for an engine's weights and cache."
    )
    sleep_in_updates: bool = Field(
        False,
        description="Engines give their GPU's memory to the trainer while it updates, and take it "
        "back with the new weights (written, not yet run on a GPU); nothing happens on CPU.",
    )
    deterministic: bool = Field(
        False,
        description="Submit prompts in waves and wait for each, so that the engine computes the "
        "same batches every time and a resumed run equals an unbroken one to the last bit "
        "(docs/resume.md). Needs engines: 1.",
    )
    dynamic_sampling: bool = Field(
        True,
        description="Start another prompt for each group without signal, until the batch is full; "
        "false leaves its place empty, so that steps train on fewer groups.",
    )
    max_rejected_per_kept: float = Field(
        20.0,
        gt=0,
        le=10_000,
        description="Rejected groups per kept one in a step before the run stops.",
    )
    surplus: Literal["requeue", "carry_over"] = Field(
        "requeue",
        description="Prompts under way when the batch is full: sampled anew by the next policy, or "
        "finished by it (less work in vain; samples partly one update old; docs/rollouts.md).",
    )
    prompt_history: History | None = Field(
        None, description="Pass over prompts that gave no signal several times; null is off."
    )
    weight_transfer: Literal["host", "broadcast", "cuda_ipc"] = Field(
        "host",
        description="How weights reach the engines: through host memory; by NCCL to engines on "
        "other GPUs (gloo on CPU); or where they are, for an engine on its trainer rank's GPU. "
        "The two for GPUs are written, not yet run on one.",
    )
    verify_weights_every: int = Field(
        25,
        ge=0,
        description="Steps between comparisons of every tensor in the engines with the trainer's, "
        "by checksum; 0 is never.",
    )
    engine_hang_seconds: float = Field(
        900.0,
        gt=0,
        description=(
            "An engine that makes no step with its requests, or does not finish a weight update, "
            "for so long is replaced."
        ),
    )
    max_engine_restarts: int = Field(
        5,
        ge=0,
        le=1000,
        description="More restarts of engines than this within engine_restart_window save the run "
        "and stop it.",
    )
    engine_restart_window: float = Field(
        3600.0, gt=0, description="Seconds over which restarts of engines are counted."
    )
