"""Runs whose time was published, and what the model of a step says of them.

`python -m prorl_nemo.planning.published` prints the table of docs/planning.md. Response lengths are
published for NeMo-RL alone; elsewhere the planner's default share of the limit stands.
"""

from __future__ import annotations

from dataclasses import dataclass

from prorl_nemo.planning.engine import Engine, Generation
from prorl_nemo.planning.hardware import FITTED, GIB, GPUS, Efficiency
from prorl_nemo.planning.shapes import KNOWN
from prorl_nemo.planning.step_time import StepTime, Workload, step_time
from prorl_nemo.recipe import Policy

MEAN_SHARE = 0.35
"""Mean response over the limit, where nobody says: our choice (log-normal, docs/planning.md)."""
SPREAD = 1.35
"""Mean square over squared mean of lengths: exp(sigma^2) with sigma 0.55."""
PROMPT = 200.0
"""Mean tokens of a prompt: our choice."""
KEEP_RATE = 0.41
"""Share of groups with signal: BroRL (arXiv 2510.01180), at ProRL's plateau."""


@dataclass(frozen=True)
class Published:
    """A run: what it was, and GPU-hours a step as published or derived.

    Attributes:
        rounds: waits for the longest response: 2 where dynamic sampling refills in rounds, 1
            without.
    """

    name: str
    source: str
    model: str
    gpu: str
    gpus: int
    prompts: int
    samples: int
    limit: int
    gpu_hours: float
    mean: float | None = None
    keep_rate: float = KEEP_RATE
    rounds: float = 2.0
    minibatches: int = 4

    def workload(self) -> Workload:
        mean = self.mean or MEAN_SHARE * self.limit
        drawn = self.prompts / self.keep_rate
        generation = Generation(drawn, self.samples, PROMPT, mean, self.limit, SPREAD, self.rounds)
        return Workload(generation, self.prompts, self.minibatches)

    def engine(self) -> Engine:
        """One of those it has on each GPU, with six tenths of the memory. Our choice."""
        spec, gpu = KNOWN[self.model], GPUS[self.gpu]
        token = 4 * spec.layers * spec.groups * spec.head_dim
        weights = 2 * spec.parameters
        return Engine(weights, GIB, int(0.6 * gpu.memory) - weights - GIB, token)

    def predicted(self, share: Efficiency = FITTED) -> StepTime:
        """Data-parallel ranks with full recomputation, prompts not shared."""
        spec, gpu = KNOWN[self.model], GPUS[self.gpu]
        policy = Policy(
            data_parallel=self.gpus,
            recompute="full",
            shared_prompts=False,
            tokens_per_microbatch=16384,
        )
        work, engine = self.workload(), self.engine()
        return step_time(spec, policy, gpu, engine, self.gpus, work, "cuda_ipc", share)

    def ratio(self, share: Efficiency = FITTED) -> float:
        """Published over predicted GPU-hours."""
        return self.gpu_hours / (self.predicted(share).total * self.gpus / 3600)


def _nemo_rl(gpu: str, gpus: int, seconds: float) -> Published:
    """NeMo-RL v0.5, Llama-3.1-8B in bf16, on-policy: 64 x 32 responses of 1,019 tokens."""
    return Published(
        name="NeMo-RL v0.5, 4K",
        source="its performance page",
        model="meta-llama/Llama-3.1-8B",
        gpu=gpu,
        gpus=gpus,
        prompts=64,
        samples=32,
        limit=4096,
        gpu_hours=gpus * seconds / 3600,
        mean=1019,
        keep_rate=1.0,
        rounds=1.0,
    )


_R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
RUNS = (
    Published("ProRL, 16K", "arXiv 2510.01180", _R1, "h100", 64, 512, 16, 16384, 16.0),
    Published("ProRL v2, 8K", "20,000 - 16,000 h", _R1, "h100", 32, 256, 16, 8192, 4.0),
    Published("ProRL v1, 8K", "arXiv 2505.24864", _R1, "h100", 32, 256, 16, 8192, 6.5),
    Published(
        "BroRL, 16K", "arXiv 2510.01180", _R1, "h100", 64, 128, 512, 16384, 58.2, keep_rate=0.62
    ),
    _nemo_rl("h100", 16, 92.8),
    _nemo_rl("gb200", 8, 91.0),
)
GENERATION = ((RUNS[0], 36.5), (RUNS[3], 72.4))
"""Responses a second while generating, of the runs that publish it."""


def generation_rate(run: Published, share: Efficiency = FITTED) -> float:
    """Responses a second that the engines generate."""
    work = run.workload().generation
    return work.prompts * work.samples / run.predicted(share).generation


def table() -> str:
    """The rows of docs/planning.md."""
    lines = [
        "| run | source | GPUs | prompts x samples | limit | published | predicted | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        hours = run.predicted().total * run.gpus / 3600
        lines.append(
            f"| {run.name} | {run.source} | {run.gpus} x {run.gpu} | {run.prompts} x "
            f"{run.samples} | {run.limit:,} | {run.gpu_hours:.2f} | {hours:.2f} | "
            f"{run.gpu_hours / hours:.2f} |"
        )
    lines += ["", "| run | responses/s generating | predicted |", "|---|---|---|"]
    lines += [f"| {run.name} | {rate} | {generation_rate(run):.1f} |" for run, rate in GENERATION]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
