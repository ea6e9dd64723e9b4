"""Mismatch figures: by hand, and against loops."""

from __future__ import annotations

import math

import pytest
import torch

from prorl_nemo.algorithms.mismatch import mismatch_by_position, mismatch_metrics


def test_agreement() -> None:
    logprobs = torch.tensor([-1.0, -2.5, 0.0])
    found = mismatch_metrics(logprobs, logprobs.clone())
    assert found == {
        "mean_abs": 0.0,
        "p99": 0.0,
        "token_mult_prob_error": 1.0,
        "gen_kl": 0.0,
    }


def test_by_hand() -> None:
    """The trainer finds one token twice and one half as likely as the engine did."""
    old = torch.tensor([math.log(2.0), -math.log(2.0)], dtype=torch.float64)
    found = mismatch_metrics(old, torch.zeros(2).double())
    # float64 logarithms.
    assert found["mean_abs"] == pytest.approx(math.log(2), rel=1e-12)
    assert found["p99"] == pytest.approx(math.log(2), rel=1e-12)
    assert found["token_mult_prob_error"] == pytest.approx(2.0, rel=1e-12)
    assert found["gen_kl"] == pytest.approx((2 - 1 + 0.5 - 1) / 2, rel=1e-12)


def test_against_slow_reference() -> None:
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(257, generator=generator, dtype=torch.float64)
    engine = old + 0.3 * torch.randn(257, generator=generator, dtype=torch.float64)
    found = mismatch_metrics(old, engine)
    d = [a - b for a, b in zip(old.tolist(), engine.tolist(), strict=True)]
    assert found["mean_abs"] == pytest.approx(math.fsum(map(abs, d)) / 257, rel=1e-12)
    # Nearest rank: the smallest value that at least 99 % of 257 (255 values) do not exceed.
    assert found["p99"] == sorted(map(abs, d))[254]
    mult = math.fsum(math.exp(abs(x)) for x in d) / 257
    assert found["token_mult_prob_error"] == pytest.approx(mult, rel=1e-12)
    kl = math.fsum(math.exp(x) - 1 - x for x in d) / 257
    assert found["gen_kl"] == pytest.approx(kl, rel=1e-12)


def test_gen_kl_estimates_engine_against_trainer() -> None:
    """Enumerated over a categorical that the engine samples from, it is KL(engine || trainer)."""
    engine = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).log_softmax(-1)
    trainer = torch.tensor([0.5, 0.4, -0.6], dtype=torch.float64).log_softmax(-1)
    mean = sum(
        math.exp(e) * mismatch_metrics(t[None], e[None])["gen_kl"]
        for t, e in zip(trainer, engine, strict=True)
    )
    exact = (engine.exp() * (engine - trainer)).sum().item()
    assert mean == pytest.approx(exact, abs=1e-14)


def test_one_token_in_a_hundred() -> None:
    """A single outlier in 100 tokens is not yet the 99th percentile, two are."""
    old = torch.zeros(100)
    for outliers, expected in ((1, 0.0), (2, 1.0)):
        engine = torch.zeros(100)
        engine[:outliers] = 1.0
        assert mismatch_metrics(old, engine)["p99"] == expected


def test_hopeless_engine_stays_finite() -> None:
    found = mismatch_metrics(torch.tensor([0.0]), torch.tensor([-1000.0]))
    assert all(math.isfinite(value) for value in found.values())


def test_positions() -> None:
    old = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6], dtype=torch.float64)
    found = mismatch_by_position(
        old, torch.zeros(5).double(), torch.tensor([0, 127, 128, 20000, 8192])
    )
    assert list(found) == ["0-127", "128-1023", "8192+"]
    # float64 means of one or two numbers.
    assert list(found.values()) == pytest.approx([0.15, 0.4, 1.2], rel=1e-12)
    assert mismatch_by_position(old, old, torch.arange(5), edges=[]) == {"0+": 0.0}


def test_refusals() -> None:
    good = torch.zeros(3)
    with pytest.raises(ValueError, match="finite"):
        mismatch_metrics(good, good * math.nan)
    with pytest.raises(ValueError, match="at least one token"):
        mismatch_metrics(good[:0], good[:0])
    with pytest.raises(ValueError, match="float16"):
        mismatch_metrics(good.half(), good)
    with pytest.raises(ValueError, match="one shape"):
        mismatch_by_position(good, good, torch.arange(4))
    for edges in ([0, 5], [5, 5], [5, 3]):
        with pytest.raises(ValueError, match="ascend"):
            mismatch_by_position(good, good, torch.arange(3), edges)
