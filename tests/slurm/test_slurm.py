"""The sbatch scripts under real Slurm daemons: `make test-slurm`. Minutes; not part of `make test`.

Most submit slurm/train.sbatch with recipes/smoke/two_nodes.yaml, two ranks and two engines over
two nodes, and do to the job what happens on clusters.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from daemons import Slurm

from prorl_nemo.strict_yaml import dump_yaml
from prorl_nemo.tiny_arithmetic import tiny_arithmetic_folder
from prorl_nemo.tiny_model import tiny_model

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/smoke/two_nodes.yaml"
SECONDS = 480.0
OPTIONS = ["--gpus-per-node=0", "--mem=1G", "--nodes=2", "--time=30", "--signal=B:USR1@30"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    # A time-out outside must not leave daemons behind.
    signal.signal(signal.SIGTERM, lambda number, frame: pytest.exit("terminated"))
    tiny_arithmetic_folder()  # Both nodes would build it at once.
    made = Slurm()
    try:
        made.start()
        yield made
    finally:
        made.stop()


class Job:
    """A submitted script, train.sbatch if no other, and what it leaves in `folder`.

    Args:
        arguments: of the script, in place of the recipe and `changes`.
    """

    def __init__(
        self,
        slurm: Slurm,
        folder: Path,
        *changes: str,
        options: tuple[str, ...] = (),
        script: str = "train",
        arguments: tuple[str, ...] = (),
        **env: str,
    ) -> None:
        self.slurm, self.folder = slurm, folder
        self.name = next((c.split("=")[1] for c in changes if c.startswith("name=")), "two-nodes")
        self.run_dir = folder / "runs" / self.name
        settings = {"PRORL_HOME": str(ROOT), "PRORL_LOGS": str(folder / "logs")}
        settings |= {"TMPDIR": str(slurm.temporary)}
        settings |= {"PRORL_MIN_MEMORY_GIB": "1", "PRORL_MIN_DISK_GIB": "0.1"}
        exported = ",".join(f"{k}={v}" for k, v in {**settings, **env}.items())
        self.output = folder / f"{self.name}-%j.out"
        command = ["sbatch", "--parsable", f"--output={self.output}", f"--export=ALL,{exported}"]
        command += [*OPTIONS, *options, f"slurm/{script}.sbatch"]
        os.chdir(ROOT)
        self.id = slurm.run(*command, *(arguments or (RECIPE, f"runs_dir={folder}/runs", *changes)))

    @property
    def text(self) -> str:
        path = Path(str(self.output).replace("%j", self.id))
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> str:
        found = re.search(r"JobState=(\w+)", self.slurm.run("scontrol", "show", "job", self.id))
        return found[1] if found else ""

    @property
    def step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def events(self, name: str) -> list[dict]:
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if row["event"] == name]

    def until(self, what: str, condition: object, seconds: float = SECONDS) -> float:
        """Wait; seconds it took."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if condition():  # type: ignore[operator]
                return time.monotonic() - started
            time.sleep(0.3)
        logs = sorted((self.folder / "logs").glob("*/*/node_*.log"))
        tails = "\n".join(f"{p}:\n{p.read_text()[-2000:]}" for p in logs[-2:])
        raise AssertionError(f"not {what} in {seconds:.0f} s; {self.state}\n{self.text}\n{tails}")

    def until_step(self, step: int) -> None:
        self.until(f"at step {step}", lambda: self.step >= step)

    def until_state(self, *states: str) -> float:
        return self.until(f"{states}", lambda: self.state in states)

    def ask_to_stop(self) -> None:
        """The signal that --signal sends before the time limit."""
        self.slurm.run("scancel", "--batch", "--signal=USR1", self.id)

    def steps_logged(self) -> list[int]:
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").open()]
        return [row["step"] for row in rows if row["kind"] == "train"]


def nothing_is_left(slurm: Slurm) -> None:
    """No process of a job on any node, and none of their folders, some seconds after its end."""
    deadline = time.monotonic() + 30
    while left := of_jobs(slurm):
        assert time.monotonic() < deadline, list(left.values())
        time.sleep(0.5)
    assert not list(slurm.temporary.glob("prorl*")), "folders of agents and of Ray"


def of_jobs(slurm: Slurm) -> dict[psutil.Process, list[str]]:
    """Command line of each process on the nodes but slurmd.

    By the nodes' process trees, which orphans cannot leave: Ray's workers write their titles over
    the memory in which their environment was.
    """
    found = {}
    for node in slurm.nodes.values():
        for process in psutil.Process(node.pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.name() != "slurmd" and process.status() != psutil.STATUS_ZOMBIE:
                    found[process] = process.cmdline()[:6]
    return found


def test_time_limit_saves_and_requeues(slurm: Slurm, tmp_path: Path) -> None:
    """Four minutes of time, signalled a minute before, for a run that needs much more.

    prorl's own clock is put off: it would stop in time for the job's end by itself.
    """
    options = ("--time=4", "--signal=B:USR1@60")
    changes = ("stages=[{steps: 5000}]", "faults.wall_clock_hours=9")
    job = Job(slurm, tmp_path, *changes, "policy.optimizer.learning_rate=1e-7", options=options)
    job.until("requeued", lambda: "back into the queue" in job.text)
    (stop,) = job.events("stopped")
    assert stop["reason"] == "SIGUSR1" and "asked to save and end" in job.text
    job.until("resumed", lambda: job.events("resumed"))
    assert job.events("resumed")[0]["step"] == stop["step"], "the last finished step was saved"
    job.until_step(stop["step"] + 2)
    slurm.run("scancel", job.id)
    job.until_state("CANCELLED")
    steps = job.steps_logged()
    assert steps == list(range(1, len(steps) + 1)), "every step once"
    # Logs by attempt, the last one named.
    attempts = sorted((tmp_path / "logs/two-nodes").glob(f"{job.id}.*"))
    assert [folder.name for folder in attempts] == [f"{job.id}.0", f"{job.id}.1"]
    assert (tmp_path / "logs/two-nodes/latest").resolve() == attempts[-1]
    assert {p.name for p in attempts[0].glob("node_*.log")} == {"node_0.log", "node_1.log"}
    assert "Ray runs on 2 nodes" in (attempts[0] / "node_0.log").read_text()
    nothing_is_left(slurm)


def test_node_death(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "stages=[{steps: 20}]")
    job.until_step(6)
    slurm.kill_node("n2")
    seconds = job.until("over", lambda: "lost node n2" in job.text)
    print(f"the attempt ended {seconds:.0f} s after the node died")
    assert seconds < 60
    # A dead node cannot clear its own disk.
    for folder in slurm.temporary.glob("prorl*"):
        shutil.rmtree(folder, ignore_errors=True)
    slurm.start_node("n2")
    job.until_state("COMPLETED")
    assert "is finished at step 20" in job.text
    assert job.steps_logged() == list(range(1, 21))
    assert job.events("resumed")
    nothing_is_left(slurm)


def test_preemption(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "stages=[{steps: 20}]")
    job.until_step(6)
    command = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--wrap=sleep 5"]
    other = slurm.run(*command, f"--output={tmp_path}/other.out")
    job.until_state("PENDING")
    job.until(
        "other job over",
        lambda: "JobState=COMPLETED" in slurm.run("scontrol", "show", "job", other),
    )
    job.until_state("COMPLETED")
    assert "is finished at step 20" in job.text and job.events("resumed")
    assert job.steps_logged() == list(range(1, 21))
    nothing_is_left(slurm)


def test_cancelled_stays_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "stages=[{steps: 90}]")
    job.until_step(2)
    slurm.run("scancel", job.id)
    job.until_state("CANCELLED")
    nothing_is_left(slurm)
    slurm.wait_idle()
    assert "back into the queue" not in job.text


def test_chained_jobs(slurm: Slurm, tmp_path: Path) -> None:
    """The second goes on where the first was stopped, the third finds nothing to do."""
    options = ("--dependency=singleton", "--job-name=chain")
    jobs = [
        Job(slurm, tmp_path, "stages=[{steps: 16}]", options=options, PRORL_AGAIN="chain")
        for _ in range(3)
    ]
    jobs[0].until_step(4)
    jobs[0].ask_to_stop()
    jobs[0].until_state("COMPLETED")
    assert "the next job of this name goes on" in jobs[0].text
    jobs[2].until_state("COMPLETED")
    assert "is finished at step 16" in jobs[1].text
    assert "attempt" not in jobs[2].text and "is finished at step 16" in jobs[2].text
    assert jobs[0].steps_logged() == list(range(1, 17))


def test_two_jobs_on_the_same_nodes(slurm: Slurm, tmp_path: Path) -> None:
    jobs = [Job(slurm, tmp_path, "stages=[{steps: 8}]", f"name=job{i}") for i in range(2)]
    jobs[0].until("both running", lambda: all(job.state == "RUNNING" for job in jobs))
    for job in jobs:
        job.until_state("COMPLETED")
        assert "is finished at step 8" in job.text
    nothing_is_left(slurm)


def test_gives_up_without_progress(slurm: Slurm, tmp_path: Path) -> None:
    """A run that dies in every attempt before its first checkpoint."""
    job = Job(slurm, tmp_path, "checkpoint.interval=1000", PRORL_MAX_STALLED="2")

    def killed(attempt: int) -> bool:
        # Of this test's job alone: others may be training on this machine.
        for process, command in of_jobs(slurm).items():
            if "prorl_nemo.cli" in command:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        return (tmp_path / f"logs/two-nodes/{job.id}.{attempt}/status").exists()

    for attempt in range(2):
        job.until(f"over: attempt {attempt}", lambda attempt=attempt: killed(attempt))
    job.until_state("FAILED")
    assert "2 attempts in a row brought no checkpoint beyond step 0" in job.text
    nothing_is_left(slurm)


def test_nodes_are_looked_at(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, script="check")
    job.until_state("COMPLETED")
    log = (tmp_path / f"logs/prorl-check/{job.id}.0/node_0.log").read_text()
    assert "2 nodes are fit for two-nodes" in log and "bus bandwidth" in log
    nothing_is_left(slurm)


def test_an_evaluation_goes_on_after_its_time(slurm: Slurm, tmp_path: Path) -> None:
    """On one node; stopped in the middle, every item is answered once."""
    samples, items = tmp_path / "eval" / "samples.jsonl", 480
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 32}
    data = {"origin": "generated", "name": "reasoning-gym", "revision": "0.1.25"}
    data |= {"reader": "reasoning_gym", "licence": "Apache-2.0", "sha256": None}
    data |= {"items": items, "tasks": ["chain_sum"], "items_per_task": items}
    sums = {"name": "sums", "title": "Sums", "domain": "logic", "data": data, "samples": 1}
    sums |= {"prompt": "{problem}", "extraction": "answer_tags", "grader": "reasoning_gym"}
    sums |= {"metric": "continuous", "sampling": sampling, "source": "ours"}
    protocol = {"name": "one", "title": "One", "samples": 1, "source": "ours", "sampling": sampling}
    for kind, content in (("benchmarks", sums), ("protocols", protocol)):
        (tmp_path / "own" / kind).mkdir(parents=True)
        (tmp_path / "own" / kind / f"{content['name']}.yaml").write_text(dump_yaml(content))
    arguments = [str(tiny_arithmetic_folder()), f"--definitions={tmp_path}/own", "--protocol=one"]
    arguments += ["--engines=1", "--max-sequences=4", f"--out={samples.parent}"]
    options = ("--nodes=1",)
    job = Job(slurm, tmp_path, script="eval", arguments=tuple(arguments), options=options)

    def answered() -> list[str]:
        rows = samples.read_text().splitlines() if samples.exists() else []
        return [json.loads(row)["item"] for row in rows if row.endswith("}")]

    job.until("answering", lambda: len(answered()) >= 10)
    job.ask_to_stop()
    job.until("requeued", lambda: "stopped; back into the queue" in job.text)
    assert 10 <= len(answered()) < items
    job.until_state("COMPLETED")
    assert len(answered()) == len(set(answered())) == items
    assert (samples.parent / "results.html").exists()
    nothing_is_left(slurm)


def test_publishing_without_sending(slurm: Slurm, tmp_path: Path) -> None:
    export = tiny_model("llama", tmp_path / "export")
    about = {"run": "small", "step": 2000, "model": "tiny-arithmetic", "checkpoint_sha256": "0"}
    (export / "prorl_export.json").write_text(json.dumps(about))
    options, arguments = ("--nodes=1",), (str(export), "--repo=us/model", "--license=apache-2.0")
    job = Job(
        slurm, tmp_path, script="publish", arguments=(*arguments, "--dry-run"), options=options
    )
    job.until_state("COMPLETED")
    assert "model.safetensors" in job.text and "nothing was sent" in job.text
    wrong = Job(
        slurm, tmp_path, script="publish", arguments=(*arguments, "--step=x"), options=options
    )
    wrong.until_state("FAILED")
    assert "an exported folder is of one step" in wrong.text
    nothing_is_left(slurm)


def test_refusals_cost_nothing(slurm: Slurm, tmp_path: Path) -> None:
    """A wrong recipe starts no node; nodes that lack GPUs are named before Ray starts."""
    job = Job(slurm, tmp_path, "polcy.threads=1")
    job.until_state("FAILED")
    assert "polcy" in job.text and "nothing was started" in job.text
    job = Job(slurm, tmp_path, PRORL_GPUS="8", PRORL_AGAIN="never")
    job.until_state("FAILED")
    for node in ("n1", "n2"):
        assert f"{node}: 0 GPUs are visible, 8 are needed" in job.text
    nothing_is_left(slurm)
