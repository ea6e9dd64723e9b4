"""The process that generates Reasoning Gym items is replaced when it fails, and never outlives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prorl_nemo.data import reasoning_gym_generator
from prorl_nemo.data.chat import ChatRenderer, PromptDropped, load_tokenizer
from prorl_nemo.data.reasoning_gym_generator import GeneratorDied, ReasoningGymGenerator
from prorl_nemo.data.reasoning_gym_source import ReasoningGymSource
from prorl_nemo.errors import RecipeError
from prorl_nemo.tiny_model import tiny_model


def test_the_process_ends_with_its_parent() -> None:
    program = (
        "from prorl_nemo.data.reasoning_gym_generator import ReasoningGymGenerator as G\n"
        "import os, signal, sys\n"
        "g = G(); g.ask(op='check', task='chain_sum', config={})\n"
        "print(g._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert parent.returncode == -signal.SIGKILL
    for _ in range(100):
        try:
            os.kill(int(parent.stdout), 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{int(parent.stdout)}/stat").read_text().split()[2] == "Z":
            return  # Ended; nobody collected it.
        time.sleep(0.1)
    pytest.fail("the generating process outlived its parent")


def test_a_dead_or_hung_process_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = ReasoningGymGenerator()
    tokenizer = load_tokenizer(tiny_model("llama", tmp_path / "m", layers=1))
    source = ReasoningGymSource(
        "chain_sum",
        {},
        size=9,
        seed=1,
        renderer=ChatRenderer(tokenizer, 500),
        generator=generator,
    )
    first = source.prompt(0)
    hung = generator._process
    assert hung is not None
    os.kill(hung.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch, pytest.raises(PromptDropped, match="no answer after"):
        patch.setattr(generator, "_seconds", 0.2)
        source.prompt(0)
    assert hung.returncode == -signal.SIGKILL
    assert source.prompt(0) == first
    generator.close()
    (tmp_path / "silent.py").write_text("import time\ntime.sleep(600)\n")
    with monkeypatch.context() as patch:
        patch.setattr(reasoning_gym_generator, "_WORKER", tmp_path / "silent.py")
        patch.setattr(generator, "_seconds", 0.2)
        patch.setattr(reasoning_gym_generator, "_SECONDS_TO_START", 0.0)
        for _ in range(2):
            with pytest.raises(PromptDropped):
                source.prompt(0)
        with pytest.raises(RecipeError, match="3 times in a row"):
            source.prompt(0)
    with pytest.raises(GeneratorDied, match="KeyError: 'nonsense'"):
        generator.ask(op="nonsense")
    assert generator._process is None
