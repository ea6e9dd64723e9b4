"""`prorl check` of tiny models of every family in four layouts, as the table of docs/layouts.md.

    python -m tools.check_table [FAMILY ...]

A row a layout, printed as it is done; the exit status is 1 if a check failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

from prorl_nemo.tiny_model import Family, tiny_model

ROOT = Path(__file__).parents[1]
LAYOUTS: dict[str, list[str]] = {
    "TP 2, SP": ["tensor_parallel=2", "sequence_parallel=true"],
    "PP 2, VPP 2": ["pipeline_parallel=2", "virtual_pipeline=2"],
    "CP 2, DP 2": ["context_parallel=2", "data_parallel=2", "shared_prompts=false"],
    "TP 2, PP 2": ["tensor_parallel=2", "pipeline_parallel=2"],
}
# Columns, by what the line of the check begins with.
FIGURES = {
    "trainer, transformers": "trainer log-probs against transformers",
    "engine, before": "engine log-probs against the trainer's, before",
    "engine, after": "engine log-probs against the trainer's, after",
    "gradient": "gradient norm",
}


def main() -> int:
    families = sys.argv[1:] or list(get_args(Family))
    print("| family | layout | " + " | ".join(FIGURES) + " | checks passed |")
    print("|---|---|" + "---|" * (len(FIGURES) + 1))
    failed = False
    for family in families:
        for layout, keys in LAYOUTS.items():
            lines = check(family, keys)
            cells = [
                next(f"{line['figure']:.1e}" for line in lines if line["name"].startswith(name))
                for name in FIGURES.values()
            ]
            passed = sum(line["ok"] for line in lines)
            failed |= passed < len(lines)
            cells.append(f"{passed} of {len(lines)}")
            print(f"| {family} | {layout} | " + " | ".join(cells) + " |", flush=True)
    return int(failed)


def check(family: str, keys: list[str]) -> list[dict]:
    """The lines of `prorl check` in fp32 at temperature 1.2."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(family, Path(folder) / "model", layers=4, tied=family != "qwen2")
        found = Path(folder) / "check.json"
        settings = [
            f"model={model}",
            f"runs_dir={folder}",
            "policy.precision=fp32",
            "policy.threads=1",
            "rollout.temperature=1.2",
            "data.max_prompt_tokens=1024",
            *(f"policy.{key}" for key in keys),
        ]
        command = [sys.executable, "-m", "prorl_nemo.cli", "check", "recipes/quickstart.yaml"]
        answer = subprocess.run(
            [*command, *settings, "--json", str(found)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if not found.exists() or not found.stat().st_size:
            raise SystemExit(f"prorl check did not run:\n{answer.stdout}{answer.stderr}")
        lines: list[dict] = json.loads(found.read_text())
        return lines


if __name__ == "__main__":
    sys.exit(main())
