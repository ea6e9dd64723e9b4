"""The worker side of the pool: a template process that forks graders.

The template imports the graders once and then only forks, so that a worker that hung or
ran out of memory is replaced in milliseconds. It runs nothing a model wrote. Each worker
confines itself, then grades requests from its socket until told to stop.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import socket
import sys
import traceback
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.rewards import confinement
from prorl_nemo.rewards.frames import receive_frame, send_frame
from prorl_nemo.rewards.registry import KINDS, grade
from prorl_nemo.rewards.sandbox.inside import die_with_parent
from prorl_nemo.rewards.verdict import GradingError

_SOFT_REPEAT_S = 0.2


class SoftTimeout(BaseException):
    """The soft limit passed. Not an Exception, so that graders do not swallow it."""


def template_main(control_fd: int) -> None:
    """Serve `fork` and `kill` requests of the pool until its end of the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the pool, which ends us
    control = socket.socket(fileno=control_fd)
    children: set[int] = set()
    try:
        while True:
            request = receive_frame(control)
            if request["do"] == "load":
                send_frame(control, _load(request["kind"]))
            elif request["do"] == "fork":
                _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
                pid = os.fork()
                if pid == 0:
                    control.close()
                    _worker_main(descriptors[0], request)
                os.close(descriptors[0])
                children.add(pid)
                send_frame(control, {"pid": pid})
            elif request["do"] == "kill":
                status = None
                if request["pid"] in children:
                    # Only we reap our children, so the number cannot have been reused.
                    children.discard(request["pid"])
                    os.kill(request["pid"], signal.SIGKILL)
                    status = os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])
                send_frame(control, {"status": status})
    except EOFError:
        pass
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def _load(kind: str) -> dict[str, Any]:
    try:
        module = KINDS[kind].load()
        warm_up = getattr(module, "warm_up", None)
        if warm_up:
            warm_up()
    except UserError as error:
        return {"error": str(error)}
    except Exception:
        return {"error": traceback.format_exc()}
    # What is loaded now is shared by all workers; keep the collector from copying it.
    gc.collect()
    gc.freeze()
    return {"ok": True}


def _worker_main(descriptor: int, settings: dict[str, Any]) -> None:
    """Grade until the socket closes, the parent asks for no more, or a limit is reached."""
    code = 1
    try:
        die_with_parent()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        sock = socket.socket(fileno=descriptor)
        try:
            if settings["confined"]:
                _limit_memory(settings["memory_bytes"])
                confinement.enter()
        except Exception as error:
            send_frame(sock, {"unfit": f"{type(error).__name__}: {error}"})
            raise
        send_frame(sock, {"ready": True})
        _serve(sock, settings)
        code = 0
    except (EOFError, OSError):
        code = 0
    finally:
        os._exit(code)


def _limit_memory(memory_bytes: int) -> None:
    """Allow `memory_bytes` of address space beyond what the imports already took."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory_bytes, taken + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _serve(sock: socket.socket, settings: dict[str, Any]) -> None:
    sys.setrecursionlimit(2000)
    signal.signal(signal.SIGALRM, _raise_soft_timeout)
    for left in range(settings["recycle_after"] - 1, -1, -1):
        request = receive_frame(sock)
        answer, healthy = _grade(request)
        last = left == 0 or not healthy
        send_frame(sock, {**answer, "id": request["id"], "last": last})
        if last:
            return


def _grade(request: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The answer to a request, and whether this process may go on."""
    global _timed_out
    _timed_out = False
    try:
        try:
            # Repeated, because a bare `except:` in a library may catch the first one.
            signal.setitimer(signal.ITIMER_REAL, request["seconds"], _SOFT_REPEAT_S)
            verdict = grade(request["grading"], request["text"], training=request["training"])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if _timed_out:  # a library's bare `except:` took it for a wrong answer
            raise SoftTimeout
        answer = {"score": verdict.score, "parts": verdict.parts, "reason": verdict.reason}
        json.dumps(answer)
        return answer, True
    except GradingError as error:
        return {"bad_record": str(error)}, True
    except UserError as error:
        return {"unfit": str(error)}, False
    except SoftTimeout:
        seconds = request["seconds"]
        return {"score": 0.0, "reason": f"timed out: {seconds:g} s of grading"}, False
    except MemoryError:
        return {"score": 0.0, "reason": "out of memory: grading exceeded its limit"}, False
    except RecursionError:
        return {"score": 0.0, "reason": "refused: the answer is nested too deeply"}, False
    except Exception as error:
        # A response that breaks a grader earns nothing, and the reason shows in the counts.
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(where.filename)}:{where.lineno}"
        reason = f"grader failed: {type(error).__name__} at {place}: {error}"
        return {"score": 0.0, "reason": reason[:300]}, False


_timed_out = False


def _raise_soft_timeout(signum: int, frame: object) -> None:
    global _timed_out
    _timed_out = True
    raise SoftTimeout
