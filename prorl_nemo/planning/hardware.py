"""GPUs by their data sheets, and what share of those figures real work reaches.

The shares in `Efficiency` are the only constants fitted to published runs (docs/planning.md shows
each run beside its prediction); everything else is counted from the model and the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

from prorl_nemo.errors import UserError

GIB = 1 << 30
GPUS_PER_NODE = 8
"""Of a node whose GPUs are joined by NVLink: DGX and HGX A100, H100, H200 and B200."""


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet.

    Attributes:
        memory: bytes that a process can have.
        bf16_flops: of dense products, a second; FP8 has twice as many where there is FP8.
        bandwidth: of its memory, bytes a second.
        nvlink, network: to the GPUs of its node and to other nodes, bytes a second each way.
        host: to the host's memory, bytes a second each way.
        capability: compute capability, by which FP8 scalings are allowed or refused.
    """

    name: str
    memory: int
    bf16_flops: float
    bandwidth: float
    nvlink: float
    network: float
    host: float
    capability: tuple[int, int]


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 79 * GIB, 312e12, 2.04e12, 300e9, 25e9, 25e9, (8, 0)),
        Gpu("h100", 79 * GIB, 989e12, 3.35e12, 450e9, 50e9, 50e9, (9, 0)),
        Gpu("h200", 139 * GIB, 989e12, 4.8e12, 450e9, 50e9, 50e9, (9, 0)),
        Gpu("b200", 178 * GIB, 2250e12, 7.7e12, 900e9, 50e9, 50e9, (10, 0)),
        Gpu("gb200", 184 * GIB, 2500e12, 8.0e12, 900e9, 50e9, 200e9, (10, 0)),
    )
}
"""80 GB variants with SXM; one 400 Gb/s network card (A100: 200) for each GPU."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet that are reached, and one latency. Fitted; see docs/planning.md.

    Attributes:
        compute: of the dense peak, by the trainer's and the prefill's products.
        bandwidth: of the memory's bandwidth, by decoding and by element-wise kernels.
        network: of NVLink and network, by collectives.
        iteration: seconds an engine spends beside the GPU's work for each token of its batch
            (scheduling, sampling, log-probs, detokenisation).
    """

    compute: float = 0.30
    bandwidth: float = 0.50
    network: float = 0.70
    iteration: float = 0.012


FITTED = Efficiency()


def find_gpu(name: str) -> Gpu:
    """Raises UserError for a GPU that is not in the table."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: {name!r} is not known; choose from {', '.join(GPUS)}")
    return GPUS[name.lower()]
