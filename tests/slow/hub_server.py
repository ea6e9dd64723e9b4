"""A server on 127.0.0.1 that speaks the hub's upload calls, large files by the Xet protocol.

What it understands of a file that comes as Xet chunks is how many bytes they hold: enough to see
that all of it came, and that nothing came twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = ".safetensors"
_CHUNK_HEADER = 8  # version, stored length (3 bytes), compression, length (3 bytes)


@dataclass
class Repository:
    """What the hub holds: `files` of the main branch, as bytes or as (sha256, size)."""

    private: bool
    files: dict[str, bytes | tuple[str, int]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """Attributes: repositories, what was sent as chunks, and the headers that came.

    `refuse_commits`: status with which commits are refused; 0: none is.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.chunk_bytes: list[int] = []
        self.calls: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuse_commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def _any(self) -> None:
        body = self._body()
        self.server.calls.append(f"{self.command} {self.path}")
        if self.path.startswith("/cas/"):
            return self._chunks(body)
        if not self.path.startswith(("/api/models/", "/api/repos/")):
            # The client's own: telemetry, and the check of a card's metadata.
            return self._send(200, {"errors": [], "warnings": []})
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        found = re.fullmatch(
            r"/api/models/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/([^?]+))?)?.*", self.path
        )
        if found is None or found[1] not in self.server.repositories:
            return self._send(404, {"error": "not here"}, {"X-Error-Code": "RepoNotFound"})
        repository, what, revision = self.server.repositories[found[1]], found[2], found[3]
        if what is None:
            about = {"_id": "1", "id": found[1], "private": repository.private, "siblings": []}
            return self._send(200, about)
        if what == "preupload":
            return self._send(
                200, {"files": [_mode(f, repository) for f in json.loads(body)["files"]]}
            )
        if what == "xet-write-token":
            cas = f"{self.server.url}/cas"
            token = {"casUrl": cas, "exp": 4_000_000_000, "accessToken": "cas"}
            named = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "cas"}
            return self._send(200, token, named | {"X-Xet-Token-Expiration": "4000000000"})
        if what == "commit":
            return self._commit(found[1], body)
        if what == "tag":
            return self._tag(repository, json.loads(body)["tag"], str(revision))
        if what == "refs":
            refs = [
                {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
                for name, commit in repository.tags.items()
            ]
            return self._send(200, {"branches": [], "converts": [], "tags": refs})
        return self._send(404, {"error": "not here"})

    do_GET = do_POST = do_PUT = do_HEAD = _any

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        there = name in self.server.repositories
        private = wanted.get("private", wanted.get("visibility") == "private")
        self.server.repositories.setdefault(name, Repository(bool(private)))
        self._send(409 if there else 200, {"url": f"{self.server.url}/{name}", "name": name})

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.server.repositories[name]
        if self.server.refuse_commits:
            return self._send(self.server.refuse_commits, {"error": "no commits now"})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = (value["oid"], value["size"])
        oid = hashlib.sha1(body).hexdigest()
        repository.commits.append(oid)
        self._send(
            200,
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.server.url}/{name}/commit/{oid}",
            },
        )

    def _tag(self, repository: Repository, tag: str, commit: str) -> None:
        if tag in repository.tags:
            return self._send(409, {"error": "the tag exists"})
        repository.tags[tag] = commit
        self._send(200, {})

    def _chunks(self, body: bytes) -> None:
        # The newer calls are refused; the client falls back to these.
        if "/v1/xorbs/" in self.path:
            self.server.chunk_bytes.append(_length(body))
            return self._send(200, {"was_inserted": True})
        if "/v1/shards" in self.path:
            return self._send(200, {"result": 1})
        return self._send(404, {})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        parts = []
        while "chunked" in self.headers.get("Transfer-Encoding", ""):
            size = int(self.rfile.readline().split(b";")[0], 16)
            parts.append(self.rfile.read(size))
            self.rfile.readline()
            if not size:
                break
        return b"".join(parts)

    def _send(
        self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Quiet."""


def _mode(file: dict[str, Any], repository: Repository) -> dict[str, Any]:
    large = file["path"].endswith(LARGE)
    answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular"}
    there = repository.files.get(file["path"])
    if isinstance(there, tuple):
        answer["oid"] = there[0]
    elif there is not None:
        answer["oid"] = hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
    return answer | {"shouldIgnore": False}


def _length(xorb: bytes) -> int:
    """Bytes that the chunks of a xorb hold once unpacked."""
    position = total = 0
    while position + _CHUNK_HEADER <= len(xorb) and xorb[position] == 0:
        stored = int.from_bytes(xorb[position + 1 : position + 4], "little")
        total += int.from_bytes(xorb[position + 5 : position + 8], "little")
        position += _CHUNK_HEADER + stored
    return total


@contextmanager
def serving() -> Iterator[Hub]:
    """The hub on a port of its own, until the end."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
