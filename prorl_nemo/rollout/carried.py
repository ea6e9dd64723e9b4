"""Samples carried over, as JSON that stays small (our choice).

At full scale the surplus is millions of tokens. As lists of numbers they would be hundreds of MB
of text in each checkpoint; as base64 of fixed-size numbers they are 11 bytes a token, and exact.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from prorl_nemo.records import Sample

Carried = Mapping[tuple[str, int], Sequence[Sample]]
"""By (prompt id, epoch), the samples begun for an earlier batch, some of them unfinished."""

# Engines compute log-probs in float32: nothing is lost.
_TYPES = {"token_ids": "<i4", "engine_logprobs": "<f4"}


def carried_state(carried: Carried) -> list[dict[str, Any]]:
    """JSON-able, for `load_carried`."""
    return [
        {"prompt_id": prompt_id, "epoch": epoch, "samples": [_packed(s) for s in samples]}
        for (prompt_id, epoch), samples in carried.items()
    ]


def load_carried(state: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[Sample]]:
    """What `carried_state` was given."""
    return {
        (entry["prompt_id"], entry["epoch"]): [_unpacked(s) for s in entry["samples"]]
        for entry in state
    }


def _packed(sample: Sample) -> dict[str, Any]:
    values = {field.name: getattr(sample, field.name) for field in fields(Sample)}
    for name, kind in _TYPES.items():
        values[name] = base64.b64encode(np.asarray(values[name], dtype=kind).tobytes()).decode()
    return values


def _unpacked(state: Mapping[str, Any]) -> Sample:
    values = dict(state)
    for name, kind in _TYPES.items():
        values[name] = np.frombuffer(base64.b64decode(values[name]), dtype=kind).tolist()
    return Sample(**values)
