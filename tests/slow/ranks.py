"""Trainer ranks as processes, forked from one that has imported torch and Megatron already.

The imports cost several seconds of a core, a tiny model's step a fraction of one. Ranks are not
used twice: gloo keeps some sixty threads for a layout's process groups, as long as anything
refers to a group.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, get_args

import torch

from prorl_nemo.tiny_model import Family

Task = Callable[..., Any]

_CONTEXT = multiprocessing.get_context("forkserver")
# What the tasks' modules import: without transformers each rank would spend 3 s of a core on it.
_FAMILIES = [f"transformers.models.{name}.modeling_{name}" for name in get_args(Family)]
_CONTEXT.set_forkserver_preload(["prorl_nemo.megatron.policy_worker", "pytest", *_FAMILIES])


def run_ranks(task: Task, world_size: int, *arguments: Any, limit_s: float = 240.0) -> list[Any]:
    """Runs `task(rank, world_size, address, *arguments)` on ranks 0 .. world_size - 1.

    Returns:
        what each rank returned, in rank order.

    Raises:
        RuntimeError: with the traceback of the first rank that failed.
        TimeoutError: no rank answered for `limit_s` seconds.
    """
    address = f"tcp://127.0.0.1:{_free_port()}"
    ranks = [_start(task, (rank, world_size, address, *arguments)) for rank in range(world_size)]
    rank_of = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world_size:
            ready = wait([c for c, rank in rank_of.items() if rank not in answers], limit_s)
            if not ready:
                missing = sorted(set(range(world_size)) - set(answers))
                raise TimeoutError(f"ranks {missing} were silent for {limit_s} s")
            for connection in ready:
                rank = rank_of[connection]
                try:
                    failed, answers[rank] = connection.recv()
                except EOFError:
                    failed, answers[rank] = True, "the process died"
                if failed:
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{answers[rank]}")
    finally:
        for process, connection in ranks:
            process.kill()
            process.join()
            connection.close()
    return [answers[rank] for rank in range(world_size)]


def _start(task: Task, arguments: tuple[Any, ...]) -> tuple[Any, Connection]:
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(theirs, task, arguments))
    process.start()
    theirs.close()
    return process, ours


def _serve(connection: Connection, task: Task, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        answer = False, task(*arguments)
    except Exception:
        answer = True, traceback.format_exc()
    connection.send(answer)
    # Other ranks may still need this one's sockets: the parent ends all of them together.
    connection.poll(None)
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
