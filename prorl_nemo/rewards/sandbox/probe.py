"""Which sandbox works on this machine: each is tried by really trying to break out of it.

A container may refuse namespaces, a kernel may lack Landlock, an administrator may have
switched either off; only an attempt tells. Nothing that lets the attempt through is used.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
from functools import lru_cache

from prorl_nemo.rewards.sandbox import SANDBOX_VARIABLE, SandboxError, runner
from prorl_nemo.rewards.sandbox.backends import BACKENDS, Backend
from prorl_nemo.rewards.sandbox.box import Box, CompileError

_SECONDS = 10.0

# Reads where to attack from its input, prints what it managed to do.
_ATTEMPT = r"""
import json, os, socket, sys
targets = json.loads(sys.stdin.read())
done = []

def attempt(name, action):
    try:
        if action() is not False:
            done.append(name)
    except (OSError, AttributeError, ImportError):
        pass

def fork():
    if os.fork() == 0:
        os._exit(0)

def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.connect(address)

attempt("read a file of the host", lambda: open(targets["secret"]).read())
attempt("list a folder of the host", lambda: os.listdir(targets["folder"]))
attempt("write a file of the host", lambda: open(targets["folder"] + "/mine", "w"))
attempt("write a temporary file", lambda: open("/tmp/" + targets["token"], "w"))
attempt("start a process", fork)
attempt("run a program", lambda: os.execv("/bin/true", ["true", "0"]) or True)
attempt("connect to a port", lambda: connect(socket.AF_INET, ("127.0.0.1", targets["port"])))
attempt("connect to a socket", lambda: connect(socket.AF_UNIX, "\0" + targets["token"]))
attempt("signal the grader", lambda: os.kill(targets["pid"], 0))
attempt("signal everyone", lambda: os.kill(-1, 0))
attempt("read the grader's environment", lambda: open(f"/proc/{targets['pid']}/environ").read())
attempt("be root", lambda: os.getuid() == 0)
attempt("inherit the environment", lambda: targets["token"] in str(os.environ))
print(json.dumps(done))
"""


def attempts(backend: Backend) -> list[str]:
    """What a program that tries to get out of `backend` managed to do; empty is good.

    Raises:
        SandboxError: the sandbox does not start, or an honest program does not run in it.
    """
    token = f"probe-{secrets.token_hex(8)}"
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as port,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind("\0" + token)
        abstract.listen()
        secret = os.path.join(folder, "secret")
        with open(secret, "w", encoding="utf-8") as file:
            file.write(token)
        # World-readable, so that only the sandbox can be what keeps it.
        os.chmod(folder, 0o777)
        targets = {
            "secret": secret,
            "folder": folder,
            "token": token,
            "port": port.getsockname()[1],
            "pid": os.getpid(),
        }
        try:
            with Box(backend, _ATTEMPT) as box:
                run = box.run(json.dumps(targets).encode(), _SECONDS, _SECONDS)
        except CompileError as error:
            raise SandboxError(f"sandbox {backend.name}: {error}") from None
    if run.status != runner.FINISHED:
        raise SandboxError(f"sandbox {backend.name}: an honest program fails: {run.messages}")
    managed: list[str] = json.loads(run.output)
    return managed


@lru_cache(maxsize=4)
def working_backend(choice: str | None = None) -> Backend:
    """The sandbox to use.

    Args:
        choice: a name in BACKENDS, or `auto` for the first that holds; default: the
            environment variable PRORL_SANDBOX, or `auto`. `none` is never chosen by itself.

    Raises:
        SandboxError: nothing holds here, or the chosen one does not; says why for each.
    """
    choice = choice or os.environ.get(SANDBOX_VARIABLE) or "auto"
    if choice != "auto" and choice not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise SandboxError(f"sandbox: {choice!r} is unknown; use one of {known}")
    failures = []
    for name in ("bubblewrap", "landlock") if choice == "auto" else (choice,):
        backend = BACKENDS[name]
        try:
            managed = attempts(backend)
        except SandboxError as error:
            failures.append(str(error))
            continue
        if not managed or name == "none":
            return backend
        failures.append(f"sandbox {name}: a program inside could {', '.join(managed)}")
    raise SandboxError(
        "no sandbox holds on this machine, so model-written code cannot be run:\n  "
        + "\n  ".join(failures)
        + "\ninstall bubblewrap where user namespaces are allowed, or use a kernel with Landlock; "
        "grading.sandbox=none with grading.allow_unsafe=true runs unprotected, at your own risk"
    )
