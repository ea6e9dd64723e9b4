"""The untrained model and its tokenizer, as a Hugging Face folder.

Byte-level BPE (Radford et al. 2019; any text round-trips) with digits one by one, without which
small models hardly learn arithmetic (Singh & Strouse, arXiv 2402.14903). Weights: normal with
deviation 0.02, the projections back into the residual stream smaller by sqrt(2 layers), as GPT-2.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prorl_nemo.recipe_pretrain import Shape

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ANSWER_TAGS = ["<answer>", "</answer>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_DEVIATION = 0.02


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_positions: int) -> Any:
    """A tokenizer of at most `vocab_size` tokens for these texts, with a chat template.

    The answer's tags are one token each: the format costs a response two tokens, and is either
    right or absent.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ANSWER_TAGS),
        # A pair met once is a name or a number, not a word.
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ANSWER_TAGS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[2],
        pad_token=SPECIAL_TOKENS[0],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_positions,
    )


def write_first_model(
    folder: Path, shape: Shape, texts: Iterable[str], seed: int, precision: str
) -> None:
    """Write the folder unless it is there; aside, then renamed. The same for a seed."""
    if folder.exists():
        return
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = train_tokenizer(texts, shape.vocab_size, shape.max_positions)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        deviation = _DEVIATION
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= math.sqrt(2 * shape.layers)
        with torch.no_grad():
            if weight.dim() == 1:
                weight.fill_(1.0 if "norm" in name else 0.0)
            else:
                weight.normal_(0.0, deviation, generator=generator)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
