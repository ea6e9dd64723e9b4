"""One node of a Slurm job, from the first look at it to the last process: `srun` runs it on each,
behind a guard (node_guard.py).

The first node waits for the others, compares what they show (probes.py), starts a Ray head, lets
them join, runs that `prorl` command with RAY_ADDRESS, and ends it when a node is lost. FOLDER is
new, shared, and the attempt's own; `status` in it says how it ended: an exit status and a
sentence. A file `stop` in it asks the command to save and end: a signal sent through Slurm would
reach Ray's processes too.
"""

from __future__ import annotations

import argparse
import os
import queue
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from prorl_nemo.cluster.link import Door, Link, LinkLost
from prorl_nemo.cluster.node_guard import adopt_orphans, end_below, hang_up_after
from prorl_nemo.cluster.placement import listed
from prorl_nemo.cluster.probes import GIB, Needs, Probe, probe, problems
from prorl_nemo.cluster.ray_node import (
    RayFailed,
    RayNode,
    own_address,
    ray_environment,
    ray_part,
)
from prorl_nemo.errors import UserError

NODE_LOST, NODE_REFUSED, NOT_JOINED, HUNG_UP = 70, 71, 72, 128 + signal.SIGHUP
"""Exit statuses of an attempt that ended for the sake of its nodes."""
HEAD, STATUS, STOP = "head", "status", "stop"
_TOO_EARLY = "stopped before the run began"
_POLL_SECONDS = 0.5
_LEAVE_SECONDS = 5.0
"""For the command, when the job is over: a small run saves in it, others end their trackers."""


class AttemptOver(Exception):
    """The attempt ends: an exit status and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass
class Settings:
    """Of an agent; from the environment that Slurm and slurm/job.sh set."""

    folder: Path
    node: int
    names: list[str]
    needs: Needs
    join_seconds: float
    interface: str | None
    dashboard: bool

    @classmethod
    def from_environment(cls, folder: Path) -> Settings:
        """Raises UserError naming the variable that is wrong."""
        read = os.environ.get
        names = read("PRORL_NODES", "").split() or [read("SLURMD_NODENAME", "this node")]
        nodes = _number("SLURM_STEP_NUM_NODES", len(names))
        if nodes != len(names):  # The first node would run the command without the others.
            raise UserError(
                f"PRORL_NODES: names {len(names)} nodes, this step has {nodes:g}; start it with "
                "slurm/job.sh, which sets it"
            )
        return cls(
            folder=folder,
            node=int(_number("SLURM_NODEID", 0)),
            names=names,
            needs=Needs(
                gpus=int(_number("PRORL_GPUS", _number("SLURM_GPUS_ON_NODE", 0))),
                memory=int(_number("PRORL_MIN_MEMORY_GIB", 4) * GIB),
                disk=int(_number("PRORL_MIN_DISK_GIB", 4) * GIB),
            ),
            join_seconds=_number("PRORL_JOIN_SECONDS", 300),
            interface=read("PRORL_INTERFACE") or None,
            dashboard=read("PRORL_DASHBOARD", "0") == "1",
        )


def _number(name: str, default: float) -> float:
    """Of the environment; an empty variable is one that is not set."""
    text = os.environ.get(name) or default
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name}: {text!r} is no number") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guard", type=int, required=True, help="its process")
    parser.add_argument("--temporary", type=Path, required=True, help="folder, which it removes")
    parser.add_argument("folder", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    try:
        settings = Settings.from_environment(arguments.folder)
    except UserError as error:
        _say(f"error: {error}")
        return NODE_REFUSED
    adopt_orphans()
    signal.signal(signal.SIGHUP, _hang_up)
    agent = _Head if settings.node == 0 else _Other
    try:
        hang_up_after(arguments.guard)
        return agent(settings, arguments.temporary).run(arguments.command)
    except AttemptOver as over:
        _say(over.why)
        return over.status
    finally:
        signal.signal(signal.SIGHUP, _nothing)
        end_below()


def _hang_up(number: int, frame: FrameType | None) -> None:
    """Slurm has killed the guard: the job is over, and what runs here is to end at once."""
    signal.signal(number, _nothing)
    raise AttemptOver(HUNG_UP, "ended, because the process that Slurm had started was killed")


def _nothing(number: int, frame: FrameType | None) -> None:
    """In place of SIG_IGN, which Ray's processes would inherit."""


class _Head:
    """The first node: gathers the others, runs the command, watches."""

    def __init__(self, settings: Settings, temporary: Path) -> None:
        self.settings, self.temporary = settings, temporary
        self.links: dict[int, Link] = {}
        self.arriving: queue.Queue[Link] = queue.Queue()
        self.ray: RayNode | None = None
        self.driver: subprocess.Popen[bytes] | None = None
        self.stopping = self.over = False

    def run(self, command: list[str]) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._forward)
        try:
            status, why = self._attempt(command), ""
        except AttemptOver as over:
            status, why = over.status, over.why
            if status == HUNG_UP and self.driver is not None:
                self.driver.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self.driver.wait(_LEAVE_SECONDS)
        except (LinkLost, RayFailed) as error:
            status, why = NOT_JOINED, str(error)
        finally:
            self._close()
        why = why or f"prorl {command[0]} ended with status {status}"
        _say(why)
        _publish(self.settings.folder / STATUS, f"{status} {why}\n")
        return status

    def _attempt(self, command: list[str]) -> int:
        settings = self.settings
        # Not in the environment: other users of the node could read that of a process.
        token = secrets.token_hex(16)
        door = Door(token, self.arriving.put)
        own = own_address(settings.interface)
        _publish(settings.folder / HEAD, f"{own} {door.port} {token}\n")
        probes = self._gather(probe(self.temporary))
        for node in probes:
            software = ", ".join(f"{name} {version}" for name, version in node.software.items())
            _say(
                f"{node.host}: {len(node.gpus)} GPUs, {node.cpus} CPUs, memory "
                f"{node.memory / GIB:.0f} GiB, disk {node.disk / GIB:.0f} GiB, sandbox "
                f"{node.sandbox or 'none'}; {software}"
            )
        found = problems(probes, settings.needs)
        if found:
            raise AttemptOver(NODE_REFUSED, "nodes that cannot be used:\n  " + "\n  ".join(found))
        environment = ray_environment(secrets.token_hex(32))
        log = settings.folder / f"ray_{settings.names[0]}.log"
        options = (f"--include-dashboard={str(settings.dashboard).lower()}",)
        self.ray = RayNode(self.temporary / "ray", log, own, None, environment, options)
        for link in self.links.values():
            link.send({"ray": self.ray.address, "environment": ray_part(environment)})
        self._all_say("joined")
        _say(f"Ray runs on {len(settings.names)} nodes at {self.ray.address}")
        if (settings.folder / STOP).exists():
            raise AttemptOver(128 + signal.SIGUSR1, _TOO_EARLY)
        environment["RAY_ADDRESS"] = self.ray.address
        prorl = [sys.executable, "-m", "prorl_nemo.cli", *command]
        self.driver = subprocess.Popen(prorl, env=environment, start_new_session=True)
        return self._watch()

    def _gather(self, own: Probe) -> list[Probe]:
        """The nodes' probes, in their order."""
        names = self.settings.names
        probes = {0: own}
        deadline = time.monotonic() + self.settings.join_seconds
        while len(probes) < len(names):
            try:
                link = self.arriving.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                missing = ", ".join(n for i, n in enumerate(names) if i not in probes)
                raise AttemptOver(
                    NOT_JOINED,
                    f"{missing} did not report within {self.settings.join_seconds:.0f} s: does "
                    f"every node see {self.settings.folder}, and can it reach {names[0]}? "
                    "(PRORL_INTERFACE names the network to use)",
                ) from None
            try:
                hello = link.receive(self.settings.join_seconds)
            except LinkLost:
                continue  # Said to be missing when the time is over.
            if hello and isinstance(hello.get("probe"), dict):
                probes[int(hello["node"])] = Probe(**hello["probe"])
                self.links[int(hello["node"])] = link
        return [probes[i] for i in range(len(names))]

    def _all_say(self, word: str) -> None:
        for node, link in self.links.items():
            name = self.settings.names[node]
            try:
                answer = link.receive(self.settings.join_seconds)
            except LinkLost as error:
                raise AttemptOver(NODE_LOST, f"lost node {name}: {error}") from None
            if not answer or word not in answer:
                raise AttemptOver(NOT_JOINED, f"{name}: {(answer or {}).get('failed', 'silent')}")

    def _watch(self) -> int:
        """Until the command ends or a node is lost."""
        assert self.driver is not None and self.ray is not None
        while (status := self.driver.poll()) is None:
            for node, link in self.links.items():
                name = self.settings.names[node]
                try:
                    message = link.receive(0)
                except LinkLost as error:
                    raise AttemptOver(NODE_LOST, f"lost node {name}: {error}") from None
                if message:
                    raise AttemptOver(NODE_LOST, f"lost node {name}: {message.get('failed')}")
            if not self.ray.alive:
                raise AttemptOver(NODE_LOST, f"Ray ended on {self.settings.names[0]}")
            if not self.stopping and (self.settings.folder / STOP).exists():
                self.stopping = True
                self.driver.send_signal(signal.SIGUSR1)
            time.sleep(_POLL_SECONDS)
        return status if status >= 0 else 128 - status

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.driver is not None:
            self.driver.send_signal(number)
        elif not self.over:
            self.over = True
            raise AttemptOver(128 + number, _TOO_EARLY)

    def _close(self) -> None:
        self.over = True
        if self.driver is not None and self.driver.poll() is None:
            # It cannot save any more: its ranks are gone, or the time is.
            with suppress(ProcessLookupError):
                os.killpg(self.driver.pid, signal.SIGKILL)
        for link in self.links.values():
            with suppress(LinkLost):
                link.send({"end": True})
        if self.ray is not None:
            self.ray.stop()
        for link in self.links.values():
            link.close()


class _Other:
    """Every other node: looks at itself, joins Ray, stays until the head says or is gone."""

    def __init__(self, settings: Settings, temporary: Path) -> None:
        self.settings, self.temporary = settings, temporary

    def run(self, command: list[str]) -> int:
        # The head decides: while it saves, the ranks here are needed.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, _nothing)
        try:
            link, own = self._connect()
        except (OSError, LinkLost) as error:
            _say(f"no connection to the first node: {error}")
            return NOT_JOINED
        ray = None
        try:
            looked = probe(self.temporary).as_json()
            link.send({"node": self.settings.node, "probe": looked})
            order = _order(link)
            if "ray" not in order:
                return 0
            environment = {**os.environ, **order["environment"]}
            log = self.settings.folder / f"ray_{self.settings.names[self.settings.node]}.log"
            ray = RayNode(self.temporary / "ray", log, own, order["ray"], environment)
            link.send({"joined": True})
            while link.receive(_POLL_SECONDS) is None:
                if not ray.alive:
                    link.send({"failed": f"Ray ended; see {log}"})
                    return NODE_LOST
        except LinkLost as error:
            _say(f"lost the first node: {error}")
            return NODE_LOST
        except RayFailed as error:
            with suppress(LinkLost):
                link.send({"failed": str(error)})
            return NOT_JOINED
        finally:
            if ray is not None:
                ray.stop()
            link.close()
        return 0

    def _connect(self) -> tuple[Link, str]:
        file = self.settings.folder / HEAD
        deadline = time.monotonic() + self.settings.join_seconds
        while not listed(file):
            if time.monotonic() > deadline:
                raise LinkLost(
                    f"{file} did not appear: PRORL_LOGS must be on a file system that all nodes see"
                )
            time.sleep(_POLL_SECONDS)
        host, port, token = file.read_text().split()
        return Link.to((host, int(port)), token), own_address(self.settings.interface)


def _order(link: Link) -> dict[str, Any]:
    """What the head says next, however long it waits for others."""
    while (order := link.receive(_POLL_SECONDS)) is None:
        pass
    return order


def _publish(file: Path, text: str) -> None:
    """Write a file whole, for this user's eyes."""
    aside = file.with_name(f"{file.name}.part")
    descriptor = os.open(aside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(text)
    aside.rename(file)


def _say(text: str) -> None:
    with suppress(OSError):  # Whoever read it may have been killed.
        print(time.strftime("%F %T"), text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
