"""Log-probs of response tokens: blocks of logits against the whole matrix.

At the size of DeepSeek-R1-Distill-Qwen-1.5B's head: 8,192 tokens, 151,936 words, 1,536 channels.
`plain` is log_softmax of all logits; `selective` gathers the target's logit and subtracts a
logsumexp taken sequence by sequence, as TRL does; `ours` is `megatron.logprobs`, which also gives
the entropy. In fp32, in bf16 (`policy.logits: bf16`), and ours also with fp32 logits of bf16
numbers, the default, which is compared with plain fp32. Each runs in a process of its own.
`extra` is the peak of resident memory during the computation less what was resident before: inputs
are not in it, the gradients are.

The tokens are fewer where the plain computation would not fit into the free memory.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prorl_nemo.megatron.logprobs import response_logprobs

TOKENS, VOCABULARY, HIDDEN = 8_192, 151_936, 1_536
SEQUENCES = 8
TEMPERATURE = 1.2
GRADIENT_TOKENS = 256
# Whole fp32 matrices the plain backward holds at once: its output, two gradients, and a margin.
PLAIN_MATRICES = 3.2


@dataclass(frozen=True)
class Figure:
    """A method and type, as in TYPES. Seconds of a forward pass, and of both passes."""

    method: str
    dtype: str
    tokens: int
    forward_seconds: float
    forward_extra_mib: float
    seconds: float
    extra_mib: float


def main(json_path: Path | None) -> None:
    """Run the bench, print its tables and write the figures to `json_path`."""
    tokens = _tokens_that_fit()
    found = [_in_own_process(method, dtype, tokens) for dtype, method in RUNS]
    gradients = _gradient_distance()
    console = Console()
    console.print(_table(found))
    console.print(f"gradients of ours against plain, fp32, largest relative: {gradients:.1e}")
    if json_path:
        figures = {
            "vocabulary": VOCABULARY,
            "hidden": HIDDEN,
            "threads": torch.get_num_threads(),
            "figures": [asdict(figure) for figure in found],
            "gradient_distance": gradients,
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, exact: bool) -> Tensor:
    logits = _whole_logits(hidden, weight, exact)
    return logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def selective(hidden: Tensor, weight: Tensor, targets: Tensor, exact: bool) -> Tensor:
    logits = _whole_logits(hidden, weight, exact)
    picked = logits.gather(1, targets[:, None]).squeeze(1)
    return picked - torch.cat([part.logsumexp(dim=-1) for part in logits.chunk(SEQUENCES)])


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, exact: bool) -> Tensor:
    return response_logprobs(hidden, weight, targets, TEMPERATURE, VOCABULARY, exact=exact)[0]


def _whole_logits(hidden: Tensor, weight: Tensor, exact: bool) -> Tensor:
    if exact:
        hidden, weight = hidden.float(), weight.float()
    return (hidden @ weight.t()).float() / TEMPERATURE


TYPES = {
    "fp32": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "bf16, fp32 logits": (torch.bfloat16, True),
}
"""Type of the inputs, and whether products of them come out in fp32."""

METHODS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    "plain": plain,
    "selective": selective,
    "ours": ours,
}


RUNS = [(dtype, method) for dtype in ("fp32", "bf16") for method in METHODS]
RUNS.append(("bf16, fp32 logits", "ours"))


def _inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN) / math.sqrt(HIDDEN)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (tokens,))


def _tokens_that_fit() -> int:
    free = psutil.virtual_memory().available
    inputs = 3 * 4 * VOCABULARY * HIDDEN
    tokens = int((free - inputs) / (PLAIN_MATRICES * 4 * VOCABULARY))
    return max(SEQUENCES, min(TOKENS, tokens // 256 * 256))


def _in_own_process(method: str, dtype: str, tokens: int) -> Figure:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, method, dtype, tokens))
    process.start()
    theirs.close()
    try:
        figure: Figure = ours.recv()
    except EOFError:
        raise RuntimeError(f"{method} in {dtype} ended without a result (memory?)") from None
    finally:
        process.join()
    return figure


def _measure(connection: Any, method: str, dtype: str, tokens: int) -> None:
    compute, (kind, exact) = METHODS[method], TYPES[dtype]
    hidden, weight, targets = _inputs(tokens, kind)
    compute(hidden[:64], weight, targets[:64], exact)  # kernels are chosen and threads started

    def forward() -> None:
        with torch.no_grad():
            compute(hidden, weight, targets, exact)

    def both() -> None:
        compute(hidden, weight, targets, exact).sum().backward()

    forward_seconds, forward_extra = _cost(forward)
    seconds, extra = _cost(both)
    connection.send(Figure(method, dtype, tokens, forward_seconds, forward_extra, seconds, extra))


def _cost(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and MiB of peak memory above what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    started = time.perf_counter()
    work()
    return time.perf_counter() - started, _resident("VmHWM") - before


def _resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def _gradient_distance() -> float:
    """Largest difference of a gradient from the plain one, over the largest gradient."""
    inputs = _inputs(GRADIENT_TOKENS, torch.float32)
    upstream = torch.randn(GRADIENT_TOKENS)
    wanted, found = (
        torch.autograd.grad(method(*inputs, exact=True) @ upstream, inputs[:2])
        for method in (plain, ours)
    )
    return max(
        float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True)
    )


def _table(figures: list[Figure]) -> Table:
    table = Table(title=f"log-probs of {figures[0].tokens:,} tokens, {VOCABULARY:,} words")
    for column in ("type", "method", "forward s", "extra MiB", "with backward s", "extra MiB"):
        table.add_column(column, justify="left" if column in ("type", "method") else "right")
    for figure in figures:
        kind = "bf16" if figure.dtype == "bf16" else "fp32"
        base = next(f for f in figures if (f.method, f.dtype) == ("plain", kind))
        table.add_row(
            figure.dtype,
            figure.method,
            f"{figure.forward_seconds:.1f} ({figure.forward_seconds / base.forward_seconds:.2f})",
            f"{figure.forward_extra_mib:,.0f} (1/{_ratio(base, figure, 'forward_extra_mib'):.1f})",
            f"{figure.seconds:.1f} ({figure.seconds / base.seconds:.2f})",
            f"{figure.extra_mib:,.0f} (1/{_ratio(base, figure, 'extra_mib'):.1f})",
        )
    return table


def _ratio(base: Figure, figure: Figure, name: str) -> float:
    return float(getattr(base, name) / max(getattr(figure, name), 1.0))
