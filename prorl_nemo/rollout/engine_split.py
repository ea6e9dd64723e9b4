"""Over how many GPUs vLLM can split a model: its rules, asked before an engine starts."""

from __future__ import annotations

_VOCABULARY_BLOCK = 64
"""vLLM pads the vocabulary to a multiple of this, which the workers must divide."""


def split_problem(ways: int, *, heads: int, kv_heads: int, ffn: int, vocab: int) -> str:
    """Why a model cannot be split over `ways` workers, and what it could be; empty if it can.

    Args:
        heads, kv_heads: query and key/value heads. With fewer key/value heads than workers each is
            held by several.
        ffn: width of the feed-forward layer.
        vocab: rows of the embedding.
    """

    def fits(count: int) -> bool:
        shared = kv_heads % count == 0 or count % kv_heads == 0
        padded = -(-vocab // _VOCABULARY_BLOCK) * _VOCABULARY_BLOCK
        return shared and heads % count == 0 and ffn % count == 0 and padded % count == 0

    if fits(ways):
        return ""
    possible = ", ".join(str(count) for count in range(1, heads + 1) if fits(count))
    return (
        f"vLLM cannot split {heads} heads, {kv_heads} key/value heads and a feed-forward width of "
        f"{ffn} over {ways}; possible: {possible}"
    )
