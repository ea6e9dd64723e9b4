"""The trainer's ranks as Ray actors, used by the controller as one object.

Weights leave the ranks as streams of buckets in the object store; they never
pass through the controller.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from prorl_nemo.recipe import Recipe
from prorl_nemo.training.batch import StepSettings, TrainingBatch


@ray.remote
class _Rank:
    """One trainer process. Built empty, so that rank 0 can be asked for an address first."""

    def __init__(self, recipe: Recipe, folder: Path, rank: int) -> None:
        self.arguments = (recipe, folder, rank, recipe.policy.ranks)
        self.worker: Any = None

    def address(self) -> str:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return f"tcp://{ray.util.get_node_ip_address()}:{port}"

    def start(self, address: str) -> None:
        from prorl_nemo.megatron.policy_worker import PolicyWorker

        self.worker = PolicyWorker(*self.arguments, address)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.worker, method)(*arguments)

    def weights(self) -> Iterator[Any]:
        """Buckets of this rank's stage; nothing from ranks that only take part in the gather."""
        from prorl_nemo.rollout.weights import pack_buckets

        buckets = pack_buckets(self.worker.export_weights())
        for bucket in buckets:
            if self.worker.publishes:
                yield bucket


class PolicyGroup:
    """All trainer ranks. Every method is one collective call on all of them.

    Args:
        recipe: the run's settings.
        folder: the Hugging Face folder the policy starts from.

    Raises:
        UserError: whatever a rank refuses, as it raised it.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        variables = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
        threads = recipe.policy.threads
        if threads:
            variables["OMP_NUM_THREADS"] = str(threads)
        actor = _Rank.options(  # type: ignore[attr-defined]
            num_cpus=0, runtime_env={"env_vars": variables}
        )
        self._ranks = [actor.remote(recipe, folder, rank) for rank in range(recipe.policy.ranks)]
        address = _get(self._ranks[0].address.remote())
        _get([rank.start.remote(address) for rank in self._ranks])

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        shared = [ray.put(argument) for argument in arguments]
        answers: list[Any] = _get([r.call.remote(method, *shared) for r in self._ranks])
        return answers

    def logprobs(
        self, batch: TrainingBatch, which: str = "policy"
    ) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
        """Log-probs and entropy, float32 [length] for each sample, under policy or reference."""
        found: dict[int, NDArray[np.float32]] = {}
        for part in self._call("logprobs", batch, which):
            found |= part
        samples = range(len(batch.responses))
        return [found[s][0] for s in samples], [found[s][1] for s in samples]

    def train(self, batch: TrainingBatch, settings: StepSettings) -> list[dict[str, float]]:
        """The updates of one rollout; see PolicyWorker.train. Sums are over all ranks."""
        return merge_records(self._call("train", batch, settings))

    def gradient_norm(self, batch: TrainingBatch, settings: StepSettings) -> float:
        """Gradient norm of the whole batch as one minibatch; nothing is updated."""
        return float(self._call("gradient_norm", batch, settings)[0])

    def reset_reference(self, clear_optimizer: bool = False) -> None:
        self._call("reset_reference")
        if clear_optimizer:
            self._call("clear_optimizer")

    def weights(self) -> Iterator[Any]:
        """References to the weight buckets of all stages, as they become ready."""
        streams = [rank.weights.options(num_returns="streaming").remote() for rank in self._ranks]
        for stream in streams:
            yield from stream

    def weight_checksums(self, dtype: str) -> dict[str, str]:
        """Checksum of every published weight, as an engine of type `dtype` would hold it."""
        found: dict[str, str] = {}
        for part in self._call("weight_checksums", dtype):
            found |= part
        return found

    def save(self, folder: Path) -> None:
        self._call("save", folder)

    def load(self, folder: Path) -> None:
        self._call("load", folder)

    def shutdown(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []


def merge_records(per_rank: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """One record for each update: sums added over ranks, the rest taken from rank 0."""
    merged = []
    for update in zip(*per_rank, strict=True):
        record = {"grad_norm": update[0]["grad_norm"], "skipped": update[0]["skipped"]}
        for part in update:
            for name, value in part.items():
                if name not in ("grad_norm", "skipped"):
                    record[name] = record.get(name, 0.0) + value
        merged.append(record)
    return merged


def _get(references: Any) -> Any:
    """`ray.get`, with the rank's own exception instead of Ray's wrapper."""
    try:
        return ray.get(references)
    except RayTaskError as error:
        raise error.cause from None
