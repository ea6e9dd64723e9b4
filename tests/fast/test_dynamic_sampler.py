"""The sampler against a slow walk over the prompts, in simulated time."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.simulated_engine import (
    SimulatedFleet,
    SimulatedGrader,
    SimulatedPrompts,
    SimulatedVerdict,
    World,
)
from prorl_nemo.records import Sample
from prorl_nemo.rollout.carried import carried_state, load_carried
from prorl_nemo.rollout.dynamic_sampler import DynamicSampler
from prorl_nemo.rollout.filling import Filling, NoSignalError, RolloutBatch
from prorl_nemo.rollout.group_collector import GroupCollector, Sampling
from prorl_nemo.rollout.keep_rate import KeepRate, is_certain
from prorl_nemo.rollout.protocol import GenerationRequest, GenerationResult
from prorl_nemo.rollout.seeds import sample_seed

SEED = 7
SAMPLING = Sampling(samples_per_prompt=8, temperature=1.2, max_response_tokens=8192)


def responses(world: World, index: int, samples: int = 8) -> list[tuple[int, str, float]]:
    return [world.response(str(index), sample_seed(SEED, str(index), 0, i)) for i in range(samples)]


def walk(world: World, first: int, wanted: int) -> tuple[list[str], int, int]:
    """The batch by its definition: prompts one after the other until `wanted` carry signal.

    Returns the kept prompt ids, the tokens of every prompt met, and the next prompt.
    """
    kept: list[str] = []
    tokens = 0
    while len(kept) < wanted:
        group = responses(world, first)
        tokens += sum(length for length, _, _ in group)
        if statistics.pstdev(score for _, _, score in group) > 1e-6:
            kept.append(str(first))
        first += 1
    return kept, tokens, first


def sampler_in(
    world: World, engines: int = 4, **options: Any
) -> tuple[DynamicSampler, SimulatedFleet, SimulatedPrompts]:
    fleet, prompts = SimulatedFleet(world, engines, slots=64), SimulatedPrompts()
    return DynamicSampler(fleet, SimulatedGrader(), prompts, SEED, **options), fleet, prompts


def prompt_ids(batch: RolloutBatch) -> list[str]:
    return [group.prompt.prompt_id for group in batch.groups]


@pytest.mark.parametrize("engines", [1, 8])
@pytest.mark.parametrize("keep_rate", [0.9, 0.41, 0.2])
def test_batches_are_the_first_groups_with_signal(keep_rate: float, engines: int) -> None:
    world = World(keep_rate=keep_rate)
    sampler, fleet, _ = sampler_in(world, engines)
    first = 0
    for _ in range(3):
        expected, _, following = walk(world, first, 16)
        batch = sampler.sample_batch(16, SAMPLING, max_rejected_per_kept=50)
        assert prompt_ids(batch) == expected
        for group in batch.groups:
            made = responses(world, int(group.prompt.prompt_id))
            assert [len(s.token_ids) for s in group.samples] == [length for length, _, _ in made]
            assert group.scores == [score for _, _, score in made]
            assert [s.index for s in group.samples] == list(range(8))
        assert batch.rejected == following - first - 16
        assert fleet.poll(1.0) == []  # Nothing is left running.
        first = following


@pytest.mark.parametrize("keep_rate", [0.9, 0.41, 0.05])
def test_without_replacement_a_batch_is_that_of_its_prompts(keep_rate: float) -> None:
    """Sixteen prompts a step, those without signal left out; more only while none has any."""
    world = World(keep_rate=keep_rate)
    sampler, fleet, _ = sampler_in(world, replace=False)
    first = 0
    for _ in range(4):
        signal = [
            str(i)
            for i in range(first, first + 400)
            if statistics.pstdev(score for _, _, score in responses(world, i)) > 1e-6
        ]
        following = max(first + 16, int(signal[0]) + 1)
        expected = [i for i in signal if int(i) < following]
        batch = sampler.sample_batch(16, SAMPLING, max_rejected_per_kept=1000)
        assert prompt_ids(batch) == expected
        assert len(expected) + batch.rejected == following - first
        assert batch.wasted_tokens == 0
        assert fleet.poll(1.0) == []
        first = following


def test_tokens_are_counted_and_few_are_in_vain() -> None:
    world = World()
    sampler, fleet, _ = sampler_in(world, engines=8)
    first = unavoidable = generated = everything = 0
    for step in range(6):
        _, tokens, first = walk(world, first, 32)
        batch = sampler.sample_batch(32, SAMPLING)
        assert batch.generated_tokens - batch.wasted_tokens == tokens
        assert batch.trained_tokens == sum(
            len(s.token_ids) for group in batch.groups for s in group.samples
        )
        everything += batch.generated_tokens
        if step == 0:
            continue  # The keep rate is learnt here.
        unavoidable += tokens
        generated += batch.generated_tokens
    # 32 kept groups need 78 +- 11 prompts, and here all of them run at once: one deviation is
    # what cannot be known while they run. (With 256 groups a step it is a third of this.)
    assert generated / unavoidable < 1 + 11 / 78
    # The fleet counts aborted sequences in fractions of a token.
    assert fleet.generated_tokens == pytest.approx(everything, rel=1e-4)


def test_in_lockstep_nothing_depends_on_the_clock() -> None:
    """Waves are started whole, so one may hold more groups with signal than the batch takes."""
    world = World(keep_rate=0.9)
    one, many = (sampler_in(world, engines, lockstep=True)[0] for engines in (1, 8))
    first, evidence = 0, 0.0
    for _ in range(3):
        expected, _, first = walk(world, first, 16)
        batches = [sampler.sample_batch(16, SAMPLING) for sampler in (one, many)]
        assert [prompt_ids(batch) for batch in batches] == [expected, expected]
        # What is known of the keep rate ages by a fifth with each batch.
        evidence = 0.8 * (evidence + len(batches[0].decided))
        known = one.state_dict()["keep_rate"]
        assert known == many.state_dict()["keep_rate"]
        assert known["seen"][0] == pytest.approx(evidence)


def first_to_finish(world: World, wanted: int, in_flight: int) -> list[str]:
    """A batch by order of finishing, the rest thrown away: the rule we avoid."""
    prompts = SimulatedPrompts()
    fleet = SimulatedFleet(world, engines=8, slots=512)
    collector = GroupCollector(fleet, SimulatedGrader(), SEED)
    pending = collector.launch([prompts.draw() for _ in range(in_flight)], SAMPLING)
    kept: list[str] = []
    while len(kept) < wanted:
        collector.advance()
        for group in [g for g in pending if g.complete]:
            pending.remove(group)
            pending += collector.launch([prompts.draw()], SAMPLING)
            if statistics.pstdev(group.scores) > 1e-6:
                kept.append(group.prompt.prompt_id)
    return kept[:wanted]


def test_order_of_finishing_prefers_short_responses_and_prompt_order_does_not() -> None:
    world = World(limit=100_000)

    def mean_length(ids: list[str]) -> float:
        return statistics.fmean(length for i in ids for length, _, _ in responses(world, int(i)))

    population = [i for i in range(3000) if 0 < sum(r[2] for r in responses(world, i)) < 8]
    lengths = [statistics.fmean(r[0] for r in responses(world, i)) for i in population]
    truth = statistics.fmean(lengths)
    error = statistics.stdev(lengths) / 64**0.5

    sampler, _, _ = sampler_in(world, engines=8)
    ours = mean_length(prompt_ids(sampler.sample_batch(64, SAMPLING)))
    assert abs(ours - truth) < 3 * error
    theirs = mean_length(first_to_finish(world, 64, in_flight=300))
    assert theirs < 0.85 * truth
    assert theirs < truth - 3 * error


class LateGrader:
    """Verdicts from threads, in any order."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4)
        self._random = random.Random(0)

    def submit(self, request_id: str, grading: dict[str, Any], text: str) -> Future[Any]:
        delay = self._random.random() * 0.002

        def grade() -> SimulatedVerdict:
            time.sleep(delay)
            return SimulatedVerdict(float(text))

        return self._pool.submit(grade)


def test_late_verdicts_change_nothing() -> None:
    world = World()
    fleet, prompts = SimulatedFleet(world, 4, slots=64), SimulatedPrompts()
    sampler = DynamicSampler(fleet, LateGrader(), prompts, SEED)
    first = 0
    for _ in range(2):
        expected, _, first = walk(world, first, 8)
        batch = sampler.sample_batch(8, SAMPLING)
        assert prompt_ids(batch) == expected
        assert all(
            group.scores == [r[2] for r in responses(world, int(group.prompt.prompt_id))]
            for group in batch.groups
        )


def test_tallies_cover_every_prompt_decided() -> None:
    world = World()
    sampler, _, _ = sampler_in(world)
    _, _, following = walk(world, 0, 16)
    batch = sampler.sample_batch(16, SAMPLING)
    for task, tally in batch.tallies.items():
        decided = [i for i in range(following) if f"task{i % 3}" == task]
        scores = [[r[2] for r in responses(world, i)] for i in decided]
        kept = sum(0 < sum(s) < 8 for s in scores)
        assert (tally.kept, tally.rejected) == (kept, len(decided) - kept)
        assert tally.mean_score == pytest.approx(statistics.fmean(x for s in scores for x in s))
        assert tally.keep_rate == pytest.approx(kept / len(decided))


def test_a_hopeless_run_stops_with_a_table_and_an_untouched_queue() -> None:
    sampler, fleet, prompts = sampler_in(World(keep_rate=0.0))
    with pytest.raises(NoSignalError) as error:
        sampler.sample_batch(8, SAMPLING, max_rejected_per_kept=10)
    # 41 rejections: 10 for each of the 4 groups on credit, and one more.
    assert "41 groups without signal for 0 kept" in str(error.value)
    assert "task2" in str(error.value)
    assert fleet.poll(1.0) == []
    assert [prompts.draw()[0].prompt_id for _ in range(60)] == [str(i) for i in range(60)]


def test_a_pass_over_the_data_without_signal_stops() -> None:
    prompts = SimulatedPrompts(size=12)
    fleet = SimulatedFleet(World(keep_rate=0.0), 2, slots=64)
    sampler = DynamicSampler(fleet, SimulatedGrader(), prompts, SEED)
    with pytest.raises(NoSignalError, match=r"a whole pass over the data \(12 prompts\)") as error:
        sampler.sample_batch(4, SAMPLING, max_rejected_per_kept=1000)
    # When the first of them, one of four of its task, is met for the third time.
    assert re.search(r"task0 +0 of 9 ", str(error.value))


def test_a_low_keep_rate_starts_no_more_prompts_than_the_limit_allows() -> None:
    hopeless = KeepRate(4)
    for _ in range(1000):
        hopeless.observe([0.0] * 4, kept=False)
    assert hopeless.chance(0) < 0.01
    # Of 21 prompts for each kept group 20 may be rejected.
    assert Filling(16).prompts_to_start(hopeless, max_rejected_per_kept=20.0) == 16 * 21


class PickyFleet(SimulatedFleet):
    """Cannot serve prompts 3 and 4."""

    def poll(self, max_wait: float) -> list[GenerationResult]:
        return [
            replace(r, token_ids=[], logprobs=[], finish_reason="rejected", text="too long")
            if self.prompt_of[r.request_id] in (3, 4)
            else r
            for r in super().poll(max_wait)
        ]

    def submit(self, requests: Any) -> None:
        self.prompt_of = getattr(self, "prompt_of", {})
        self.prompt_of |= {r.request_id: r.prompt_token_ids[0] for r in requests}
        super().submit(requests)


def test_prompts_the_engine_cannot_serve_are_dropped_with_an_event() -> None:
    world = World(keep_rate=0.9)
    events: list[tuple[str, dict[str, Any]]] = []
    running: list[str] = []
    fleet = PickyFleet(world, 2, slots=64)

    def note(name: str, details: dict[str, Any]) -> None:
        events.append((name, details))
        running.extend(g.prompt.prompt_id for g, _ in sampler._collector._generating.values())

    sampler = DynamicSampler(fleet, SimulatedGrader(), SimulatedPrompts(), SEED, on_event=note)
    batch = sampler.sample_batch(8, SAMPLING)
    assert batch.dropped == ["3", "4"]
    # The other samples of a dropped prompt are stopped with it.
    assert running and not {"3"} & set(running)
    assert [i for i in walk(world, 0, 10)[0] if i not in "34"][:8] == prompt_ids(batch)
    assert events == [
        ("prompt_dropped", {"prompt_id": i, "reason": "too long"}) for i in ("3", "4")
    ]
    prompts = SimulatedPrompts()
    everything = sampler.sample_all([prompts.draw() for _ in range(5)], SAMPLING)
    assert [group.prompt.prompt_id for group in everything] == ["0", "1", "2"]
    assert [len(group.samples) for group in everything] == [8, 8, 8]
    assert fleet.poll(1.0) == []


class RefusingFleet(SimulatedFleet):
    """Refuses every prompt."""

    def poll(self, max_wait: float) -> list[GenerationResult]:
        return [replace(r, finish_reason="rejected", text="no") for r in super().poll(max_wait)]


def test_engines_that_refuse_every_prompt_stop_the_run() -> None:
    prompts = SimulatedPrompts()
    sampler = DynamicSampler(RefusingFleet(World(), 2, slots=64), SimulatedGrader(), prompts, SEED)
    with pytest.raises(
        NoSignalError, match=r"refuse 41 prompts for 0 groups kept .* because of: no"
    ):
        sampler.sample_batch(8, SAMPLING, max_rejected_per_kept=10)
    assert [prompts.draw()[0].prompt_id for _ in range(60)] == [str(i) for i in range(60)]


class BrokenGrader(SimulatedGrader):
    def submit(self, request_id: str, grading: dict[str, Any], text: str) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(RuntimeError("grader bug"))
        return future


def test_after_an_error_the_engine_is_idle_and_the_queue_as_before() -> None:
    fleet, prompts = SimulatedFleet(World(), 2, slots=64), SimulatedPrompts()
    with pytest.raises(RuntimeError, match="grader bug"):
        DynamicSampler(fleet, BrokenGrader(), prompts, SEED).sample_batch(4, SAMPLING)
    assert fleet.poll(1.0) == []
    assert [prompts.draw()[0].prompt_id for _ in range(30)] == [str(i) for i in range(30)]


def test_sample_all_keeps_order_and_filters_nothing() -> None:
    world = World()
    sampler, _, prompts = sampler_in(world)
    drawn = [prompts.draw() for _ in range(12)]
    groups = sampler.sample_all(drawn, Sampling(3, 0.6, 8192, top_p=0.95))
    assert [g.prompt.prompt_id for g in groups] == [str(i) for i in range(12)]
    assert [g.scores for g in groups] == [[r[2] for r in responses(world, i, 3)] for i in range(12)]


def test_progress_reaches_the_batch_size() -> None:
    seen: list[Any] = []
    sampler, _, _ = sampler_in(World(), on_progress=seen.append)
    sampler.sample_batch(8, SAMPLING)
    assert [p.kept for p in seen] == sorted(p.kept for p in seen)
    assert (seen[-1].kept, seen[-1].wanted, seen[-1].samples_running) == (8, 8, 0)


def test_certain_means_certain() -> None:
    # By hand: two scores 0 and 1, two more between them at 0.5: deviation sqrt(0.5/4) = 0.354.
    assert is_certain([0.0, 1.0], 4)
    assert not is_certain([0.5, 0.5, 0.5], 4)
    assert not is_certain([1.0], 4)
    # The bound against the worst completion: all others half-way. At a distance just below
    # sqrt(2 n) * 1e-6 that completion carries no signal, just above it does.
    for n in (2, 8, 16):
        for factor in (0.9, 1.1):
            distance = factor * 1e-6 * (2 * n) ** 0.5
            worst = [0.0, distance] + [distance / 2] * (n - 2)
            assert (statistics.pstdev(worst) > 1e-6) == (factor > 1)
            assert is_certain([0.0, distance], n) == (factor > 1)


def test_keep_rate_learns_from_decided_groups() -> None:
    rate = KeepRate(4)
    assert rate.chance(0) == pytest.approx(0.5)
    groups = [([0.0, 0.0, 1.0, 0.0], True), ([0.0] * 4, False), ([1.0] * 4, False)] * 400
    for scores, kept in groups:
        rate.observe(scores, kept)
    # One in three is kept, and still after two equal scores; none after three. The prior weighs
    # 4 groups of 1,200: less than 0.01, the tolerance here.
    assert rate.chance(0) == pytest.approx(1 / 3, abs=0.01)
    assert rate.chance(2) == pytest.approx(1 / 3, abs=0.01)
    assert rate.chance(3) == pytest.approx(0, abs=0.01)
    assert rate.chance(4) == 0
    for _ in range(60):
        rate.forget()
    assert rate.chance(0) == pytest.approx(0.5, abs=0.01)


def test_what_is_carried_over_is_not_generated_twice() -> None:
    world = World()

    def run(carry_over: bool, restart: bool) -> tuple[list[RolloutBatch], float]:
        sampler, fleet, prompts = sampler_in(world, engines=8, carry_over=carry_over)
        batches = []
        for version in range(4):
            fleet.weight_version = version
            batches.append(sampler.sample_batch(16, SAMPLING))
            if restart:
                state = json.loads(json.dumps(sampler.state_dict()))
                sampler = DynamicSampler(
                    fleet, SimulatedGrader(), prompts, SEED, carry_over=carry_over
                )
                sampler.load_state_dict(state)
        return batches, fleet.generated_tokens

    plain, _ = run(carry_over=False, restart=False)
    assert {s.weight_version for s in samples_of(plain[3])} == {3}
    for restart in (False, True):
        carried, generated = run(carry_over=True, restart=restart)
        # A second run of the same sampler knows the keep rate; a restarted one learns it anew.
        assert sum(b.wasted_tokens for b in carried) == 0
        assert {2, 3} <= {s.weight_version for s in samples_of(carried[3])}
        for one, other in zip(carried, plain, strict=True):
            assert prompt_ids(one) == prompt_ids(other)
            assert one.tallies == other.tallies
            # The imagined policy does not change, so a continued sample equals a fresh one.
            assert [replace(s, weight_version=0) for s in samples_of(one)] == [
                replace(s, weight_version=0) for s in samples_of(other)
            ]
        # Each token counts in the step that made it, none twice; an interrupted sequence loses
        # the token under way.
        assert sum(b.generated_tokens for b in carried) == pytest.approx(generated, rel=1e-3)


def test_what_the_next_batch_has_no_use_for_is_carried_further() -> None:
    """A keep rate that rises suddenly leaves more behind than the next batch begins with."""
    sampler, fleet, _ = sampler_in(World(keep_rate=0.9), engines=8, carry_over=True)
    hopeless = KeepRate(8)
    for _ in range(50):
        hopeless.observe([0.0] * 8, kept=False)
    sampler._keep_rate.load_state_dict(hopeless.state_dict())
    generated = 0
    for version in range(4):
        fleet.weight_version = version
        batch = sampler.sample_batch(4, SAMPLING)
        # All of them were begun for the first batch: 84 prompts for the first 4 with signal.
        assert {s.weight_version for s in samples_of(batch)} == {0}
        generated += batch.generated_tokens
        sampler._keep_rate = KeepRate(8)
    assert generated == pytest.approx(fleet.generated_tokens, rel=1e-3)


def samples_of(batch: RolloutBatch) -> list[Sample]:
    return [sample for group in batch.groups for sample in group.samples]


class DriftingFleet(SimulatedFleet):
    """Draws another response from the same seed with every version of the weights, but goes on
    with the one that was begun."""

    def respond(self, prompt_id: str, request: GenerationRequest) -> tuple[int, str, float]:
        self.begun = getattr(self, "begun", {})
        if not request.prefix:
            seed = hash((request.seed, self.weight_version))
            self.begun[request.seed] = self.world.response(prompt_id, seed)
        return self.begun[request.seed]


class ForgetfulFleet(DriftingFleet):
    """Loses what is unfinished when it is interrupted."""

    def interrupt(self, request_ids: Sequence[str]) -> list[GenerationResult]:
        super().interrupt(request_ids)
        return []


def test_carrying_over_prefers_no_length_and_keeping_only_finished_responses_does() -> None:
    """Two slots for 8 samples a prompt: when a batch is full, many responses are half-done."""
    world = World(median_tokens=250, sigma=0.8, limit=100_000)
    share = world.sigma / math.sqrt(2)

    def deviation(kind: type[SimulatedFleet]) -> float:
        """Log length minus its mean for the prompt, in standard errors of the mean over the
        samples trained on of prompts that once were surplus: those alone may be biased."""
        fleet, prompts = kind(world, engines=24, slots=2), SimulatedPrompts()
        sampler = DynamicSampler(fleet, SimulatedGrader(), prompts, SEED, carry_over=True)
        surplus: set[str] = set()
        found = []
        for version in range(100):
            fleet.weight_version = version
            for group in sampler.sample_batch(4, SAMPLING).groups:
                if group.prompt.prompt_id not in surplus:
                    continue
                own = random.Random(f"length {group.prompt.prompt_id}").gauss(0, share)
                for sample in group.samples:
                    log_length = math.log(len(sample.token_ids) / world.median_tokens)
                    found.append((log_length - own) / share)
            surplus = {prompt.prompt_id for prompt, _ in prompts.waiting}
        return statistics.fmean(found) * math.sqrt(len(found))

    # Seeds are fixed, so these figures are: chance would exceed 2 once in 20 choices of seeds.
    assert abs(deviation(DriftingFleet)) < 2
    assert deviation(ForgetfulFleet) < -2.5


def test_carried_samples_survive_json_to_the_last_bit() -> None:
    rng = random.Random(5)
    # What an engine gives: float32 numbers, as Python floats.
    logprobs = torch.tensor([-rng.expovariate(1.0) for _ in range(50)]).tolist()
    tokens = [rng.randrange(2**18) for _ in range(50)]
    samples = [
        Sample(0, tokens, logprobs, "interrupted", "", 2**63 - 1, 7),
        Sample(3, [], [], "stop", "text \ud800 ½", 5, 6, 0.25, "why"),
    ]
    carried = {("gym/task/1", 2): samples, ("gym/task/2", 0): samples[1:]}
    state = json.loads(json.dumps(carried_state(carried)))
    assert load_carried(state) == carried
    # 4 + 4 bytes a token, by 4/3 in base64, and 200 bytes of names around them.
    assert len(json.dumps(state[0]["samples"][0])) < 50 * 8 * 4 / 3 + 250


class StopNow(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 40, 160])
def test_a_step_broken_off_is_done_again_from_the_same_state(calls: int) -> None:
    """As a stop signal does it: the checkpoint written then is that of the step before."""
    world = World()
    plain, _, _ = sampler_in(world, engines=8)
    expected = [plain.sample_batch(16, SAMPLING) for _ in range(2)]
    left = [10**9]

    def stop(progress: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise StopNow

    sampler, fleet, prompts = sampler_in(world, engines=8, carry_over=True, on_progress=stop)
    sampler.sample_batch(16, SAMPLING)
    waiting, known = list(prompts.waiting), sampler.state_dict()["keep_rate"]
    left[0] = calls
    with pytest.raises(StopNow):
        sampler.sample_batch(16, SAMPLING)
    assert fleet.poll(1.0) == []
    assert list(prompts.waiting)[: len(waiting)] == waiting
    assert sampler.state_dict()["keep_rate"] == known
    resumed = DynamicSampler(fleet, SimulatedGrader(), prompts, SEED, carry_over=True)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    batch = resumed.sample_batch(16, SAMPLING)
    assert [g.samples for g in batch.groups] == [g.samples for g in expected[1].groups]
    assert batch.tallies == expected[1].tallies


def test_a_continued_sample_is_of_the_policy_that_began_it() -> None:
    sampler, fleet, _ = sampler_in(World(), engines=8, carry_over=True)
    begun: set[tuple[str, int]] = set()
    seen = 0
    for version in range(12):
        fleet.weight_version = version
        batch = sampler.sample_batch(16, SAMPLING)
        for group in batch.groups:
            for sample in group.samples:
                if (group.prompt.prompt_id, sample.index) in begun:
                    assert sample.weight_version == version - 1
                    seen += 1
        begun = {
            (prompt_id, sample.index)
            for (prompt_id, _), samples in sampler._carried.items()
            for sample in samples
            # Others wait since the batch before.
            if sample.finish_reason == "interrupted" and sample.weight_version == version
        }
    assert seen > 10


class SlowGrader:
    """Gives no verdict."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, request_id: str, grading: dict[str, Any], text: str) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]


def test_an_abandoned_group_is_graded_no_further() -> None:
    grader = SlowGrader()
    collector = GroupCollector(SimulatedFleet(World(), 1, slots=64), grader, SEED)
    groups = collector.launch([SimulatedPrompts().draw()], SAMPLING)
    while len(grader.futures) < 3:
        collector.advance()
    wasted = collector.abandon(groups)
    assert all(future.cancelled() for future in grader.futures)
    assert collector.running == 0 and not collector._grading
    assert wasted >= groups[0].tokens > 0


class DeadFleet(SimulatedFleet):
    """Its engines die when they are asked for what they have got so far."""

    def interrupt(self, request_ids: Sequence[str]) -> list[GenerationResult]:
        super().interrupt(request_ids)
        return []


def test_what_a_dead_engine_was_to_continue_is_not_lost() -> None:
    collector = GroupCollector(DeadFleet(World(), 1, slots=64), SlowGrader(), SEED)
    begun = Sample(2, [5, 6], [-0.5, -0.25], "interrupted", "", 1, 0)
    (group,) = collector.launch([SimulatedPrompts().draw()], SAMPLING, {("0", 0): [begun]})
    collector.suspend([group])
    assert group.samples == [begun] and collector.running == 0


def test_a_new_stage_starts_without_what_was_carried_over() -> None:
    sampler, fleet, _ = sampler_in(World(), engines=8, carry_over=True)
    while not sampler.state_dict()["carried"]:
        sampler.sample_batch(16, SAMPLING)
    fleet.weight_version = 1
    batch = sampler.sample_batch(16, replace(SAMPLING, max_response_tokens=4096))
    assert {s.weight_version for s in samples_of(batch)} == {1}
