"""`prorl export`: a step of a run as a Hugging Face folder that transformers and vLLM load.

Weights come from the checkpoint, tensor by tensor, into sharded safetensors; configuration,
tokenizer, chat template and generation settings are those of the model the run began with.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prorl_nemo.errors import ModelError, UserError
from prorl_nemo.megatron.layout import read_model_spec
from prorl_nemo.megatron.stored_weights import stored_weights
from prorl_nemo.model_source import EXPORT_RECORD, check_model_folder, resolve_model
from prorl_nemo.recipe import load_recipe
from prorl_nemo.training.run_state import MANIFEST, Checkpoints, DamagedCheckpoint

SHARD_BYTES = 4 << 30
"""A model of 1.5B parameters is one file; larger ones load several at a time."""

# What of the first model's folder is the trained model's as well, unchanged.
_KEPT = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def export_step(
    run_dir: Path, out: Path, step: int | None = None, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a checkpoint's policy to `out` as a Hugging Face folder. Returns its step.

    Written aside and renamed, so `out` is a whole model or is not there. The run may be training
    meanwhile, unless it deletes the checkpoint.

    Args:
        run_dir: a run's folder.
        out: new, or an empty folder.
        step: the checkpoint's; the newest if None.
        shard_bytes: a file of weights is no larger, unless a single tensor is.

    Raises:
        UserError: no such run or step, a folder that is taken, or a checkpoint that is damaged.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir}: no run directory (it has no recipe.yaml)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} is not an empty folder; give a new one")
    recipe = load_recipe(run_dir / "recipe.yaml")
    checkpoints = Checkpoints(run_dir / "checkpoints", recipe.checkpoint.keep_last)
    step = _chosen(checkpoints.steps(), step, run_dir)
    try:
        checkpoints.verify(step)
    except DamagedCheckpoint as reason:
        raise _damaged(checkpoints.path(step), reason) from None
    precision = recipe.policy.precision
    about = {
        "run": recipe.name,
        "step": step,
        # Of a folder its name only: the path is nobody else's business.
        "model": Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model,
        "recipe_fingerprint": recipe.fingerprint,
        "checkpoint_sha256": checkpoint_sha256(run_dir, step),
    }
    source = resolve_model(recipe.model)
    write_model(checkpoints.path(step) / "policy", source, out, precision, about, shard_bytes)
    return step


def write_model(
    policy: Path,
    source: Path,
    out: Path,
    precision: str,
    about: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The weights of `policy/` of a checkpoint, with everything else from `source`, as `out`.

    Args:
        precision: bf16 or fp32, that of the weights.
        about: written beside them, see `EXPORT_RECORD`.

    Raises:
        UserError: the folder cannot be written, or the checkpoint is of another model.
    """
    weights = stored_weights(policy, read_model_spec(source))
    aside = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for pattern in _KEPT:
            for file in source.glob(pattern):
                shutil.copyfile(file, aside / file.name)
        shapes = _write_weights(weights, aside, shard_bytes)
        _write_config(source, aside, "bfloat16" if precision == "bf16" else "float32")
        (aside / EXPORT_RECORD).write_text(json.dumps(about, indent=1) + "\n")
        check_model_folder(aside)
        _check_shapes(shapes, aside)
        aside.replace(out)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def chosen_step(run_dir: Path, step: str | int | None) -> int:
    """The checkpoint that `last` (or None), `best` of the validations, or a number means.

    Raises:
        UserError: there is none of it; the message names those there are.
    """
    checkpoints = Checkpoints(run_dir / "checkpoints", 1)
    steps = checkpoints.steps()
    if not steps or step in (None, "last"):
        return _chosen(steps, None, run_dir)
    if step == "best":
        try:
            step = checkpoints.read_state(steps[-1])["resets"]["best_step"]
        except DamagedCheckpoint as reason:
            raise _damaged(checkpoints.path(steps[-1]), reason) from None
        if step is None:
            raise UserError(f"--step: {run_dir} has not been validated; there is no best step")
    if not str(step).isdecimal():
        raise UserError(f"--step: {step!r} is no step; use last, best or a number")
    return _chosen(steps, int(step), run_dir)


def export_in_run(run_dir: Path, step: int) -> Path:
    """The export of a checkpoint in the run's own `exports/`, made unless it is there.

    Raises:
        UserError: as `export_step`, or the folder there is of another checkpoint.
    """
    folder = run_dir / "exports" / f"step_{step:06d}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        export_step(run_dir, folder, step)
        return folder
    try:
        about = json.loads((folder / EXPORT_RECORD).read_text(encoding="utf-8"))
        same = about["checkpoint_sha256"] == checkpoint_sha256(run_dir, step)
    except (OSError, ValueError, KeyError):
        same = False
    if not same:
        raise UserError(f"{folder}: no export of the checkpoint that the run has now; delete it")
    check_model_folder(folder)
    return folder


def checkpoint_sha256(run_dir: Path, step: int) -> str:
    """Of a checkpoint's manifest, which holds the sums of all its files."""
    manifest = run_dir / "checkpoints" / f"step_{step:06d}" / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


def _chosen(steps: list[int], step: int | None, run_dir: Path) -> int:
    if not steps:
        raise UserError(f"{run_dir}: has no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(
            f"--step: {run_dir} has no checkpoint of step {step}, but of "
            f"{', '.join(map(str, steps))}"
        )
    return steps[-1] if step is None else step


def _damaged(checkpoint: Path, reason: DamagedCheckpoint) -> UserError:
    return UserError(f"{checkpoint}: damaged ({reason}); choose another step with --step=NUMBER")


def _write_weights(
    weights: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int
) -> dict[str, tuple[int, ...]]:
    """Safetensors files of at most `shard_bytes`, with an index if several. Returns the shapes."""
    shards: list[list[str]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    total, held = 0, dict[str, Tensor]()

    def flush() -> None:
        save_file(held, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in weights:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
        shapes[name] = tuple(tensor.shape)
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return shapes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return shapes


def _write_config(source: Path, folder: Path, precision: str) -> None:
    """The first model's config, but for the type of the weights."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # transformers 5 writes `dtype`; version 4 and older engines read `torch_dtype`.
    config.pop("dtype", None)
    config |= {"torch_dtype": precision, "dtype": precision}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if not (folder / "generation_config.json").exists():
        from transformers import AutoConfig, GenerationConfig

        GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).save_pretrained(
            folder
        )


def _check_shapes(found: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Nothing may be missing or over, by what transformers makes of the config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    # A tied head is one parameter under the embedding's name.
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = sorted(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
    if wrong:
        raise ModelError(
            f"model: {', '.join(wrong[:3])} of the checkpoint and of the model's config differ; "
            "the checkpoint is damaged or of another model"
        )
