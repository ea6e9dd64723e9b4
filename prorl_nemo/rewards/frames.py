"""Messages between the processes that grade: 4 bytes of length, then JSON.

Never pickle: a worker that was taken over must not be able to run code in the process that trains.
"""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

MAX_FRAME = 256 << 20  # bytes


def send_frame(sock: socket.socket, message: dict[str, Any], deadline: float | None = None) -> None:
    """Send one message. Raises TimeoutError past `deadline` (of time.monotonic)."""
    body = json.dumps(message).encode()
    data = memoryview(len(body).to_bytes(4, "little") + body)
    if deadline is not None:
        sock.settimeout(_left(deadline))
        sock.sendall(data)
        return
    # Plain writes and reads without a deadline: a confined worker has no socket calls.
    while data:
        data = data[os.write(sock.fileno(), data) :]


def receive_frame(
    sock: socket.socket, deadline: float | None = None, limit: int = MAX_FRAME
) -> dict[str, Any]:
    """Receive one message.

    Raises:
        TimeoutError: nothing whole came before `deadline`.
        EOFError: the other side has gone.
        ValueError: not a frame of at most `limit` bytes with a JSON object of sane depth.
    """
    size = int.from_bytes(receive_bytes(sock, 4, deadline), "little")
    if size > limit:
        raise ValueError(f"a message of {size} bytes exceeds the limit of {limit}")
    body = receive_bytes(sock, size, deadline)
    try:
        message = json.loads(body)
    except RecursionError:
        raise ValueError("the message is nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("the message is not an object")
    return message


def receive_bytes(sock: socket.socket, size: int, deadline: float | None = None) -> bytes:
    """Receive exactly `size` bytes. Raises TimeoutError and EOFError as `receive_frame`."""
    received = bytearray()
    while len(received) < size:
        wanted = min(size - len(received), 1 << 20)
        if deadline is None:
            chunk = os.read(sock.fileno(), wanted)
        else:
            sock.settimeout(_left(deadline))
            chunk = sock.recv(wanted)
        if not chunk:
            raise EOFError
        received += chunk
    return bytes(received)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
