"""`prorl study`: every run of a study that has no result yet, one after the other.

A result file that is there is never run again, so the folder of results, committed as they come,
is the study's state: any machine goes on with what is missing. A run that was stopped half-way
resumes from its folder below `runs/` where that is, and starts again where it is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from prorl_nemo.errors import UserError
from prorl_nemo.export import export_in_run
from prorl_nemo.model_source import resolve_model
from prorl_nemo.pretraining.run import pretrain
from prorl_nemo.recipe_pretrain import load_pretraining
from prorl_nemo.study.compact import FORMAT, Counts, compact, read_result, write_result
from prorl_nemo.study.pages import write_pages
from prorl_nemo.study.plan import Study, Variant
from prorl_nemo.study.probe import probe
from prorl_nemo.training.run import train


def run_study(study: Study, only: Iterable[str], console: Console) -> bool:
    """Run what is missing, then write figures and tables of all results there are.

    Args:
        only: names of variants; none: all.

    Returns:
        False if it was stopped; the same command goes on.

    Raises:
        UserError: an unknown variant, or whatever a run refuses.
    """
    runs = list(chosen(study, only))
    for variant, seed in runs:
        study.recipe_of(variant, seed)  # Refused now, not after hours.
    missing = [run for run in runs if read_result(study.result_file(run[0].name, run[1])) is None]
    if missing:
        console.print(f"{len(missing)} of {len(runs)} runs have no result yet")
        if pretrain(load_pretraining(study.pretraining, []), console) is None:
            return False
    for variant, seed in missing:
        if not _run(study, variant, seed, console):
            return False
        write_pages(study)
    write_pages(study)
    return True


def chosen(study: Study, only: Iterable[str]) -> Iterator[tuple[Variant, int]]:
    """Variants and seeds in the order they are run: the first seed of all, then the second ...

    So a study that is stopped early has a bit of everything.
    """
    names = set(only)
    unknown = sorted(names - {variant.name for variant in study.variants})
    if unknown:
        known = ", ".join(variant.name for variant in study.variants)
        raise UserError(f"--only: the study has no variant {', '.join(unknown)}; it has {known}")
    variants = [v for v in study.variants if not names or v.name in names]
    for place in range(max(len(variant.seeds) for variant in variants)):
        for variant in variants:
            if place < len(variant.seeds):
                yield variant, variant.seeds[place]


def _run(study: Study, variant: Variant, seed: int, console: Console) -> bool:
    recipe = study.recipe_of(variant, seed)
    console.print(f"run {recipe.name}: {recipe.total_steps} steps")
    finished, _ = train(recipe)
    if not finished:
        return False
    probes = {
        "start": _first_probe(study),
        "end": probe(
            study.main_recipe, export_in_run(recipe.run_dir, recipe.total_steps), study.probe
        ),
    }
    result = compact(recipe.run_dir, probes, study.probe.samples)
    write_result(study.result_file(variant.name, seed), result)
    return True


def _first_probe(study: Study) -> Counts:
    """Of the model all runs begin with: asked once, and kept beside the results."""
    recipe = study.main_recipe
    file = Path(study.results) / "first_model.json"
    found = read_result(file)
    if found is None:
        counts = probe(recipe, resolve_model(recipe.model), study.probe)
        found = {"format": FORMAT, "probe_samples": study.probe.samples, "counts": counts}
        write_result(file, found)
    if found["probe_samples"] != study.probe.samples:
        raise UserError(f"{file}: has {found['probe_samples']} samples of a prompt; delete it")
    counts = found["counts"]
    return counts
