"""The connection between the nodes of a job: hello, heartbeat, end. JSON lines over TCP.

Our choice, in place of files or Ray's own health check: a shared file system shows changes up to a
minute late, and Ray has to be watched as well. Both ends notice within `SILENT_SECONDS` that the
other one is gone. A token from a file that only the user can read keeps others out.
"""

from __future__ import annotations

import hmac
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

BEAT_SECONDS = 2.0
SILENT_SECONDS = 20.0
_LONGEST = 1 << 20  # bytes of a line: a probe has two thousand


class LinkLost(Exception):
    """The other node is gone, or says nothing."""


class Link:
    """One end of a connection. Sends a heartbeat by itself; reading is the caller's."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(SILENT_SECONDS)
        self._received = b""
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self._heard = time.monotonic()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    @classmethod
    def to(cls, address: tuple[str, int], token: str) -> Link:
        """Connect to a head.

        Raises:
            OSError: nobody listens there.
        """
        link = cls(socket.create_connection(address, timeout=SILENT_SECONDS))
        link.send({"token": token})
        return link

    def send(self, message: dict[str, Any]) -> None:
        """Raises LinkLost."""
        try:
            with self._sending:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise LinkLost(str(error)) from None

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message that is no heartbeat, or None if none comes in time.

        Raises:
            LinkLost: closed, silent, or not one of ours.
        """
        deadline = time.monotonic() + seconds
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                try:
                    message = json.loads(line)
                except ValueError:
                    raise LinkLost("what came is no message") from None
                if not isinstance(message, dict):
                    raise LinkLost("what came is no message")
                if message:
                    return message
                continue
            left = deadline - time.monotonic()
            if self._readable(max(0.0, min(left, BEAT_SECONDS))):
                self._read()
                continue
            # Only now: what came while nobody read has been read.
            silent = time.monotonic() - self._heard
            if silent > SILENT_SECONDS:
                raise LinkLost(f"silent for {silent:.0f} s")
            if left <= 0:
                return None

    def close(self) -> None:
        self._ended.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _readable(self, seconds: float) -> bool:
        with selectors.DefaultSelector() as selector:
            try:
                selector.register(self._socket, selectors.EVENT_READ)
            except ValueError:
                raise LinkLost("closed") from None
            return bool(selector.select(seconds))

    def _read(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except OSError as error:
            raise LinkLost(str(error)) from None
        if not data:
            raise LinkLost("closed")
        self._received += data
        self._heard = time.monotonic()
        if len(self._received) > _LONGEST:
            raise LinkLost("a message without an end")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(LinkLost):
                self.send({})


class Door:
    """Where a head takes the links of the other nodes, on a port that is free.

    Args:
        token: what a link must say first; others are turned away.
        on_link: called with each link, in a thread of its own.
    """

    def __init__(self, token: str, on_link: Callable[[Link], None]) -> None:
        self._token, self._on_link = token, on_link
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, name="door", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # This one has hung up, or there is no descriptor just now.
                time.sleep(0.1)
                continue
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        link = Link(connection)
        try:
            hello = link.receive(SILENT_SECONDS)
        except LinkLost:
            hello = None
        said = hello.get("token") if hello else None
        if isinstance(said, str) and hmac.compare_digest(said.encode(), self._token.encode()):
            self._on_link(link)
        else:
            link.close()
