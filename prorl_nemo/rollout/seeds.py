"""The seed of every sample, as a function of what the sample is and not of when it runs.

So a killed run, another number of engines or a restarted engine draws the same samples.
"""

from __future__ import annotations

import hashlib
import json


def sample_seed(run_seed: int, prompt_id: str, epoch: int, index: int) -> int:
    """Seed of sample `index` of a prompt in an epoch: 63 bits, stable between machines.

    63 bits because vLLM keeps a seed in a signed 64-bit integer.
    """
    key = json.dumps([run_seed, prompt_id, epoch, index]).encode()
    return _seed(key)


def continuation_seed(seed: int, tokens: int) -> int:
    """Seed of a sample that goes on after its first `tokens` tokens.

    Not `seed` itself: the next token would be drawn with the random numbers of the first one.
    """
    return _seed(json.dumps([seed, tokens]).encode())


def _seed(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
