"""Tiny random models with a real tokenizer, for tests and smoke runs.

They are small enough to run everything on two cores, and wide awake: norms and
biases are random too, so that a weight mapping that forgets one is seen, and
the logits are far enough from uniform for log-probabilities to differ.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from prorl_nemo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Family = Literal["llama", "qwen2", "qwen3"]

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_BYTES = 256


def tiny_model(
    family: Family,
    out: Path,
    *,
    tied: bool = True,
    vocab_size: int = 512,
    hidden_size: int = 128,
    intermediate_size: int = 256,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    max_positions: int = 2048,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> Path:
    """Write a random model and its tokenizer as a Hugging Face folder; the same for a seed.

    Args:
        family: architecture; qwen2 has query, key and value biases, qwen3 head norms.
        out: the folder, new or empty.
        tied: the output head shares the embedding.
        vocab_size: tokens of the tokenizer and rows of the embedding, at least 259 + 1.
        heads, kv_heads: query heads, and key/value heads they share.
        max_positions: longest sequence, in tokens.

    Raises:
        ModelError: the folder is taken, or sizes that do not fit.
    """
    # Imported here: model_source promises a quick import.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if family not in (families := get_args(Family)):
        raise ModelError(f"tiny_model: family {family!r} is none of {', '.join(families)}")
    if hidden_size % heads or heads % kv_heads:
        raise ModelError(
            f"tiny_model: heads ({heads}) must divide hidden_size ({hidden_size}), "
            f"and kv_heads ({kv_heads}) must divide heads"
        )
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out}: not empty; give a new folder")

    tokenizer = _tiny_tokenizer(vocab_size, max_positions, seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            if weight.dim() == 1:
                weight.copy_(0.1 * drawn + (1.0 if "norm" in name else 0.0))
            elif "embed_tokens" in name or "lm_head" in name:
                # The head sees vectors of unit mean square: logits get deviation 1.5.
                weight.copy_(1.5 * drawn / hidden_size**0.5)
            else:
                weight.copy_(drawn / weight.shape[1] ** 0.5)
    model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _tiny_tokenizer(vocab_size: int, max_positions: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `vocab_size` tokens: any text round-trips through it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size <= _BYTES + len(_SPECIAL_TOKENS):
        raise ModelError(
            f"tiny_model: vocab_size {vocab_size} has no room for the bytes and special tokens; "
            f"give at least {_BYTES + len(_SPECIAL_TOKENS) + 1}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_words(vocab_size, seed), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ModelError(f"tiny_model: vocab_size {vocab_size} is too large for its training text")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=max_positions,
    )


def _words(vocab_size: int, seed: int) -> list[str]:
    """Text with enough different words, each word seen twice, to learn `vocab_size` tokens."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in "aeiou"]
    known = ["user", "assistant", "answer", "question", "what", "is", "sum", "yes", "no"]
    made = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(vocab_size)]
    return [" ".join(known + made + known + made)]
