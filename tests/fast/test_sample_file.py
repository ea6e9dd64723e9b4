"""The samples' file after a kill: whole rows stay, a torn one goes, nothing is there twice."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.sample_file import SampleFile

ROWS = [
    {"item": f"b/{i}", "sample": j, "response": "a\nb \ud83d \u2028" * i}
    for i in range(4)
    for j in range(3)
]


def write(path: Path, rows: list[dict]) -> bytes:
    with SampleFile(path) as file:
        for row in rows:
            file.append(row)
    return path.read_bytes()


@given(cut=st.integers(0, 2000), tail=st.binary(max_size=9).filter(lambda b: b"\n" not in b))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_cut_anywhere_it_goes_on_as_if_nothing_had_been(
    tmp_path: Path, cut: int, tail: bytes
) -> None:
    path = tmp_path / "samples.jsonl"
    path.unlink(missing_ok=True)
    whole = write(path, ROWS)
    path.write_bytes(whole[:cut] + tail)
    kept = (whole[:cut] + tail).count(b"\n")
    with SampleFile(path) as file:
        assert len(file) == kept
        assert list(file.rows()) == ROWS[:kept]
        assert all(
            ((row["item"], row["sample"]) in file) == (i < kept) for i, row in enumerate(ROWS)
        )
        for row in ROWS[kept:]:
            file.append(row)
    assert path.read_bytes() == whole


def test_a_torn_line_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    whole = write(path, ROWS[:1])
    torn = b'{"item": "' + b"x" * 200_000
    path.write_bytes(whole + torn)
    with SampleFile(path) as file:
        assert file.repaired == len(torn)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '{"item": 1, "sample": 0}', '{"item": "b"}', '{"item": "b", "sample": true}'],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(UserError, match="line 2: damaged"):
        SampleFile(path)


def test_nothing_is_counted_twice(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with SampleFile(path) as file:
        file.append(ROWS[0])
        with pytest.raises(ValueError, match="twice"):
            file.append(ROWS[0])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match="twice"):
        SampleFile(path)


def test_a_full_disk_is_an_error_that_says_so_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    whole = write(path, ROWS[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
    try:
        with SampleFile(path) as file, pytest.raises(UserError, match="the same command again"):
            file.append(ROWS[2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    with SampleFile(path) as file:
        assert file.repaired == 10
    assert path.read_bytes() == whole
