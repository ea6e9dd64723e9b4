"""A weight update must be exactly the tensors of the model. vLLM only logs a missing one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prorl_nemo.errors import UserError


class EngineError(RuntimeError):
    """The engine cannot go on: replace it."""


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a Hugging Face folder, from its safetensors headers.

    A tied output head stored beside the embedding is left out.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    if not shapes:
        raise UserError(f"{folder}: no safetensors file with weights")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("tie_word_embeddings", False):
        shapes.pop("lm_head.weight", None)
    return shapes


class CompleteWeights:
    """Checks the tensors of one update against those of the model.

    vLLM only logs a missing tensor. And unless `lm_head.weight` is sent, it silently keeps the old
    packed head of a tied model: where `shapes` has no head, the embedding is passed on as one.

    Args:
        shapes: of every tensor, by name; see `checkpoint_shapes`.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._missing = dict(shapes)
        self._embedding: Any = None

    def checked(self, named_tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Pass on some of the tensors.

        Raises:
            EngineError: one is unknown, sent twice or of a wrong shape.
        """
        for name, tensor in named_tensors:
            if name == "lm_head.weight" and name not in self._shapes:
                continue
            expected = self._missing.pop(name, None)
            if expected is None:
                raise EngineError(f"{name}: sent twice, or not a tensor of the model")
            if tuple(tensor.shape) != expected:
                raise EngineError(f"{name}: shape {tuple(tensor.shape)}, expected {expected}")
            if name == "model.embed_tokens.weight":
                self._embedding = tensor
            yield name, tensor

    def rest(self) -> Iterator[tuple[str, Any]]:
        """What is to follow the last of them.

        Raises:
            EngineError: a tensor never came.
        """
        if self._missing:
            names = ", ".join(self._missing)[:200]
            raise EngineError(f"{len(self._missing)} tensors never arrived: {names}")
        if "lm_head.weight" not in self._shapes:
            yield "lm_head.weight", self._embedding


def complete_weights(
    named_tensors: Iterable[tuple[str, Any]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Any]]:
    """All tensors of an update, as `CompleteWeights` passes them on."""
    complete = CompleteWeights(shapes)
    yield from complete.checked(named_tensors)
    yield from complete.rest()
