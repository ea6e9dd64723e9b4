"""`python -m bench NAME [--json FILE]`: runs bench/NAME.py. `all` runs every one into a folder."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

HELPERS = {"__init__", "__main__", "long_run", "padded_rows", "simulated_engine", "trl_step"}
NAMES = sorted(f.stem for f in Path(__file__).parent.glob("*.py") if f.stem not in HELPERS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--json", type=Path, help="where the figures go (a folder for `all`)")
    arguments = parser.parse_args()
    if arguments.name != "all":
        importlib.import_module(f"bench.{arguments.name}").main(arguments.json)
        return
    for name in NAMES:
        target = arguments.json / f"{name}.json" if arguments.json else None
        importlib.import_module(f"bench.{name}").main(target)


if __name__ == "__main__":
    main()
