"""Links between the nodes of a job, over real sockets; and what their probes have in common."""

from __future__ import annotations

import queue
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prorl_nemo.cluster import link as link_module
from prorl_nemo.cluster.link import Door, Link, LinkLost
from prorl_nemo.cluster.probes import GIB, Needs, Probe, code_digest, parse_smi, probe, problems


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[Link, Link]:
    """Both ends, with a patience of a second in place of twenty."""
    monkeypatch.setattr(link_module, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(link_module, "BEAT_SECONDS", 0.2)
    arrived: queue.Queue[Link] = queue.Queue()
    door = Door("secret", arrived.put)
    ours = Link.to(("127.0.0.1", door.port), "secret")
    return ours, arrived.get(timeout=5)


def test_messages_and_heartbeats(pair: tuple[Link, Link]) -> None:
    ours, theirs = pair
    ours.send({"probe": {"host": "n1"}})
    ours.send({"joined": True})
    assert theirs.receive(1.0) == {"probe": {"host": "n1"}}
    assert theirs.receive(1.0) == {"joined": True}
    # Twice the patience without a message, and the heartbeats keep it alive.
    assert theirs.receive(2.0) is None
    started = time.monotonic()
    assert theirs.receive(0) is None
    assert time.monotonic() - started < 0.5


def test_reading_late_is_not_the_other_ones_silence(pair: tuple[Link, Link]) -> None:
    """A head that was busy for longer than its patience finds the heartbeats waiting."""
    ours, theirs = pair
    time.sleep(1.5)
    assert theirs.receive(0.1) is None
    time.sleep(1.5)
    ours.send({"joined": True})
    assert theirs.receive(1.0) == {"joined": True}


def test_a_node_that_leaves_is_noticed(pair: tuple[Link, Link]) -> None:
    ours, theirs = pair
    ours.close()
    with pytest.raises(LinkLost):
        theirs.receive(5.0)


def test_a_node_that_falls_silent_is_noticed(pair: tuple[Link, Link]) -> None:
    """The connection stays open, as when a node loses its power: only the heartbeat ends."""
    ours, theirs = pair
    ours._ended.set()
    started = time.monotonic()
    with pytest.raises(LinkLost, match="silent"):
        theirs.receive(10.0)
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize("said", [b'{"token": "wrong"}\n', b"GET / HTTP/1.1\n", b"[]\n", b"{}\n"])
def test_strangers_are_turned_away(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(link_module, "SILENT_SECONDS", 1.0)
    arrived: queue.Queue[Link] = queue.Queue()
    door = Door("secret", arrived.put)
    with socket.create_connection(("127.0.0.1", door.port), timeout=5) as stranger:
        stranger.sendall(said)
        while stranger.recv(100):  # Heartbeats, then the end.
            pass
    assert arrived.empty()


def test_a_connection_that_fails_does_not_shut_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that hangs up before it is taken, or comes when no descriptor is free."""
    accept, failures = socket.socket.accept, [OSError("hung up"), OSError("too many files")]

    def failing(own: socket.socket) -> object:
        if failures:
            raise failures.pop()
        return accept(own)

    monkeypatch.setattr(socket.socket, "accept", failing)
    arrived: queue.Queue[Link] = queue.Queue()
    door = Door("secret", arrived.put)
    Link.to(("127.0.0.1", door.port), "secret")
    assert arrived.get(timeout=5) and not failures


def node(host: str, **changes: object) -> Probe:
    software = {"torch": "2.13.0", "prorl-nemo": "abc"}
    usual = Probe(
        host, ["H100"] * 8, [0] * 8, 96, 900 * GIB, 500 * GIB, 900 * GIB, software, "bwrap"
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def test_equal_nodes_have_no_problems() -> None:
    needs = Needs(gpus=8, memory=GIB, disk=GIB, sandbox=True)
    assert problems([node("n1"), node("n2"), node("n3")], needs) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": ["H100"] * 7, "held": [0] * 7}, "n3: 7 GPUs are visible, 8 are needed"),
        ({"held": [0] * 7 + [30_000]}, "n3: 30000 MiB of GPU 7 are in use"),
        ({"memory": GIB}, "n3: 1.0 GiB of memory are free, 4.0 are needed"),
        ({"disk": 0}, "n3: 0.0 GiB of disk"),
        ({"sandbox": ""}, "n3: no sandbox"),
        ({"software": {"torch": "2.12.0", "prorl-nemo": "abc"}}, "n3: torch 2.12.0, on other"),
        ({"software": {"torch": "2.13.0"}}, "n3: prorl-nemo absent, on other nodes abc"),
        ({"gpus": ["A100"] * 8}, "n3: GPU A100, on other nodes H100"),
    ],
)
def test_each_fault_is_named_with_its_node(changes: dict[str, object], said: str) -> None:
    needs = Needs(gpus=8, memory=4 * GIB, disk=GIB, sandbox=True)
    found = problems([node("n1"), node("n2"), node("n3", **changes)], needs)
    assert len(found) == 1 and found[0].startswith(said)


def test_a_probe_of_this_machine(tmp_path: Path) -> None:
    found = probe(tmp_path)
    assert found.host == socket.gethostname() and found.cpus >= 1
    assert found.memory > 0 and found.disk > 0 and found.software["torch"]
    assert Probe(**found.as_json()) == found
    assert problems([found, found], Needs()) == []


def test_digest_sees_a_changed_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = code_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != before


def test_reading_nvidia_smi() -> None:
    text = "NVIDIA H100, 81559, 4, 570.1\nNVIDIA H100, 81559, 70000, 570.1\n"
    assert parse_smi(text, None) == (["NVIDIA H100"] * 2, [4, 70000], "570.1")
    assert parse_smi(text, "1") == (["NVIDIA H100"], [70000], "570.1")
    # Inside a job that shows its own GPUs only, numbers of the whole node are meant otherwise.
    assert parse_smi(text, "6,7")[1] == [4, 70000]
    assert parse_smi(text, "") == ([], [], "")
    assert parse_smi(text, "GPU-a1,GPU-b2")[1] == [4, 70000]
    assert parse_smi("No devices were found\n", None) == ([], [], "")
