"""A folder that belongs to one process at a time: the lock file in it, and the wait for it."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from typing import TextIO

from prorl_nemo.errors import UserError

WAIT_SECONDS = 30.0
"""For the process before to end, before this one is refused. An attempt whose agent Slurm has
killed is cleaned up in up to 17 s (5 for the command, 10 for Ray, kills: cluster/node_agent.py);
without the wait the attempt after it would end its job."""
_POLL_SECONDS = 0.2


def take(lock: TextIO, folder: str, advice: str) -> None:
    """Lock an open file; the lock is released when it is closed.

    Waits `WAIT_SECONDS` for another process to release it, and says so at once.

    Args:
        folder: for the messages, behind the setting that names it.
        advice: what the user may do instead.

    Raises:
        UserError: another process has it.
        OSError: the file system cannot lock files.
    """
    deadline = None
    # Of the open file: released whatever ends this process.
    while not _locked(lock):
        lock.seek(0)
        used = f"{folder} is in use by {lock.read(200).strip() or 'another process'}"
        if deadline is None:
            deadline = time.monotonic() + WAIT_SECONDS
            wait = f"{used}; waiting up to {WAIT_SECONDS:g} s for its end"
            print(wait, file=sys.stderr, flush=True)
        if time.monotonic() >= deadline:
            raise UserError(f"{used}; {advice}")
        time.sleep(_POLL_SECONDS)


def sign(lock: TextIO) -> None:
    """Write who has it, for whoever is refused. Raises OSError."""
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def _locked(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
