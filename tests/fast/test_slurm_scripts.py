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


# What every srun begins with, the options of the call included.
SRUN = ["srun", "--export=ALL", "--mem=0", "--cpu-bind=none", "--nodes=2", "--output=a b/%n"]
CALL = 'in_job --nodes=2 "--output=a b/%n" -- -m some.module "two words"'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkout whose path has a space."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    return folder


def sourced(script: str, home: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """A script behind job.sh, in an environment without optional variables but those given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PRORL_", "SLURM_"))}
    clean.pop("PYTHONPATH", None)
    environment = clean | {"PRORL_HOME": str(home)} | settings
    command = ["bash", "-c", f"source {ROOT}/slurm/job.sh; {script}"]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def shown(home: Path, **settings: str) -> list[str]:
    """What `in_job` would run."""
    done = sourced(CALL, home, PRORL_SHOW="1", **settings)
    assert done.returncode == 0 and not done.stderr, done.stderr
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


def test_bare(home: Path) -> None:
    found = shown(home)
    assert found == [*SRUN, f"{home}/.venv/bin/python", "-m", "some.module", "two words"]
    assert shown(home, PRORL_PYTHON="/opt/python")[len(SRUN)] == "/opt/python"


def test_pyxis(home: Path) -> None:
    """The checkout is always mounted, and the logs where they are elsewhere."""
    logs = home.parent / "the logs"
    found = shown(
        home,
        PRORL_CONTAINER="/images/prorl.sqsh",
        PRORL_MOUNTS="/data,/home/a:/home/b,/data",
        PRORL_LOGS=str(logs),
    )
    assert found == [
        *SRUN,
        "--container-image=/images/prorl.sqsh",
        f"--container-mounts={home}:{home},{logs}:{logs},/data:/data,/home/a:/home/b",
        f"--container-workdir={home}",
        *("python", "-m", "some.module", "two words"),
    ]
    assert f"--container-mounts={home}:{home}" in shown(home, PRORL_CONTAINER="registry#image:1")


def test_apptainer(home: Path) -> None:
    found = shown(home, PRORL_CONTAINER="/images/prorl.sif", PRORL_MOUNTS="/my data,/runs")
    assert found == [
        *SRUN,
        *("apptainer", "exec", "--nv", "--bind"),
        f"{home}:{home},/my data:/my data,/runs:/runs",
        *("--pwd", str(home), "/images/prorl.sif", "python", "-m", "some.module", "two words"),
    ]


def test_everybody_imports_the_checkout(home: Path) -> None:
    done = sourced("echo $PYTHONPATH", home)
    assert done.stdout == f"{home}\n"
    assert sourced("echo $PYTHONPATH", home, PYTHONPATH="/mine").stdout == f"{home}:/mine\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [("PRORL_AGAIN", "chained"), ("PRORL_MAX_STALLED", "0"), ("PRORL_MAX_STALLED", "many")],
)
def test_wrong_settings_are_refused_first(home: Path, name: str, value: str) -> None:
    """Not after hours, when they are needed."""
    done = sourced("echo begun", home, **{name: value})
    assert done.returncode == 2 and "begun" not in done.stdout
    assert f"error: {name}: {value}" in done.stdout


def test_a_signal_before_an_attempt_does_not_end_the_script(home: Path) -> None:
    assert sourced("kill -USR1 $$; echo $stopped", home).stdout == "time\n"
