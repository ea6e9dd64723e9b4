"""What one GPU can show of the trainer: numbers against transformers, memory, time, share of peak.

Each check runs in a process of its own, so that one that fails costs only its line. The models are
random: DeepSeek-R1-Distill-Qwen-1.5B's shape where speed matters, four layers where numbers do.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from prorl_nemo.errors import UserError
from prorl_nemo.megatron.precision import check_fp8, transformer_engine_installed
from prorl_nemo.recipe import Policy, Recipe, parse_recipe
from prorl_nemo.training.batch import StepSettings, TrainingBatch
from prorl_nemo.training.check_batch import (
    GRADIENT_LIMIT,
    MISMATCH_LIMIT,
    mean_difference,
    transformers_logprobs,
)
from prorl_nemo.training.step_metrics import model_flops, peak_flops

SCALINGS = ("delayed", "blockwise", "mxfp8")


@dataclass(frozen=True)
class Sizes:
    """How large the checks are."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    tokens: int
    row: int


# Rows of twice as many tokens would take 64 GiB of activations, more than an 80 GB GPU has left.
FULL = Sizes(1536, 8960, 28, 12, 2, 128, 151_936, 8192, 8192)
REHEARSAL = Sizes(64, 128, 2, 4, 2, 16, 1024, 128, 256)


@dataclass(frozen=True)
class Line:
    """A figure, and whether it is as it should be; None where nothing can be wrong."""

    name: str
    figure: str
    ok: bool | None


Check = Callable[[Sizes], Iterator[Line]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on CPU")
    rehearse = parser.parse_args().rehearse
    if not rehearse and not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU; nothing was checked", file=sys.stderr)
        return 2
    sizes = REHEARSAL if rehearse else FULL
    gpu = "CPU (rehearsal)" if rehearse else torch.cuda.get_device_name()
    table = Table(title=f"{gpu}, torch {torch.__version__}")
    for column in ("check", "figure", ""):
        table.add_column(column)
    failed = False
    checks: dict[str, Check] = {
        "parity": parity,
        "packing": packing,
        "FlexAttention": flex,
        "log-probs": logprobs,
        "training": training,
        **{f"FP8, {scaling}": partial(fp8, scaling=scaling) for scaling in SCALINGS},
    }
    for name, check in checks.items():
        for line in _in_own_process(name, check, sizes):
            failed |= line.ok is False
            verdict = {True: "ok", False: "FAILED", None: ""}[line.ok]
            table.add_row(line.name, line.figure, verdict)
    Console(width=120).print(table)
    return int(failed)


def _in_own_process(name: str, check: Check, sizes: Sizes) -> list[Line]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, name, check, sizes))
    process.start()
    theirs.close()
    lines: list[Line] = []
    try:
        while (line := ours.recv()) is not None:
            lines.append(line)
    except EOFError:
        lines.append(Line(name, "the process died", False))
    process.join()
    return lines


def _serve(connection: Any, name: str, check: Check, sizes: Sizes) -> None:
    try:
        for line in check(sizes):
            connection.send(line)
    except Exception as error:
        traceback.print_exc()
        connection.send(Line(name, f"{type(error).__name__}: {error}"[:200], False))
    connection.send(None)


# ---- the checks ---------------------------------------------------------------------------


def parity(sizes: Sizes) -> Iterator[Line]:
    """Log-probs of the trainer in bf16 against transformers in fp32, plain and packed rows."""
    with tempfile.TemporaryDirectory() as folder:
        model = _random_model(sizes, Path(folder), layers=min(4, sizes.layers))
        batch = _batch(sizes, prompts=4, samples=3)
        wanted = transformers_logprobs(model, batch, _device())
        yield _difference(
            "log-probs, bf16 against transformers fp32, mean |difference|",
            _logprobs(_worker(model, sizes), batch),
            wanted,
            MISMATCH_LIMIT["bf16"],
        )


def packing(sizes: Sizes) -> Iterator[Line]:
    """The gradient of packed rows with shared prompts against one sequence at a time."""
    with tempfile.TemporaryDirectory() as folder:
        model = _random_model(sizes, Path(folder), layers=min(4, sizes.layers))
        worker = _worker(model, sizes)
        batch = _batch(sizes, prompts=4, samples=3)
        packed = worker.gradient_norm(batch, _settings())
        worker.policy.shared_prompts, worker.policy.tokens_per_microbatch = False, 1
        alone = worker.gradient_norm(batch, _settings())
        yield _gradients("packed with shared prompts against one by one", packed, alone)


def flex(sizes: Sizes) -> Iterator[Line]:
    """The gradient of FlexAttention over whole rows against SDPA in batches."""
    if _device() != "cuda":
        yield Line("FlexAttention", "no backward pass on CPU", None)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = _random_model(sizes, Path(folder), layers=min(4, sizes.layers))
        worker = _worker(model, sizes, attention="flex")
        batch = _batch(sizes, prompts=4, samples=3)
        norms, seconds = {}, {}
        for name in ("flex", "sdpa"):
            for chunk in worker.chunks:
                for layer in chunk.decoder.layers:
                    layer.self_attention.core_attention.flex = name == "flex"
            worker.gradient_norm(batch, _settings())
            _synchronize()
            started = time.perf_counter()
            norms[name] = worker.gradient_norm(batch, _settings())
            _synchronize()
            seconds[name] = time.perf_counter() - started
        yield _gradients("FlexAttention against SDPA", norms["flex"], norms["sdpa"])
        yield Line(
            "FlexAttention: time of SDPA's", f"{seconds['flex'] / seconds['sdpa']:.2f} x", None
        )


def logprobs(sizes: Sizes) -> Iterator[Line]:
    """Memory and time of the chunked log-probs against the whole matrix, with backward."""
    from prorl_nemo.megatron.logprobs import response_logprobs

    torch.manual_seed(0)
    device = _device()
    hidden = torch.randn(sizes.tokens, sizes.hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(sizes.vocab, sizes.hidden, device=device) / math.sqrt(sizes.hidden)
    weight = weight.to(torch.bfloat16)
    targets = torch.randint(0, sizes.vocab, (sizes.tokens,), device=device)

    def plain() -> None:
        logits = (hidden @ weight.t()).float()
        logits.log_softmax(-1).gather(1, targets[:, None]).sum().backward()  # type: ignore[no-untyped-call]

    def chunked() -> None:
        response_logprobs(hidden, weight, targets, 1.0, sizes.vocab)[0].sum().backward()  # type: ignore[no-untyped-call]

    for tensor in (hidden, weight):
        tensor.requires_grad_()
    costs = {}
    for name, method in {"plain": plain, "chunked": chunked}.items():
        costs[name] = _cost(method, (hidden, weight))
    (plain_s, plain_b), (ours_s, ours_b) = costs["plain"], costs["chunked"]
    # Three products, and the one that is computed again in backward.
    share = _share_of_peak(8 * sizes.tokens * sizes.vocab * sizes.hidden / ours_s)
    what = f"log-probs of {sizes.tokens:,} x {sizes.vocab:,}, with backward"
    yield Line(f"{what}: time against plain", f"{ours_s:.3f} s, {ours_s / plain_s:.2f} x", None)
    yield Line(f"{what}: share of peak", share, None)
    if device == "cuda":
        yield Line(
            f"{what}: peak extra memory",
            f"{ours_b / 2**20:,.0f} MiB, 1/{plain_b / ours_b:.1f} of plain (at most 1/2)",
            ours_b <= plain_b / 2,
        )


def training(sizes: Sizes) -> Iterator[Line]:
    """Tokens per second of updates at full size, in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        worker = _worker(_random_model(sizes, Path(folder), sizes.layers), sizes)
        yield from _speed(worker, sizes, "bf16")


def fp8(sizes: Sizes, scaling: str) -> Iterator[Line]:
    """One FP8 scaling, if this GPU can do it: log-probs against bf16, and speed."""
    from prorl_nemo.megatron.layout import read_model_spec

    name = f"FP8, {scaling}"
    with tempfile.TemporaryDirectory() as folder:
        model = _random_model(sizes, Path(folder), sizes.layers)
        capability = torch.cuda.get_device_capability() if _device() == "cuda" else None
        policy = Policy.model_validate({"fp8": scaling})
        try:
            check_fp8(policy, read_model_spec(model), transformer_engine_installed(), capability)
        except UserError as refusal:
            yield Line(name, f"refused: {refusal}", None)
            return
        worker = _worker(model, sizes, fp8=scaling)
        batch = _batch(sizes, prompts=2, samples=4)
        for _ in range(3):  # Delayed scaling learns the range of each tensor, in training only.
            worker.gradient_norm(batch, _settings())
        found = _logprobs(worker, batch)
        # All chunks of a worker share one config.
        setting, worker.config.fp8 = worker.config.fp8, None
        exact = _logprobs(worker, batch)
        worker.config.fp8 = setting
        yield _difference(
            f"{name}: log-probs against bf16, mean |difference|",
            found,
            exact,
            MISMATCH_LIMIT["fp8"],
        )
        yield from _speed(worker, sizes, name)


# ---- parts --------------------------------------------------------------------------------


def _logprobs(worker: Any, batch: TrainingBatch) -> list[Any]:
    found = worker.logprobs(batch)
    return [found[sample][0] for sample in range(len(batch.responses))]


def _difference(name: str, found: list[Any], wanted: list[Any], limit: float) -> Line:
    difference = mean_difference(found, wanted)
    return Line(name, f"{difference:.4f} nats (limit {limit})", difference <= limit)


def _gradients(what: str, found: float, wanted: float) -> Line:
    """Two norms of one gradient in bf16."""
    difference, limit = abs(found - wanted) / wanted, GRADIENT_LIMIT["bf16"]
    return Line(
        f"gradient norm, {what}", f"{difference:.2%} (limit {limit:.0%})", difference <= limit
    )


def _speed(worker: Any, sizes: Sizes, name: str) -> Iterator[Line]:
    batch = _batch(sizes, prompts=4, samples=4)
    tokens = 4 * sizes.row // 8 + batch.response_tokens
    worker.gradient_norm(batch, _settings())
    _synchronize()
    started = time.perf_counter()
    norm = worker.gradient_norm(batch, _settings())
    _synchronize()
    seconds = time.perf_counter() - started
    yield Line(
        f"updates, {name}: tokens per second",
        f"{tokens / seconds:,.0f}, {_share_of_peak(model_flops(worker.spec, batch) / seconds)}",
        math.isfinite(norm),
    )


def _share_of_peak(flops: float) -> str:
    peak = peak_flops(torch.cuda.get_device_name()) if _device() == "cuda" else None
    share = f", {flops / peak:.0%} of its bf16 peak" if peak else ""
    return f"{flops / 1e12:,.1f} TFLOP/s{share}"


def _cost(work: Callable[[], None], leaves: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Seconds, and bytes of peak memory above what was held; the second of two runs."""
    for _ in range(2):
        for leaf in leaves:
            leaf.grad = None
        before = 0
        if _device() == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        _synchronize()
        started = time.perf_counter()
        work()
        _synchronize()
        seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if _device() == "cuda" else 0
    return seconds, float(peak - before)


def _worker(model: Path, sizes: Sizes, **policy: Any) -> Any:
    from prorl_nemo.megatron.policy_worker import PolicyWorker

    return PolicyWorker(_recipe(model, sizes, policy), model, 0, 1, f"file://{model}/rendezvous")


def _recipe(model: Path, sizes: Sizes, policy: dict[str, Any]) -> Recipe:
    return parse_recipe(
        {
            "name": "gpu-check",
            "model": str(model),
            "policy": {"tokens_per_microbatch": sizes.row, **policy},
            "algorithm": {"minibatches": 1},
            "data": {"sources": [{"task": "none"}]},
            "stages": [{"steps": 1}],
        }
    )


def _settings() -> StepSettings:
    return StepSettings(0.0, 0.2, 0.28, minibatches=1)


def _batch(sizes: Sizes, prompts: int, samples: int) -> TrainingBatch:
    """Random tokens: prompts of an eighth of a row, responses of up to an eighth."""
    draw = np.random.default_rng(0)
    count, most = prompts * samples, sizes.row // 8
    lengths = draw.integers(most // 4, most, count)
    responses = [draw.integers(0, sizes.vocab, n) for n in lengths]
    figures = [np.full(n, -math.log(sizes.vocab), dtype=np.float32) for n in lengths]
    return TrainingBatch(
        prompts=[draw.integers(0, sizes.vocab, most).tolist() for _ in range(prompts)],
        groups=[list(range(g * samples, (g + 1) * samples)) for g in range(prompts)],
        responses=responses,
        engine_logprobs=figures,
        advantages=[1.0 if i % 2 else -0.5 for i in range(count)],
        temperature=1.0,
        old_logprobs=figures,
        reference_logprobs=figures,
    )


def _random_model(sizes: Sizes, folder: Path, layers: int) -> Path:
    """A Qwen2 with random weights, without a tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups,
        max_position_embeddings=2 * sizes.row,
        tie_word_embeddings=False,
        # Products keep the size of what goes in. At the usual 0.02 all words are equally likely,
        # and a wrong rotation or mask would hardly show.
        initializer_range=sizes.hidden**-0.5,
    )
    torch.manual_seed(0)
    with torch.device(_device()):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _synchronize() -> None:
    if _device() == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
