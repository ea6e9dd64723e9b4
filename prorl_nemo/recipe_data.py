"""The recipe's sections on prompts and their grading: what to build, what to mix, who grades.

Part of `recipe`, which imports all of it; docs/recipes.md is made from both.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from prorl_nemo.settings_file import Section

# A step, token or prompt count beyond the upper bound is a slip of the keyboard.
Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Threads = Annotated[int, Field(ge=1, le=1024)]

Domain = Literal["math", "code", "stem", "logic", "instructions"]


class Source(Section):
    """One entry of the data mix."""

    kind: Literal["reasoning_gym", "built"] = Field(
        "reasoning_gym",
        description="reasoning_gym makes the questions of a task as they are drawn; built reads "
        "what `prorl data build` wrote.",
    )
    task: str | None = Field(
        None,
        min_length=1,
        description="Registered name of the Reasoning Gym task. Of built data: only this task; "
        "an entry without one takes all tasks of its domain that no other entry names.",
    )
    domain: Domain | None = Field(None, description="Of built data.")
    folder: str | None = Field(
        None, min_length=1, description="Of built data; default: data.build.folder."
    )
    config: dict[str, Any] = Field({}, description="The task's own settings, passed as they are.")
    weight: float = Field(1.0, gt=0, le=1_000_000, description="Relative share of the prompts.")
    size: int = Field(
        2000, ge=1, le=10_000_000, description="Training prompts generated for the task."
    )
    train: bool = Field(
        True,
        description="false: only validated, never trained on; its scores stay out of "
        "validation/mean and so decide nothing.",
    )

    @property
    def label(self) -> str:
        """What the entry is called in weights and figures: its task, else its domain."""
        return self.task or self.domain or ""

    @model_validator(mode="after")
    def _of_its_kind(self) -> Source:
        if self.kind == "built":
            if self.domain is None:
                raise ValueError("domain: an entry of kind built needs one")
            others = ("config", "size")
        else:
            if self.task is None:
                raise ValueError("task: an entry of kind reasoning_gym needs one")
            others = ("domain", "folder")
        # By value: a resolved recipe holds every key with its default.
        defaults = type(self).model_fields
        given = [key for key in others if getattr(self, key) != defaults[key].default]
        if given:
            raise ValueError(f"{', '.join(given)}: not for kind {self.kind}; remove it")
        return self

    @field_validator("config")
    @classmethod
    def _plain(cls, config: dict[str, Any]) -> dict[str, Any]:
        return plain_mapping(config)


def plain_mapping(config: dict[str, Any]) -> dict[str, Any]:
    """The mapping itself, if JSON can hold it. Raises ValueError."""
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"numbers, strings, lists and mappings only: {error}") from None
    return config


class BuildSource(Section):
    """A data set to build prompts from (docs/data.md)."""

    source: Literal[
        "deepscaler",
        "dapo_math",
        "eurus_code",
        "scp",
        "reasoning_gym",
        "nemotron_instructions",
        "records",
    ] = Field(description="Which data set; records are problems of one's own (docs/add_a_task.md).")
    path: str | None = Field(
        None,
        min_length=1,
        description="Folder or file in the data set's own layout; null downloads it from the hub. "
        "records have no other place.",
    )
    revision: str | None = Field(None, min_length=1, description="Of the hub: commit, tag, branch.")
    limit: Positive | None = Field(
        None, description="Training prompts at most, chosen by hash; null takes all."
    )
    tasks: dict[str, dict[str, Any]] | None = Field(
        None,
        description="For reasoning_gym: task names with their settings; null is ProRL's number of "
        "96 with the library's settings.",
    )
    seconds_per_item: float = Field(
        10.0, gt=0, le=3600, description="For reasoning_gym: an item that takes longer is left out."
    )

    @model_validator(mode="after")
    def _of_its_source(self) -> BuildSource:
        generated = self.source == "reasoning_gym"
        wrong = ["path", "revision"] if generated else ["tasks", "seconds_per_item"]
        if self.source == "records":
            wrong.append("revision")
        # By value: a resolved recipe holds every key with its default.
        defaults = type(self).model_fields
        given = [key for key in wrong if getattr(self, key) != defaults[key].default]
        if given:
            raise ValueError(f"{', '.join(given)}: not for {self.source}; remove it")
        if generated and self.limit is None:
            raise ValueError("limit: reasoning_gym never ends; say how many prompts (ProRL: 37000)")
        if self.source == "records" and self.path is None:
            raise ValueError("path: records are files of your own; say where they are")
        if self.tasks is not None:
            if not self.tasks:
                raise ValueError("tasks: name at least one")
            for config in self.tasks.values():
                plain_mapping(config)
        return self


class Build(Section):
    """What `prorl data build` makes, and where (docs/data.md)."""

    folder: str = Field(min_length=1, description="Where shards and manifest are written.")
    sources: list[BuildSource] = Field(
        min_length=1, description="Earlier ones win where two ask the same question."
    )
    evaluation: list[str] = Field(
        [],
        description="Files or folders of evaluation questions (JSON lines, JSON, Parquet) that "
        "must not be trained on.",
    )
    ngram: int = Field(
        8, ge=3, le=50, description="Words of the runs that are compared with the evaluation sets."
    )
    overlap: float = Field(
        0.4,
        gt=0,
        le=1,
        description="A prompt is removed when it holds this share of a question's runs.",
    )
    held_out: int = Field(
        100,
        ge=0,
        le=100_000,
        description="Prompts of each task set aside for validation; at most a tenth of the task's.",
    )
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="Share of unusable rows in a file above which it is refused."
    )


class Data(Section):
    """Prompts."""

    sources: list[Source] = Field(min_length=1, description="The mix of tasks, one entry each.")
    build: Build | None = Field(None, description="Data to be built ahead; null where none is.")
    worked_examples: int = Field(
        0,
        ge=0,
        le=64,
        description="Solved problems of the same task shown as earlier chat turns. Of kind "
        "reasoning_gym only; built data has none to show.",
    )
    system_prompt: str | None = Field(
        None, description="System turn; null leaves it to the chat template."
    )
    max_prompt_tokens: Positive = Field(1024, description="Longer prompts are dropped, never cut.")

    @property
    def trained(self) -> list[Source]:
        """The sources that prompts are drawn from."""
        return [source for source in self.sources if source.train]

    @model_validator(mode="after")
    def _some_trained(self) -> Data:
        if not self.trained:
            raise ValueError("sources: no entry has train: true; there is nothing to train on")
        return self

    @model_validator(mode="after")
    def _built_somewhere(self) -> Data:
        built = [source for source in self.sources if source.kind == "built"]
        if self.build is None and any(source.folder is None for source in built):
            raise ValueError("sources: an entry of kind built needs folder, or data.build")
        return self


class Grading(Section):
    """Worker processes that grade, and the sandbox for code (docs/rewards.md)."""

    workers: Threads | None = Field(
        None, description="Responses graded at the same time; default: half of the cores."
    )
    sandbox: Literal["auto", "bubblewrap", "landlock", "none"] = Field(
        "auto",
        description="Where code runs; auto takes the first that holds when it is attacked.",
    )
    allow_unsafe: bool = Field(
        False, description="Needed for sandbox none, which runs a model's code unprotected."
    )

    @model_validator(mode="after")
    def _unsafe_on_demand(self) -> Grading:
        if self.sandbox == "none" and not self.allow_unsafe:
            raise ValueError(
                "sandbox none runs code that a model wrote with your rights; use auto, or set "
                "grading.allow_unsafe=true"
            )
        return self
