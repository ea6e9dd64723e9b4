"""`prorl check --cluster` on nodes that answer badly, without Ray."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import rollouts
from ray.exceptions import GetTimeoutError, RayTaskError
from rich.console import Console

from prorl_nemo.cluster import check
from prorl_nemo.cluster.bandwidth import Bandwidths
from prorl_nemo.cluster.placement import ClusterError, Node
from prorl_nemo.cluster.probes import GIB, Probe

NODES = [Node("id1", "10.0.0.1", 0), Node("id2", "10.0.0.2", 0)]


def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **answers: Any) -> tuple[bool, str]:
    """The verdict and what is printed, where `_probes` or `measure` give or raise something."""
    probes = [Probe(n.host, memory=8 * GIB, disk=8 * GIB, sandbox="bwrap") for n in NODES]
    usual = {"_probes": probes, "measure": Bandwidths([1e9, 1e9], 1e9)}
    for name, answer in (usual | answers).items():

        def given(*_: Any, answer: Any = answer, **__: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(check, name, given)
    monkeypatch.setattr(check, "cluster_nodes", lambda: NODES)
    monkeypatch.setattr(check, "answering", lambda nodes, files: {node: [] for node in nodes})
    printed = io.StringIO()
    recipe = rollouts.recipe(runs_dir=str(tmp_path))
    return check.check_cluster(recipe, Console(file=printed, width=200)), printed.getvalue()


def test_nodes_that_are_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fit, printed = checked(monkeypatch, tmp_path)
    assert fit and "2 nodes are fit for small" in printed and "1.00 GB/s" in printed


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GetTimeoutError(), "no answer in time"),
        (RayTaskError("join", "", RuntimeError("refused\nat 10.0.0.2")), "RuntimeError: refused;"),
    ],
)
def test_a_network_that_cannot_be_measured_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, said: str
) -> None:
    """It is what the check is there to find; the nodes are shown all the same."""
    fit, printed = checked(monkeypatch, tmp_path, measure=error)
    assert not fit and "10.0.0.2" in printed
    assert "could not be measured: " in printed and said in printed


def test_a_node_that_is_lost_over_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ClusterError, match="could not be looked at: no answer in time"):
        checked(monkeypatch, tmp_path, _probes=GetTimeoutError())
