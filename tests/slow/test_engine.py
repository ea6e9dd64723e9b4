"""Real vLLM on tiny random models: numbers against transformers, and engines that die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from engines import (
    MODEL_LEN,
    PROMPTS,
    collect,
    generate,
    randomise,
    reference_logprobs,
    request,
    send,
    settings,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from prorl_nemo.errors import UserError
from prorl_nemo.records import Prompt
from prorl_nemo.rewards.verdict import Verdict
from prorl_nemo.rollout.broadcast_weights import BroadcastBucket, broadcast_buckets
from prorl_nemo.rollout.dynamic_sampler import DynamicSampler
from prorl_nemo.rollout.engine import EngineBusyError
from prorl_nemo.rollout.fleet import Fleet, FleetError
from prorl_nemo.rollout.group_collector import GroupCollector, Sampling
from prorl_nemo.rollout.protocol import GenerationRequest, GenerationResult
from prorl_nemo.rollout.weights import WeightBucket, pack_buckets, weight_checksums
from prorl_nemo.tiny_model import tiny_model

HANG_SECONDS = 10


@pytest.fixture(scope="module")
def starting(one_ray: None) -> Iterator[ThreadPoolExecutor]:
    """Two threads that start engines while the tests use those that have started."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


# float32 on both sides: rounding only, as measured 1e-6. bfloat16: the reference computes in
# float32 from the same weights, so the engine's activations make the difference.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.2}
# The third family is that of the fleet below.
CASES = [("qwen2", False, "float32"), ("qwen3", True, "bfloat16")]


@pytest.fixture(scope="module")
def families(
    starting: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[Fleet]]:
    """A fleet for each case, and one of a model that vLLM cannot run."""
    folder = tmp_path_factory.mktemp("families")
    started = {}
    for family, tied, dtype in CASES:
        model = tiny_model(family, folder / family, tied=tied, dtype=dtype)
        started[family] = starting.submit(Fleet, settings(model, dtype), 1, max_restarts=0)
    short = tiny_model("llama", folder / "short", max_positions=MODEL_LEN // 2)
    started["short"] = starting.submit(Fleet, settings(short), 1)
    return started


def agrees(fleet: Fleet, model: PreTrainedModel) -> None:
    """Weights, log-probabilities of samples and scores are those of transformers, as loaded and
    after updates."""
    dtype = getattr(torch, fleet.settings.dtype)
    tolerance = TOLERANCES[fleet.settings.dtype]
    fleet.verify_weights(weight_checksums(model.state_dict().items(), dtype))
    for version in (1, 2):
        randomise(model, version)
        model.to(dtype).float()
        fleet.verify_weights(send(fleet, model, version))
        # The version of each sample is that of the weights that made it.
        for temperature, top_p in ((1.2, 1.0), (1.0, 1.0), (0.6, 1.0), (0.6, 0.95)):
            results = generate(
                fleet,
                [
                    request(f"{p}.{s}", p, s, temperature=temperature, top_p=top_p)
                    for p in range(3)
                    for s in range(3)
                ],
            )
            for name, result in results.items():
                prompt = PROMPTS[int(name[0])]
                if dtype is torch.float32 or top_p == 1.0:
                    expected = reference_logprobs(
                        model, prompt, result.token_ids, temperature, top_p
                    )
                    error = (torch.tensor(result.logprobs).double() - expected).abs().max()
                    assert error < tolerance
                assert result.weight_version == version
                assert result.finish_reason == (
                    "stop" if result.token_ids[-1] == model.config.eos_token_id else "length"
                )
        sequence = PROMPTS[0] + results["0.0"].token_ids
        (score,) = fleet.score([sequence])
        expected = reference_logprobs(model, sequence[:1], sequence[1:], 1.0, 1.0)
        assert (torch.tensor(score).double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("family", [family for family, _, _ in CASES])
def test_weights_and_logprobs_agree_with_transformers(
    families: dict[str, Future[Fleet]], family: str
) -> None:
    fleet = families[family].result()
    model = AutoModelForCausalLM.from_pretrained(fleet.settings.model, dtype=torch.float32)
    try:
        agrees(fleet, model)
        # An update that fails half-way: the engine does not generate with what it has now.
        some = [(n, p) for n, p in model.named_parameters() if "layers.1.mlp.up" not in n]
        with pytest.raises(FleetError, match=r"never arrived: model.layers.1.mlp.up_proj.weight"):
            fleet.update_weights(3, pack_buckets(some, getattr(torch, fleet.settings.dtype)))
        fleet.submit([request("after")])
        with pytest.raises(FleetError, match="failed"):
            collect(fleet, 1)
    finally:
        fleet.shutdown()


def test_a_model_vllm_cannot_run_is_a_user_error(families: dict[str, Future[Fleet]]) -> None:
    with pytest.raises(UserError, match=f"{MODEL_LEN // 2}"):
        families["short"].result()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("fleet") / "model")


@pytest.fixture(scope="module")
def events() -> list[tuple[str, dict[str, Any]]]:
    return []


@pytest.fixture(scope="module")
def fleet(one_ray: None, model_folder: Path, events: list[Any]) -> Iterator[Fleet]:
    fleet = Fleet(
        settings(model_folder),
        2,
        on_event=lambda name, details: events.append((name, details)),
        hang_seconds=HANG_SECONDS,
        max_restarts=7,
    )
    yield fleet
    fleet.shutdown()


@pytest.fixture(scope="module")
def model(model_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


def test_weights_and_logprobs_of_two_engines_agree_with_transformers(
    fleet: Fleet, model: PreTrainedModel
) -> None:
    agrees(fleet, model)


def long_requests(tag: str, count: int = 24) -> list[GenerationRequest]:
    return [request(f"{tag}{i}", i % 3, i, max_tokens=150) for i in range(count)]


def content(results: dict[str, GenerationResult], tag: str) -> dict[str, tuple[Any, ...]]:
    return {
        name.removeprefix(tag): (r.token_ids, r.finish_reason, r.weight_version)
        for name, r in results.items()
    }


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet, model: PreTrainedModel) -> dict[str, tuple[Any, ...]]:
    """What the fleet generates when nothing happens to it, under version 1."""
    randomise(model, 1)
    send(fleet, model, 1)
    return content(generate(fleet, long_requests("quiet")), "quiet")


def test_seeds_reproduce_alone_and_in_company(
    fleet: Fleet, undisturbed: dict[str, tuple[Any, ...]]
) -> None:
    assert content(generate(fleet, long_requests("again")), "again") == undisturbed
    for i in (0, 7):
        alone = content(generate(fleet, [long_requests("alone")[i]]), "alone")
        assert alone == {str(i): undisturbed[str(i)]}
    assert len({tuple(tokens) for tokens, _, _ in undisturbed.values()}) == len(undisturbed)


def test_aborted_requests_never_come_out(fleet: Fleet, undisturbed: dict[str, Any]) -> None:
    requests = long_requests("mixed")
    fleet.submit(requests)
    first: list[GenerationResult] = []
    while not first:
        first += fleet.poll(1.0)
    done = {r.request_id for r in first}
    dropped = [r.request_id for r in requests if r.request_id not in done][::2]
    assert any(result.token_ids for result in fleet.interrupt([*dropped, "unknown"]))
    rest = collect(fleet, len(requests) - len(done) - len(dropped))
    found = content(rest | {r.request_id: r for r in first}, "mixed")
    assert found == {
        name: undisturbed[name] for name in undisturbed if f"mixed{name}" not in dropped
    }


def test_what_cannot_be_served_is_rejected_and_harms_nobody(fleet: Fleet) -> None:
    results = generate(
        fleet,
        [
            request("long", 1, max_tokens=MODEL_LEN),
            GenerationRequest("unknown token", [10**6], 1, 1.0, 5),
            GenerationRequest("empty", [], 1, 1.0, 5),
            request("fine"),
        ],
    )
    assert {name for name, r in results.items() if r.rejected} == {
        "long",
        "unknown token",
        "empty",
    }
    assert "exceed the engine's 256" in results["long"].text


def test_weights_do_not_change_under_running_requests(fleet: Fleet, model: PreTrainedModel) -> None:
    fleet.submit(long_requests("busy"))
    with pytest.raises(EngineBusyError, match="24 requests"):
        fleet.update_weights(9, pack_buckets(model.named_parameters()))
    collect(fleet, 24)
    assert [state.weight_version for state in fleet.states()] == [1, 1]


def pids(fleet: Fleet) -> list[int]:
    return [state.pid for state in fleet.states()]


def restarts(events: list[Any], before: int) -> dict[int, tuple[str, int]]:
    """Engine -> (reason, requests sent again) of the events since."""
    assert {name for name, _ in events[before:]} == {"engine_restarted"}
    found = {d["engine"]: (d["reason"], d["resubmitted"]) for _, d in events[before:]}
    assert len(found) == len(events) - before
    return found


def test_engines_killed_and_hung_during_generation_lose_no_sample(
    fleet: Fleet, model: PreTrainedModel, events: list[Any], undisturbed: dict[str, Any]
) -> None:
    before = len(events)
    killed, hung = pids(fleet)
    fleet.submit(long_requests("kill"))
    first = fleet.poll(1.0)
    os.kill(killed, signal.SIGKILL)
    os.kill(hung, signal.SIGSTOP)
    results = collect(fleet, 24 - len(first)) | {r.request_id: r for r in first}
    assert content(results, "kill") == undisturbed
    found = restarts(events, before)
    assert found[0][0] == "died"
    assert found[1][0].startswith("made no step for 1")
    assert all(resubmitted > 0 for _, resubmitted in found.values())
    fleet.verify_weights(weight_checksums(model.state_dict().items(), torch.float32))


class Stream:
    """Twenty prompts, one of which does not fit the engine."""

    def __init__(self) -> None:
        self.queue = [
            (Prompt(str(i), "math", "coin", [], [20 + i, 30] * (120 if i == 2 else 1), {}), 0)
            for i in range(20)
        ]

    def draw(self) -> tuple[Prompt, int]:
        return self.queue.pop(0)

    def put_back(self, prompts: list[tuple[Prompt, int]]) -> None:
        self.queue[:0] = prompts


class CoinGrader:
    """Rewards a coin that falls on the response's text."""

    def submit(self, request_id: str, grading: dict[str, Any], text: str) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        future.set_result(Verdict(float(sum(text.encode()) % 4 == 0)))
        return future


def test_the_sampler_repeats_itself_on_real_engines(fleet: Fleet) -> None:
    batches = []
    for _ in range(2):
        stream = Stream()
        sampler = DynamicSampler(fleet, CoinGrader(), stream, run_seed=3)
        batch = sampler.sample_batch(4, Sampling(4, 1.2, 24))
        assert stream.queue[0][0].prompt_id == str(4 + batch.rejected + 1)
        batches.append(batch)
    first, second = batches
    assert first.groups == second.groups
    assert first.dropped == ["2"]
    for group in first.groups:
        assert [s.index for s in group.samples] == [0, 1, 2, 3]
        assert all(len(s.engine_logprobs) == len(s.token_ids) for s in group.samples)


def test_responses_are_interrupted_and_continued(fleet: Fleet, model: PreTrainedModel) -> None:
    """Whole in the end, and each log-prob that of its own token."""
    stream = Stream()
    prompts = [drawn for drawn in (stream.draw() for _ in range(8)) if drawn[0].prompt_id != "2"]
    sampling = Sampling(6, 1.2, 180)
    collector = GroupCollector(fleet, CoinGrader(), 3)
    before = sum(state.steps for state in fleet.states())
    groups = collector.launch(prompts, sampling)
    while sum(state.steps for state in fleet.states()) < before + 60:
        time.sleep(0.02)
    collector.suspend(groups)
    assert fleet.poll(0.6) == []
    carried = {(g.prompt.prompt_id, g.epoch): list(g.samples) for g in groups}
    continued = collector.launch(prompts, sampling, carried)
    while not all(group.complete for group in continued):
        collector.advance()
    tokenizer = AutoTokenizer.from_pretrained(fleet.settings.model)
    interrupted = 0
    for was, group in zip(groups, continued, strict=True):
        assert [s.index for s in group.group().samples] == list(range(6))
        assert group.brought + group.tokens == sum(len(s.token_ids) for s in group.samples)
        samples = {s.index: s for s in group.samples}
        for begun in was.samples:
            sample, done = samples[begun.index], len(begun.token_ids)
            assert sample.token_ids[:done] == begun.token_ids
            assert len(sample.engine_logprobs) == len(sample.token_ids) <= 180
            if begun.finish_reason == "interrupted":
                expected = reference_logprobs(
                    model, group.prompt.token_ids, sample.token_ids, 1.2, 1.0
                )
                error = (torch.tensor(sample.engine_logprobs).double() - expected).abs().max()
                assert error < TOLERANCES["float32"]
                whole = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
                assert sample.text == whole
                interrupted += 0 < done < len(sample.token_ids)
    # Two engines have made 60 steps together: none of 180 tokens is done, nearly all have begun.
    assert interrupted > 20


def test_engines_lost_while_idle_and_during_an_update_get_it_all(
    fleet: Fleet, model: PreTrainedModel, events: list[Any]
) -> None:
    randomise(model, 2)
    before = len(events)
    first, second = pids(fleet)
    os.kill(second, signal.SIGKILL)

    def interrupted(pid: int, how: signal.Signals) -> Iterator[WeightBucket]:
        for index, bucket in enumerate(pack_buckets(model.named_parameters(), None, 60_000)):
            if index == 3:
                os.kill(pid, how)
            yield bucket

    fleet.update_weights(2, interrupted(first, signal.SIGKILL))
    fleet.verify_weights(weight_checksums(model.state_dict().items(), torch.float32))
    assert restarts(events, before) == {0: ("died", 0), 1: ("died", 0)}
    before = len(events)
    fleet.update_weights(3, interrupted(pids(fleet)[1], signal.SIGSTOP))
    fleet.verify_weights(weight_checksums(model.state_dict().items(), torch.float32))
    assert restarts(events, before) == {1: (f"gave no answer for {HANG_SECONDS} seconds", 0)}
    assert [state.weight_version for state in fleet.states()] == [3, 3]
    results = generate(fleet, long_requests("after"))
    assert {r.weight_version for r in results.values()} == {3}


@ray.remote
class Sender:
    """A trainer rank: what follows a bucket runs in its process."""

    def weights(self, tensors: dict[str, torch.Tensor], slow: bool) -> Iterator[BroadcastBucket]:
        host = ray.util.get_node_ip_address()
        for bucket in broadcast_buckets(tensors.items(), 2, host, limit=60_000):
            yield bucket
            time.sleep(0.2 if slow else 0.0)


def test_broadcast_weights_arrive_and_survive_a_lost_engine(
    fleet: Fleet, model: PreTrainedModel, events: list[Any]
) -> None:
    sender = Sender.options(num_cpus=0).remote()

    def broadcast(victim: int | None) -> Iterator[tuple[Any, ...]]:
        tensors = dict(model.named_parameters())
        stream = sender.weights.options(num_returns="streaming").remote(tensors, victim is not None)
        for index, bucket in enumerate(stream):
            if victim is not None and index == 2:
                os.kill(victim, signal.SIGKILL)
            yield (bucket,)

    before = len(events)
    for version, victim in ((4, None), (5, pids(fleet)[1])):
        randomise(model, version)
        fleet.update_weights(
            version, broadcast(victim), lambda: pack_buckets(model.named_parameters(), None, 60_000)
        )
        fleet.verify_weights(weight_checksums(model.state_dict().items(), torch.float32))
        assert [state.weight_version for state in fleet.states()] == [version, version]
        if victim is None:
            assert len(events) == before
    # A group cannot lose a member: both engines are new, and have the weights all the same.
    assert set(restarts(events, before)) == {0, 1}
    ray.kill(sender)


def test_too_many_losses_end_the_run(fleet: Fleet) -> None:
    # Seven restarts were granted within the hour, and the seven above used them.
    pid = pids(fleet)[0]
    fleet.submit(long_requests("last"))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(FleetError, match="8 engine failures within 3600 seconds"):
        collect(fleet, 24)
