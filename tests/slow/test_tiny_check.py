"""`prorl check --tiny` as a user runs it: a recipe of 32 GPUs and a model of 4B, on this machine.

One recipe here, with tensor parallelism; all of them: `make check-recipes`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_recipe_of_32_gpus(tmp_path: Path) -> None:
    lines = tmp_path / "lines.json"
    recipe = ROOT / "recipes" / "qwen3_4b" / "v2.yaml"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "prorl_nemo.cli",
            "check",
            str(recipe),
            "--tiny",
            "--json",
            str(lines),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bf16, TP 2, SP" in done.stdout
    names = {line["name"] for line in json.loads(lines.read_text())}
    # All five domains are graded, and the layout's gradient is that of one rank.
    for domain in ("math", "code", "stem", "logic", "instructions"):
        assert f"grader: small_{domain} ({domain})" in names
    assert "gradient norm against one rank and one micro-batch" in names
    assert not list(tmp_path.glob("runs*"))
