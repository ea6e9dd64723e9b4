"""The untrained model and its tokenizer, as a Hugging Face folder.

A model this small learns nothing that its tokens hide. So byte-level BPE is trained on the words
that tasks ask their questions with, which become one token each, and on nothing that the questions
differ in; digits are apart, without which small models hardly learn arithmetic (Singh & Strouse,
arXiv 2402.14903). Any text round-trips. Our choice.

Weights: normal with deviation 1 / sqrt(fan-in) (LeCun et al. 1998), the projections back into the
residual stream smaller by sqrt(2 layers) as in GPT-2. GPT-2's 0.02 is meant for widths above 1,000.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prorl_nemo.data.chat import FORMAT_INSTRUCTION
from prorl_nemo.recipe_pretrain import Shape

PAD, END_OF_TURN = SPECIAL_TOKENS = ["<|endoftext|>", "<|im_end|>"]
# The format costs a prompt one token and a response two, and is either right or absent.
WHOLE = ["<answer>", "</answer>", f"\n{FORMAT_INSTRUCTION}"]
# Turns alternate: their ends tell who speaks.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"
WORD_SHARE = 0.02
"""A word that as many of a task's problems have belongs to how it asks, not to what."""
_EMBEDDING_DEVIATION = 0.04


def make_tokenizer(tasks: Iterable[Sequence[str]], vocab_size: int, max_positions: int) -> Any:
    """A tokenizer of at most `vocab_size` tokens, with a chat template.

    It is a `Qwen2Tokenizer`, whose rules for cutting text into pieces are fixed: transformers loads
    the tokenizer of any folder of that model type as one, whatever rules its file has.

    Args:
        tasks: the problems of each task, as texts.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    rules = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(WHOLE),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(_words(tasks, rules), trainer)
    bpe = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],  # type: ignore[misc]
        unk_token=PAD,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_positions,
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in WHOLE])
    return tokenizer


def _words(tasks: Iterable[Sequence[str]], rules: Any) -> Iterator[str]:
    """Words that belong to how a task asks, the more often the more of its problems have them."""
    shares: dict[str, float] = {}
    for texts in tasks:
        having = Counter(
            piece for text in texts for piece in {p for p, _ in rules.pre_tokenize_str(text)}
        )
        for piece, count in having.items():
            # A piece met once is a name or a number, whatever its share of a few problems.
            if count > 1 and count >= WORD_SHARE * len(texts):
                shares[piece] = max(shares.get(piece, 0.0), count / len(texts))
    for piece, share in sorted(shares.items()):
        yield from [piece] * math.ceil(share / WORD_SHARE)


def write_first_model(
    folder: Path, shape: Shape, tasks: Iterable[Sequence[str]], seed: int, precision: str
) -> None:
    """Write the folder unless it is there; aside, then renamed. The same for a seed."""
    if folder.exists():
        return
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(tasks, shape.vocab_size, shape.max_positions)
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
        embedding = name.endswith("embed_tokens.weight")
        deviation = _EMBEDDING_DEVIATION if embedding else weight.shape[-1] ** -0.5
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
