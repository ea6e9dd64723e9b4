"""How to run one engine, and what vLLM is told. What it needs on CPU, and why, is said here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prorl_nemo.recipe import Recipe


@dataclass(frozen=True)
class EngineSettings:
    """How to run one engine.

    Attributes:
        model: folder of a Hugging Face model.
        dtype: `bfloat16` or `float32`.
        max_model_len: prompt and response together, tokens.
        max_sequences: requests computed at once; more wait their turn.
        kv_cache_bytes: size of the KV cache, of all workers together; None on a GPU: what
            `gpu_memory_share` leaves.
        gpu_memory_share: share of the GPU's memory for weights and cache.
        fp32_head: multiply by the output head in fp32, as the trainer does.
        threads: CPU threads, of all workers together; None: all cores.
        tensor_parallel: workers that share each matrix, one per GPU; above 1 they are processes.
        sleep: allow `VllmEngine.sleep` (GPU).
        batch_invariant: a response does not depend on what is computed beside it (GPU, vLLM's
            own kernels for it; slower).
    """

    model: str
    dtype: str
    max_model_len: int
    max_sequences: int = 256
    kv_cache_bytes: int | None = None
    gpu_memory_share: float = 0.5
    fp32_head: bool = True
    threads: int | None = None
    tensor_parallel: int = 1
    sleep: bool = False
    batch_invariant: bool = False

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        model: Path,
        neighbours: int | None = None,
        gpu: bool | None = None,
    ) -> EngineSettings:
        """Settings that serve every stage of a recipe.

        Args:
            neighbours: engines that share a machine; default: all of them.
            gpu: whether the engines have GPUs; default: whether this process sees one, which on
                the head of a cluster it need not.
        """
        rollout = recipe.rollout
        cores = os.cpu_count() or 1
        gpu = torch.cuda.is_available() if gpu is None else gpu
        cache = rollout.kv_cache_mib or (None if gpu else 512)
        return cls(
            model=str(model),
            dtype={"bf16": "bfloat16", "fp32": "float32"}[
                rollout.precision or recipe.policy.precision
            ],
            max_model_len=recipe.data.max_prompt_tokens + recipe.longest_response,
            kv_cache_bytes=cache and cache << 20,
            gpu_memory_share=rollout.gpu_memory_share,
            fp32_head=rollout.fp32_head,
            threads=rollout.engine_threads or max(1, cores // (neighbours or rollout.engines)),
            tensor_parallel=rollout.tensor_parallel,
            sleep=rollout.sleep_in_updates and gpu,
        )

    def environment(self) -> dict[str, str]:
        """Environment variables that must be set before torch and vLLM are imported."""
        variables = {
            # The engine in this process, which hands its workers what it gets itself.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Each weight update warns of layers without weights (rotary tables); errors remain.
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Idle OpenMP threads sleep: trainer and graders use the same cores in turn.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if self.batch_invariant:
            variables["VLLM_BATCH_INVARIANT"] = "1"
        if self.threads:
            variables["OMP_NUM_THREADS"] = str(max(1, self.threads // self.tensor_parallel))
        if self.tensor_parallel > 1:
            # On CPU vLLM would bind each worker to a memory node of its own, or refuse.
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # How long a step may take is the fleet's to say (`hang_seconds`).
            variables["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = str(24 * 3600)
        return variables


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` or `LLM`. Imports vLLM."""
    workers, cache = settings.tensor_parallel, settings.kv_cache_bytes
    arguments: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_sequences,
        "kv_cache_memory_bytes": cache and cache // workers,
        # Log-probabilities of the sampling distribution, not those at temperature 1: the
        # importance weight of the policy loss is wrong with any other.
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "hf_overrides": {"head_dtype": "float32"} if settings.fp32_head else {},
        "seed": 0,
    }
    if workers > 1:
        arguments |= {"tensor_parallel_size": workers, "distributed_executor_backend": "mp"}
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return arguments | {
            "gpu_memory_utilization": settings.gpu_memory_share,
            "enable_sleep_mode": settings.sleep,
        }
    return arguments | {
        "enforce_eager": True,
        # A prefill cut in chunks rewinds the request's random stream, which a CPU generator
        # cannot do; without chunks the longest sequence must fit one batch.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(settings.max_model_len, 4096),
        # Blocks are shared whole; the default of 128 tokens would share no short prompt.
        "block_size": 32,
    }
