"""The pool: every request answered once, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import reasoning_gym

from prorl_nemo.errors import UserError
from prorl_nemo.rewards.frames import receive_frame
from prorl_nemo.rewards.pool import GraderPool, _read
from prorl_nemo.rewards.verdict import GradingError, Verdict

MATH = {"kind": "math", "answer": "7"}
RIGHT, WRONG = r"\boxed{7}", r"\boxed{8}"


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(2, soft_limit_s=5, hard_limit_s=8, preload=["math"]) as started:
        yield started


def template_of(pool: GraderPool) -> psutil.Process:
    return psutil.Process(pool._template._process.pid)


def workers_of(pool: GraderPool) -> list[psutil.Process]:
    return [p for p in template_of(pool).children() if p.status() != psutil.STATUS_ZOMBIE]


def warm(pool: GraderPool) -> list[psutil.Process]:
    pool.grade_many([(MATH, RIGHT)] * 20)
    return workers_of(pool)


def test_verdicts_come_in_order(pool: GraderPool) -> None:
    texts = [RIGHT if i % 3 else WRONG for i in range(200)]
    verdicts = pool.grade_many([(MATH, text) for text in texts])
    assert [verdict.score for verdict in verdicts] == [float(text is RIGHT) for text in texts]


def test_many_threads_may_submit(pool: GraderPool) -> None:
    def one(number: int) -> float:
        item = {"kind": "math", "answer": number}
        return pool.submit(f"thread-{number}", item, rf"\boxed{{{number}}}").result().score

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, range(200))) == [1.0] * 200


def test_an_id_is_pending_once(pool: GraderPool) -> None:
    blocked = warm(pool)
    for worker in blocked:
        worker.send_signal(signal.SIGSTOP)
    try:
        first = pool.submit("same", MATH, RIGHT)
        with pytest.raises(ValueError, match="same"):
            pool.submit("same", MATH, RIGHT)
    finally:
        for worker in blocked:
            worker.send_signal(signal.SIGCONT)
    assert first.result().score == 1.0
    assert pool.submit("same", MATH, WRONG).result().score == 0.0


def test_a_malformed_record_is_the_caller_s_error(pool: GraderPool) -> None:
    with pytest.raises(GradingError, match="kind"):
        pool.submit("bad-1", {"kind": "nonsense"}, RIGHT).result()
    with pytest.raises(GradingError, match="answer"):
        pool.submit("bad-2", {"kind": "math"}, RIGHT).result()
    assert pool.submit("good", MATH, RIGHT).result().score == 1.0


def test_a_worker_that_died_idle_costs_nothing(pool: GraderPool) -> None:
    for worker in warm(pool):
        worker.kill()
    while workers_of(pool):  # dead, though not reaped before their place is needed
        time.sleep(0.01)
    assert {v.score for v in pool.grade_many([(MATH, RIGHT)] * 20)} == {1.0}


def test_a_hung_worker_costs_one_sample() -> None:
    """A stopped process stands for a hang in C code: no signal handler of its own runs."""
    with GraderPool(1, soft_limit_s=0.5, hard_limit_s=1.0, preload=["math"]) as pool:
        (worker,) = warm(pool)
        worker.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        verdicts = pool.grade_many([(MATH, RIGHT)] * 5)
        assert [v.score for v in verdicts] == [0.0, 1.0, 1.0, 1.0, 1.0]
        assert verdicts[0].reason == "timed out: killed after 1 s"
        assert time.monotonic() - start > 0.9
        assert pool.killed == 1
        assert not worker.is_running()


def test_a_worker_killed_while_grading_costs_one_sample() -> None:
    with GraderPool(1, soft_limit_s=20, hard_limit_s=30, preload=["math"]) as pool:
        (worker,) = warm(pool)
        worker.send_signal(signal.SIGSTOP)
        future = pool.submit("a", MATH, RIGHT)
        time.sleep(0.3)
        worker.kill()
        verdict = future.result(timeout=10)
        assert (verdict.score, verdict.reason) == (0.0, "worker died: signal 9")
        assert pool.submit("b", MATH, RIGHT).result().score == 1.0


def test_the_template_is_started_again(pool: GraderPool) -> None:
    workers = warm(pool)
    template = template_of(pool)
    template.kill()
    psutil.wait_procs(workers, timeout=10)  # they end with the template
    assert not any(worker.is_running() for worker in workers)
    assert {v.score for v in pool.grade_many([(MATH, RIGHT)] * 20)} == {1.0}
    assert template_of(pool).pid != template.pid


def test_the_soft_limit_interrupts_a_computation() -> None:
    """Sympy simplifies the derivative of this product for minutes."""
    entry = {"answer": "gold", "metadata": {"variable": "x", "integrand": "x"}}
    item = {"kind": "reasoning_gym", "task": "simple_integration", "entry": entry}
    product = "*".join(f"(sin({i}*x)+cos(x)**{i}+x)" for i in range(2, 20))
    with GraderPool(1, soft_limit_s=0.5, hard_limit_s=30, preload=["reasoning_gym"]) as pool:
        verdict = pool.submit("slow", item, f"<answer>{product}</answer>").result()
        assert (verdict.score, verdict.reason) == (0.0, "timed out: 0.5 s of grading")
        assert pool.submit("next", MATH, RIGHT).result().score == 1.0


def test_memory_is_limited() -> None:
    """A text of 20 MB and its copies do not fit into 16 MiB; the next request is graded."""
    with GraderPool(1, soft_limit_s=20, hard_limit_s=40, memory_mib=16, preload=["math"]) as pool:
        verdict = pool.submit("big", MATH, "x" * 20_000_000 + RIGHT).result()
        assert verdict.score == 0.0
        assert verdict.reason.split(":")[0] in ("out of memory", "worker died")
        assert pool.submit("small", MATH, RIGHT).result().score == 1.0


def test_ten_megabytes_of_response(pool: GraderPool) -> None:
    assert pool.submit("long", MATH, "x" * 10_000_000 + RIGHT).result().score == 1.0


def test_workers_are_recycled() -> None:
    with GraderPool(1, recycle_after=3, preload=["math"]) as pool:
        seen = set()
        for _ in range(7):
            assert pool.submit("a", MATH, RIGHT).result().score == 1.0
            seen |= {worker.pid for worker in workers_of(pool)}
        assert len(seen) >= 2


def test_kinds_are_loaded_when_first_seen() -> None:
    entry = reasoning_gym.create_dataset("leg_counting", size=1, seed=1)[0]
    logic = {"kind": "reasoning_gym", "task": "leg_counting", "entry": entry}
    with GraderPool(1) as pool:
        assert pool.submit("a", MATH, RIGHT).result().score == 1.0
        text = f"<answer>{entry['answer']}</answer>"
        assert pool.submit("b", logic, text).result().score == 1.0


@pytest.mark.parametrize("task", ["countdown", "n_queens", "spiral_matrix"])
def test_answers_cannot_run_code(pool: GraderPool, task: str, tmp_path: Any) -> None:
    entry = reasoning_gym.create_dataset(task, size=1, seed=1)[0]
    item = {"kind": "reasoning_gym", "task": task, "entry": entry}
    mark = tmp_path / "mark"
    for attack in (f"__import__('os').system('touch {mark}')", f"open('{mark}', 'w')"):
        assert pool.submit("a", item, f"<answer>{attack}</answer>").result().score == 0.0
    assert not mark.exists()


def test_a_confined_worker_can_only_compute(tmp_path: Any) -> None:
    """What `confinement` leaves a process, tried in one: the second line behind the gate."""
    (tmp_path / "secret").write_text("secret")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, ",".join(_escapes(str(tmp_path))).encode() or b"nothing")
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    assert os.read(reader, 4096).decode() == "nothing"
    os.close(reader)
    assert sorted(os.listdir(tmp_path)) == ["secret"]


def _escapes(folder: str) -> list[str]:
    from prorl_nemo.rewards import confinement

    confinement.enter()
    attempts: dict[str, Any] = {
        "read": lambda: Path(folder, "secret").read_text(),
        "write": lambda: Path(folder, "mine").write_text(""),
        "delete": lambda: os.unlink(f"{folder}/secret"),
        "fork": os.fork,
        "exec": lambda: os.execv("/bin/true", ["true"]),
        "thread": lambda: threading.Thread(target=print).start(),
        "socket": socket.socket,
        "kill": lambda: os.kill(os.getppid(), 0),
    }
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
            done.append(name)
        except (OSError, RuntimeError):
            continue
    return done


def test_close_ends_every_process_and_cancels_what_waits() -> None:
    pool = GraderPool(1, soft_limit_s=1, hard_limit_s=2, preload=["math"])
    (worker,) = warm(pool)
    template = template_of(pool)
    worker.send_signal(signal.SIGSTOP)
    futures = [pool.submit(str(i), MATH, RIGHT) for i in range(10)]
    time.sleep(0.2)
    pool.close()
    pool.close()
    assert futures[0].result().score == 0.0
    assert all(future.cancelled() for future in futures[1:])
    assert not template.is_running()
    assert not worker.is_running()
    with pytest.raises(ValueError, match="closed"):
        pool.submit("late", MATH, RIGHT)


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="workers"):
        GraderPool(0)
    with pytest.raises(UserError, match="hard_limit_s"):
        GraderPool(1, soft_limit_s=2, hard_limit_s=1)
    with pytest.raises(GradingError, match="nonsense"):
        GraderPool(1, preload=["nonsense"])


@pytest.mark.parametrize(
    "answer",
    [
        {"id": "b", "score": 1.0, "reason": ""},
        {"id": "a", "score": 2.0, "reason": ""},
        {"id": "a", "score": float("nan"), "reason": ""},
        {"id": "a", "score": "1e999", "reason": ""},
        {"id": "a", "score": 10**400, "reason": ""},
        {"id": "a", "score": 1.0, "parts": [], "reason": ""},
        {"id": "a"},
        {},
    ],
)
def test_a_forged_answer_is_no_verdict(answer: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        _read(answer, "a")


def test_a_forged_message_is_no_message() -> None:
    """Also one that exhausts the parser's recursion, which is no ValueError by itself."""
    for body in (b"[" * 50_000, b"[]", b"{", b'{"a": '):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(len(body).to_bytes(4, "little") + body)
            with pytest.raises(ValueError):
                receive_frame(ours, time.monotonic() + 5)


def test_a_verdict_is_a_finite_share() -> None:
    for score in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="score"):
            Verdict(score)
