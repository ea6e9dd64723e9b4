"""What differs between two finished runs of one recipe, to the last bit; times and memory aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def compare(one: Path, other: Path) -> list[str]:
    """Names of what differs: metrics, samples, state, and each tensor of the last checkpoint."""
    found = []
    for name, read in (("metrics", metrics), ("samples", samples), ("state", state)):
        a, b = read(one), read(other)
        if a != b:
            found += [f"{name}: {key}" for key in a if a[key] != b.get(key)] or [name]
    a, b = tensors(one), tensors(other)
    if set(a) != set(b):
        found.append(f"tensors: {sorted(set(a) ^ set(b))[:5]}")
    found += [f"tensor {key}" for key in a if key in b and not same_bits(a[key], b[key])]
    return found


def same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


def counts(run: Path) -> dict[str, int]:
    """How much there is to compare."""
    found = tensors(run)
    return {
        "tensors": sum(isinstance(t, torch.Tensor) for t in found.values()),
        "numbers": sum(t.numel() for t in found.values() if isinstance(t, torch.Tensor)),
        "metrics_rows": len(metrics(run)),
        "sample_files": len(samples(run)),
    }


def metrics(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        f"{row['kind']} {row['step']} (row {number})": {
            key: value
            for key, value in row.items()
            if key != "time" and not key.startswith(("time/", "throughput/", "memory/"))
        }
        for number, row in enumerate(rows)
    }


def samples(run: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((run / "samples").iterdir())}


def state(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((last_checkpoint(run) / "state.json").read_text())
    found.pop("recipe")  # Of another runs_dir.
    found.pop("log")  # Sizes of files with times in them.
    found["last_validation"] = {
        key: value for key, value in found["last_validation"].items() if not key.startswith("time")
    }
    return found


def tensors(run: Path) -> dict[str, Any]:
    """Every tensor of the last checkpoint: policy, optimizer and reference; and Adam's count."""
    return checkpoint_tensors(last_checkpoint(run) / "policy")


def checkpoint_tensors(folder: Path) -> dict[str, Any]:
    """Of one checkpoint, whatever layout wrote it."""
    found: dict[str, Any] = {}
    _load_state_dict(
        found,
        storage_reader=FileSystemReader(folder),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    common = torch.load(folder / "common.pt", weights_only=True)
    return found | {"adam_step": common["adam_step"]}


def last_checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]
