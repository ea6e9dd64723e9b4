"""Without a GPU the GPU check says so and exits with 2; it never passes for having done nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.sh"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    # In front of a real one, if there is one: as on a machine without a working driver.
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nexit 9\n")
    fake.chmod(0o755)
    found = subprocess.run(
        [str(SCRIPT)],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert "no NVIDIA GPU" in found.stderr
    assert found.stdout == ""
