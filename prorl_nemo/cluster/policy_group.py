"""The trainer's ranks as Ray actors, used by the controller as one object.

Weights leave the ranks as streams of buckets; they never pass through the controller.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from torch.distributed import DistError

from prorl_nemo.cluster.placement import Placement
from prorl_nemo.recipe import Recipe
from prorl_nemo.training.batch import StepSettings, TrainingBatch

# How long a rank's process has to leave before it is killed.
_LEAVE_SECONDS = 5.0


class PolicyError(RuntimeError):
    """A trainer rank is gone or answers no more: start all of them again from a checkpoint."""


class _RankActor:
    """One trainer process. Built empty, so that rank 0 can be asked for an address first.

    All calls share one thread, but those that must not wait for a training step.
    """

    def __init__(self, recipe: Recipe, folder: Path, rank: int) -> None:
        self.arguments = (recipe, folder, rank, recipe.policy.ranks)
        self.worker: Any = None
        self.store: Any = None
        self.shared: list[Any] = []
        self.memory: Any = None

    def address(self) -> str:
        """Where the ranks meet: a store of this process, on a port that was free when it began."""
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return f"tcp://{host}:{self.store.port}"

    def start(self, address: str) -> None:
        from prorl_nemo.megatron.policy_worker import PolicyWorker

        self.worker = PolicyWorker(*self.arguments, address)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.worker, method)(*arguments)

    @ray.method(concurrency_group="aside")
    def finish_save(self) -> None:
        self.worker.finish_save()

    @ray.method(concurrency_group="aside")
    def process(self) -> tuple[str, int]:
        """Host and process id. Answers while the rank computes, not when it is stopped or gone."""
        return socket.gethostname(), os.getpid()

    def memory_file(self) -> Any:
        """A new memory file for the weights of the ranks that share matrices with this one."""
        from prorl_nemo.rollout.shared_weights import make_memory_file

        return make_memory_file()

    def weights(self, transfer: str, file: Any) -> Iterator[Any]:
        """Buckets of this rank's pieces, or whole ones from the first that shares a matrix.

        Args:
            file: of all ranks that share matrices, where the engines are on the same machine.
        """
        from prorl_nemo.rollout.broadcast_weights import broadcast_buckets
        from prorl_nemo.rollout.cuda_weights import share_buckets
        from prorl_nemo.rollout.shared_weights import SharedWeights
        from prorl_nemo.rollout.weights import WeightBucket, bucket_bytes, pack_buckets

        worker, rollout = self.worker, self.arguments[0].rollout
        limit = bucket_bytes(worker.weight_bytes)
        if transfer == "host":
            pieces = worker.export_pieces()
            if file is None:
                yield from pack_buckets(pieces, limit=limit, first=worker.publishes)
                yield WeightBucket(())  # For `_check_sent`, which fetches the last one.
                return
            self.memory = self.memory or SharedWeights(file, *worker.tensor_rank)
            yield from self.memory.pack_buckets(pieces, limit=limit)
        elif not worker.publishes:
            deque(worker.export_weights(), maxlen=0)
        elif transfer == "broadcast":
            yield from broadcast_buckets(
                worker.export_weights(),
                rollout.engines * rollout.tensor_parallel,
                ray.util.get_node_ip_address(),
                limit=limit,
                seconds=rollout.engine_hang_seconds,
            )
        else:
            self.shared.clear()  # The engines have long loaded the update before.
            for bucket, buffer in share_buckets(worker.export_weights(), limit=limit):
                self.shared.append(buffer)
                yield bucket


# Ray's type stubs know no concurrency groups. Two threads: a save can take minutes.
_RANK: Any = ray.remote(concurrency_groups={"aside": 2})(_RankActor)  # type: ignore[call-overload]


class PolicyGroup:
    """All trainer ranks. Every method is one collective call on all of them.

    Args:
        recipe: the run's settings.
        folder: the Hugging Face folder the policy starts from.
        placement: the nodes of its ranks; None: wherever Ray has room.

    Raises:
        UserError: whatever a rank refuses, as it raised it.
        PolicyError: a rank died, gave no sign of life for `faults.silent_seconds`, or waited
            `faults.collective_seconds` for another one.
    """

    def __init__(self, recipe: Recipe, folder: Path, placement: Placement | None = None) -> None:
        self._silent_seconds = float(recipe.faults.silent_seconds)
        self._processes: list[psutil.Process] = []
        self._stages: dict[int, list[Any]] = {}
        self._files: dict[int, Any] = {}
        self._last_parts: dict[Any, Any] = {}
        self._one_machine = placement.assignment.one_machine if placement else len(ray.nodes()) == 1
        self._ranks = []
        for rank in range(recipe.policy.ranks):
            options = placement.rank_options(rank) if placement else {"num_cpus": 0}
            neighbours = placement.local_ranks(rank) if placement else recipe.policy.ranks
            variables = _environment(recipe.policy.threads, neighbours)
            actor = _RANK.options(**options, runtime_env={"env_vars": variables})
            self._ranks.append(actor.remote(recipe, folder, rank))
        address = self._get([self._ranks[0].address.remote()])[0]
        self._get([rank.start.remote(address) for rank in self._ranks])
        self._processes = _local_processes(self._get([r.process.remote() for r in self._ranks]))

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        shared = [ray.put(argument) for argument in arguments]
        return self._get([r.call.remote(method, *shared) for r in self._ranks])

    def _get(self, references: list[Any]) -> list[Any]:
        """All answers, with the rank's own exception instead of Ray's wrapper.

        The first error ends the wait: the other ranks may be in a collective that never ends.
        While none comes, every rank is asked for a sign of life.
        """
        waiting = list(references)
        try:
            while waiting:
                done, waiting = ray.wait(waiting, timeout=self._silent_seconds)
                ray.get(done)
                if not done:
                    self.check_alive()
            answers: list[Any] = ray.get(references)
        except RayTaskError as error:
            if _lost_peer(error.cause):
                raise PolicyError(f"a trainer rank lost another one: {error.cause}") from error
            raise error.cause from None
        except RayError as error:  # Its process, or its node with what it had answered.
            raise _died(error) from error
        return answers

    def check_alive(self) -> None:
        """Ask every rank for a sign of life.

        Raises:
            PolicyError: one is gone or silent.
        """
        try:
            ray.get([rank.process.remote() for rank in self._ranks], timeout=self._silent_seconds)
        except GetTimeoutError:
            raise PolicyError(
                f"a trainer rank gave no sign of life for {self._silent_seconds:.0f} seconds"
            ) from None
        except RayError as error:
            raise _died(error) from error

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

    def supervise(self, batch: TrainingBatch, learning_rate: float) -> dict[str, float]:
        """One update of next-token prediction; see PolicyWorker.supervise."""
        return merge_records(self._call("supervise", batch, learning_rate))[0]

    def gradient_norm(self, batch: TrainingBatch, settings: StepSettings) -> float:
        """Gradient norm of the whole batch as one minibatch; nothing is updated."""
        return float(self._call("gradient_norm", batch, settings)[0])

    def resources(self) -> list[tuple[str, int]]:
        """Device and peak bytes of each rank; see PolicyWorker.resources."""
        return self._call("resources")

    def reset_reference(self, clear_optimizer: bool = False) -> None:
        self._call("reset_reference")
        if clear_optimizer:
            self._call("clear_optimizer")

    def weights(self, transfer: str = "host") -> Iterator[tuple[Any, ...]]:
        """The weight buckets of all stages, as they become ready.

        Each as references to what the stage's tensor-parallel ranks have of it, in their order.

        Args:
            transfer: as `rollout.weight_transfer`.

        Raises:
            PolicyError, or what a rank raised: at the end, when the buckets are not all there are.
        """
        if not self._stages:
            for rank, stage in zip(self._ranks, self._call("stage"), strict=True):
                if stage is not None:
                    self._stages.setdefault(stage, []).append(rank)
            if self._one_machine:
                firsts = [ranks[0].memory_file.remote() for ranks in self._stages.values()]
                self._files = dict(zip(self._stages, self._get(firsts), strict=True))
        stages = [
            [
                rank.weights.options(num_returns="streaming").remote(
                    transfer, self._files.get(stage)
                )
                for rank in ranks
            ]
            for stage, ranks in sorted(self._stages.items())
        ]
        self._last_parts.clear()
        for streams in stages:
            # Without pieces the first rank sends it all. The others only take part in its gathers,
            # and end when it does.
            senders = streams if transfer == "host" else streams[:1]
            while parts := tuple(p for p in map(self._next, senders) if p is not None):
                yield parts
            for stream in streams[len(senders) :]:
                self._next(stream)
        if transfer == "broadcast":
            self.check_alive()  # What a sender raises may be the loss of an engine.
        else:
            self._check_sent()

    def _check_sent(self) -> None:
        """Raise what a rank raised while it sent its weights, which is the last its stream held."""
        self._get(list(self._last_parts.values()))

    def _next(self, stream: Any) -> Any:
        """The next reference of a rank's stream, or None at its end."""
        while True:
            ready, _ = ray.wait([stream], timeout=self._silent_seconds, fetch_local=False)
            if ready:
                part = next(stream, None)
                if part is not None:
                    self._last_parts[stream] = part
                return part
            self.check_alive()

    def weight_checksums(self, dtype: str) -> dict[str, str]:
        """Checksum of every published weight, as an engine of type `dtype` would hold it."""
        found: dict[str, str] = {}
        for part in self._call("weight_checksums", dtype):
            found |= part
        return found

    def begin_save(self, folder: Path) -> Callable[[], None]:
        """Copy the state of every rank and start to write it into `folder`.

        Returns:
            what waits for the files, from any thread, and raises what went wrong.
        """
        self._call("begin_save", folder)
        pending = [rank.finish_save.remote() for rank in self._ranks]

        def finish() -> None:
            try:
                ray.get(pending)
            except RayTaskError as error:
                raise error.cause from None

        return finish

    def load_reference(self, folder: Path) -> None:
        """The reference becomes the policy of another checkpoint."""
        self._call("load_reference", folder)

    def load(self, folder: Path) -> None:
        self._call("load", folder)

    def shutdown(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
        # Ray asks the processes to leave, which a stopped one does not hear. Killed before they
        # could, Ray would report a crash.
        _, stopped = psutil.wait_procs(self._processes, timeout=_LEAVE_SECONDS)
        for process in stopped:
            process.kill()
        self._ranks, self._processes = [], []


def _environment(threads: int | None, neighbours: int) -> dict[str, str]:
    """Of a rank that shares its node with others."""
    variables = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "LOCAL_WORLD_SIZE": str(neighbours),
        # Rank 0's store is there before torch.distributed starts: every rank only joins it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return variables | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


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


def _local_processes(ranks: list[tuple[str, int]]) -> list[psutil.Process]:
    """Those of this machine; psutil kills no other process that has got the same id since."""
    found = []
    for host, number in ranks:
        if host == socket.gethostname():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(number))
    return found


def _died(error: RayError) -> PolicyError:
    return PolicyError(f"a trainer rank died: {error}".partition("\n")[0])


def _lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because of another rank: gloo raises a plain RuntimeError."""
    signs = ("gloo", "Connection closed by peer", "Timed out waiting")
    plain = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return plain or isinstance(error, DistError)
