"""What is under way in a vLLM engine: requests in, responses out. Used on the engine's thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prorl_nemo.rollout.engine_settings import EngineSettings
from prorl_nemo.rollout.protocol import GenerationRequest, GenerationResult
from prorl_nemo.rollout.seeds import continuation_seed


class Running:
    """The unfinished requests of a vLLM `LLMEngine`.

    Attributes:
        weight_version: that responses are marked with.
        steps: made so far.
    """

    def __init__(self, llm: Any, settings: EngineSettings) -> None:
        self._llm, self._settings = llm, settings
        self._internal_ids: dict[str, str] = {}
        self._prefixes: dict[str, list[int]] = {}
        self.weight_version = 0
        self.steps = 0

    def __len__(self) -> int:
        return len(self._internal_ids)

    def add(self, request: GenerationRequest) -> GenerationResult | None:
        """Begin a request; one that cannot be served is answered at once, as `rejected`."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        try:
            length = len(request.prompt_token_ids) + request.max_tokens
            if length > self._settings.max_model_len:
                raise ValueError(
                    f"prompt of {len(request.prompt_token_ids)} tokens and response of "
                    f"{request.max_tokens} exceed the engine's {self._settings.max_model_len}"
                )
            done = len(request.prefix)
            parameters = SamplingParams(
                seed=continuation_seed(request.seed, done) if done else request.seed,
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=request.max_tokens - done,
                logprobs=0,
                flat_logprobs=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = tokens_input([*request.prompt_token_ids, *request.prefix])
            internal = self._llm.add_request(request.request_id, prompt, parameters)
        except (ValueError, VLLMClientError) as error:
            return GenerationResult(request.request_id, [], [], "rejected", str(error), 0)
        self._internal_ids[request.request_id] = internal
        if done:
            self._prefixes[request.request_id] = list(request.prefix)
        return None

    def step(self) -> list[GenerationResult]:
        """One token for every request; returns the responses that are whole."""
        outputs = self._llm.step()
        self.steps += 1
        results = []
        for output in outputs:
            if self._internal_ids.pop(output.request_id, None) is None:
                continue
            completion = output.outputs[0]
            text = completion.text
            prefix = self._prefixes.pop(output.request_id, None)
            if prefix is not None:
                # Decoded as a whole: a character may lie across the seam.
                whole = [*prefix, *completion.token_ids]
                text = self._llm.output_processor.tokenizer.decode(whole, skip_special_tokens=True)
            results.append(
                GenerationResult(
                    request_id=output.request_id,
                    token_ids=list(completion.token_ids),
                    logprobs=_sampled_logprobs(completion.logprobs),
                    finish_reason=str(completion.finish_reason),
                    text=text,
                    weight_version=self.weight_version,
                )
            )
        return results

    def interrupt(self, request_ids: Sequence[str]) -> list[GenerationResult]:
        """Drop requests; returns what was generated for them. Others are ignored."""
        found = []
        running = []
        for request_id in request_ids:
            internal = self._internal_ids.pop(request_id, None)
            if internal is None:
                continue
            running.append(request_id)
            self._prefixes.pop(request_id, None)
            state = self._llm.output_processor.request_states.get(internal)
            if state is None:
                continue
            found.append(
                GenerationResult(
                    request_id=request_id,
                    token_ids=list(state.detokenizer.output_token_ids),
                    logprobs=_sampled_logprobs(state.logprobs_processor.logprobs),
                    finish_reason="interrupted",
                    text="",
                    weight_version=self.weight_version,
                )
            )
        self._llm.abort_request(running)
        return found

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `VllmEngine.score`; nothing else may be under way."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for index, sequence in enumerate(sequences):
            self._llm.add_request(str(index), tokens_input(list(sequence)), parameters)
        scores: list[list[float]] = [[] for _ in sequences]
        while self._llm.has_unfinished_requests():
            for output in self._llm.step():
                # The first token has no prediction: its position holds no entry.
                scores[int(output.request_id)] = _sampled_logprobs(output.prompt_logprobs)
        return scores


def _sampled_logprobs(logprobs: Any) -> list[float]:
    """The log-probability of the chosen token at every position that has one."""
    return [
        logprobs.logprobs[start]
        for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True)
        if end > start
    ]
