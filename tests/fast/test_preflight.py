"""What is refused before a worker starts: precision, context, memory, disk, the run directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from prorl_nemo import folder_lock
from prorl_nemo.errors import ModelError, RecipeError, UserError
from prorl_nemo.megatron.layout import read_model_spec
from prorl_nemo.recipe import Recipe, load_recipe, parse_recipe
from prorl_nemo.training import host_memory, preflight
from prorl_nemo.training.preflight import check_resources, checkpoint_bytes, required_bytes
from prorl_nemo.training.run_dir import RESUMABLE, open_run_dir

GIB = 1 << 30
# Parameters by hand: 2 layers of attention 8*2*(2*4 + 2*2) = 192 and feed-forward 3*8*16 = 384, and
# a tied embedding of 100*8 = 800: 1952 in matrices; the norms' 40 do not count.
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def recipe(tmp_path: Path, **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "small",
        "runs_dir": str(tmp_path / "runs"),
        "model": "somewhere",
        "data": {"sources": [{"task": "coin_flip"}], "max_prompt_tokens": 32},
        "rollout": {"prompts_per_step": 8, "max_response_tokens": 32},
        "stages": [{"steps": 100}],
    }
    return parse_recipe(raw | changes)


def test_a_recipe_that_fits(tmp_path: Path, model: Path) -> None:
    began = time.monotonic()
    assert check_resources(recipe(tmp_path), model).parameters == 1952
    assert time.monotonic() - began < 1  # A promise of its docstring.
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy": {"tensor_parallel": 4}},
            "policy.tensor_parallel: 4 does not divide the model's 2 key/value heads; "
            "possible: 1, 2",
        ),
        (
            {"policy": {"pipeline_parallel": 3}},
            "policy.pipeline_parallel: 3 does not divide the model's 2 layers; possible: 1, 2",
        ),
        (
            {"rollout": {"tensor_parallel": 3}},
            "rollout.tensor_parallel: vLLM cannot split 4 heads, 2 key/value heads and a "
            "feed-forward width of 16 over 3; possible: 1, 2, 4",
        ),
        (
            {"policy": {"fp8": "blockwise"}},
            "policy.fp8: ",
        ),
        (
            {"stages": [{"steps": 1}, {"steps": 1, "max_response_tokens": 33}]},
            "data.max_prompt_tokens + rollout.max_response_tokens: 65 tokens exceed the model's "
            "64 positions",
        ),
    ],
)
def test_refused(tmp_path: Path, model: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        check_resources(recipe(tmp_path, **changes), model)
    assert message in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_model_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        check_resources(recipe(tmp_path), tmp_path)


def test_memory_by_hand(tmp_path: Path, model: Path) -> None:
    spec = read_model_spec(model)
    # bf16, one rank, one engine: 1952 parameters with (2*2 + 4) + (8 + 4) + (2 + 1)*2 = 26 bytes
    # and 2*2 + 12 while a checkpoint is written, 512 MiB of KV cache, three processes of 1 GiB.
    assert required_bytes(recipe(tmp_path), spec) == 1952 * (26 + 16) + GIB // 2 + 3 * GIB
    # Moments in bf16 save 4 bytes.
    halved = recipe(tmp_path, policy={"optimizer": {"moments": "bf16"}})
    assert required_bytes(halved, spec) == required_bytes(recipe(tmp_path), spec) - 1952 * 4
    # fp32 policy on two data-parallel ranks, two bf16 engines with 1 GiB of cache each:
    # 2*(2*4 + 4) + 8 + (4 + 1)*2 = 42 bytes, 2*(2*4 + 12) for a checkpoint, five processes.
    large = recipe(
        tmp_path,
        policy={"precision": "fp32", "data_parallel": 2},
        rollout={
            "prompts_per_step": 8,
            "engines": 2,
            "precision": "bf16",
            "kv_cache_mib": 1024,
            "max_response_tokens": 32,
        },
    )
    assert required_bytes(large, spec) == 1952 * (42 + 40) + 2 * GIB + 5 * GIB
    # Policy and reference, fp32 main weights and two moments.
    assert checkpoint_bytes(recipe(tmp_path), spec) == 1952 * (2 + 2 + 12)
    assert checkpoint_bytes(large, spec) == 1952 * (4 + 4 + 12)


def test_too_little_memory(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: 3 * GIB)
    monkeypatch.setattr(preflight, "gpu_present", lambda: False)
    with pytest.raises(RecipeError, match=r"model: about 3\.5 GiB of memory .* 3\.0 GiB are free"):
        check_resources(recipe(tmp_path), model)
    monkeypatch.setattr(preflight, "gpu_present", lambda: True)
    check_resources(recipe(tmp_path), model)


def test_too_little_disk(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps, the last 2 kept and the best. One checkpoint in 50: 2 are written; in 10, or with
    every validation: a fourth beside those kept."""
    one = 1952 * 16
    free = SimpleNamespace(free=2 * one)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    check_resources(recipe(tmp_path, validation={"interval": 50}), model)
    check_resources(recipe(tmp_path, checkpoint={"keep_best": False}), model)
    with pytest.raises(RecipeError, match="for 4 checkpoints"):  # A validation in 10 steps.
        check_resources(recipe(tmp_path), model)
    often = recipe(tmp_path, checkpoint={"interval": 10})
    with pytest.raises(RecipeError, match=r"checkpoint\.keep_last: .* for 4 checkpoints"):
        check_resources(often, model)
    no_best = recipe(tmp_path, checkpoint={"interval": 10, "keep_best": False})
    with pytest.raises(RecipeError, match="for 3 checkpoints"):
        check_resources(no_best, model)
    # On resume, what is there already needs no more room.
    for step in (10, 20):
        (often.run_dir / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    check_resources(often, model)
    free.free = one
    with pytest.raises(RecipeError, match="for 2 checkpoints"):
        check_resources(often, model)


def test_memory_of_a_container(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().total
    mounts = tmp_path / "cgroup"
    groups = tmp_path / "groups"

    def group(folder: str, limit: str, used: int, version: int) -> None:
        path = mounts / folder
        path.mkdir(parents=True, exist_ok=True)
        names = {
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            2: ("memory.max", "memory.current", "inactive_file"),
        }[version]
        (path / names[0]).write_text(limit + "\n")
        (path / names[1]).write_text(f"{used}\n")
        (path / "memory.stat").write_text(f"anon 1\n{names[2]} 10\n")

    def available() -> int:
        return host_memory.available_bytes(groups, mounts)

    groups.write_text("0::/job/step\n")
    group("", "max", 0, 2)
    group("job", "max", 700, 2)
    group("job/step", "max", 700, 2)
    assert 10_000 < available() <= machine
    group("job/step", "1000", 700, 2)
    assert available() == 1000 - 700 + 10
    group("job", "800", 700, 2)  # The narrowest of all that hold the process.
    assert available() == 800 - 700 + 10
    group("job", "600", 700, 2)
    assert available() == 0

    groups.write_text("4:cpuset:/\n3:memory:/slurm/job_1\n0::/\n")
    group("memory", "9223372036854771712", 5000, 1)
    group("memory/slurm/job_1", "6000", 5000, 1)
    assert available() == 6000 - 5000 + 10
    assert host_memory.available_bytes(tmp_path / "absent", mounts) > 10_000


# ---- the run directory


def test_a_new_run_directory_says_what_it_is_for(tmp_path: Path) -> None:
    ours = recipe(tmp_path)
    with open_run_dir(ours) as changes:
        assert changes == {}
        assert _stored(ours) == ours


def test_another_recipe_is_refused_once_there_are_figures(tmp_path: Path) -> None:
    ours = recipe(tmp_path)
    other = recipe(tmp_path, seed=2, policy={"precision": "fp32"})
    with open_run_dir(ours):
        pass
    # Nothing came of the first start (say, a task was misspelt), so the second may correct it.
    with open_run_dir(other):
        pass
    assert _stored(ours).seed == 2
    (ours.run_dir / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError) as error, open_run_dir(ours):
        pass
    message = str(error.value)
    assert "was begun with another recipe; give this run another name with name=NAME" in message
    assert "seed: 2 there, 1 now" in message
    assert "policy.precision: 'fp32' there, 'bf16' now" in message
    assert _stored(ours).seed == 2
    with open_run_dir(other) as changes:
        assert changes == {}


def test_what_may_change_on_resume_may_and_is_told(tmp_path: Path) -> None:
    ours = recipe(tmp_path)
    with open_run_dir(ours):
        (ours.run_dir / "checkpoints" / "step_000050").mkdir(parents=True)
    changed = recipe(
        tmp_path,
        policy={"data_parallel": 2, "recompute": "full"},
        checkpoint={"interval": 7},
    )
    with open_run_dir(changed) as changes:
        assert changes == {
            "policy.data_parallel": [1, 2],
            "policy.recompute": ["none", "full"],
            "checkpoint.interval": [50, 7],
        }
    stages = recipe(tmp_path, stages=[{"steps": 101}])
    with pytest.raises(UserError, match="stages: "), open_run_dir(stages):
        pass


def test_resumable_keys_exist() -> None:
    def dotted(node: dict[str, Any], prefix: str = "") -> set[str]:
        return set().union(
            *(
                dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
                for key, value in node.items()
            )
        )

    assert set(RESUMABLE) <= dotted(recipe(Path()).model_dump(mode="json"))


@pytest.mark.parametrize("damage", ["", "name: [", "- 1", "name: small\nsed: 1\n"])
def test_a_damaged_recipe_of_a_run_is_named(tmp_path: Path, damage: str) -> None:
    ours = recipe(tmp_path)
    with open_run_dir(ours):
        (ours.run_dir / "metrics.jsonl").write_text('{"step": 0}\n')
    (ours.run_dir / "recipe.yaml").write_text(damage)
    with pytest.raises(UserError, match=r"small/recipe\.yaml"), open_run_dir(ours):
        pass


def test_an_unwritable_run_directory(tmp_path: Path) -> None:
    # Below a regular file: not even root may write there.
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        ours = recipe(tmp_path, runs_dir=str(place))
        with (
            pytest.raises(UserError, match=r"runs_dir: .* cannot be written .* runs_dir=DIR"),
            open_run_dir(ours),
        ):
            pass
    (tmp_path / "small").write_text("")
    with (
        pytest.raises(UserError, match=r"runs_dir: .*small cannot be written"),
        open_run_dir(recipe(tmp_path, runs_dir=str(tmp_path))),
    ):
        pass


HOLDER = """
import sys, time
from prorl_nemo.recipe import load_recipe
from prorl_nemo.training.run_dir import open_run_dir
with open_run_dir(load_recipe(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    time.sleep(2)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the run's folder, to 2 s after a line to its standard input."""
    ours = recipe(tmp_path)
    with open_run_dir(ours):
        pass
    made = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(ours.run_dir / "recipe.yaml")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert made.stdout is not None
    try:
        assert made.stdout.readline() == b"held\n"
        yield made
    finally:
        made.kill()
        made.communicate()


def test_two_processes_cannot_have_one_run(
    tmp_path: Path, holder: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = recipe(tmp_path)
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 1.0)
    began = time.monotonic()
    with (
        pytest.raises(UserError, match=rf"is in use by process {holder.pid} on .*name=NAME"),
        open_run_dir(ours),
    ):
        pass
    assert time.monotonic() - began >= 1.0
    holder.kill()
    holder.wait()
    # A killed process leaves nothing to clean up.
    with open_run_dir(ours):
        assert (ours.run_dir / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_run_waits_for_the_one_before(
    tmp_path: Path, holder: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert holder.stdin is not None
    holder.stdin.write(b"\n")
    holder.stdin.flush()
    began = time.monotonic()
    with open_run_dir(recipe(tmp_path)):
        assert 1.0 < time.monotonic() - began < folder_lock.WAIT_SECONDS
        lock = (tmp_path / "runs" / "small" / "lock").read_text()
        assert lock.startswith(f"process {os.getpid()} on ")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"in use by process {holder.pid} on " in line and "waiting up to 30 s" in line


def _stored(ours: Recipe) -> Recipe:
    return load_recipe(ours.run_dir / "recipe.yaml")
