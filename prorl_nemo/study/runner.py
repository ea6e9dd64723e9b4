"""`prorl study`: every run of a study that has no result yet, one after the other.

A result file that is there is never run again, so the folder of results, committed as they come,
is the study's state: any machine goes on with what is missing. A run that was stopped half-way
resumes from its folder below `runs/` where that is, and starts again where it is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from prorl_nemo.errors import UserError
from prorl_nemo.export import chosen_step, export_in_run
from prorl_nemo.recipe import Recipe
from prorl_nemo.study.compact import FORMAT, Counts, compact, read_result, write_result
from prorl_nemo.study.first_model import FirstModel, first_model, hold
from prorl_nemo.study.pages import write_pages
from prorl_nemo.study.plan import Study, Variant
from prorl_nemo.study.probe import probe
from prorl_nemo.study.results import read_results, sha256_of
from prorl_nemo.training.metrics import EVENTS, read_rows
from prorl_nemo.training.run import train
from prorl_nemo.training.stopping import StopWatch

FIRST_PROBE = "first_model.json"


def run_study(
    study: Study, only: Iterable[str], console: Console, seeds: Iterable[int] = ()
) -> bool:
    """Run what is missing, then write figures and tables of all results there are.

    A run that cannot be finished does not keep the others from being made.

    Args:
        only: names of variants; none: all.
        seeds: of the runs; none: all. Several machines share a study by variants and seeds.

    Returns:
        False if it was stopped; the same command goes on.

    Raises:
        UserError: an unknown variant, results that do not belong together, or at the end: runs
            that could not be finished, and why.
    """
    runs = list(chosen(study, only, seeds))
    for variant, seed in runs:
        study.recipe_of(variant, seed)  # Refused now, not after hours.
    done = read_results(study, sha256_of(study))
    missing = [run for run in runs if run[1] not in done.get(run[0].name, {})]
    failed = []
    if missing:
        console.print(f"{len(missing)} of {len(runs)} runs have no result yet")
        model = first_model(study, console)
        if model is None:
            return False
        for variant, seed in missing:
            if study.result_file(variant.name, seed).exists():
                continue  # Another process that shares the study has made it since.
            try:
                if not _run(study, variant, seed, model, console):
                    return False
            except UserError as error:
                if _was_stopped(study.recipe_of(variant, seed).run_dir):
                    raise  # In no time to save; or engines die, as they would in the next run.
                failed.append(f"{variant.name}, seed {seed}: {error}")
                console.print(failed[-1], markup=False, soft_wrap=True)
                continue
            write_pages(study)
    write_pages(study)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(missing)} runs were not finished; the same command tries them "
            "again\n" + "\n".join(failed)
        )
    return True


def chosen(
    study: Study, only: Iterable[str], seeds: Iterable[int] = ()
) -> Iterator[tuple[Variant, int]]:
    """Variants and seeds in the order they are run: the first seed of all, then the second ...

    So a study that is stopped early has a bit of everything.
    """
    names = set(only)
    unknown = sorted(names - {variant.name for variant in study.variants})
    if unknown:
        known = ", ".join(variant.name for variant in study.variants)
        raise UserError(f"--only: the study has no variant {', '.join(unknown)}; it has {known}")
    variants = [v for v in study.variants if not names or v.name in names]
    wanted = set(seeds)
    strange = wanted - {seed for variant in variants for seed in variant.seeds}
    if strange:
        raise UserError(f"--seed: no variant that is to be run has seed {min(strange)}")
    for place in range(max(len(variant.seeds) for variant in variants)):
        for variant in variants:
            if place < len(variant.seeds) and (not wanted or variant.seeds[place] in wanted):
                yield variant, variant.seeds[place]


def _run(study: Study, variant: Variant, seed: int, model: FirstModel, console: Console) -> bool:
    """One run to its result; False if it was stopped."""
    recipe = study.recipe_of(variant, seed)
    console.print(f"run {recipe.name}: {recipe.total_steps} steps")
    probed = variant.name in study.probe.variants
    # Before the run: a model that cannot be asked is found out now, not after hours.
    start = _first_probe(study, model, console) if probed else None
    if probed and start is None:
        return False
    hold(recipe.run_dir, model)
    finished, _ = train(recipe)
    if not finished:
        return False
    asked = None
    if probed:
        folder = export_in_run(recipe.run_dir, chosen_step(recipe.run_dir, None))
        end = _ask(study, folder, console)
        if end is None:
            return False
        asked = {
            "prompts_per_task": study.probe.prompts_per_task,
            "samples": study.probe.samples,
            "response_limit": study.main_recipe.longest_response,
            "start": start,
            "end": end,
        }
    result = compact(
        recipe.run_dir,
        recipe,
        variant=variant.name,
        seed=seed,
        model_sha256=model.sha256,
        probe=asked,
    )
    write_result(study.result_file(variant.name, seed), result)
    return True


def _was_stopped(run_dir: Path) -> bool:
    events = read_rows(run_dir / EVENTS)
    return bool(events) and events[-1]["event"] == "stopped"


def _ask(study: Study, folder: Path, console: Console) -> Counts | None:
    """See `probe`. A stop is taken up between two tasks."""
    recipe = study.main_recipe
    prompts = study.probe.prompts_per_task * len(recipe.data.sources)
    about = f"asking {folder}: {prompts} prompts, {study.probe.samples} samples of each"
    console.print(about, markup=False, soft_wrap=True)
    stop = StopWatch(recipe.faults.stop_seconds)
    with stop.listening():
        return probe(recipe, folder, study.probe, lambda: stop.should_stop(0.0) is not None)


def _first_probe(study: Study, model: FirstModel, console: Console) -> Counts | None:
    """Of the model all runs begin with: asked once, and kept beside the results."""
    file = Path(study.results) / FIRST_PROBE
    asked = _asked(study, study.main_recipe)
    found = read_result(file)
    if found is None or (found["model_sha256"], found["asked"]) != (model.sha256, asked):
        counts = _ask(study, model.folder, console)
        if counts is None:
            return None
        found = {
            "format": FORMAT,
            "model_sha256": model.sha256,
            "asked": asked,
            "counts": counts,
        }
        write_result(file, found)
    return dict(found["counts"])


def _asked(study: Study, recipe: Recipe) -> str:
    """Of everything beside the model that the counts depend on."""
    settings = {
        "data": recipe.data.model_dump(mode="json"),
        "prompts_per_task": study.probe.prompts_per_task,
        "samples": study.probe.samples,
        "response_limit": recipe.longest_response,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
