"""The rooms and the arrows between them (docs/architecture.md), read from the imports."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "prorl_nemo"
FILES = sorted(PACKAGE.rglob("*.py"))

# Every room, and what of this project it may import besides itself: rooms, or single modules
# where the room as a whole would be an arrow in the wrong direction.
VOCABULARY = {"errors", "recipe", "records"}
ROOMS: dict[str, set[str]] = {
    # The vocabulary, and what reads it from files.
    "errors": set(),
    "records": set(),
    "folder_lock": {"errors"},
    "strict_yaml": set(),
    "settings_file": {"errors", "strict_yaml"},
    "recipe": {"settings_file", "recipe_data", "recipe_rollout", "recipe_training"}
    | {"recipe_checks"},
    # The type alone of what it checks.
    "recipe_checks": {"recipe"},
    "recipe_rollout": {"settings_file", "recipe_data"},
    "recipe_training": {"settings_file", "recipe_data"},
    "recipe_data": {"settings_file"},
    "recipe_pretrain": {"recipe", "recipe_data", "recipe_training", "settings_file"},
    "recipe_docs": {"recipe", "recipe_pretrain", "settings_file", "training.run_dir"},
    # The pure core.
    "algorithms": set(),
    "schedule": set(),
    "rewards": {"errors"},
    # Models and prompts in.
    "smollm2": {"errors"},
    "tiny_model": {"errors"},
    "tiny_arithmetic": {"errors", "tiny_model"},
    "model_source": {"errors", "smollm2", "tiny_arithmetic"},
    # Rows of data sets are checked by the graders that will read them.
    "data": VOCABULARY | {"recipe_data", "rewards"},
    # Policy and engines. They share two records: the batch, and weights on their way.
    "megatron": VOCABULARY | {"algorithms", "training.batch", "rollout.weights"},
    "rollout": VOCABULARY | {"algorithms"},
    "cluster": VOCABULARY
    | {"megatron", "training.batch"}
    | {f"rollout.{name}" for name in ("weights", "cuda_weights", "shared_weights")}
    | {"rollout.broadcast_weights"}
    # What a node must show: memory as a run counts it, a sandbox that holds.
    | {"rewards", "training.host_memory"},
    # Everything together. A run ends with its report, which reads the run's diary.
    "reporting": {"errors", "strict_yaml", "training.metrics"},
    "training": VOCABULARY
    | {"settings_file", "recipe_pretrain", "strict_yaml", "algorithms", "schedule", "rewards"}
    | {"folder_lock"}
    | {"data", "model_source"}
    | {"recipe_training", "planning.hardware"}
    | {"megatron", "rollout", "cluster", "reporting"},
    # A model of one's own: the trainer's ranks with another loss.
    "pretraining": {"errors", "recipe_pretrain", "data", "schedule", "cluster", "export"}
    | {"model_source", "training"},
    # Many runs, and what they say together.
    "study": VOCABULARY
    | {"settings_file", "recipe_data", "recipe_pretrain", "pretraining", "training", "export"}
    | {"model_source", "data", "rewards", "rollout", "reporting", "evaluation", "harness.model"},
    # A recipe made small: needs the shape of its model and data like that of a build.
    "shrink": VOCABULARY | {"data", "planning", "rewards", "tiny_model"},
    # Counts what the others allocate; imports what of them needs neither torch nor Megatron.
    "planning": VOCABULARY
    | {"recipe_training", "megatron.layout", "megatron.precision", "rollout.engine_split"},
    "evaluation": {"errors", "settings_file", "strict_yaml", "data", "rewards"},
    # A model answers benchmarks: engines without a trainer.
    "harness": VOCABULARY
    | {"folder_lock"}
    | {"evaluation", "data", "rewards", "rollout", "reporting", "model_source", "export"}
    | {"training.run_state", "training.session"},
    # Exported models for others; its self-check starts an engine and a trainer rank.
    "publishing": VOCABULARY
    | {"export", "evaluation", "harness.model", "reporting", "model_source", "strict_yaml"}
    | {"smollm2", "tiny_arithmetic", "data", "rollout", "cluster", "megatron"}
    | {"training.batch", "training.session"},
    "export": VOCABULARY | {"megatron", "model_source", "training.run_state"},
    "cli": {"errors", "recipe", "training", "reporting", "rewards", "export", "data", "planning"}
    | {"shrink", "evaluation", "harness", "publishing", "recipe_pretrain", "pretraining", "study"},
}
# Libraries that only the rooms named may import.
KEPT_TO = {
    "megatron": {"megatron"},
    "transformer_engine": {"megatron"},
    "vllm": {"rollout"},
    "ray": {"rollout", "cluster", "training", "harness", "publishing", "pretraining", "study"},
    "typer": {"cli"},
}
# Libraries beyond the standard one that a pure room may import.
PURE = {
    "algorithms": {"torch"},
    "schedule": set(),
    "records": set(),
    "errors": set(),
}
HEAVY = {"torch", "ray", "megatron", "vllm", "transformers"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Dotted names a file imports anywhere in it, types for checkers included."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            # `from prorl_nemo.megatron import checkpoint` names a module only with its alias.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_is_listed() -> None:
    found = {room_of(path) for path in FILES} - {"__init__"}
    assert found == set(ROOMS)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_arrows_between_rooms(room: str) -> None:
    for path in FILES:
        if room_of(path) != room:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "prorl_nemo":
                continue
            target = parts[1]
            allowed = target == room or target in ROOMS[room] or ".".join(parts[1:3]) in ROOMS[room]
            assert allowed, f"{path.relative_to(PACKAGE)} may not import {name}"


def test_libraries_stay_in_their_rooms() -> None:
    for path in FILES:
        for name in imports(path):
            library = name.split(".")[0]
            rooms = KEPT_TO.get(library)
            assert rooms is None or room_of(path) in rooms, (
                f"{path.relative_to(PACKAGE)} may not import {library}"
            )


@pytest.mark.parametrize("room", sorted(PURE))
def test_the_core_is_pure(room: str) -> None:
    for path in FILES:
        if room_of(path) != room:
            continue
        for name in imports(path):
            library = name.split(".")[0]
            known = library in sys.stdlib_module_names or library in PURE[room]
            assert known or library == "prorl_nemo", f"{path.relative_to(PACKAGE)} imports {name}"


def test_graders_are_light() -> None:
    """A grading worker is forked by the hundred: no torch, nor anything that imports it."""
    for path in FILES:
        if room_of(path) == "rewards":
            heavy = HEAVY & {name.split(".")[0] for name in imports(path)}
            assert not heavy, f"{path.relative_to(PACKAGE)} imports {sorted(heavy)}"


def test_a_wrong_recipe_is_refused_without_waiting_for_torch() -> None:
    """What `prorl` imports before it knows that the recipe is right."""
    light = {"cli", "settings_file", "strict_yaml", "errors"}
    light |= {path.stem for path in PACKAGE.glob("recipe*.py")} - {"recipe_docs"}
    for path in FILES:
        if room_of(path) not in light:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [
            name
            for node in top
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
        ]
        for name in names:
            assert name.split(".")[0] not in HEAVY
            if name.startswith("prorl_nemo."):
                assert name.split(".")[1] in light, f"{path.name} imports {name} at its top"
