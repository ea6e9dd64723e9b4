"""The `prorl` command. Arguments in, messages out; the work is done elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from prorl_nemo.errors import UserError

app = typer.Typer(
    help="ProRL v2 on Megatron-Core and vLLM.",
    no_args_is_help=True,
    add_completion=False,
    # Typer's own tracebacks print local variables: whole tensors, and tokens of the environment.
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prompts to train on.", no_args_is_help=True)
app.add_typer(data_app, name="data")
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="section.key=value overrides.")
]


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train, or resume where the run stopped."""
    with _errors():
        from prorl_nemo.recipe import load_recipe

        settings = load_recipe(recipe, overrides or [])
        from prorl_nemo.training.run import train as run

        finished, report = run(settings)
        state = "finished" if finished else "stopped and saved; the same command resumes"
        print(f"{settings.name}: {state}\nreport: {report}")


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the lines here.")] = None,
) -> None:
    """Prove on this machine that a set-up is numerically right."""
    with _errors():
        from prorl_nemo.recipe import load_recipe

        settings = load_recipe(recipe, overrides or [])
        if json_file:
            _check_writable("--json", json_file)  # Now, not after minutes of checks.
        from prorl_nemo.training.check import run_check

        ok = run_check(settings, json_file)
    raise typer.Exit(0 if ok else 1)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs; whole nodes of 8 where there are more.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    model: Annotated[
        str | None, typer.Option(help="Folder or name of a model of the same shape.")
    ] = None,
    mean_response: Annotated[
        float, typer.Option(help="Mean response as a share of the limit.")
    ] = 0.35,
    keep_rate: Annotated[float, typer.Option(help="Share of prompts with signal.")] = 0.41,
    mean_prompt: Annotated[
        float | None, typer.Option(help="Mean prompt, in tokens; default: 200 or the limit.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Layouts to list.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan here.")] = None,
) -> None:
    """Memory and time of a recipe on N GPUs, and the layouts that fit. Needs no GPU."""
    with _errors():
        from prorl_nemo.recipe import load_recipe

        settings = load_recipe(recipe, overrides or [])
        from prorl_nemo.planning.plan import Assumptions, make_plan
        from prorl_nemo.planning.show import show

        if json_file:
            _check_writable("--json", json_file)
        assumed = Assumptions(mean_response, keep_rate, mean_prompt)
        made = make_plan(settings, gpus, gpu, assumed, model)
        show(made, Console(), most)
        if json_file:
            json_file.write_text(json.dumps(made.as_json(), indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(0 if made.chosen else 1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; default: RUN/report.html.")] = None,
) -> None:
    """One HTML page of a run, or of several side by side."""
    with _errors():
        from prorl_nemo.reporting import write_report

        target = out or runs[0] / "report.html"
        try:
            write_report(runs, target)
        except OSError as error:
            raise UserError(f"--out: {target} cannot be written ({error.strerror})") from None
        print(f"report: {target}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    out: Annotated[Path, typer.Option(help="The model's folder: new or empty.")],
    step: Annotated[
        int | None, typer.Option(min=0, help="Of which checkpoint; default: the newest.")
    ] = None,
) -> None:
    """A step of a run as a Hugging Face model: sharded safetensors, tokenizer, configs."""
    with _errors():
        from prorl_nemo.export import export_step

        print(f"step {export_step(run, out, step)} of {run}: {out}")


@app.command()
def grade(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON lines: grading, response, ...")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write each verdict here, as JSON lines.")
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Score as in evaluation, not as in training.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Graders; default: the machine's cores.")
    ] = None,
    sandbox: Annotated[
        str, typer.Option(help="Where code runs: auto, bubblewrap, landlock or none.")
    ] = "auto",
    allow_unsafe: Annotated[
        bool, typer.Option("--allow-unsafe", help="Needed for --sandbox none.")
    ] = False,
) -> None:
    """Grade a file of responses and say what the graders said."""
    with _errors():
        if sandbox == "none" and not allow_unsafe:
            raise UserError(
                "--sandbox: none runs code that a model wrote with your rights; use auto, or add "
                "--allow-unsafe"
            )
        from prorl_nemo.rewards.grade_file import grade_file

        found = grade_file(file, workers=workers, training=not evaluation, out=out, sandbox=sandbox)
    console = Console()
    console.print(found.table())
    for number, problem in found.bad_lines[:20]:
        console.print(Text(f"line {number}: {problem}".translate(_CONTROL)), soft_wrap=True)
    if found.bad_lines:
        console.print(f"{len(found.bad_lines)} lines could not be graded")
    raise typer.Exit(1 if found.bad_lines else 0)


@data_app.command("build")
def data_build(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Build the prompts that the recipe's data.build describes; resumes where it stopped."""
    with _errors():
        from prorl_nemo.recipe import load_recipe

        settings = load_recipe(recipe, overrides or [])
        from prorl_nemo.data.build import build
        from prorl_nemo.data.build_summary import summary

        console = Console()
        manifest = build(settings, console)
        console.print(summary(manifest))


@contextmanager
def _errors() -> Iterator[None]:
    """A user's mistake is one message and exit status 2; anything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        message = str(error).translate(_CONTROL)
        # Not wrapped: a path that is cut in two cannot be copied.
        Console(stderr=True).print(
            Text.assemble(("error", "bold red"), " ", message), soft_wrap=True
        )
        raise typer.Exit(2) from None


# What a message quotes must not steer the terminal.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(10), *range(11, 32), 127)}


def _check_writable(option: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    app()
