"""A step of a recipe from 8 to 4,096 GPUs: where time goes, and which part stops scaling first.

    python -m prorl_nemo.planning.simulate recipes/nemotron_1.5b/v2.yaml --gpu h100

Generation is simulated: responses with log-normal lengths take the engines' places as they become
free, in the order their prompts were drawn (rollout/dynamic_sampler.py). Trainer, reference and
weights come from step_time.py. What no roofline knows is added, because it does not shrink with
GPUs: the controller's work for a response, grading, and weights on their way to more nodes.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.megatron.layout import ModelSpec
from prorl_nemo.planning.activations import width
from prorl_nemo.planning.engine import Engine, Generation, decode_seconds
from prorl_nemo.planning.hardware import FITTED, GPUS_PER_NODE, Gpu
from prorl_nemo.planning.layouts import Layout, layouts
from prorl_nemo.planning.plan import Assumptions, checked, workload
from prorl_nemo.planning.step_time import Workload
from prorl_nemo.recipe import Recipe, load_recipe

CONTROLLER_SECONDS = 0.25e-3
"""Of one core for a response: request, result, grading handed over, filter. Measured with imagined
engines, 9,712 responses on 64 of them; Ray's messages are not in it."""
GRADING_SECONDS = 0.026
"""Core-seconds of a response: 24 of ProRL's 136 thousand prompts are code, 130 ms with 50 tests
on a machine that is busy (87 ms on an idle one), the rest 4 ms (docs/performance.md)."""
GRADERS = 48
"""Half of the cores of the controller's node."""
FLEETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGE, STOPPED = 0.10, 0.8
"""A part has stopped scaling when twice the GPUs leave it STOPPED of its time or more, and it is
LARGE of the step."""
PARTS = ("generation", "controller", "logprobs", "updates", "weights", "validation")


@dataclass(frozen=True)
class Step:
    """Seconds of one step on a fleet, by part.

    Attributes:
        ranks: GPUs that train; the rest only generate, where no layout takes all of them.
        waiting: seconds of generation in which some engine had nothing left to do.
        controller: of the controller and the graders, beyond what generation hides.
    """

    gpus: int
    ranks: int
    layout: str
    generation: float
    waiting: float
    controller: float
    logprobs: float
    updates: float
    weights: float
    validation: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)


def simulate_generation(
    work: Generation, engines: int, places: int, token_seconds: Sequence[float], seed: int = 0
) -> tuple[float, float]:
    """Seconds to the last response, and until the first engine is idle for good.

    A response decodes at the speed of its engine's batch when it starts, all places filled; near
    the end, when places stay empty, engines are faster than that.

    Args:
        places: sequences an engine decodes at once.
        token_seconds: of a token, with 1, 2, ... `places` sequences.
    """
    draw = random.Random(seed)
    sigma = math.sqrt(math.log(work.spread))
    mean = math.log(work.mean) - sigma**2 / 2
    responses = math.ceil(work.prompts) * round(work.samples)
    batch = min(places, -(-responses // engines))
    speed = token_seconds[batch - 1]
    # The second figure deals the first responses out evenly: of places that are free, that of the
    # engine that has got fewest.
    free = [(0.0, place, engine) for place in range(batch) for engine in range(engines)]
    last = [0.0] * engines
    for _ in range(responses):
        start, place, engine = heapq.heappop(free)
        end = start + min(work.limit, draw.lognormvariate(mean, sigma)) * speed
        last[engine] = max(last[engine], end)
        heapq.heappush(free, (end, place, engine))
    return max(last), min(last)


def simulate(
    recipe: Recipe,
    gpu_name: str,
    fleets: Sequence[int] = FLEETS,
    assumed: Assumptions | None = None,
) -> list[Step]:
    """A step of the recipe's last stage on each fleet; the batch stays the recipe's.

    Raises:
        UserError: naming the option or key at fault.
    """
    assumed = assumed or Assumptions()
    gpu, spec, engine = checked(recipe, min(fleets), gpu_name, assumed)
    work = workload(recipe, recipe.stages[-1], assumed)
    generation = work.generation
    places = engine.sequences(generation.prompt + generation.mean)
    context = generation.prompt + generation.mean * generation.spread / 2
    token_seconds = [
        decode_seconds(spec, engine, gpu, FITTED, batch, context) for batch in range(1, places + 1)
    ]
    found = []
    for gpus in fleets:
        layout = _largest_layout(recipe, spec, gpu, engine, work, gpus)
        if layout is None or layout.time is None:
            continue
        engines = gpus // engine.gpus
        seconds, first = simulate_generation(generation, engines, places, token_seconds)
        responses = generation.prompts * generation.samples
        serial = responses * max(CONTROLLER_SECONDS, GRADING_SECONDS / GRADERS)
        nodes = max(1, gpus // GPUS_PER_NODE)
        # Ray's copies spread from node to node: with each round there are twice as many.
        sent = spec.parameters * width(recipe.rollout.precision or recipe.policy.precision)
        spread = math.ceil(math.log2(nodes)) * sent / (gpu.network * FITTED.network)
        held_out = work.validation
        validation = 0.0
        if held_out is not None:
            per_validation = simulate_generation(held_out, engines, places, token_seconds)[0]
            validation = work.validation_share * per_validation
        found.append(
            Step(
                gpus=gpus,
                ranks=layout.policy.ranks,
                layout=layout.policy.layout,
                generation=seconds,
                waiting=seconds - first,
                controller=max(0.0, serial - seconds),
                logprobs=layout.time.old_logprobs + layout.time.reference,
                updates=layout.time.updates,
                weights=layout.time.weights + spread,
                validation=validation,
            )
        )
    return found


def _largest_layout(
    recipe: Recipe, spec: ModelSpec, gpu: Gpu, engine: Engine, work: Workload, gpus: int
) -> Layout | None:
    """The fastest trainer on as many of the GPUs as it can use: half of them, or fewer, if more
    leave data-parallel ranks without work or cut the model too fine."""
    best: Layout | None = None
    ranks = gpus
    while ranks >= 1:
        fitting = [x for x in layouts(recipe, spec, gpu, engine, work, ranks) if x.fits]
        for layout in fitting:
            if best is None or _trainer_seconds(layout) < _trainer_seconds(best):
                best = layout
        ranks //= 2
        if best is not None and ranks < best.policy.ranks // 4:
            break
    return best


def _trainer_seconds(layout: Layout) -> float:
    assert layout.time is not None
    return layout.time.old_logprobs + layout.time.reference + layout.time.updates


def stops_scaling(steps: Sequence[Step]) -> list[tuple[int, str]]:
    """(GPUs, part) of the first fleet on which each part is large and no faster than before."""
    found: dict[str, int] = {}
    for before, step in itertools.pairwise(steps):
        for part in PARTS:
            now, then = getattr(step, part), getattr(before, part)
            if now >= LARGE * step.total and now >= STOPPED * then:
                found.setdefault(part, step.gpus)
    return sorted((gpus, part) for part, gpus in found.items())


def table(steps: Sequence[Step]) -> str:
    """The rows of docs/planning.md."""
    lines = [
        "| GPUs | trainer | generation | of it waiting | controller | log-probs | updates | "
        "weights | validation | step | GPU-hours a step | efficiency |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for step in steps:
        ideal = steps[0].total * steps[0].gpus / step.gpus
        cells = [getattr(step, part) for part in PARTS]
        cells.insert(1, step.waiting)
        layout = step.layout if step.ranks == step.gpus else f"{step.layout} ({step.ranks})"
        lines.append(
            f"| {step.gpus:,} | {layout} | "
            + " | ".join(f"{cell:,.0f}" for cell in cells)
            + f" | {step.total:,.0f} | {step.total * step.gpus / 3600:.2f} | "
            f"{ideal / step.total:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--keep-rate", type=float, default=Assumptions().keep_rate)
    parser.add_argument("--mean-response", type=float, default=Assumptions().mean_response)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    assumed = Assumptions(arguments.mean_response, arguments.keep_rate)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        steps = simulate(recipe, arguments.gpu, assumed=assumed)
    except UserError as error:
        parser.error(str(error))
    print(table(steps))
    for gpus, part in stops_scaling(steps):
        print(f"at {gpus:,} GPUs {part} is a tenth of the step or more and no longer shrinks")
    if arguments.json:
        rows: list[dict[str, Any]] = [asdict(step) | {"total": step.total} for step in steps]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
