"""What is measured and how: benchmarks and protocols, read from YAML files.

A benchmark (`eval/benchmarks/NAME.yaml`) fixes the items, the words around them and the grader. A
protocol (`eval/protocols/NAME.yaml`) fixes how responses are drawn, over all benchmarks alike.
Both are data, so that a number can be traced to a file that says where each choice comes from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, model_validator

from prorl_nemo.errors import UserError
from prorl_nemo.settings_file import Section, load_settings

Reader = Literal[
    "math", "gpqa", "ifeval", "humaneval", "programs", "eurus", "livecodebench", "reasoning_gym"
]
# Where each grader finds the answer (`prorl_nemo.rewards`); written in the file for its reader.
_EXTRACTION = {
    "math": "last_box",
    "multiple_choice": "last_box",
    "code": "last_code_block",
    "instructions": "after_thinking",
    "reasoning_gym": "answer_tags",
}
_GRADER = {
    "math": "math",
    "gpqa": "multiple_choice",
    "ifeval": "instructions",
    "humaneval": "code",
    "programs": "code",
    "eurus": "code",
    "livecodebench": "code",
    "reasoning_gym": "reasoning_gym",
}
PLACE = "{problem}"


class Sampling(Section):
    """How one response is drawn."""

    temperature: float = Field(ge=0, le=2)
    top_p: float = Field(gt=0, le=1)
    max_tokens: int = Field(ge=1, description="Response limit in tokens, thinking included")


class Data(Section):
    """Which items, and where they are."""

    origin: Literal["hub", "git", "package", "generated"]
    name: str = Field(min_length=1, description="Data set of the hub, repository, or package")
    revision: str = Field(min_length=1, description="Commit, tag or package version")
    files: list[str] = Field(default=[], description="Patterns of its files, also in --data-dir")
    reader: Reader = Field(description="How a row is read")
    licence: str = Field(min_length=1)
    items: int | None = Field(ge=1, description="How many; null where the source does not say")
    sha256: str | None = Field(
        pattern="^[0-9a-f]{64}$",
        description="Of the items' content; null where they were not at hand",
    )
    select: str | None = Field(default=None, description="eurus: the part, by its data_source")
    since: str | None = Field(default=None, pattern=r"^\d{4}-\d\d-\d\d$")
    until: str | None = Field(
        default=None, pattern=r"^\d{4}-\d\d-\d\d$", description="livecodebench: last day counted"
    )
    tasks: list[str] = Field(default=[], description="reasoning_gym: its tasks")
    items_per_task: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _options_of_the_reader(self) -> Data:
        wanted = {
            "eurus": {"select"},
            "livecodebench": {"since", "until"},
            "reasoning_gym": {"tasks", "items_per_task"},
        }.get(self.reader, set())
        options = ("select", "since", "until", "tasks", "items_per_task")
        given = {name for name in options if getattr(self, name)}
        if given != wanted:
            odd = ", ".join(sorted(given ^ wanted))
            raise ValueError(f"{odd}: must be given for its reader, and for no other")
        if (self.reader == "reasoning_gym") != (self.origin == "generated"):
            raise ValueError("origin: generated goes with the reader reasoning_gym")
        if self.origin != "generated" and not self.files:
            raise ValueError("files: name the files that hold the items")
        if self.tasks and self.items != len(self.tasks) * (self.items_per_task or 0):
            raise ValueError("items: must be the number of tasks times items_per_task")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError("tasks: a task is named twice")
        return self


class Benchmark(Section):
    """A benchmark file."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    title: str = Field(min_length=1)
    domain: Literal["math", "code", "stem", "instructions", "logic"]
    data: Data
    system: str | None = Field(default=None, description="System turn; null: the template's own")
    prompt: str = Field(description="The user's turn, with {problem} in the problem's place")
    extraction: Literal["last_box", "last_code_block", "after_thinking", "answer_tags"]
    grader: Literal["math", "multiple_choice", "code", "instructions", "reasoning_gym"]
    metric: Literal["strict", "continuous"] = Field(
        description="strict: a score below 1 counts as 0"
    )
    samples: int = Field(ge=1, description="As its source has it; a protocol may say otherwise")
    sampling: Sampling
    source: str = Field(min_length=1, description="Where this protocol is from")
    doubts: list[str] = Field(default=[], description="Known differences to other harnesses")

    @model_validator(mode="after")
    def _consistent(self) -> Benchmark:
        if self.prompt.count(PLACE) != 1:
            raise ValueError(f"prompt: must hold {PLACE} once")
        if _EXTRACTION[self.grader] != self.extraction:
            raise ValueError(f"extraction: the grader takes {_EXTRACTION[self.grader]}")
        if _GRADER[self.data.reader] != self.grader:
            raise ValueError(f"grader: these items are graded by {_GRADER[self.data.reader]}")
        _refuse_copies(self.samples, self.sampling)
        return self

    def prompt_for(self, problem: str) -> str:
        """The user's turn. Braces in the problem are left alone."""
        before, _, after = self.prompt.partition(PLACE)
        return before + problem + after


class Protocol(Section):
    """A protocol file."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    title: str = Field(min_length=1)
    sampling: Sampling
    samples: int = Field(ge=1, description="Samples per item")
    samples_for: dict[str, int] = Field(default={}, description="Of benchmarks that have others")
    benchmarks: list[str] = Field(default=[], description="The suite; empty: all there are")
    items: int | None = Field(
        default=None, ge=1, description="At most this many of each benchmark; null: all"
    )
    scoring: Literal["as_benchmark", "strict"] = Field(
        default="as_benchmark", description="strict: partial credit is none, everywhere"
    )
    source: str = Field(min_length=1)
    doubts: list[str] = Field(default=[])

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        if any(count < 1 for count in self.samples_for.values()):
            raise ValueError("samples_for: must be at least 1")
        if self.benchmarks:
            stray = sorted(set(self.samples_for) - set(self.benchmarks))
            if stray:
                raise ValueError(f"samples_for: {stray[0]} is not among its benchmarks")
        _refuse_copies(max([self.samples, *self.samples_for.values()]), self.sampling)
        return self

    def samples_of(self, benchmark: Benchmark) -> int:
        """Samples per item of a benchmark."""
        return self.samples_for.get(benchmark.name, self.samples)

    def strict(self, benchmark: Benchmark) -> bool:
        """Whether partial credit counts as 0."""
        return self.scoring == "strict" or benchmark.metric == "strict"


Named = TypeVar("Named", Benchmark, Protocol)


def load_benchmarks(folder: Path) -> dict[str, Benchmark]:
    """The benchmarks of `folder/benchmarks`, by name.

    Raises:
        UserError: none there, a bad file, or one whose name differs from what it says.
    """
    return _load(Benchmark, folder / "benchmarks")


def load_protocols(folder: Path) -> dict[str, Protocol]:
    """The protocols of `folder/protocols`, by name. Raises UserError as `load_benchmarks`, and
    for a protocol that speaks of a benchmark that is not there."""
    protocols = _load(Protocol, folder / "protocols")
    return {name: check_names(protocol, folder) for name, protocol in protocols.items()}


def check_names(protocol: Protocol, folder: Path) -> Protocol:
    """The protocol itself. Raises UserError if it names a benchmark that `folder` has not."""
    known = {path.stem for path in (folder / "benchmarks").glob("*.yaml")}
    for name in [*protocol.benchmarks, *protocol.samples_for]:
        if name not in known:
            raise UserError(f"protocol {protocol.name}: there is no benchmark {name!r}")
    return protocol


def _load(schema: type[Named], folder: Path) -> dict[str, Named]:
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UserError(f"{folder}: holds no definitions (*.yaml)")
    found = {}
    for path in files:
        settings = load_settings(schema, path)
        if settings.name != path.stem:
            raise UserError(f"{path}: name: must be that of the file (found {settings.name!r})")
        found[settings.name] = settings
    return found


def _refuse_copies(samples: int, sampling: Sampling) -> None:
    if samples > 1 and sampling.temperature == 0:
        raise ValueError("samples: greedy decoding gives the same response each time; use 1")
