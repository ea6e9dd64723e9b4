"""Bytes one packed row takes on one GPU: what autograd saves of it, and the backward pass.

Counted tensor by tensor from `layers.py`, `batched_attention.py` and `logprobs.py` in `megatron/`
and Megatron's unfused MLP, in the manner of Korthikanti et al. (arXiv 2205.05198), whose formula is
for other layers. The row is the largest a recipe can make: full of the longest responses.
"""

from __future__ import annotations

from dataclasses import dataclass

from prorl_nemo.megatron.layout import ModelSpec, padded_groups, padded_vocab
from prorl_nemo.megatron.precision import row_multiple
from prorl_nemo.recipe import Policy

# The head's blocks of logits. megatron/logprobs.py imports torch; a test holds the figures equal.
BLOCK_ELEMENTS = 16 * 1024 * 1024
BLOCK_TOKENS = 8192
FP32 = 4


def width(precision: str) -> int:
    """Bytes of a number: 2 in bf16, 4 in fp32."""
    return 2 if precision == "bf16" else FP32


@dataclass(frozen=True)
class Row:
    """The largest packed row.

    Attributes:
        tokens: of the whole row, over all context-parallel ranks.
        prompt, response: tokens of the longest prompt and response.
        shared: responses of a group follow one prompt.
    """

    tokens: int
    prompt: int
    response: int
    shared: bool

    @classmethod
    def largest(cls, policy: Policy, prompt: int, response: int) -> Row:
        """The token budget, or one sequence that is longer, padded as the ranks need it."""
        multiple = row_multiple(policy)
        tokens = max(policy.tokens_per_microbatch, prompt + response)
        return cls(-(-tokens // multiple) * multiple, prompt, response, policy.shared_prompts)

    @property
    def responses(self) -> list[int]:
        """Lengths of the responses behind one prompt: as many of the longest as fit, the rest."""
        room = self.tokens - self.prompt
        whole, rest = divmod(room, self.response) if self.response else (0, 0)
        return [self.response] * whole + [rest] * (rest > 0)


@dataclass(frozen=True)
class Sizes:
    """Widths of a layer on one tensor-parallel rank, and tokens held by it.

    Attributes:
        query, group: channels of all its query heads, and of its key (or value) heads.
        ffn: feed-forward channels; vocab: rows of the output head.
        tokens: of a row inside the matrices; outside: the share of them that norms and
            residuals see (sequence parallelism); keys: tokens whose keys and values it holds.
    """

    hidden: int
    query: int
    group: int
    heads: int
    groups: int
    ffn: int
    vocab: int
    tokens: int
    outside: int
    keys: int

    @classmethod
    def of(cls, spec: ModelSpec, policy: Policy, row: Row) -> Sizes:
        tp = policy.tensor_parallel
        groups = padded_groups(spec, tp) // tp
        heads = groups * (spec.heads // spec.groups)
        tokens = row.tokens // policy.context_parallel
        return cls(
            hidden=spec.hidden,
            query=heads * spec.head_dim,
            group=groups * spec.head_dim,
            heads=heads,
            groups=groups,
            ffn=spec.ffn // tp,
            vocab=padded_vocab(spec, tp) // tp,
            tokens=tokens,
            outside=tokens // tp if policy.sequence_parallel else tokens,
            keys=row.tokens,
        )


def attention_saved(spec: ModelSpec, policy: Policy, row: Row) -> int:
    """Bytes core attention saves in one layer for its backward pass, rotation included.

    With `policy.attention: sdpa` queries, keys and values are copied into batches
    (megatron/batched_attention.py), where each query head has its own keys, and each response
    those of its prompt. A response behind a shared prompt, and the piece of a row that a
    context-parallel rank holds, attends under a mask, of which torch saves a copy in the layers'
    type: [queries, keys] of each response.
    """
    s, w = Sizes.of(spec, policy, row), width(policy.precision)
    pairs = 0
    if policy.attention == "sdpa":
        places = s.keys
        if policy.context_parallel > 1:
            # The rank's two pieces: together they see the row and half a share more.
            places += s.tokens // 2
            pairs = s.tokens * places // 2
        elif row.shared and len(row.responses) > 1:
            places = row.prompt + sum(n + row.prompt for n in row.responses)
            pairs = sum(n * (n + row.prompt) for n in row.responses)
        keys_values = 2 * places * s.query
    else:  # The values are a view of the whole product of queries, keys and values.
        keys_values = s.tokens * (s.group + s.query + 2 * s.group)
    rotation = 2 * FP32 * s.tokens * spec.head_dim  # Sines and cosines, twice.
    outputs = w * s.tokens * s.query + FP32 * s.tokens * s.heads
    return w * (s.tokens * s.query + keys_values + pairs) + rotation + outputs


def _copied(s: Sizes) -> bool:
    """Whether queries are copied out of the product of queries, keys and values."""
    return s.heads > s.groups > 1


def layer_saved(spec: ModelSpec, policy: Policy, row: Row, recompute: str) -> int:
    """Bytes one layer saves of one row for its backward pass.

    Args:
        recompute: `none`, `selective` (core attention again in backward) or `full` (its input is
            all that stays).
    """
    s, w = Sizes.of(spec, policy, row), width(policy.precision)
    residual = FP32 * s.outside * s.hidden  # The residual stream is fp32 in bf16 as well.
    if recompute == "full":
        return residual
    # Of each of two norms: its fp32 input, that input at unit size, its result, and a scale.
    norms = 2 * (residual + 2 * w * s.outside * s.hidden + FP32 * s.outside)
    qkv = w * s.tokens * (s.query + 2 * s.group)
    if recompute == "selective":
        # Keys and values are views of the product, as are queries that lie in it as heads do.
        core = qkv + w * s.tokens * s.query * (_copied(s) or spec.qk_norm)
        core += w * s.tokens * s.group * spec.qk_norm
    else:
        core = attention_saved(spec, policy, row)
    heads = 0
    if spec.qk_norm:  # As the other norms, but the results go on to core attention.
        channels = s.query + s.group
        if w == FP32:  # Nothing is widened: the keys are a view of the product.
            held = recompute == "selective" or policy.attention == "flex"
            channels = s.query * _copied(s) + (0 if held else qkv // (w * s.tokens))
        heads = FP32 * s.tokens * (channels + s.heads + s.groups)
        heads += w * s.tokens * (s.query + s.group)
    projection = w * s.tokens * s.query
    # Gate and up in one, silu of the gate, up plus Megatron's offset of zero, and their product.
    mlp = 5 * w * s.tokens * s.ffn
    return norms + core + heads + projection + mlp


def head_saved(spec: ModelSpec, policy: Policy, row: Row) -> int:
    """Bytes the final norm and the log-probs save of one row: fp32 hidden states, three times."""
    s = Sizes.of(spec, policy, row)
    norm = FP32 * s.outside * (2 * s.hidden + 1)
    return norm + s.tokens * (FP32 * s.hidden + 8 + FP32)


def head_working(spec: ModelSpec, policy: Policy, row: Row) -> int:
    """Bytes of the log-probs beside what they save: blocks of logits, gradients of their inputs.

    While a block is computed, the one before is still there: its logits, in forward their
    exponentials, in backward in bf16 their gradient. fp32 hidden states with a bf16 weight are two
    products, so two blocks, and two bf16 numbers each.
    """
    s, w = Sizes.of(spec, policy, row), width(policy.precision)
    tokens = min(s.tokens, BLOCK_TOKENS)
    block = FP32 * tokens * min(s.vocab, max(1, BLOCK_ELEMENTS // tokens))
    split = 2 * FP32 * tokens * s.hidden if w < FP32 else 0
    gradients = FP32 * s.hidden * (s.tokens + s.vocab)
    if w < FP32:  # The weight's is cast at the end, when no block is left.
        return split + max(
            4 * block, 7 * block // 2 + gradients, gradients + w * s.vocab * s.hidden
        )
    return max(3 * block, 2 * block + gradients)


def layer_working(spec: ModelSpec, policy: Policy, row: Row) -> int:
    """Bytes of one layer's backward pass: gradients of the MLP, and what is computed again."""
    s, w = Sizes.of(spec, policy, row), width(policy.precision)
    gradients = w * s.tokens * 6 * max(s.ffn, s.query) + 2 * FP32 * s.tokens * s.hidden
    again = {
        "none": 0,
        "selective": attention_saved(spec, policy, row),
        "full": layer_saved(spec, policy, row, "none"),
    }
    return gradients + again[policy.recompute]
