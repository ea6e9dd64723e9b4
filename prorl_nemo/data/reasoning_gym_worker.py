"""Generates Reasoning Gym items in a process of its own. Imports nothing of this project.

Why a process: six generators (isomorphic_strings and word_ladder among them)
walk over Python sets, so their items depend on PYTHONHASHSEED, which is fixed
only at a process's start; two more draw from the global random state. Here the
hash seed is pinned by whoever starts the process and the global states are
seeded per item, so (task, settings, seed, slot) always gives the same item, on
any machine and after any restart. A generator that hangs can be killed, too.

Protocol: one JSON request a line on stdin, one JSON answer a line on stdout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import reasoning_gym
from reasoning_gym.factory import DATASETS

# A question belongs to the split that its text hashes to. So the splits are disjoint whatever the
# seeds, sizes and settings are, also between runs, and nobody has to remember what was held out.
SPLIT_SHARES = {"held_out": 64, "examples": 32, "train": 160}  # Of 256.

# Items tried until one falls into the wanted split. All 64 miss a share of 1/8 once in 5,000.
ATTEMPTS = 64

# Settings of a data set that the source gives itself.
_OWN_SETTINGS = ("seed", "size")

_datasets: dict[str, Any] = {}


def split_of(question: str) -> str:
    """The split a question belongs to; letter case and spacing do not matter."""
    text = " ".join(question.split()).casefold()
    bucket = hashlib.blake2b(text.encode(), digest_size=1).digest()[0]
    for split, share in SPLIT_SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares add up to 256")


def derived_seed(*parts: object) -> int:
    """A seed below 2**31, the most that every generator accepts."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) >> 1


def check(task: str, config: dict[str, Any]) -> dict[str, Any]:
    """Whether a task and its settings are acceptable; what is wrong, otherwise."""
    if task not in DATASETS:
        return {"unknown_task": sorted(DATASETS)}
    fields = {f.name for f in dataclasses.fields(DATASETS[task][1])} - set(_OWN_SETTINGS)
    for key in config:
        if key not in fields:
            return {"unknown_key": key, "known": sorted(fields)}
    try:
        reasoning_gym.create_dataset(task, seed=0, size=1, **config)
    except Exception as error:  # A generator may raise anything on a wrong setting.
        return {"bad_config": _one_line(error)}
    return {"version": importlib.metadata.version("reasoning-gym")}


def item(
    task: str, config: dict[str, Any], seed: str, size: int, split: str, slot: int
) -> dict[str, Any]:
    """The item of a slot: the first of slot, slot + size, slot + 2 size ... that is in the split.

    Returns:
        {"entry": question, answer and metadata}, or {"dropped": reason}.
    """
    failure = ""
    for attempt in range(ATTEMPTS):
        try:
            entry = _generate(task, config, seed, size, slot, attempt)
            question = entry["question"]
            if not isinstance(question, str) or not question.strip():
                raise ValueError("the generator gave no question")
            if split_of(question) == split:
                # Written here, so that a failure counts as one of the item.
                return {"entry": json.loads(json.dumps(entry, default=_plain))}
        except Exception as error:  # One bad item must not end a run of thousands of steps.
            failure = _one_line(error)
    return {"dropped": f"generator failed: {failure}" if failure else f"no question for {split}"}


def numbered(
    task: str, config: dict[str, Any], seed: str, size: int, number: int
) -> dict[str, Any]:
    """The item of a number, whichever split it falls into.

    Returns:
        {"entry": question, answer and metadata, "split": as in `split_of`}, or {"dropped": reason}.
    """
    try:
        entry = _generate(task, config, seed, size, number % size, number // size)
        question = entry["question"]
        if not isinstance(question, str) or not question.strip():
            raise ValueError("the generator gave no question")
        entry = json.loads(json.dumps(entry, default=_plain))
    except Exception as error:  # One bad item must not end a build of thousands.
        return {"dropped": f"generator failed: {_one_line(error)}"}
    return {"entry": entry, "split": split_of(question)}


def _generate(
    task: str, config: dict[str, Any], seed: str, size: int, slot: int, attempt: int
) -> dict[str, Any]:
    dataset_seed = derived_seed(seed, task)
    dataset = _dataset(task, config, dataset_seed, size)
    # Items are made from seed + index, so one data set serves all attempts. (Some take seconds to
    # build.) The size is virtual; word_ladder checks it, and shrinks it when an item fails.
    dataset.size = size * ATTEMPTS
    index = slot + attempt * size
    _seed_global_states(dataset_seed + index)
    try:
        entry: dict[str, Any] = dataset[index]
    except IndexError:
        # A few hold a real list of `size` items: they need another list.
        dataset = _dataset(task, config, derived_seed(seed, task, attempt), size)
        _seed_global_states(dataset_seed + index)
        entry = dataset[slot]
    return entry


def _seed_global_states(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)


def _dataset(task: str, config: dict[str, Any], seed: int, size: int) -> Any:
    key = json.dumps([task, config, seed, size], sort_keys=True)
    if key not in _datasets:
        _datasets[key] = reasoning_gym.create_dataset(task, seed=seed, size=size, **config)
    return _datasets[key]


def _plain(value: object) -> object:
    """JSON for what generators leave in their metadata."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def main() -> None:
    # Generators may print; the answers keep the real stdout to themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    operations: dict[str, Callable[..., dict[str, Any]]] = {
        "check": check,
        "item": item,
        "numbered": numbered,
    }
    for line in sys.stdin:
        request = json.loads(line)
        answer = operations[request.pop("op")](**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
