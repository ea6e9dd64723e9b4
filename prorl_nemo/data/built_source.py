"""Prompts from what `prorl data build` wrote: a domain or a task, in an order by the seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prorl_nemo.data.chat import ChatRenderer, Message, PromptDropped
from prorl_nemo.data.record import INSTRUCTIONS, Record
from prorl_nemo.data.shards import check_shards, read_manifest, record_of
from prorl_nemo.errors import RecipeError
from prorl_nemo.records import Prompt

_GROUPS_KEPT = 8


class BuiltData:
    """A built folder, opened and checked against its manifest.

    Args:
        key: where the recipe names the folder.

    Raises:
        UserError: nothing built there, or shards that are not what the manifest says.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.manifest = read_manifest(folder, key)
        check_shards(folder, self.manifest["shards"], key)
        hashes = [shard["sha256"] for shard in self.manifest["shards"]]
        self.digest = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]
        self._groups: OrderedDict[tuple[str, int], list[dict[str, str]]] = OrderedDict()

    def tasks(self, domain: str) -> list[str]:
        """The domain's tasks, in the order of names."""
        return sorted(self.manifest["tasks"].get(domain, ()))

    def rows(self, domain: str, split: str, tasks: set[str]) -> tuple[list[str], NDArray[np.int64]]:
        """Where a split's records are.

        Returns:
            the shards' names, and [records, 3]: shard, row group, row of the group.
        """
        names: list[str] = []
        places: list[tuple[int, int, int]] = []
        for shard in self.manifest["shards"]:
            if (shard["domain"], shard["split"]) != (domain, split):
                continue
            with pq.ParquetFile(self.folder / shard["file"]) as file:
                for group in range(file.num_row_groups):
                    column = file.read_row_group(group, columns=["task"])["task"].to_pylist()
                    places += [
                        (len(names), group, row) for row, task in enumerate(column) if task in tasks
                    ]
            names.append(shard["file"])
        return names, np.array(places, dtype=np.int64).reshape(-1, 3)

    def record(self, shard: str, group: int, row: int) -> Record:
        """One record; the groups read last are kept."""
        key = (shard, group)
        if key not in self._groups:
            with pq.ParquetFile(self.folder / shard) as file:
                self._groups[key] = file.read_row_group(group).to_pylist()
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return record_of(self._groups[key][row])


class BuiltSource:
    """Prompts of some tasks of a domain.

    Args:
        task: what the source is called: the task, or the domain.
        tasks: the tasks it takes.
        seed: the run's; decides which record is in which slot.

    Raises:
        RecipeError: no training records of these tasks.
    """

    def __init__(
        self,
        data: BuiltData,
        domain: str,
        task: str,
        tasks: set[str],
        *,
        seed: int,
        renderer: ChatRenderer,
        system_prompt: str | None = None,
    ) -> None:
        self.task = task
        self._data, self._domain, self._tasks = data, domain, tasks
        self._renderer, self._system_prompt = renderer, system_prompt
        self._seed = seed
        self._names, self._places = data.rows(domain, "train", tasks)
        self.size = len(self._places)
        if not self.size:
            known = ", ".join(data.tasks(domain)) or "none"
            raise RecipeError(
                f"{data.key}: {data.folder} has no training prompts for {task}; its tasks of "
                f"domain {domain}: {known}"
            )
        order = list(range(self.size))
        random.Random(f"{seed}/{domain}/{task}").shuffle(order)
        self._order = order

    @property
    def fingerprint(self) -> str:
        """What the prompts depend on: a saved cursor is worthless under another one."""
        settings = {
            "tasks": hashlib.sha256(json.dumps(sorted(self._tasks)).encode()).hexdigest()[:8],
            "seed": self._seed,
            "instruction": INSTRUCTIONS[self._domain],
            "system_prompt": self._system_prompt,
            "max_prompt_tokens": self._renderer.max_prompt_tokens,
        }
        return f"{self.task} {json.dumps(settings)} of build {self._data.digest}"

    def prompt(self, slot: int) -> Prompt:
        """The training prompt of a slot, 0 <= slot < size. Raises PromptDropped."""
        shard, group, row = self._places[self._order[slot]].tolist()
        record = self._data.record(self._names[shard], group, row)
        return self._make(record, f"built/{self.task}/{slot}")

    def held_out(self, count: int) -> list[Prompt]:
        """Up to `count` prompts of each task that training never shows.

        A narrow task may have set aside fewer; then all of them.

        Raises:
            RecipeError: more are asked for than any task has set aside.
        """
        prompts: list[Prompt] = []
        names, places = self._data.rows(self._domain, "held_out", self._tasks)
        found: dict[str, int] = dict.fromkeys(sorted(self._tasks), 0)
        for number, (shard, group, row) in enumerate(places.tolist()):
            record = self._data.record(names[shard], group, row)
            if found[record.task] == count:
                continue
            try:
                prompt = self._make(record, f"built/{self.task}/held_out-{number}")
            except PromptDropped:
                continue
            found[record.task] += 1
            prompts.append(prompt)
        prompts.sort(key=lambda prompt: prompt.task)
        most = max(found.values())
        if most < count:
            raise RecipeError(
                f"validation.prompts_per_task: {self.task} has {most} held-out prompts that can "
                f"be used; ask for at most that many, or build with more data.build.held_out"
            )
        return prompts

    def _make(self, record: Record, prompt_id: str) -> Prompt:
        messages: list[Message] = []
        if self._system_prompt is not None:
            messages.append({"role": "system", "content": self._system_prompt})
        messages.append({"role": "user", "content": record.question})
        return Prompt(
            prompt_id=prompt_id,
            domain=record.domain,
            task=record.task,
            messages=messages,
            token_ids=self._renderer.render(messages),
            grading=record.grading,
        )


def tasks_of_entries(
    data: BuiltData, domain: str, named: set[str], task: str | None, key: str
) -> set[str]:
    """The tasks an entry of the mixture takes: its own, or those that no entry names.

    Raises:
        RecipeError: the build has no such task, or all are named.
    """
    known = set(data.tasks(domain))
    if task is not None and task not in known:
        have = ", ".join(sorted(known)) or "nothing of this domain"
        raise RecipeError(f"{key}.task: {data.folder} has no {domain} task {task!r}; it has {have}")
    tasks = {task} if task is not None else known - named
    if not tasks:
        why = "other entries take all its tasks" if known else "it was not built"
        raise RecipeError(f"{key}.domain: no {domain} is left in {data.folder}: {why}")
    return tasks
