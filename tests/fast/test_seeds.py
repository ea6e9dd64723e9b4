"""The seed of a sample is a function of what the sample is."""

from __future__ import annotations

from prorl_nemo.rollout.seeds import continuation_seed, sample_seed


def test_seeds_are_pinned_and_distinct() -> None:
    # A resumed run, maybe on another machine and version, must draw what the first would have.
    assert sample_seed(1, "reasoning_gym/chain_sum/17", 0, 3) == 6983535798115441443
    seeds = {
        sample_seed(run, prompt, epoch, index)
        for run in (1, 2, 11)
        for prompt in ("a", "a1", "a11", 'a"', "b")
        for epoch in (0, 1, 10)
        for index in range(16)
    }
    assert len(seeds) == 3 * 5 * 3 * 16
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_continued_sample_draws_other_numbers() -> None:
    """The same seed again would draw the next token with the random numbers of the first one."""
    seed = sample_seed(1, "a", 0, 0)
    seeds = {seed, *(continuation_seed(seed, tokens) for tokens in range(1, 50))}
    assert len(seeds) == 50
    assert all(0 <= other < 2**63 for other in seeds)
