"""Rotary frequencies, plain or scaled to a longer context than the model was first made for.

Plain: Su et al., RoFormer (arXiv 2104.09864). linear: position interpolation, Chen et al.
(2306.15595). yarn: Peng et al. (2309.00071), section 3. llama3: the released Llama 3.1 code, which
interpolates as YaRN does but by wavelength. All in fp32, operation by operation as transformers
and vLLM compute them: an angle is a position times a frequency, so at position 100,000 a last
digit of the frequency is already a hundredth of a radian.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prorl_nemo.megatron.layout import RopeScaling


def inverse_frequencies(theta: float, dim: int, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair of channels, [dim / 2] fp32.

    Args:
        theta: base of the geometric series.
        dim: channels of a head.
        scaling: None for a plain model.
    """
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    plain = 1.0 / powers
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _by_wavelength(plain, scaling)
    kept = 1 - _ramp(theta, dim, scaling)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + plain * kept


def attention_scale(dim: int, scaling: RopeScaling | None) -> float | None:
    """Factor of query times key, where it is not 1 / sqrt(dim); else None.

    YaRN multiplies rotated queries and keys by a factor each, which is to multiply their
    product by its square.
    """
    if scaling is None or scaling.kind != "yarn":
        return None
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return factor**2 / math.sqrt(dim)


def _by_wavelength(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Short waves as they are, long ones stretched, a blend between the two bounds."""
    original, low, high = (
        scaling.original_positions,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    wavelength = 2 * math.pi / plain
    blend = (original / wavelength - low) / (high - low)
    between = (1 - blend) * plain / scaling.factor + blend * plain
    found = torch.where(wavelength > original / low, plain / scaling.factor, between)
    return torch.where(wavelength < original / high, plain, found)


def _ramp(theta: float, dim: int, scaling: RopeScaling) -> Tensor:
    """0 for channels that turn often in the original context, 1 for those that hardly do."""

    def channel(turns: float) -> float:
        ratio = scaling.original_positions / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # The published code's guard against a ramp of no length.
    width = high - low if high != low else 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
