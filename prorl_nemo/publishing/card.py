"""The model card: the hub's metadata, and what a reader must know before using or citing a model.

Its metadata is written by the hub's own library, so that the hub reads it (Model Cards: Mitchell
et al. 2019). Every figure is from the run's log or from results of `prorl eval`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from prorl_nemo import smollm2, tiny_arithmetic
from prorl_nemo.data.public_sources import SOURCES
from prorl_nemo.evaluation.tables import MISSING, Table, percent
from prorl_nemo.reporting.run import Run, stages, validation_scores

# Models that come under a name of ours: (name on the hub, licence).
_KNOWN = {smollm2.NAME: ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REASONING_GYM = ("Reasoning Gym", "https://github.com/open-thought/reasoning-gym", "Apache-2.0")
_NO_PROFIT = re.compile(r"-nc\b|-nc-", re.IGNORECASE)


def known_licence(about: Mapping[str, Any]) -> str | None:
    """The licence of the model that a run began with, where this project knows it."""
    return _KNOWN.get(str(about.get("model")), (None, None))[1]


def model_card(
    about: Mapping[str, Any],
    run: Run | None,
    results: Sequence[Mapping[str, Any]],
    curves: bool,
    licence: str | None = None,
) -> str:
    """The card as Markdown with its metadata in front.

    Args:
        about: of the export: run, step, model.
        run: recipe and log; None where there is none.
        results: documents of `prorl eval` on these weights.
        curves: `curves.svg` lies beside the card.
        licence: an identifier of the hub (`mit`, `cc-by-nc-4.0`); None: that of the first model.
    """
    name, step, base = f"{about['run']}", int(about["step"]), base_model(about)
    data = data_sets(run)
    parts = [
        f"# {_text(name)}, step {step}",
        f"{_base_link(base, about)} after {step} steps of reinforcement learning on rewards that "
        f"a program checks{_rules(run)}, trained with prorl_nemo.",
        _training(run),
    ]
    if curves:
        parts.append("![Held-out score by step](curves.svg)")
    parts += [_evaluation(results), _data_table(data), _LIMITS, _USE, _FILES]
    metadata = _metadata(name, base, data, results, licence or known_licence(about))
    return f"---\n{metadata.strip()}\n---\n\n" + "\n\n".join(p for p in parts if p) + "\n"


def base_model(about: Mapping[str, Any]) -> str | None:
    """The hub's name of the model that the run began with; None where it is not on the hub."""
    model = str(about.get("model", ""))
    if model in _KNOWN:
        return _KNOWN[model][0]
    repository = model.partition("@")[0]
    return repository if _HUB_NAME.fullmatch(repository) else None


def data_sets(run: Run | None) -> list[tuple[str, str, str]]:
    """(name, where, licence) of what was trained on; `where` is empty for unpublished data."""
    data = run.recipe.get("data") if run else None
    if not isinstance(data, dict):
        return []
    trained = [source for source in data.get("sources") or [] if source.get("train", True)]
    built = [source for source in trained if source.get("kind") == "built"]
    found = [_REASONING_GYM] if len(built) < len(trained) else []
    build = data.get("build") or {}
    elsewhere = {source.get("folder") for source in built} - {None, build.get("folder")}
    found += [(f"built by another recipe: {name}", "", "not stated") for name in sorted(elsewhere)]
    domains = {s.get("domain") for s in built if s.get("folder") not in elsewhere}
    for entry in build.get("sources", []) if domains else []:
        source = SOURCES.get(entry["source"])
        if source is None and "logic" in domains and _REASONING_GYM not in found:
            found.append(_REASONING_GYM)
        elif source is not None and not source.repository:  # Of any domain.
            found.append(("problems of its author's own", "", source.licence))
        elif source is not None and source.domain in domains:
            found.append((source.repository, _hub_data(source.repository), source.licence))
    return found


def _metadata(
    name: str,
    base: str | None,
    data: Sequence[tuple[str, str, str]],
    results: Sequence[Mapping[str, Any]],
    licence: str | None,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    scores = [
        EvalResult(
            task_type="text-generation",
            task_name=benchmark["domain"],
            dataset_type=benchmark["name"],
            dataset_name=benchmark["title"],
            metric_type="accuracy" if benchmark["metric"] == "avg" else "reward",
            metric_name=f"{benchmark['metric']}@{benchmark['average']['samples']} under "
            f"{document['manifest']['protocol']['label']}",
            metric_value=round(100 * benchmark["average"]["mean"], 2),
        )
        for document in results
        for benchmark in document["benchmarks"]
    ]
    card = ModelCardData(
        base_model=base,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["prorl", "reinforcement-learning", "reasoning"],
        datasets=[name for name, where, _ in data if "huggingface.co" in where] or None,
        model_name=name,
        eval_results=scores or None,
    )
    return card.to_yaml()


def _base_link(base: str | None, about: Mapping[str, Any]) -> str:
    if base:
        return f"[{base}](https://huggingface.co/{base})"
    model = str(about.get("model", "a model"))
    if model == tiny_arithmetic.NAME:
        return "The built-in test model of prorl_nemo (it knows nothing)"
    # A path says nothing to others, and may say too much.
    return f"The local model `{_text(model.rsplit('/', 1)[-1])}`"


def _rules(run: Run | None) -> str:
    """ProRL v2 is all of its rules: what a run leaves out is trained with this project as well."""
    if run is None:
        return ""
    recipe = run.recipe
    algorithm = recipe.get("algorithm", {})
    kl = algorithm.get("kl", {})
    clips = _by_stage(run, algorithm, "clip_low", "clip_high")
    cosines = _by_stage(run, recipe.get("shaping", {}), "cosine")
    resets = _by_stage(run, recipe, "reference_reset")
    causes = ("interval", "kl_factor", "stalled_evaluations", "triggers")
    v2 = (
        algorithm.get("advantage") == "reinforce_plus_plus_baseline"
        and all(low < high for low, high in clips)
        and (kl.get("estimator") == "k2" and kl.get("coefficient", 0) > 0)
        and recipe.get("rollout", {}).get("dynamic_sampling", False)
        and any(isinstance(cosine, dict) and cosine.get("weight", 0) > 0 for (cosine,) in cosines)
        and any(reset and reset.get(cause) for (reset,) in resets for cause in causes)
    )
    return ", by the rules of ProRL v2" if v2 else ""


def _by_stage(run: Run, section: Mapping[str, Any], *keys: str) -> list[tuple[Any, ...]]:
    """Settings of each stage trained so far: its own, or those of the recipe's section."""
    trained = run.recipe.get("stages", [])[: max(1, len(stages(run)))]
    return [
        tuple(section.get(key) if stage.get(key) is None else stage[key] for key in keys)
        for stage in trained
    ]


def _training(run: Run | None) -> str:
    if run is None:
        return "The log of the training is not part of this folder."
    recipe = run.recipe
    rollout, algorithm = recipe.get("rollout", {}), recipe.get("algorithm", {})
    kl = algorithm.get("kl", {})
    optimizer = recipe.get("policy", {}).get("optimizer", {})

    def told(section: Mapping[str, Any], *keys: str) -> str:
        """What it was, stage after stage where they differ."""
        values = [", ".join(map(str, found)) for found in _by_stage(run, section, *keys)]
        return "; then ".join(value for value, _ in groupby(values))

    facts = {
        "prompts a step": rollout.get("prompts_per_step"),
        "samples of each": told(rollout, "samples_per_prompt"),
        "response limit": f"{told(rollout, 'max_response_tokens')} tokens",
        "temperature": told(rollout, "temperature"),
        "advantage": algorithm.get("advantage"),
        "clip bounds": told(algorithm, "clip_low", "clip_high"),
        "KL": f"{kl.get('estimator')}, coefficient {kl.get('coefficient')}",
        "learning rate": told(optimizer, "learning_rate"),
    }
    lines = [f"* {key}: {_text(value)}" for key, value in facts.items()]
    scores = validation_scores(run)
    held = [f"* step {step}: {mean:.3f} ± {error:.3f}" for step, mean, error in scores]
    held = held[:1] + held[1:][-1:]
    parts = ["## Training", "\n".join(lines), _stage_table(run)]
    resets = [event for event in run.events if event.get("event") == "reference_reset"]
    if resets:
        when = ", ".join(f"{event['step']} ({_text(event.get('trigger'))})" for event in resets)
        parts.append(f"Reference resets after step {when}.")
    else:
        parts.append("No reference reset.")
    if held:
        parts.append(
            "Score on held-out prompts of the training tasks, ± its standard error:\n\n"
            + "\n".join(held)
        )
    return "\n\n".join(parts)


def _stage_table(run: Run) -> str:
    rows = [
        [str(stage["name"]), f"{stage['from']} to {stage['to']}", str(stage["limit"])]
        for stage in stages(run)
    ]
    return Table("Stages", ["stage", "steps", "response limit"], rows).markdown() if rows else ""


def _evaluation(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "## Evaluation\n\nNot evaluated on public benchmarks."
    parts = ["## Evaluation"]
    for document in results:
        manifest = document["manifest"]
        protocol, sampling = manifest["protocol"], manifest["protocol"]["sampling"]
        rows = []
        for benchmark in document["benchmarks"]:
            mean = benchmark["average"]
            interval = benchmark["interval"]
            rows.append([
                benchmark["title"],
                f"{benchmark['metric']}@{mean['samples']}",
                "; ".join(benchmark["notes"]) or MISSING,
                str(mean["items"]),
                percent(mean["mean"]),
                f"{percent(interval['low'])} to {percent(interval['high'])}",
                percent(mean["error_samples"]),
                percent(benchmark["shares"]["truncated"]),
            ])  # fmt: skip
        columns = ["benchmark", "metric", "notes", "items", "score", "95 % interval",
                   "± samples", "truncated"]  # fmt: skip
        title = (
            f"Protocol {protocol['label']}: temperature {sampling['temperature']:g}, top-p "
            f"{sampling['top_p']:g}, at most {sampling['max_tokens']:,} tokens, seed "
            f"{manifest['seed']}; in percent"
        )
        parts.append(Table(title, columns, rows, left=3).markdown())
    parts.append("Beside published numbers, and every known difference to them: `evaluation/`.")
    return "\n\n".join(parts)


def _data_table(data: Sequence[tuple[str, str, str]]) -> str:
    if not data:
        return ""
    rows = [
        [f"[{_text(name)}]({where})" if where else _text(name), _text(licence)]
        for name, where, licence in data
    ]
    lines = ["## Data", "| data set | licence |\n| --- | --- |"]
    lines[1] += "".join(f"\n| {' | '.join(row)} |" for row in rows)
    bound = [name for name, _, licence in data if _NO_PROFIT.search(licence)]
    if bound:
        lines.append(f"{', '.join(bound)}: no commercial use.")
    return "\n\n".join(lines)


def _hub_data(repository: str) -> str:
    return f"https://huggingface.co/datasets/{repository}"


def _text(value: Any) -> str:
    """A value that is no markup and stays on its line."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


_LIMITS = """## Limits

* Trained on rewards that a program can check. Nothing was done about facts, safety or style beyond
  what the first model learned.
* Scores hold for the protocol beside them; another prompt, limit or temperature gives others.
* Code that the model writes should run in a sandbox only."""

_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # or the name of this repository
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
chat = [{"role": "user", "content": "What is 7 times 8?"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=512)
print(tokenizer.decode(answer[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""

_FILES = """## Files

`training/` holds the resolved recipe and the log of every step; `prorl_export.json` says which
checkpoint the weights are; `evaluation/` holds the results with their protocols."""
