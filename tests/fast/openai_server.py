"""A small OpenAI-compatible server on 127.0.0.1, whose answers depend on prompt and seed alone."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], str]


class Server(ThreadingHTTPServer):
    """Attributes: `asked`, the bodies of all completions asked for, in order of arrival."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reply: Reply, seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.seconds = reply, seconds
        self.asked: list[dict[str, Any]] = []
        self.refuse = 0
        """Status with which every completion is refused; 0: none is."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._send(200, {"object": "list", "data": [{"id": "small", "object": "model"}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if self.server.refuse:
            said = self.headers["Authorization"]
            self._send(self.server.refuse, {"error": {"message": f"no: {said}"}})
            return
        time.sleep(self.server.seconds)
        text = self.server.reply(body)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length" if len(text) > 60 else "stop",
        }
        usage = {"prompt_tokens": 9, "completion_tokens": len(text), "total_tokens": 9 + len(text)}
        about = {"id": "x", "object": "chat.completion", "created": 0, "model": "small"}
        self._send(200, {**about, "choices": [choice], "usage": usage})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Quiet."""


def chance(body: dict[str, Any], sides: int) -> int:
    """A die that falls the same way for the same prompt and seed."""
    key = json.dumps([body["messages"], body["seed"]]).encode()
    return hashlib.sha256(key).digest()[0] % sides


@contextmanager
def serving(reply: Reply, seconds: float = 0.0) -> Iterator[Server]:
    """The server on a port of its own, until the end."""
    server = Server(reply, seconds)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
