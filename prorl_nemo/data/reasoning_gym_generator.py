"""Reasoning Gym's items, generated in a process of their own (`reasoning_gym_worker`).

Its hash seed is fixed, so that an item is the same in every run, and it can be killed: some
settings make a generator search for ever.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import select
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any

from prorl_nemo.data.chat import PromptDropped
from prorl_nemo.errors import RecipeError

_WORKER = Path(__file__).with_name("reasoning_gym_worker.py")

# The slowest generator (number_sequence) was seen to need 30 s for one item.
_SECONDS_PER_ITEM = 120.0
_SECONDS_TO_START = 120.0

# One item that hangs is bad luck; settings that make every item hang would cost days.
_DEATHS_IN_A_ROW = 3


class GeneratorDied(Exception):
    """The generating process ended or hung on a request."""


class ReasoningGymGenerator:
    """The process that generates items (see `reasoning_gym_worker`); starts when first asked.

    It ends with this object, with `close`, or when this process dies.

    Args:
        seconds_per_item: how long one request may take before the process is killed.
    """

    def __init__(self, seconds_per_item: float = _SECONDS_PER_ITEM) -> None:
        self._seconds = seconds_per_item
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._buffer = b""

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            GeneratorDied: the process ended, or took too long and was killed. The next request
                starts a new one.
        """
        seconds = self._seconds
        if self._process is None:
            self._start()
            seconds += _SECONDS_TO_START
        try:
            return self._exchange(request, seconds)
        except (OSError, ValueError) as error:
            reason = self._last_words() or str(error)
            self.close()
            raise GeneratorDied(reason) from None

    def close(self) -> None:
        if self._process is not None:
            self._finalizer()
            self._process = None
            self._buffer = b""

    def _start(self) -> None:
        log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process.
        # Some tasks (codeio) run code of the library's data, which writes files where it runs.
        scratch = tempfile.TemporaryDirectory()
        process = subprocess.Popen(
            # -P: the script's folder must not shadow anyone's modules.
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=scratch.name,
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        )
        self._process, self._log = process, log
        self._finalizer = weakref.finalize(self, _end, process, log, scratch)

    def _exchange(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        # poll, because select refuses descriptors above 1023, which a large run has.
        ready = select.poll()
        ready.register(process.stdout, select.POLLIN)
        while b"\n" not in self._buffer:
            if not ready.poll(1000 * seconds):
                raise OSError(f"no answer after {seconds:.0f} s")
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise OSError("the generating process ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        """The last line of the process's stderr: for a failed import, which one."""
        assert self._log is not None
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]


def _end(
    process: subprocess.Popen[bytes], log: IO[bytes], scratch: tempfile.TemporaryDirectory[str]
) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout, log):
        if stream is not None:
            with contextlib.suppress(OSError):  # A request may be left in the pipe.
                stream.close()
    process.wait()
    scratch.cleanup()


class TaskItems:
    """Items of one task, checked once: what sources and pretraining ask the generator for.

    Args:
        key: where the recipe speaks of this task, for error messages.

    Raises:
        RecipeError: unknown task, unknown or wrong setting.
    """

    def __init__(
        self, task: str, config: dict[str, Any], generator: ReasoningGymGenerator, key: str
    ) -> None:
        self.task, self._config, self._generator, self.key = task, config, generator, key
        self._deaths = 0
        self.version = self._check()

    def entry(self, split: str, slot: int, seed: str, size: int) -> dict[str, Any]:
        """Question, answer and metadata of a slot, 0 <= slot < size.

        Raises:
            PromptDropped: the slot has no usable item.
            RecipeError: the generator died on several items in a row.
        """
        try:
            answer = self._generator.ask(
                op="item",
                task=self.task,
                config=self._config,
                seed=seed,
                size=size,
                split=split,
                slot=slot,
            )
        except GeneratorDied as death:
            self._deaths += 1
            if self._deaths == _DEATHS_IN_A_ROW:
                raise RecipeError(
                    f"{self.key}.config: generating {self.task} died or hung "
                    f"{self._deaths} times in a row ({death}); its settings leave nothing to find"
                ) from None
            raise PromptDropped(f"generator died: {death}") from None
        self._deaths = 0
        if "dropped" in answer:
            raise PromptDropped(answer["dropped"])
        found: dict[str, Any] = answer["entry"]
        return found

    def _check(self) -> str:
        try:
            json.dumps(self._config, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"{self.key}.config: numbers, strings, lists and mappings only ({error})"
            ) from None
        try:
            answer = self._generator.ask(op="check", task=self.task, config=self._config)
        except GeneratorDied as death:
            raise RecipeError(
                f"{self.key}: reasoning-gym cannot be used ({death}); is it installed?"
            ) from None
        if "unknown_task" in answer:
            raise RecipeError(
                f"{self.key}.task: Reasoning Gym has no task {self.task!r}"
                f"{_nearest(self.task, answer['unknown_task'])}"
            )
        if "unknown_key" in answer:
            unknown, known = answer["unknown_key"], answer["known"]
            hint = _nearest(unknown, known) or f"; it has: {', '.join(known)}"
            raise RecipeError(f"{self.key}.config.{unknown}: unknown setting of {self.task}{hint}")
        if "bad_config" in answer:
            reason = answer["bad_config"]
            raise RecipeError(f"{self.key}.config: {self.task} refuses it ({reason})")
        version: str = answer["version"]
        return version


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
