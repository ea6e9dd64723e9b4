"""One engine over two worker processes: the same numbers, weights on every path, lost workers."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import psutil
import pytest
import ray
import torch
from engines import (
    PROMPTS,
    collect,
    generate,
    randomise,
    reference_logprobs,
    request,
    send,
    settings,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from prorl_nemo.rollout.broadcast_weights import BroadcastBucket, broadcast_buckets
from prorl_nemo.rollout.fleet import Fleet, FleetError
from prorl_nemo.rollout.protocol import GenerationResult
from prorl_nemo.rollout.shared_weights import SharedBucket, SharedWeights, make_memory_file
from prorl_nemo.rollout.weights import Piece, pack_buckets, weight_checksums
from prorl_nemo.tiny_model import Family, tiny_model

HANG_SECONDS = 20
BUCKET = 60_000
TOLERANCE = 1e-4  # float32: the halves of a product are added in another order, as measured 2e-6.
Transfer = Literal["object store", "shared memory", "broadcast"]
TRANSFERS: tuple[Transfer, ...] = ("object store", "shared memory", "broadcast")

# Workers hold: a key/value head each; copies of the only one; half of four. 450 rows of the
# vocabulary are padded to 512, so the second worker has some that belong to no token.
CASES: dict[Family, dict[str, Any]] = {
    "llama": {"tied": True, "kv_heads": 2},
    "qwen2": {"tied": False, "kv_heads": 1},
    "qwen3": {"tied": True, "kv_heads": 4},
}


# How often an engine may be lost: llama's is, in the last test.
RESTARTS: dict[Family, int] = {"llama": 3, "qwen2": 0, "qwen3": 0}
Started = tuple[Fleet, PreTrainedModel, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def started(
    one_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Family], Started]]:
    """started(family) -> (fleet, model, events), started once: three processes that import vLLM."""
    made: dict[Family, Started] = {}

    def start(family: Family) -> Started:
        if family not in made:
            folder = tmp_path_factory.mktemp("engine") / family
            tiny_model(family, folder, vocab_size=450, **CASES[family])
            events: list[dict[str, Any]] = []
            fleet = Fleet(
                settings(folder, tensor_parallel=2),
                1,
                on_event=lambda _, details: events.append(details),
                max_restarts=RESTARTS[family],
            )
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            made[family] = fleet, model, events
        return made[family]

    yield start
    for fleet, _, _ in made.values():
        fleet.shutdown()


@ray.remote(num_cpus=0)
class Sender:
    """A trainer rank: what follows a bucket runs in its process."""

    def __init__(self) -> None:
        self.memory = SharedWeights(make_memory_file())

    def broadcast(self, tensors: dict[str, torch.Tensor]) -> Iterator[BroadcastBucket]:
        host = ray.util.get_node_ip_address()
        yield from broadcast_buckets(tensors.items(), 2, host, limit=BUCKET)

    def share(self, tensors: dict[str, torch.Tensor]) -> Iterator[SharedBucket]:
        yield from self.memory.pack_buckets(tensors.items(), limit=BUCKET)


def update(fleet: Fleet, sender: Any, tensors: dict[str, torch.Tensor], how: Transfer) -> None:
    version = fleet.weight_version + 1
    if how == "object store":
        fleet.update_weights(version, pack_buckets(tensors.items(), None, BUCKET))
        return
    method = sender.broadcast if how == "broadcast" else sender.share
    stream = method.options(num_returns="streaming").remote(tensors)
    again = pack_buckets(tensors.items(), None, BUCKET)
    fleet.update_weights(version, ((bucket,) for bucket in stream), lambda: again)


def agrees(fleet: Fleet, model: PreTrainedModel) -> None:
    """Greedy tokens and log-probabilities, sampled ones, and scores are those of transformers."""
    greedy = generate(fleet, [request(f"{p}", p, temperature=0.0, max_tokens=16) for p in range(3)])
    for name, result in greedy.items():
        given = torch.tensor([PROMPTS[int(name)]])
        mask = torch.ones_like(given)
        expected = model.generate(given, attention_mask=mask, do_sample=False, max_new_tokens=16)
        assert result.token_ids == expected[0, given.shape[1] :].tolist()
    requests = [request(f"{p}.{s}", p, s, max_tokens=20) for p in range(3) for s in range(2)]
    sampled = generate(fleet, requests)
    scores = fleet.score([PROMPTS[int(n[0])] + r.token_ids for n, r in sampled.items()])
    for (name, result), score in zip(sampled.items(), scores, strict=True):
        prompt = PROMPTS[int(name[0])]
        reference = reference_logprobs(model, prompt, result.token_ids, 1.2, 1.0)
        assert (torch.tensor(result.logprobs).double() - reference).abs().max() < TOLERANCE
        assert result.weight_version == fleet.weight_version
        reference = reference_logprobs(model, prompt[:1], prompt[1:] + result.token_ids, 1.0, 1.0)
        assert (torch.tensor(score).double() - reference).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", CASES)
def test_two_workers_compute_and_hold_what_was_sent(
    started: Callable[[Family], Started], family: Family
) -> None:
    fleet, model, _ = started(family)
    sender = Sender.remote()
    agrees(fleet, model)
    for seed, how in enumerate(TRANSFERS):
        randomise(model, seed)
        update(fleet, sender, dict(model.named_parameters()), how)
        fleet.verify_weights(weight_checksums(model.state_dict().items(), torch.float32))
        agrees(fleet, model)
    # The proof sees one wrong number in the second worker's half of each kind of tensor.
    wrong = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in wrong.values():
        tensor.reshape(-1)[-1] += 1
    with pytest.raises(FleetError, match=f"{len(wrong)} of {len(wrong)} tensors differ"):
        fleet.verify_weights(weight_checksums(wrong.items(), torch.float32))
    ray.kill(sender)


def test_pieces_are_joined_by_each_worker_and_copies_must_be_equal(
    started: Callable[[Family], Started],
) -> None:
    """A trainer of two tensor-parallel ranks; and what both workers of the engine have whole."""
    fleet, model, _ = started("qwen2")
    randomise(model, 5)
    ranks = []
    for rank in range(2):
        pieces = [
            Piece(name, tensor.chunk(2)[rank], 0, len(tensor))
            if tensor.dim() == 2
            else Piece(name, tensor)
            for name, tensor in model.named_parameters()
        ]
        ranks.append(list(pack_buckets(pieces, None, BUCKET, first=rank == 0)))
    buckets = [tuple(map(ray.put, parts)) for parts in zip(*ranks, strict=True)]
    fleet.update_weights(fleet.weight_version + 1, buckets)
    expected = weight_checksums(model.state_dict().items(), torch.float32)
    fleet.verify_weights(expected)
    spoilt = ["model.norm.weight", "model.layers.0.self_attn.qkv_proj.bias"]

    # In here, so that it travels whole: the engine's process cannot import this module.
    def spoil(actor: Any) -> None:
        def add(worker: Any) -> None:
            for name in spoilt:
                if worker.rank == 1:
                    worker.get_model().get_parameter(name).data[-1] += 1

        engine = actor._engine.result()
        engine._call(lambda: engine._llm.collective_rpc(add))

    (member,) = fleet._members
    ray.get(member.actor.__ray_call__.remote(spoil))
    (found,) = fleet.weights_checksum()
    wrong = {name for name in expected if found[name] != expected[name]}
    assert wrong == {"model.norm.weight", "model.layers.0.self_attn.v_proj.bias"}


def test_an_update_without_a_tensor_is_refused(started: Callable[[Family], Started]) -> None:
    fleet, model, _ = started("qwen3")
    some = [(n, p) for n, p in model.named_parameters() if "layers.1.mlp.up" not in n]
    with pytest.raises(FleetError, match=r"never arrived: model.layers.1.mlp.up_proj.weight"):
        fleet.update_weights(fleet.weight_version + 1, pack_buckets(some, None, BUCKET))


def workers(pid: int) -> list[psutil.Process]:
    """The worker processes of an engine, first rank first."""
    found = [p for p in psutil.Process(pid).children() if "Worker_TP" in p.name()]
    assert len(found) == 2
    return sorted(found, key=lambda process: process.name())


def long_requests(tag: str) -> list[Any]:
    return [request(f"{tag}{i}", i % 3, i, max_tokens=150) for i in range(24)]


def content(results: dict[str, GenerationResult], tag: str) -> dict[str, Any]:
    return {name.removeprefix(tag): (r.token_ids, r.finish_reason) for name, r in results.items()}


def test_lost_and_hung_workers_lose_no_sample_and_leave_nobody(
    started: Callable[[Family], Started],
) -> None:
    fleet, model, events = started("llama")
    fleet._hang_seconds = HANG_SECONDS
    seen: list[psutil.Process] = []

    def processes() -> list[psutil.Process]:
        """Of the engine that there is now: itself and its two workers."""
        (state,) = fleet.states()
        found = [psutil.Process(state.pid), *workers(state.pid)]
        seen.extend(found)
        return found

    randomise(model, 6)
    expected = send(fleet, model, fleet.weight_version + 1)
    quiet = content(generate(fleet, long_requests("quiet")), "quiet")
    # A worker that dies, and one that hangs.
    for tag, worker, how in (("a", 2, signal.SIGKILL), ("b", 1, signal.SIGSTOP)):
        victim = processes()[worker]
        fleet.submit(long_requests(tag))
        early = fleet.poll(1.0)
        victim.send_signal(how)
        results = collect(fleet, 24 - len(early)) | {r.request_id: r for r in early}
        assert content(results, tag) == quiet
        fleet.verify_weights(expected)
    assert len(events) == 2 and all(event["resubmitted"] > 0 for event in events)
    assert events[0]["reason"].startswith("failed")
    assert events[1]["reason"].startswith("made no step for")

    # In an update: the successor gets the new weights, and never a mixture.
    randomise(model, 7)
    victim = processes()[2]

    def interrupted() -> Iterator[Any]:
        for index, bucket in enumerate(pack_buckets(model.named_parameters(), None, BUCKET)):
            if index == 3:
                victim.kill()
            yield bucket

    fleet.update_weights(fleet.weight_version + 1, interrupted())
    fleet.verify_weights(weight_checksums(model.state_dict().items(), torch.float32))
    assert len(events) == 3 and events[2]["resubmitted"] == 0

    # The engine's own process: its workers leave by themselves.
    processes()[0].kill()
    deadline = time.monotonic() + 20
    while any(process.is_running() for process in seen) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [process for process in seen if process.is_running()] == []
