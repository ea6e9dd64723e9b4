"""`tools/gpu_check.sh --rehearse`: the script that waits for a GPU runs to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_check_that_needs_no_gpu_is_right() -> None:
    done = subprocess.run(
        [str(ROOT / "tools" / "gpu_check.sh"), "--rehearse"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Log-probs against transformers, the packed gradient, and updates at full depth.
    assert done.stdout.count(" ok ") == 3, done.stdout
    assert done.stdout.count("needs Transformer Engine") == 3
