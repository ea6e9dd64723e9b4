"""Ranks that are lost while they send their weights, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from prorl_nemo.cluster import policy_group
from prorl_nemo.cluster.policy_group import PolicyError, PolicyGroup


class FakeRay:
    """References are what they stand for; an exception among them is raised by `get`."""

    def wait(self, references: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        return references, []

    def get(self, references: list[Any], timeout: float | None = None) -> list[Any]:
        for found in references:
            if isinstance(found, Exception):
                raise found
        return references


class Rank:
    """A trainer rank that sends these buckets, or raises."""

    def __init__(self, *sent: Any) -> None:
        def stream(transfer: str, file: Any) -> Iterator[Any]:
            yield from sent

        self.weights = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=stream))
        dead = next((s for s in sent if isinstance(s, RayActorError)), ("host", 1))
        self.process = SimpleNamespace(remote=lambda: dead)


def group_of(monkeypatch: pytest.MonkeyPatch, *stages: list[Rank]) -> PolicyGroup:
    monkeypatch.setattr(policy_group, "ray", FakeRay())
    group = PolicyGroup.__new__(PolicyGroup)
    group._silent_seconds, group._last_parts, group._files = 1.0, {}, {}
    group._stages = dict(enumerate(stages))
    group._ranks = [rank for ranks in stages for rank in ranks]
    return group


def test_buckets_of_all_stages_each_with_the_parts_of_its_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = group_of(monkeypatch, [Rank("a1", "a2"), Rank("b1", "b2")], [Rank("c"), Rank("d")])
    assert list(group.weights()) == [("a1", "b1"), ("a2", "b2"), ("c", "d")]
    # A bucket that the first rank gathers has no other parts.
    assert list(group.weights("cuda_ipc")) == [("a1",), ("a2",), ("c",)]


@pytest.mark.parametrize(
    ("lost", "raised"),
    [
        (RayActorError(), PolicyError),
        (ObjectLostError("0" * 56, None, ""), PolicyError),
        (RayTaskError("weights", "", MemoryError("no room")), MemoryError),
    ],
)
def test_a_rank_that_is_lost_while_it_sends_is_no_fault_of_the_engines(
    monkeypatch: pytest.MonkeyPatch, lost: Exception, raised: type[Exception]
) -> None:
    """They would be replaced one after the other, and be sent the same incomplete set."""
    for stages in (
        [[Rank("a1", lost), Rank("b1", "b2", "b3")]],
        [[Rank("a1", "a2", "a3"), Rank("b1", lost)]],
        [[Rank(lost)], [Rank("c")]],
    ):
        with pytest.raises(raised):
            list(group_of(monkeypatch, *stages).weights())


def test_a_broadcast_that_an_engine_broke_off_is_no_loss_of_a_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = RayTaskError("weights", "", RuntimeError("gloo: connection closed by peer"))
    assert len(list(group_of(monkeypatch, [Rank("a1", failed)]).weights("broadcast"))) == 2
    with pytest.raises(PolicyError):
        list(group_of(monkeypatch, [Rank("a1", RayActorError())]).weights("broadcast"))
