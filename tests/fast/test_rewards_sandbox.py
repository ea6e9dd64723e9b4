"""The sandbox's parts; the attacks on the whole are in tests/slow/test_sandbox_attacks.py."""

from __future__ import annotations

import errno
import os
import platform
import struct

import pytest

from prorl_nemo.errors import UserError
from prorl_nemo.rewards.sandbox import SandboxError, backends, probe, runner, seccomp
from prorl_nemo.rewards.sandbox.backends import BACKENDS
from prorl_nemo.rewards.sandbox.box import Box, CompileError

ALLOWED, REFUSED, ABSENT, KILLED = "allowed", "refused", "absent", "killed"
X86_64, AARCH64 = 0xC000003E, 0xC00000B7


def judge(program: bytes, architecture: int, call: int, *arguments: int) -> str:
    """A slow reading of the filter: the classic BPF machine, as the kernel defines it."""
    code = [struct.unpack("=HBBI", program[i : i + 8]) for i in range(0, len(program), 8)]
    padded = [*arguments, *([0] * (6 - len(arguments)))]
    data = struct.pack("=IIQ6Q", call, architecture, 0, *padded)
    position = register = 0
    while True:
        operation, true, false, constant = code[position]
        position += 1
        if operation == 0x20:
            (register,) = struct.unpack_from("=I", data, constant)
        elif operation == 0x54:
            register &= constant
        elif operation == 0x15:
            position += true if register == constant else false
        elif operation == 0x35:
            position += true if register >= constant else false
        elif operation == 0x06:
            return {
                0x7FFF0000: ALLOWED,
                0x80000000: KILLED,
                0x00050000 | errno.EPERM: REFUSED,
                0x00050000 | errno.ENOSYS: ABSENT,
            }[constant]
        else:
            raise AssertionError(f"unknown operation {operation:#x}")


def build(monkeypatch: pytest.MonkeyPatch, machine: str, threads: bool, programs: bool) -> bytes:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    return seccomp.build(threads=threads, programs=programs)


@pytest.mark.parametrize(
    ("call", "arguments", "verdict"),
    [
        (0, (), ALLOWED),  # read
        (2, (0, os.O_RDONLY), ALLOWED),  # open
        (2, (0, os.O_WRONLY), REFUSED),
        (257, (0, 0, os.O_RDONLY | os.O_CLOEXEC), ALLOWED),  # openat
        (257, (0, 0, os.O_RDWR), REFUSED),
        (257, (0, 0, os.O_CREAT), REFUSED),
        (257, (0, 0, os.O_TMPFILE | os.O_RDWR), REFUSED),
        (437, (), REFUSED),  # openat2 hides its flags behind a pointer
        (85, (), REFUSED),  # creat
        (56, (0x10000,), ALLOWED),  # clone of a thread
        (56, (17,), REFUSED),  # clone of a process
        (57, (), REFUSED),  # fork
        (58, (), REFUSED),  # vfork
        (435, (), ABSENT),  # clone3
        (59, (), REFUSED),  # execve
        (322, (), REFUSED),  # execveat
        (41, (), REFUSED),  # socket
        (62, (), REFUSED),  # kill
        (234, (), REFUSED),  # tgkill
        (101, (), REFUSED),  # ptrace
        (72, (0, 3), ALLOWED),  # fcntl F_GETFL
        (72, (0, 8), REFUSED),  # fcntl F_SETOWN
        (16, (0, 0x5401), ALLOWED),  # ioctl TCGETS
        (16, (0, 0x5412), REFUSED),  # ioctl TIOCSTI
        (157, (15,), ALLOWED),  # prctl PR_SET_NAME
        (157, (1,), REFUSED),  # prctl PR_SET_PDEATHSIG
        (302, (0,), ALLOWED),  # prlimit64 of itself
        (302, (1,), REFUSED),
        (0x40000000, (), ABSENT),  # x32
        (9999, (), REFUSED),
    ],
)
def test_the_filter_of_a_python_submission(
    monkeypatch: pytest.MonkeyPatch, call: int, arguments: tuple[int, ...], verdict: str
) -> None:
    program = build(monkeypatch, "x86_64", True, False)
    assert judge(program, X86_64, call, *arguments) == verdict


def test_the_filter_s_options(monkeypatch: pytest.MonkeyPatch) -> None:
    confined = build(monkeypatch, "x86_64", False, False)
    assert judge(confined, X86_64, 56, 0x10000) == REFUSED
    compiled = build(monkeypatch, "x86_64", True, True)
    assert judge(compiled, X86_64, 59) == ALLOWED
    assert judge(compiled, X86_64, 57) == REFUSED


def test_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    program = build(monkeypatch, "aarch64", True, False)
    assert judge(program, AARCH64, 63) == ALLOWED  # read
    assert judge(program, AARCH64, 220, 17) == REFUSED  # clone of a process
    assert judge(program, AARCH64, 198) == REFUSED  # socket
    assert judge(program, X86_64, 63) == KILLED
    assert len(program) // 8 < 4096  # the kernel's limit of instructions
    with pytest.raises(UserError, match="riscv64"):
        build(monkeypatch, "riscv64", True, False)


@pytest.mark.parametrize("name", ["bubblewrap", "landlock"])
def test_a_sandbox_that_is_used_holds(name: str) -> None:
    assert probe.attempts(BACKENDS[name]) == []


def test_the_probe_notices_a_sandbox_that_does_not_hold() -> None:
    managed = probe.attempts(BACKENDS["none"])
    assert "read a file of the host" in managed
    assert "start a process" not in managed  # the filter holds without a sandbox, too


def test_a_leaking_sandbox_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    leaking = backends.Backend("bubblewrap", backends.unconfined)
    monkeypatch.setitem(BACKENDS, "bubblewrap", leaking)
    probe.working_backend.cache_clear()
    try:
        with pytest.raises(SandboxError, match="could read a file of the host"):
            probe.working_backend("bubblewrap")
        assert probe.working_backend("auto").name == "landlock"
    finally:
        probe.working_backend.cache_clear()


def test_without_any_sandbox_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(scratch: bool) -> backends.Launch:
        raise SandboxError("not here")

    for name in ("bubblewrap", "landlock"):
        monkeypatch.setitem(BACKENDS, name, backends.Backend(name, absent))
    probe.working_backend.cache_clear()
    try:
        with pytest.raises(SandboxError, match="no sandbox holds"):
            probe.working_backend("auto")
        assert probe.working_backend("none").name == "none"
    finally:
        probe.working_backend.cache_clear()


def test_a_box_that_does_not_start_is_the_sandbox_s_fault() -> None:
    def broken(scratch: bool) -> backends.Launch:
        launch = backends.bubblewrap(scratch)
        launch.command = [launch.command[0], "--no-such-option"]
        return launch

    with pytest.raises(SandboxError, match="did not start"):
        Box(backends.Backend("broken", broken), "print(1)")


def test_runs_do_not_see_each_other() -> None:
    source = "import builtins\nprint(hasattr(builtins, 'mark'))\nbuiltins.mark = 1"
    with Box(BACKENDS["landlock"], source) as box:
        outputs = [box.run(b"", 2, 5).output for _ in range(2)]
    assert outputs == [b"False\n", b"False\n"]


def test_a_box_leaves_no_process() -> None:
    box = Box(BACKENDS["bubblewrap"], "print(1)")
    process = box._process
    assert process.poll() is None
    box.close()
    assert process.poll() is not None


def test_a_box_outlives_a_crash_of_its_run() -> None:
    with Box(BACKENDS["landlock"], "import ctypes\nctypes.string_at(0)") as box:
        for _ in range(2):
            run = box.run(b"", 2, 5)
            assert (run.status, run.code) == (runner.FAILED, -11)


def test_a_syntax_error_is_told() -> None:
    with pytest.raises(CompileError, match="line 1"):
        Box(BACKENDS["landlock"], "print(")
