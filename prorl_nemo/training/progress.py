"""How far a run is, for scripts: `python -m prorl_nemo.training.progress RECIPE [KEY=VALUE ...]`.

Prints one line: `finished` or `unfinished`, the step of its newest checkpoint, its name. Reads the
recipe and the run directory, nothing else, so that a wrong recipe, or another one than the run
began with, is refused before nodes are started.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prorl_nemo.errors import UserError
from prorl_nemo.recipe import Recipe, load_recipe
from prorl_nemo.training.metrics import EVENTS
from prorl_nemo.training.run_dir import changes_since
from prorl_nemo.training.run_state import Checkpoints


def progress(recipe: Recipe) -> tuple[bool, int]:
    """Whether a run is finished, and the step of its newest checkpoint (0 without one)."""
    steps = Checkpoints(recipe.run_dir / "checkpoints", recipe.checkpoint.keep_last).steps()
    return _finished(recipe.run_dir / EVENTS), steps[-1] if steps else 0


def _finished(events: Path) -> bool:
    """Whether the run's last start came to its end. A last line cut short counts for nothing."""
    try:
        lines = events.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    last = ""
    for line in lines:
        try:
            name = json.loads(line).get("event")
        except (ValueError, AttributeError):
            continue
        last = name if name in ("finished", "run_started", "resumed", "stopped") else last
    return last == "finished"


def main() -> int:
    try:
        if len(sys.argv) < 2:
            raise UserError("usage: progress RECIPE [KEY=VALUE ...]")
        recipe = load_recipe(Path(sys.argv[1]), sys.argv[2:])
        changes_since(recipe)
        finished, step = progress(recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("finished" if finished else "unfinished", step, recipe.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
