"""Ray on one node of a job: started on ports that are free, and gone without a trace afterwards.

Ray's command line takes fixed ports where it is not told others (10001, 52365, 8265), which is why
two jobs on one node usually fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from prorl_nemo.cluster.node_guard import end_below

READY = "Ray runtime started"
START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_TRIES = 3
_ADDRESS = "ray_current_cluster"


class RayFailed(RuntimeError):
    """`ray start` did not get ready."""


class RayNode:
    """The Ray processes of this node, as a child of this one.

    Args:
        temporary: their folder: short, because Ray's sockets lie in it. Removed at the end.
        log: where `ray start` writes.
        own_address: of this node.
        head: address of the Ray head to join; None: become it.
        environment: of the processes.
        options: more arguments of `ray start`.
    """

    def __init__(
        self,
        temporary: Path,
        log: Path,
        own_address: str,
        head: str | None,
        environment: Mapping[str, str],
        options: tuple[str, ...] = (),
    ) -> None:
        self._temporary, self._log = temporary, log
        self._process: subprocess.Popen[bytes] | None = None
        for number in range(_TRIES):
            command = _command(temporary, own_address, head, options)
            written = log.stat().st_size if log.exists() else 0
            with log.open("ab") as out:
                self._process = subprocess.Popen(
                    command, stdout=out, stderr=subprocess.STDOUT, env=dict(environment)
                )
            if self._ready(written) and (head or self._addressed()):
                return
            self.stop()
            if number + 1 < _TRIES:  # A free port may have been taken by somebody else.
                time.sleep(1.0 + number)
        raise RayFailed(f"ray start failed {_TRIES} times; see {log}")

    @property
    def address(self) -> str:
        """Of the head."""
        return (self._temporary / _ADDRESS).read_text().strip()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End every process below this one, and remove their folder."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        end_below(_STOP_SECONDS)
        self._process.wait()
        self._process = None
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _addressed(self) -> bool:
        """Whether a head has written its address, which it does after it has said READY."""
        deadline = time.monotonic() + _STOP_SECONDS
        file = self._temporary / _ADDRESS
        while not (file.exists() and file.read_text().strip()):
            if time.monotonic() > deadline or not self.alive:
                return False
            time.sleep(0.1)
        return True

    def _ready(self, written: int) -> bool:
        """Whether it says so in its log, behind the `written` bytes of earlier tries."""
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with self._log.open("rb") as file:
                file.seek(written)
                if READY.encode() in file.read():
                    return True
            time.sleep(0.2)
        return False


def ray_environment(token: str) -> dict[str, str]:
    """Of Ray and the command on every node: a token of this job's, and quick news of lost nodes."""
    return dict(os.environ) | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_worker_niceness": "0",
        "RAY_health_check_period_ms": "3000",
        "RAY_health_check_timeout_ms": "5000",
        "RAY_health_check_failure_threshold": "4",
    }


def ray_part(environment: dict[str, str]) -> dict[str, str]:
    """What of it the other nodes need."""
    return {name: value for name, value in environment.items() if name.startswith("RAY_")}


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def own_address(interface: str | None) -> str:
    """The address by which other nodes reach this one.

    Args:
        interface: name of the network interface to use, such as `ib0`; None: that of the host's
            name, unless that is a loopback address, then that of the default route.
    """
    if interface:
        for entry in psutil.net_if_addrs().get(interface, ()):
            if entry.family == socket.AF_INET:
                return entry.address
        raise RayFailed(f"PRORL_INTERFACE: this node has no interface {interface} with an address")
    with suppress(OSError):
        named = socket.gethostbyname(socket.gethostname())
        if not named.startswith("127."):
            return named
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # Reserved for documentation; nothing is sent.
        routed: str = probe.getsockname()[0]
        return routed
    return "127.0.0.1"


def _command(temporary: Path, own: str, head: str | None, options: tuple[str, ...]) -> list[str]:
    ray = Path(sys.executable).with_name("ray")
    command = [
        str(ray) if ray.exists() else "ray",
        "start",
        "--block",
        "--disable-usage-stats",
        f"--node-ip-address={own}",
        f"--temp-dir={temporary}",
        f"--num-cpus={len(os.sched_getaffinity(0))}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--metrics-export-port={free_port()}",
        "--min-worker-port=0",  # Any that is free, in place of 10002 to 19999.
        "--max-worker-port=0",
    ]
    if head:
        return [*command, f"--address={head}", *options]
    ports = [f"--ray-client-server-port={free_port()}", f"--dashboard-port={free_port()}"]
    return [*command, "--head", "--port=0", *ports, *options]
