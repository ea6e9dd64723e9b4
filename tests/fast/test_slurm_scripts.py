"""The sbatch scripts without Slurm: they parse, their settings are documented, and what they would
run in each kind of container is what it should be. Under real daemons: `make test-slurm`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").iterdir())
DOCS = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def shown(**settings: str) -> list[str]:
    """What `in_job` would run."""
    script = 'source slurm/job.sh; in_job "--nodes=2 --overlap" -m some.module "two words"'
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PRORL_", "SLURM_"))}
    environment = clean | {"PRORL_HOME": str(ROOT), "PRORL_SHOW": "1"} | settings
    command = ["bash", "-c", script]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return shlex.split(done.stdout)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_every_setting_is_documented() -> None:
    text = " ".join(path.read_text() for path in SCRIPTS)
    text += (ROOT / "prorl_nemo" / "cluster" / "node_agent.py").read_text()
    used = set(re.findall(r"PRORL_[A-Z_]+", text)) - {"PRORL_NODES", "PRORL_SHOW"}
    documented = set(re.findall(r"`(PRORL_[A-Z_]+)`", DOCS))
    assert used == documented
    for path in SCRIPTS:
        assert f"slurm/{path.name}" in DOCS


def test_bare() -> None:
    found = shown()
    assert found[:5] == ["srun", "--nodes=2", "--overlap", "--mem=0", "--cpu-bind=none"]
    assert found[5:] == [f"{ROOT}/.venv/bin/python", "-m", "some.module", "two words"]
    assert shown(PRORL_PYTHON="/opt/python")[5] == "/opt/python"


def test_pyxis() -> None:
    found = shown(PRORL_CONTAINER="/images/prorl.sqsh", PRORL_MOUNTS="/data,/home/a:/home/b,/runs")
    assert found[5:8] == [
        "--container-image=/images/prorl.sqsh",
        "--container-mounts=/data:/data,/home/a:/home/b,/runs:/runs",
        f"--container-workdir={ROOT}",
    ]
    assert found[8:] == ["python", "-m", "some.module", "two words"]
    assert f"--container-mounts={ROOT}:{ROOT}" in shown(PRORL_CONTAINER="registry#image:1")


def test_apptainer() -> None:
    found = shown(PRORL_CONTAINER="/images/prorl.sif", PRORL_MOUNTS="/data,/runs")
    assert found[5:] == [
        *("apptainer", "exec", "--nv", "--bind", "/data,/runs", "--pwd", str(ROOT)),
        *("/images/prorl.sif", "python", "-m", "some.module", "two words"),
    ]
