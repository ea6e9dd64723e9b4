"""No attack succeeds, in either sandbox; nothing is left behind; grading goes on."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from attacks import CPP, CPP_COMPILER, PYTHON, attempting, python_source

from prorl_nemo.rewards import code
from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.rewards.sandbox import box as box_module
from prorl_nemo.rewards.sandbox import runner
from prorl_nemo.rewards.sandbox.backends import BACKENDS, Backend
from prorl_nemo.rewards.sandbox.box import MAX_OUTPUT, Box, CompileError, Run

TOKEN = f"attack-{os.getpid()}"
EXPECTED = "the output that only the grader knows"
SECONDS, WALL = 0.5, 1.5  # the kernel counts processor time in whole seconds: 1
COMPILE_SECONDS = 3.0


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
    """Processes of boxes (users that only boxes have, or a runner) that are ours, or nobody's.

    Those of another run on this machine have a living parent that is not this process.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if process.uids().real >= 1_000_000_000 or "runner.main" in " ".join(process.cmdline()):
                parents = [parent.pid for parent in process.parents()]
                if os.getpid() in parents or len(parents) <= 1:
                    found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module", autouse=True)
def nothing_left(backend: Backend, aim: dict[str, Any]) -> Iterator[None]:
    """After all attacks on a sandbox the machine is as it was before."""
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


@pytest.fixture(scope="module")
def attacks(
    backend: Backend, aim: dict[str, Any], nothing_left: None
) -> Iterator[dict[tuple[str, str], Future[list[Run]]]]:
    """Every attack under way, four at a time: most of them do nothing but wait for a limit."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as executor:
        patch.setattr(box_module, "_COMPILE_CPU_S", COMPILE_SECONDS)
        programs = {("python", name): python_source(name) for name in PYTHON}
        programs |= {("cpp", name): source for name, source in (CPP | CPP_COMPILER).items()}
        yield {
            key: executor.submit(attack, backend, key[0], source, aim)
            for key, source in programs.items()
        }
        executor.shutdown(cancel_futures=True)


def attack(backend: Backend, language: str, source: str, aim: dict[str, Any]) -> list[Run]:
    """Run an attack twice in one box: the second finds what the first has left there."""
    with Box(backend, source, language) as box:
        return [box.run(json.dumps(aim).encode(), SECONDS, WALL) for _ in range(2)]


def check(run: Run) -> None:
    assert b"PWNED" not in run.output
    assert len(run.output) <= MAX_OUTPUT
    # Processor time is cut at the limit, to the second in which the kernel notices.
    assert run.cpu < 1 + 1.0


@pytest.mark.parametrize("name", PYTHON)
def test_python_attack(attacks: dict[tuple[str, str], Future[list[Run]]], name: str) -> None:
    for run in attacks["python", name].result():
        check(run)


@pytest.mark.parametrize("name", CPP)
def test_cpp_attack(attacks: dict[tuple[str, str], Future[list[Run]]], name: str) -> None:
    for run in attacks["cpp", name].result():
        check(run)


@pytest.mark.parametrize("name", CPP_COMPILER)
def test_compiler_attack(attacks: dict[tuple[str, str], Future[list[Run]]], name: str) -> None:
    with pytest.raises(CompileError):
        attacks["cpp", name].result(timeout=60)


@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("python", attempting("attempt(lambda: T['token'])")),
        ("cpp", '#include <cstdio>\nint main(){puts("PWNED");}'),
    ],
    ids=["python", "cpp"],
)
def test_an_attack_that_succeeds_is_seen(
    backend: Backend, aim: dict[str, Any], language: str, source: str
) -> None:
    """An attack's first lines run in the box, too: what follows them is really tried."""
    with Box(backend, source, language) as box:
        assert b"PWNED" in box.run(json.dumps(aim).encode(), SECONDS, WALL).output


def test_there_are_enough_attacks() -> None:
    assert len(PYTHON) + len(CPP) + len(CPP_COMPILER) >= 40


def test_an_honest_program_runs_after_an_attack(backend: Backend, aim: dict[str, Any]) -> None:
    with Box(backend, python_source("fork bomb")) as box:
        box.run(json.dumps(aim).encode(), SECONDS, WALL)
    with Box(backend, "print(input()[::-1])") as box:
        run = box.run(b"abc", SECONDS, WALL)
    assert (run.status, run.output) == (runner.FINISHED, b"cba\n")


def test_the_pool_grades_on_under_attack(backend: Backend, aim: dict[str, Any]) -> None:
    """Attacks and honest submissions mixed: no attack earns a point, every honest one does."""
    tests = [{"input": json.dumps(aim), "output": EXPECTED}]
    attack = {"kind": "code", "tests": tests, "time_limit_s": 0.25}
    honest = {"kind": "code", "tests": [{"input": "3", "output": "9"}]}
    items = []
    for name in PYTHON:
        items.append((attack, f"```python\n{python_source(name)}\n```"))
        items.append((honest, "```python\nprint(int(input())**2)\n```"))
    with GraderPool(4, sandbox=backend.name, preload=["code"]) as pool:
        verdicts = pool.grade_many(items)
        assert [v.score for v in verdicts[0::2]] == [0.0] * len(PYTHON)
        assert [v.score for v in verdicts[1::2]] == [1.0] * len(PYTHON)
        assert pool.killed == 0
