"""The `prorl` command. Arguments in, messages out; the work is done elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from prorl_nemo.errors import UserError

if TYPE_CHECKING:
    from prorl_nemo.recipe import Recipe

# What a message quotes must not steer the terminal.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(10), *range(11, 32), 127)}


class _Commands(TyperGroup):
    """A user's mistake is one message and its exit status; anything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            message, status = str(error), error.status
        except ModuleNotFoundError as error:
            if (error.name or "prorl_nemo").startswith("prorl_nemo"):
                raise
            status = 2
            message = (
                f"{error.name} is not installed: pip brought the command alone; what it computes "
                "with is in requirements/ of the repository (make setup)"
            )
        # Not wrapped: a path that is cut in two cannot be copied.
        Console(stderr=True).print(
            Text.assemble(("error", "bold red"), " ", message.translate(_CONTROL)), soft_wrap=True
        )
        raise typer.Exit(status)


app = typer.Typer(
    cls=_Commands,
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
_Evaluations = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of prorl eval on this step; may be given again."),
]
_Licence = Annotated[
    str | None, typer.Option("--license", help="As the hub writes it; default: the base's.")
]
_Step = Annotated[
    str | None, typer.Option(help="Of a run: last (default), best, or a step's number.")
]
_Sandbox = Annotated[str, typer.Option(help="Where code runs: auto, bubblewrap, landlock or none.")]
_AllowUnsafe = Annotated[bool, typer.Option("--allow-unsafe", help="Needed for --sandbox none.")]


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train, or resume where the run stopped."""
    settings = _recipe(recipe, overrides)
    from prorl_nemo.training.run import train as run

    finished, report = run(settings)
    state = "finished" if finished else "stopped and saved; the same command resumes"
    print(f"{settings.name}: {state}\nreport: {report}")


@app.command()
def pretrain(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train a small model on worked problems by next-token prediction; resumes."""
    from prorl_nemo.recipe_pretrain import load_pretraining

    settings = load_pretraining(recipe, overrides or [])
    from prorl_nemo.pretraining.run import pretrain as run

    folder = run(settings, Console())
    print(f"model: {folder}" if folder else "stopped and saved; the same command resumes")


@app.command()
def study(
    plan: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (YAML).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="section.key=value of every run: settings alone that change where and how fast.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Name of a variant; may be given again.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Runs of this seed alone; may be given again.")
    ] = None,
    pages: Annotated[
        bool, typer.Option("--pages", help="Figures and tables of the results there are; no run.")
    ] = False,
) -> None:
    """Run every run of a study that has no result yet; ends with figures and tables."""
    from prorl_nemo.study.plan import load_study

    settings = load_study(plan, overrides or [])
    if pages:
        from prorl_nemo.study.pages import write_pages

        if not write_pages(settings):
            raise UserError(f"--pages: {settings.results} holds no result of this study yet")
    else:
        from prorl_nemo.study.runner import run_study

        if not run_study(settings, only or [], Console(), seed or []):
            print("stopped and saved; the same command goes on")
            raise typer.Exit(3)
    print(f"results: {settings.results} (README.md, study.html)")


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the lines here.")] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A shrunken model of the same family, on any machine.")
    ] = False,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Look at every node of the Ray cluster instead.")
    ] = False,
) -> None:
    """Prove on this machine that a set-up is numerically right."""
    settings = _recipe(recipe, overrides)
    if cluster and (tiny or json_file):
        raise UserError("--cluster: looks at the nodes alone; leave out --tiny and --json")
    if json_file:
        _check_writable("--json", json_file)  # Now, not after minutes of checks.
    if cluster:
        from prorl_nemo.training.session import check_nodes

        ok = check_nodes(settings, Console())
    elif tiny:
        import tempfile

        from prorl_nemo.shrink import shrink
        from prorl_nemo.training.check import run_check

        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            small, left_out = shrink(settings, Path(folder))
            for line in left_out:
                Console().print(line, markup=False, soft_wrap=True)
            ok = run_check(small, json_file)
    else:
        from prorl_nemo.training.check import run_check

        ok = run_check(settings, json_file)
    raise typer.Exit(0 if ok else 1)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs; whole nodes of 8 where there are more.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200 or gb200.")] = "h100",
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
    settings = _recipe(recipe, overrides)
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
    step: _Step = None,
    evaluation: _Evaluations = None,
    licence: _Licence = None,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Load it in transformers and vLLM, and compare.")
    ] = False,
) -> None:
    """A step of a run as a Hugging Face model: weights, tokenizer, card, log, recipe."""
    from prorl_nemo.export import chosen_step, export_step
    from prorl_nemo.publishing.folder import add_evaluations, add_training, write_card

    done = export_step(run, out, chosen_step(run, step) if step else None)
    add_training(out, run)
    add_evaluations(out, evaluation or [])
    write_card(out, licence)
    print(f"step {done} of {run}: {out}")
    if self_check:
        from prorl_nemo.publishing.self_check import check_export

        raise typer.Exit(0 if check_export(out, run, Console()) else 1)


@app.command()
def publish(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What prorl export wrote, or a run directory.")
    ],
    repo: Annotated[str, typer.Option(help="ORG/NAME on the hub.")],
    step: _Step = None,
    tag: Annotated[str | None, typer.Option(help="Revision; default: step-NNNNNN.")] = None,
    public: Annotated[bool, typer.Option("--public", help="For everybody to see.")] = False,
    evaluation: _Evaluations = None,
    licence: _Licence = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every file and the card; send nothing.")
    ] = False,
) -> None:
    """Upload an exported model with its card to the hub: private, tagged with its step."""
    from prorl_nemo.publishing.publish import prepare, send, show

    ready = prepare(folder, repo, step, tag, evaluation or [], licence)
    if dry_run:
        show(ready, not public, Console())
        return
    print(f"published: {send(ready, private=not public)}")


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A run's folder, a model's folder, a hub name, smollm2-135m-instruct, or the URL "
            "of an OpenAI-compatible server.",
        ),
    ] = None,
    step: _Step = None,
    protocol: Annotated[
        str | None, typer.Option(help="Name under eval/protocols, or a file; default: prorl.")
    ] = None,
    benchmarks: Annotated[
        str, typer.Option("--benchmarks", "--suite", help="Names, comma between; default: all.")
    ] = "",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the files of the data sets.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The evaluation's folder; default: evals/MODEL-PROTOCOL.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Of each item, in place of the protocol's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of each benchmark, a fixed random subset.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Another response limit.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="Another temperature.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Another top-p.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all samples.")] = 0,
    engines: Annotated[
        int | None, typer.Option(min=1, help="vLLM engines; default: one a GPU, one on CPU.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16 or fp32; default: bf16 on GPUs, fp32 on CPU.")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option(help="Results do not depend on the number of engines; without, faster.")
    ] = True,
    max_sequences: Annotated[
        int, typer.Option(min=1, help="Responses an engine computes at once.")
    ] = 256,
    engine_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads each.")] = None,
    kv_cache_mib: Annotated[
        int | None, typer.Option(min=1, help="KV cache of an engine; default: 512 on CPU.")
    ] = None,
    gpu_memory_share: Annotated[
        float, typer.Option(min=0.05, max=1, help="Of a GPU, for an engine.")
    ] = 0.9,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, max=64, help="GPUs of an engine; on CPU, processes.")
    ] = 1,
    served_model: Annotated[
        str | None, typer.Option(help="Name of the model on a server that has several.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=4096, help="Requests to a server at once.")
    ] = 32,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Graders; default: half of the cores.")
    ] = None,
    sandbox: _Sandbox = "auto",
    allow_unsafe: _AllowUnsafe = False,
    reported_as: Annotated[
        str | None, typer.Option(help="The model's name in eval/reported, if it is there.")
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Show the reported numbers of this model; may be given again."),
    ] = None,
    definitions: Annotated[Path | None, typer.Option(help="Folder in the place of eval/.")] = None,
    regrade: Annotated[
        Path | None, typer.Option(help="Grade this evaluation's samples again; no model.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Paired test of two evaluations; no model."),
    ] = None,
) -> None:
    """Measure a model on benchmarks, beside the reported numbers; resumes where it stopped."""
    console = Console()
    _check_sandbox(sandbox, allow_unsafe)
    if sum(chosen is not None for chosen in (model, regrade, compare)) != 1:
        raise UserError("prorl eval: give a MODEL, or --regrade DIR, or --compare DIR DIR")
    if precision not in ("bf16", "fp32", None):
        raise UserError(f"--precision: {precision!r} is none; use bf16 or fp32")
    from prorl_nemo.evaluation.suite import DEFINITIONS, Changes
    from prorl_nemo.harness.outputs import show_comparison, show_results

    where = definitions or DEFINITIONS
    if compare is not None:
        from prorl_nemo.harness import again

        show_comparison(*again.compare(*compare), console)
        return
    if regrade is not None:
        from prorl_nemo.harness import again

        results, changed = again.regrade(
            regrade,
            protocol=protocol,
            definitions=where,
            workers=workers,
            sandbox=sandbox,
            reported_as=reported_as,
            beside=beside or [],
        )
        show_results(results, str(regrade), console)
        console.print(f"{changed} verdicts changed")
        return
    assert model is not None
    from prorl_nemo.harness.evaluate import Request
    from prorl_nemo.harness.evaluate import evaluate as run
    from prorl_nemo.harness.fleet_generator import EngineOptions

    request = Request(
        model=model,
        protocol=protocol or "prorl",
        benchmarks=[name.strip() for name in benchmarks.split(",") if name.strip()],
        step=step,
        data_dir=data_dir,
        out=out,
        changes=Changes(samples, limit, max_tokens, temperature, top_p),
        seed=seed,
        definitions=where,
        engines=EngineOptions(
            engines,
            precision,
            batch_invariant,
            max_sequences,
            engine_threads,
            kv_cache_mib,
            gpu_memory_share,
            tensor_parallel,
        ),
        served_model=served_model,
        concurrency=concurrency,
        workers=workers,
        sandbox=sandbox,
        reported_as=reported_as,
        beside=beside or [],
    )
    outcome = run(request, console)
    if outcome.results is None:
        print(f"{outcome.folder}: stopped; the same command goes on")
        raise typer.Exit(3)
    show_results(outcome.results, f"{model} under {request.protocol}", console)
    print(f"results: {outcome.folder / 'results.html'}")


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
    sandbox: _Sandbox = "auto",
    allow_unsafe: _AllowUnsafe = False,
) -> None:
    """Grade a file of responses and say what the graders said."""
    _check_sandbox(sandbox, allow_unsafe)
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
    settings = _recipe(recipe, overrides)
    from prorl_nemo.data.build import build
    from prorl_nemo.data.build_summary import summary

    console = Console()
    manifest = build(settings, console)
    console.print(summary(manifest))


def _recipe(path: Path, overrides: list[str] | None) -> Recipe:
    from prorl_nemo.recipe import load_recipe  # Here, as all that takes a second to import.

    return load_recipe(path, overrides or [])


def _check_sandbox(sandbox: str, allow_unsafe: bool) -> None:
    if sandbox == "none" and not allow_unsafe:
        raise UserError(
            "--sandbox: none runs code that a model wrote with your rights; use auto, or add "
            "--allow-unsafe"
        )


def _check_writable(option: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    app()
