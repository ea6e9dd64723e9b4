"""What `pip install .` brings: the package, its assets, eval/ and recipes/; nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders beside its sources."""
    source = tmp_path_factory.mktemp("source") / "prorl"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("prorl_nemo", "eval", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = source.parent / "wheel"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (found,) = out.glob("*.whl")
    return found


def test_it_holds_what_the_command_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "prorl_nemo").rglob("*")
        if path.suffix in (".py", ".js", ".css", ".html")
    }
    wanted |= {
        f"prorl_nemo/{path.relative_to(ROOT).as_posix()}"
        for folder in ("eval", "recipes")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".yaml", ".csv")
    }
    assert names == wanted


def test_it_works_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an empty folder, with the wheel's files in front of the checkout's."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    program = """
from pathlib import Path
import prorl_nemo
from prorl_nemo.evaluation.benchmark import load_benchmarks
from prorl_nemo.evaluation.suite import DEFINITIONS
from prorl_nemo.recipe import load_recipe
site = Path(prorl_nemo.__file__).parents[1]
assert DEFINITIONS.is_relative_to(site), DEFINITIONS
assert len(load_benchmarks(DEFINITIONS)) > 10
assert load_recipe("recipes/smoke/resets.yaml").name == "resets"
print(site)
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "empty",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()) == tmp_path / "site"
