"""A plan on the terminal."""

from __future__ import annotations

from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prorl_nemo.planning.hardware import GIB
from prorl_nemo.planning.layouts import EQUAL, FREE_SHARE, RECOMPUTE, RUNTIME, Layout, room
from prorl_nemo.planning.memory import trainer_memory
from prorl_nemo.planning.plan import Plan

# Column, what it is, fields of StepTime.
_PHASES = (
    ("gen", "generation", ("generation",)),
    ("logp", "old and reference log-probs", ("old_logprobs", "reference")),
    ("upd", "updates", ("updates",)),
    ("sync", "weights to engines", ("weights",)),
    ("val", "validation", ("validation",)),
)


def show(plan: Plan, console: Console, most: int = 8) -> None:
    """Memory, layouts (at most so many that fit, and that do not), time by stage, GPU-hours."""
    recipe, gpu, assumed = plan.recipe, plan.gpu, plan.assumed
    console.print(
        f"{escape(recipe.name)}: {plan.spec.parameters / 1e9:.2f}B parameters on {plan.gpus} x "
        f"{gpu.name} of {gpu.memory / GIB:.0f} GiB, a trainer rank and an engine on each"
    )
    console.print(
        f"assumed: mean response {assumed.mean_response:.2f} of the limit, keep rate "
        f"{assumed.keep_rate:.2f}, mean prompt {assumed.prompt_tokens(recipe):.0f} tokens"
    )
    if plan.own and not plan.own.fits:
        console.print(f"[red]the recipe as it is does not fit:[/] {escape(plan.own.reason)}")
    elif plan.own is None:
        console.print(
            f"the recipe has {recipe.policy.ranks} trainer ranks, not {plan.gpus}; planned with "
            "the best layout below"
        )
    layout = plan.chosen or plan.own or plan.layouts[0]
    if layout.memory:
        console.print(_memory(plan, layout))
    console.print(_layouts(plan, most))
    _refusals(plan, console, most)
    if not plan.chosen:
        console.print("[red]no layout fits:[/] more GPUs, or less rollout.gpu_memory_share")
        return
    console.print(_stages(plan))
    low, high = plan.gpu_hours_range
    console.print(
        f"whole recipe: about {plan.gpu_hours:,.0f} GPU-hours, "
        f"{plan.gpu_hours / plan.gpus / 24:,.1f} days; {low:,.0f} to {high:,.0f} if it is as far "
        "off as for published runs (docs/planning.md): time a few steps before you reserve",
        soft_wrap=True,
    )
    changes = plan.chosen.overrides(recipe)
    if changes:
        console.print("run it with: " + escape(" ".join(changes)), soft_wrap=True)


def _memory(plan: Plan, layout: Layout) -> Table:
    """By part, of the layout with each recomputation."""
    title = f"GiB a GPU: {layout.policy.layout}, rows of {layout.row.tokens:,} tokens, by recompute"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    memories = []
    for recompute in RECOMPUTE:
        policy = layout.policy.model_copy(update={"recompute": recompute})
        memories.append(trainer_memory(plan.spec, policy, layout.row))
        mark = "*" if recompute == layout.policy.recompute else ""
        table.add_column(recompute + mark, justify="right")
    names = ("weights", "gradients", "optimizer", "fp8", "activations", "working")
    labels = {
        "fp8": "FP8 copies of weights",
        "working": "backward pass and log-prob blocks",
        "optimizer": "distributed optimizer",
    }
    for name in names:
        values = [getattr(memory, name) for memory in memories]
        if any(values):
            table.add_row(labels.get(name, name), *(_gib(v) for v in values))
    table.add_row("trainer at its peak", *(_gib(m.peak) for m in memories), style="bold")
    engine = plan.engine
    for label, value in (
        ("engine weights", engine.weights),
        ("engine activations and graphs", engine.activations),
        ("KV cache", engine.kv_cache),
        ("CUDA and NCCL", RUNTIME),
        ("kept free", int(FREE_SHARE * plan.gpu.memory)),
    ):
        table.add_row(label, *[_gib(value)] * len(memories))
    if engine.sleeps:
        freed = engine.total - engine.beside_updates
        table.add_row("freed by the sleeping engine", *[_gib(-freed)] * len(memories))
    left = room(plan.gpu, engine)
    table.add_row("left over", *(_gib(left - m.peak) for m in memories), style="bold")
    table.add_row("host memory: reference, checkpoint", *(_gib(m.host) for m in memories))
    return table


def _layouts(plan: Plan, most: int) -> Table:
    fitting = [layout for layout in plan.layouts if layout.fits]
    table = Table(
        title=f"{len(fitting)} of {len(plan.layouts)} layouts fit, best first: within "
        f"{EQUAL:.0%} of each other's time, the fewest ranks a model",
        title_justify="left",
    )
    for name in ("layout", "recompute", "row", "trainer GiB", "step s"):
        table.add_column(name, justify="left" if name in ("layout", "recompute") else "right")
    for layout in fitting[:most]:
        assert layout.memory and layout.time
        table.add_row(
            layout.policy.layout,
            layout.policy.recompute,
            f"{layout.row.tokens:,}",
            _gib(layout.memory.peak),
            f"{layout.time.total:,.0f}",
        )
    return table


def _refusals(plan: Plan, console: Console, most: int) -> None:
    """Each reason once, with the layouts it holds for."""
    reasons: dict[str, list[str]] = {}
    for layout in plan.layouts:
        if not layout.fits:
            reasons.setdefault(layout.reason, []).append(layout.policy.layout)
    if reasons:
        console.print(f"{sum(map(len, reasons.values()))} layouts do not fit:")
    for reason, names in list(reasons.items())[:most]:
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        console.print(f"  {'; '.join(names[:2])}{more}: {escape(reason)}", soft_wrap=True)
    if len(reasons) > most:
        console.print(f"  {len(reasons) - most} more reasons: --json FILE has all")


def _stages(plan: Plan) -> Table:
    phases = ", ".join(f"{column} {what}" for column, what, _ in _PHASES)
    table = Table(title=f"seconds a step ({phases})", title_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = 0, False
    columns = [column for column, _, _ in _PHASES]
    for name in ("stage", "steps", "limit", *columns, "step", "GPU-h/step", "GPU-h"):
        left = name == "stage"
        table.add_column(name, justify="left" if left else "right", no_wrap=not left)
    for stage in plan.stages:
        seconds = asdict(stage.time)
        table.add_row(
            escape(stage.name),
            f"{stage.steps:,}",
            f"{stage.limit:,}",
            *(f"{sum(seconds[name] for name in names):,.0f}" for _, _, names in _PHASES),
            f"{stage.time.total:,.0f}",
            f"{stage.time.total * plan.gpus / 3600:.2f}",
            f"{plan.stage_hours(stage):,.0f}",
        )
    return table


def _gib(value: int) -> str:
    return f"{value / GIB:.1f}"
