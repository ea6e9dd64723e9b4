"""Processes that stay and take trainer ranks one after another.

Importing torch and Megatron costs each process several seconds, a tiny model's step a fraction
of one. So a fork server imports once, and the same processes serve every layout of a test file.
"""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

Task = Callable[..., Any]


class RankPool:
    """Runs `task(rank, world_size, address, *arguments)` on ranks 0 .. world_size - 1.

    Args:
        limit_s: seconds a task may take before its ranks are given up.
    """

    def __init__(self, limit_s: float = 240.0) -> None:
        self._limit_s = limit_s
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["prorl_nemo.megatron.policy_worker"])
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, task: Task, world_size: int, *arguments: Any) -> list[Any]:
        """What each rank returned, in rank order. The first rank that raises ends the task."""
        while len(self._ranks) < world_size:
            self._ranks.append(self._start())
        address = f"tcp://127.0.0.1:{_free_port()}"
        connections = [connection for _, connection in self._ranks[:world_size]]
        for rank, connection in enumerate(connections):
            connection.send((task, (rank, world_size, address, *arguments)))
        answers: dict[int, Any] = {}
        while len(answers) < world_size:
            pending = [c for rank, c in enumerate(connections) if rank not in answers]
            ready = wait(pending, timeout=self._limit_s)
            for connection in ready:
                rank = connections.index(connection)
                failed, answers[rank] = _received(connection)
                if failed:
                    # The others wait for this rank in a collective: they cannot be kept.
                    self.close()
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{answers[rank]}")
            if not ready:
                self.close()
                missing = sorted(set(range(world_size)) - set(answers))
                raise TimeoutError(f"ranks {missing} were silent for {self._limit_s} s")
        return [answers[rank] for rank in range(world_size)]

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,))
        process.start()
        theirs.close()
        return process, ours

    def close(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks = []


def _received(connection: Connection) -> tuple[bool, Any]:
    try:
        return connection.recv()
    except EOFError:
        return True, "the process died"


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            task, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = False, task(*arguments)
        except Exception:
            answer = True, traceback.format_exc()
        finally:
            _leave_groups()
        connection.send(answer)


def _leave_groups() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
