"""`prorl publish` against a server that speaks the hub's calls: what arrives, once, for whom."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub, serving

from prorl_nemo.tiny_model import tiny_model

TOKEN = "hf_" + "SecretSecret" * 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported model, and what must stay at home."""
    folder = tiny_model("llama", tmp_path / "export")
    about = {"run": "small", "step": 2000, "model": "tiny-arithmetic", "checkpoint_sha256": "0"}
    (folder / "prorl_export.json").write_text(json.dumps(about))
    (folder / ".env").write_text("HF_TOKEN=x")
    return folder


def publish(hub: Hub, folder: Path, *more: str, token: str = TOKEN) -> subprocess.CompletedProcess:
    home = folder.parent / "home"
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_XET_CACHE": str(home / "xet")}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | variables
    command = [sys.executable, "-m", "prorl_nemo.cli", "publish", str(folder), "--repo", "us/model"]
    return subprocess.run(
        [*command, "--license", "apache-2.0", *more],
        env=environment | ({"HF_TOKEN": token} if token else {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_arrives_whole_and_private_and_only_once(folder: Path) -> None:
    with serving() as hub:
        # The upload itself succeeds, then the hub fails: what is there need not be sent again.
        hub.refuse_commits = 403
        first = publish(hub, folder)
        assert first.returncode == 2
        assert "may not write" in first.stderr
        sent = sum(hub.chunk_bytes)
        weights = folder / "model.safetensors"
        assert sent == weights.stat().st_size
        hub.refuse_commits = 0
        second = publish(hub, folder)
        assert second.returncode == 0, second.stderr
        assert sum(hub.chunk_bytes) == sent
        repository = hub.repositories["us/model"]
        assert repository.private
        for path in folder.iterdir():
            if path.name == ".env":
                assert path.name not in repository.files
                continue
            data = path.read_bytes()
            large = (hashlib.sha256(data).hexdigest(), len(data))
            assert repository.files[path.name] == (large if path == weights else data), path.name
        assert "license: apache-2.0" in (folder / "README.md").read_text()
        assert repository.tags == {"step-002000": repository.commits[-1]}
        assert "tree/step-002000" in second.stdout
        assert hub.tokens == {f"Bearer {TOKEN}"}
        # Other files under the same tag are refused: a revision that changes is none.
        (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
        third = publish(hub, folder)
        assert third.returncode == 2
        assert "marks other files" in third.stderr
        public = publish(hub, folder, "--public", "--tag", "v1")
        assert "is private already" in public.stderr
    for run in (first, second, third, public):
        assert TOKEN not in run.stdout + run.stderr


def test_a_dry_run_sends_nothing_and_needs_no_token(folder: Path) -> None:
    with serving() as hub:
        dry = publish(hub, folder, "--dry-run", token="")
        assert dry.returncode == 0, dry.stderr
        assert [call for call in hub.calls if "agent-harnesses" not in call] == []
        for name in ("README.md", "model.safetensors", "tokenizer.json", "# small, step 2000"):
            assert name in dry.stdout
        assert ".env" not in dry.stdout
        bare = publish(hub, folder, token="")
        assert bare.returncode == 2
        assert "HF_TOKEN" in bare.stderr
        assert hub.repositories == {}
