"""A real Slurm of two nodes on this machine: munged, slurmctld and a slurmd for each node, in
namespaces of its own, so that a node has its name and process tree and can be killed as a whole.

Needs root and Debian's packages (slurmctld slurmd slurm-client munge). Nothing of it is left when
it ends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PACKAGES = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
NODES = ("n1", "n2")
_CONF = """\
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
_PARTITIONS = """\
PartitionName=batch Nodes=n[1-2] Default=YES PriorityTier=1 OverSubscribe=FORCE:2
PartitionName=urgent Nodes=n[1-2] PriorityTier=9 PreemptMode=OFF OverSubscribe=EXCLUSIVE
"""


class Slurm:
    """The daemons, from `start` to `stop`; `temporary` is for the jobs' TMPDIR."""

    def __init__(self) -> None:
        missing = [n for n in ("slurmctld", "slurmd", "munged") if not _program(n)]
        if missing or os.getuid() != 0:
            raise SystemExit(f"needs root and {', '.join(missing) or 'Slurm'}: {PACKAGES}")
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))
        # Of the jobs: short, because Ray's sockets lie in it.
        self.temporary = self.folder / "t"
        self.temporary.mkdir()
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        base = _free_ports(1 + len(NODES))
        for name in ("munge", "state", "log", "spool"):
            (self.folder / name).mkdir(mode=0o700)
        conf = _CONF.format(
            host=socket.gethostname().split(".")[0], port=base[0], folder=self.folder
        )
        hosts = Path("/etc/hosts").read_text()
        for number, (name, port) in enumerate(zip(NODES, base[1:], strict=True)):
            address = f"127.0.0.{11 + number}"
            conf += f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} "
            conf += "CPUs=8 RealMemory=20000\n"
            hosts += f"{address} {name}\n"
        (self.folder / "slurm.conf").write_text(conf + _PARTITIONS)
        (self.folder / "hosts").write_text(hosts)

    def start(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o600)
        files = {"key": "key", "pid": "pid", "log": "log", "seed": "seed"}
        command = [_program("munged"), f"--socket={munge}/socket", "--force"]
        self._run(*command, *(f"--{k}-file={munge}/{v}" for k, v in files.items()))
        self._run(_program("slurmctld"), "-c")
        for name in NODES:
            self.start_node(name)
        self.wait_idle()

    def start_node(self, name: str) -> None:
        inside = (
            f"hostname {name}; mount --bind {self.folder}/hosts /etc/hosts; "
            f"exec {_program('slurmd')} -D -N {name}"
        )
        namespaces = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.nodes[name] = subprocess.Popen(
            ["unshare", *namespaces, "bash", "-c", inside],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill_node(self, name: str) -> None:
        """As if its power had failed: every process on it is gone at once."""
        self.nodes[name].send_signal(signal.SIGKILL)
        self.nodes[name].wait()

    def wait_idle(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.run("sinfo", "-hNo", "%T").split().count("idle") >= len(NODES):
                return
            time.sleep(0.2)
        raise TimeoutError(self.run("sinfo", "-No", "%N %T %E"))

    def stop(self) -> None:
        with suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root", "--signal=KILL", "--full")
            self.run("scontrol", "shutdown")
        time.sleep(1)
        with suppress(subprocess.SubprocessError):
            self._run(_program("munged"), f"--socket={self.folder}/munge/socket", "--stop")
        for process in self.nodes.values():
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str) -> str:
        """Standard output of a Slurm command."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()

    def _run(self, *command: str) -> None:
        subprocess.run(
            command, env=self.environment, check=True, timeout=60, stdin=subprocess.DEVNULL
        )


def _program(name: str) -> str:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin") or ""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
