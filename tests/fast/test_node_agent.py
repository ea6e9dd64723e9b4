"""What an agent takes from the environment, and where it puts Ray's sockets."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from prorl_nemo.cluster.node_agent import Settings
from prorl_nemo.cluster.node_guard import short_temporary
from prorl_nemo.cluster.probes import GIB
from prorl_nemo.errors import UserError

FOLDER = Path("attempt")


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PRORL_", "SLURM")):
            monkeypatch.delenv(name)


def test_without_a_variable() -> None:
    found = Settings.from_environment(FOLDER)
    assert (found.node, len(found.names), found.needs.gpus) == (0, 1, 0)
    assert found.needs.memory == found.needs.disk == 4 * GIB and found.join_seconds == 300


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPUS", "MIN_MEMORY_GIB", "MIN_DISK_GIB", "JOIN_SECONDS", "INTERFACE"):
        monkeypatch.setenv(f"PRORL_{name}", "")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    found = Settings.from_environment(FOLDER)
    assert found.needs.gpus == 8 and found.needs.memory == 4 * GIB and found.interface is None


def test_a_wrong_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRORL_MIN_DISK_GIB", "4G")
    with pytest.raises(UserError, match="PRORL_MIN_DISK_GIB: '4G' is no number"):
        Settings.from_environment(FOLDER)


def test_a_step_of_more_nodes_than_are_named_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `sbatch --export=NAME`: the first node would have run without the others."""
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(UserError, match="names 1 nodes, this step has 2"):
        Settings.from_environment(FOLDER)
    monkeypatch.setenv("PRORL_NODES", "n1 n2 ")
    assert Settings.from_environment(FOLDER).names == ["n1", "n2"]


def test_sockets_fit_below_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """AF_UNIX names end at 107 bytes; a job's own folder for temporary files may be long."""
    below = "/prorl12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
    for folder in ("/tmp", "/scratch/4711", "/scratch/slurm/" + "x" * 40, "/ü" * 12):
        monkeypatch.setattr(tempfile, "tempdir", folder)
        chosen = short_temporary()
        assert len(os.fsencode(chosen + below)) <= 107
        assert chosen == folder or len(os.fsencode(folder + below)) > 107
