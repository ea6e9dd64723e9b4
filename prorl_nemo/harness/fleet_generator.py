"""The training fleet as generator: the same engine actors, with the weights of a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prorl_nemo.data.chat import ChatRenderer, PromptDropped, load_tokenizer
from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.benchmark import Sampling
from prorl_nemo.harness.generator import Answer, CannotAsk, Rendered, Wanted
from prorl_nemo.rollout.engine_split import split_problem

# Twice what an engine computes at once: the next requests wait beside it, not in this process.
_QUEUED = 2
_NO_LIMIT = 1 << 40


@dataclass(frozen=True)
class EngineOptions:
    """Engines of an evaluation; what changes what is computed is in `FleetGenerator.settings`.

    Attributes:
        engines: None: as many as GPUs have room for, one on CPU.
        precision: bf16 or fp32; None: bf16 on GPUs, fp32 on CPU.
        batch_invariant: a sample does not depend on what is computed beside it, so the number of
            engines changes nothing. On GPUs by vLLM's kernels for it, on CPU by fp32, where
            roundings are too small to be met (bf16 is refused then).
        max_sequences: requests computed at once by an engine.
        threads: CPU threads of an engine; None: the cores divided by the engines.
        kv_cache_mib: None: 512 on CPU, `gpu_memory_share` on a GPU.
        tensor_parallel: GPUs of an engine, on CPU processes.
    """

    engines: int | None = None
    precision: str | None = None
    batch_invariant: bool = True
    max_sequences: int = 256
    threads: int | None = None
    kv_cache_mib: int | None = None
    gpu_memory_share: float = 0.9
    tensor_parallel: int = 1


class FleetGenerator:
    """Engines of this machine or of the Ray cluster at RAY_ADDRESS.

    Args:
        folder: of a Hugging Face model.
        on_event: called with an event's name and details, when an engine had to be replaced.
    """

    def __init__(
        self,
        folder: Path,
        sampling: Sampling,
        options: EngineOptions,
        on_event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.folder = folder
        self.capacity = options.max_sequences * _QUEUED * (options.engines or 1)
        self._sampling, self._options, self._on_event = sampling, options, on_event
        self._tokenizer = load_tokenizer(folder)
        # Too long is told apart below, where the limit is known.
        self._renderer = ChatRenderer(self._tokenizer, _NO_LIMIT)
        self._fleet: Any = None
        self._stack = ExitStack()

    def render(self, messages: list[dict[str, str]]) -> Rendered:
        try:
            token_ids = self._renderer.render(messages)
        except PromptDropped as dropped:
            raise CannotAsk(str(dropped)) from None
        text = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return Rendered(str(text), token_ids, messages, str(text).rstrip().endswith("<think>"))

    def start(self, longest_prompt: int) -> None:
        length = longest_prompt + self._sampling.max_tokens
        context = _context(self.folder)
        if context is not None and length > context:
            raise UserError(
                f"--max-tokens: the protocol's {self._sampling.max_tokens} tokens after a prompt "
                f"of {longest_prompt} exceed the model's context of {context}; use --max-tokens "
                f"{max(1, context - longest_prompt)} or less (the result then names it)"
            )
        # Engines take seconds to import.
        from prorl_nemo.rollout.engine_settings import EngineSettings
        from prorl_nemo.rollout.fleet import Fleet

        gpus = self._gpus()
        options, precision = self._options, self._precision()
        split = options.tensor_parallel
        if split > 1:
            _check_split(self.folder, split)
        count = options.engines or max(1, gpus // split)
        if gpus and count * split > gpus:
            each = "a GPU" if split == 1 else f"{split} GPUs"
            raise UserError(f"--engines: {count} engines need {each} each; there are {gpus}")
        cache = options.kv_cache_mib or (None if gpus else 512)
        settings = EngineSettings(
            model=str(self.folder),
            dtype={"bf16": "bfloat16", "fp32": "float32"}[precision],
            max_model_len=length,
            max_sequences=options.max_sequences,
            kv_cache_bytes=cache and cache << 20,
            gpu_memory_share=options.gpu_memory_share,
            batch_invariant=bool(gpus) and options.batch_invariant,
            threads=options.threads or (None if gpus else max(1, (os.cpu_count() or 1) // count)),
            tensor_parallel=split,
        )
        place = {"num_cpus": 0} | ({"num_gpus": split} if gpus else {})
        self._fleet = Fleet(settings, count, actor_options=[place] * count, on_event=self._on_event)
        self._stack.callback(self._fleet.shutdown)
        self.capacity = options.max_sequences * _QUEUED * count

    def submit(self, wanted: Sequence[Wanted]) -> None:
        from prorl_nemo.rollout.protocol import GenerationRequest

        sampling = self._sampling
        requests = []
        for one in wanted:
            assert one.prompt.token_ids is not None
            requests.append(
                GenerationRequest(
                    request_id=one.request_id,
                    prompt_token_ids=one.prompt.token_ids,
                    seed=one.seed,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_tokens,
                )
            )
        self._fleet.submit(requests)

    def poll(self, max_wait: float) -> list[Answer]:
        answers = []
        for result in self._fleet.poll(max_wait):
            if result.rejected:
                raise UserError(f"the engine refuses {result.request_id}: {result.text}")
            answers.append(
                Answer(
                    result.request_id,
                    result.text,
                    list(result.token_ids),
                    len(result.token_ids),
                    result.finish_reason == "length",
                )
            )
        return answers

    def settings(self) -> dict[str, Any]:
        settings = {
            "kind": "fleet",
            "precision": self._precision(),
            "batch_invariant": self._options.batch_invariant,
        }
        # The parts of a product are added in another order.
        split = self._options.tensor_parallel
        return settings | ({"tensor_parallel": split} if split > 1 else {})

    def _precision(self) -> str:
        """Raises UserError where it cannot be batch-invariant."""
        chosen = self._options.precision or ("bf16" if self._gpus() else "fp32")
        if self._options.batch_invariant and chosen == "bf16" and not self._gpus():
            raise UserError(
                "--precision: in bf16 on CPU a response depends on what is computed beside it, so "
                "results would change with the number of engines; leave it out (fp32), or add "
                "--no-batch-invariant"
            )
        return chosen

    def _gpus(self) -> int:
        """GPUs of the cluster, which may have some where this process has none."""
        import ray

        from prorl_nemo.training.session import start_ray

        if not ray.is_initialized():
            start_ray()
            self._stack.callback(ray.shutdown)
        return int(ray.cluster_resources().get("GPU", 0))

    def close(self) -> None:
        self._stack.close()


def _check_split(folder: Path, ways: int) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    problem = split_problem(
        ways,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        ffn=config["intermediate_size"],
        vocab=config["vocab_size"],
    )
    if problem:
        raise UserError(f"--tensor-parallel: {problem}")


def _context(folder: Path) -> int | None:
    """Tokens that the model can hold, as its config says."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("max_position_embeddings")
    return found if isinstance(found, int) else None
