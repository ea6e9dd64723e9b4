"""No attack succeeds, in either sandbox; nothing is left behind; grading goes on."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from attacks import CPP, CPP_COMPILER, PYTHON, python_source

from prorl_nemo.rewards import code
from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.rewards.sandbox import runner
from prorl_nemo.rewards.sandbox.backends import BACKENDS, Backend
from prorl_nemo.rewards.sandbox.box import MAX_OUTPUT, Box, CompileError, Run

TOKEN = f"attack-{os.getpid()}"
EXPECTED = "the output that only the grader knows"
SECONDS = 1.0


@pytest.fixture(scope="module", params=["bubblewrap", "landlock"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


@pytest.fixture(scope="module")
def aim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the attacks aim at, all of it within reach of any user of the host."""
    folder = tmp_path_factory.mktemp("target")
    for parent in (folder, *folder.parents):
        if parent.owner() == Path.home().owner() and str(parent).startswith("/tmp/"):
            parent.chmod(0o777)
    secret = folder / "secret"
    secret.write_text(TOKEN)
    connections: list[Any] = []
    os.environ["ATTACK_TOKEN"] = TOKEN
    with socket.create_server(("127.0.0.1", 0)) as port, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0" + TOKEN)
        abstract.listen()
        for server in (port, abstract):
            threading.Thread(target=_accept, args=(server, connections), daemon=True).start()
        yield {
            "secret": str(secret),
            "folder": str(folder),
            "token": TOKEN,
            "port": port.getsockname()[1],
            "pid": os.getpid(),
            "grader": code.__file__,
        }
    del os.environ["ATTACK_TOKEN"]
    assert connections == []
    assert os.listdir(folder) == ["secret"]
    assert secret.read_text() == TOKEN


def _accept(server: socket.socket, connections: list[Any]) -> None:
    try:
        while True:
            connections.append(server.accept())
    except OSError:
        return


def box_processes() -> list[psutil.Process]:
    """Processes of boxes: users that only boxes have, or our descendants that run one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.uids().real >= 1_000_000_000 or "runner.main" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_left(aim: dict[str, Any]) -> Iterator[None]:
    mounts, files = Path("/proc/self/mounts").read_text(), set(os.listdir("/tmp"))
    before = {process.pid for process in box_processes()}
    yield
    deadline = time.monotonic() + 5  # the kernel tears a pid namespace down in its own time
    while left := [p for p in box_processes() if p.pid not in before]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    assert Path("/proc/self/mounts").read_text() == mounts
    ours = [n for n in set(os.listdir("/tmp")) - files if TOKEN in n or n.startswith("box-")]
    assert ours == []
    assert not Path("/tmp/mine").exists()


def check(run: Run) -> None:
    assert b"PWNED" not in run.output
    assert len(run.output) <= MAX_OUTPUT
    # Processor time is cut at the limit, to the second in which the kernel notices.
    assert run.cpu < SECONDS + 1.5


@pytest.mark.parametrize("name", PYTHON)
def test_python_attack(backend: Backend, aim: dict[str, Any], name: str) -> None:
    with Box(backend, python_source(name)) as box:
        run = box.run(json.dumps(aim).encode(), SECONDS, 3.0)
        check(run)
        # The box has survived, or says that it has not; a second run tells neither apart.
        again = box.run(json.dumps(aim).encode(), SECONDS, 3.0)
        check(again)


@pytest.mark.parametrize("name", CPP)
def test_cpp_attack(backend: Backend, aim: dict[str, Any], name: str) -> None:
    with Box(backend, CPP[name], "cpp") as box:
        check(box.run(b"", SECONDS, 3.0))


@pytest.mark.parametrize("name", CPP_COMPILER)
def test_compiler_attack(backend: Backend, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(CompileError):
        Box(backend, CPP_COMPILER[name], "cpp")
    assert time.monotonic() - start < 40


def test_there_are_enough_attacks() -> None:
    assert len(PYTHON) + len(CPP) + len(CPP_COMPILER) >= 40


def test_an_honest_program_runs_after_an_attack(backend: Backend, aim: dict[str, Any]) -> None:
    with Box(backend, python_source("fork bomb")) as box:
        box.run(json.dumps(aim).encode(), SECONDS, 3.0)
    with Box(backend, "print(input()[::-1])") as box:
        run = box.run(b"abc", SECONDS, 3.0)
    assert (run.status, run.output) == (runner.FINISHED, b"cba\n")


@pytest.mark.parametrize("sandbox", ["bubblewrap", "landlock"])
def test_the_pool_grades_on_under_attack(aim: dict[str, Any], sandbox: str) -> None:
    """Attacks and honest submissions mixed: no attack earns a point, every honest one does."""
    tests = [{"input": json.dumps(aim), "output": EXPECTED}]
    attack = {"kind": "code", "tests": tests, "time_limit_s": SECONDS}
    honest = {"kind": "code", "tests": [{"input": "3", "output": "9"}]}
    items = []
    for name in PYTHON:
        items.append((attack, f"```python\n{python_source(name)}\n```"))
        items.append((honest, "```python\nprint(int(input())**2)\n```"))
    with GraderPool(2, sandbox=sandbox, preload=["code"]) as pool:
        verdicts = pool.grade_many(items)
        assert [v.score for v in verdicts[0::2]] == [0.0] * len(PYTHON)
        assert [v.score for v in verdicts[1::2]] == [1.0] * len(PYTHON)
        assert pool.killed == 0
