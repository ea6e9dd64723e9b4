"""Faults are done to real runs: tests/kill/real_run.py starts and watches them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kill"))
