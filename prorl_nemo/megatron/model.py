"""The policy network: Megatron-Core's GPTModel over packed rows, returning log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from prorl_nemo.megatron import hf_weights
from prorl_nemo.megatron.layers import (
    FinalNorm,
    PackedAttention,
    RMSNorm,
    WideRowParallelLinear,
    add_to_residual,
)
from prorl_nemo.megatron.layout import ModelSpec, padded_groups, padded_vocab
from prorl_nemo.megatron.logprobs import response_logprobs
from prorl_nemo.megatron.packing import PackedRow
from prorl_nemo.megatron.precision import megatron_settings
from prorl_nemo.megatron.rope import attention_scale, inverse_frequencies
from prorl_nemo.recipe import Policy

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class PolicyModel(GPTModel):
    """GPTModel whose last stage gives [2, targets]: log-probs and entropy of a row's responses.

    The hidden states of response positions go straight to the chunked
    log-probs, so the logits of a row never exist.
    """

    true_vocab_size: int
    exact_logits: bool

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        row: PackedRow = packed_seq_params
        if self.config.sequence_parallel:
            # The log-probs' backward already sums over the ranks: each takes its slice of it.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        logprobs, entropy = response_logprobs(
            hidden_states[:, 0].index_select(0, row.hidden_index),
            weight,
            row.targets,
            row.temperature,
            self.true_vocab_size,
            parallel_state.get_tensor_model_parallel_group(),
            exact=self.exact_logits,
        )
        return torch.stack((logprobs, entropy))


def transformer_config(spec: ModelSpec, policy: Policy) -> TransformerConfig:
    """Megatron's configuration of a model and layout.

    Rope and activation fusions stay off: on DeepSeek-R1-Distill-Qwen-1.5B they make
    trainer and engine disagree (NeMo-RL #1801). `moe_token_dispatcher_type` matters to
    dense models too: variable sequence lengths over pipeline stages require it.

    The interleaved schedule sends activations and gradients in one batch by default. With two
    pipeline ranks both have the same sender and receiver, and gloo delivers one in place of the
    other: silently wrong gradients. Messages one by one, as set here, keep their order. Its
    early release of sent activations is off on CPU, where gloo may still be reading them.
    """
    dtype = DTYPES[policy.precision]
    groups = padded_groups(spec, policy.tensor_parallel)
    interleaved = policy.virtual_pipeline > 1
    recompute: dict[str, Any] = {}
    if policy.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif policy.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        ffn_hidden_size=spec.ffn,
        num_attention_heads=groups * (spec.heads // spec.groups),
        num_query_groups=groups,
        kv_channels=spec.head_dim,
        softmax_scale=attention_scale(spec.head_dim, spec.rope_scaling),
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        # See layers.add_to_residual.
        fp32_residual_connection=policy.precision == "bf16",
        pipeline_dtype=torch.float32,
        bf16=policy.precision == "bf16",
        tensor_model_parallel_size=policy.tensor_parallel,
        sequence_parallel=policy.sequence_parallel,
        pipeline_model_parallel_size=policy.pipeline_parallel,
        virtual_pipeline_model_parallel_size=policy.virtual_pipeline if interleaved else None,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=policy.context_parallel,
        # Without it a context-parallel rank's mean loss makes gradients that many times too large.
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        deallocate_pipeline_outputs=torch.cuda.is_available() or not interleaved,
        # Weights come from the folder, but initialisation must be "performed": without it
        # Megatron leaves out the attributes by which the gradient norm counts a tensor-parallel
        # shard on every rank, and the norm is silently too small.
        perform_initialization=True,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        use_cpu_initialization=not torch.cuda.is_available(),
        **megatron_settings(policy),
        **recompute,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


def layer_spec(spec: ModelSpec, policy: Policy) -> ModuleSpec:
    """Megatron's local layer with our norm and our packed attention.

    With FP8 its products are Transformer Engine's, which alone have FP8; in bf16 they would
    call the same kernels as torch. Norms stay apart from them: Transformer Engine's fused ones
    refuse the fp32 residual stream.
    """
    layer = get_gpt_layer_local_spec(qk_layernorm=spec.qk_norm, normalization="RMSNorm")
    submodules = layer.submodules
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(
        PackedAttention,
        params={
            "inverse_frequencies": inverse_frequencies(
                spec.rope_theta, spec.head_dim, spec.rope_scaling
            ),
            "flex": policy.attention == "flex",
        },
    )
    attention.linear_proj = WideRowParallelLinear
    submodules.mlp.submodules.linear_fc2 = WideRowParallelLinear
    submodules.self_attn_bda = submodules.mlp_bda = add_to_residual
    if spec.qk_norm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    if policy.fp8:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TERowParallelLinear,
        )

        mlp = submodules.mlp.submodules
        attention.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear
        attention.linear_proj = mlp.linear_fc2 = TERowParallelLinear
    return layer


def build_model(spec: ModelSpec, policy: Policy, folder: Path) -> list[PolicyModel]:
    """This rank's chunks of the model, with the folder's weights. Needs parallel_state.

    One chunk, or with an interleaved pipeline one for each virtual stage; all share a config.
    """
    config = transformer_config(spec, policy)
    return [
        _build_chunk(spec, policy, config, folder, stage)
        for stage in range(policy.virtual_pipeline)
    ]


def _build_chunk(
    spec: ModelSpec, policy: Policy, config: TransformerConfig, folder: Path, stage: int
) -> PolicyModel:
    place: dict[str, Any] = {"ignore_virtual": False, "vp_stage": stage}
    model = PolicyModel(
        config,
        _block_spec(spec, policy, config, stage),
        vocab_size=padded_vocab(spec, policy.tensor_parallel),
        max_sequence_length=spec.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type="none",  # PackedAttention rotates.
        vp_stage=stage if policy.virtual_pipeline > 1 else None,
    )
    model.true_vocab_size = spec.vocab
    model.exact_logits = policy.logits == "fp32"
    if torch.cuda.is_available():
        model.cuda()
    if policy.precision == "bf16":
        model.bfloat16()
    hf_weights.load_weights(
        model, layer_offset(model), weight_shape(spec, policy), folder, *_tensor_rank()
    )
    return model


def _block_spec(spec: ModelSpec, policy: Policy, config: TransformerConfig, stage: int) -> Any:
    layers = get_num_layers_to_build(config, vp_stage=stage)
    layer = layer_spec(spec, policy)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=FinalNorm)


def weight_shape(spec: ModelSpec, policy: Policy) -> hf_weights.Shape:
    """What the rules of `hf_weights` must know of the model and of its padding for the ranks."""
    return hf_weights.Shape(
        spec.heads,
        spec.groups,
        padded_groups(spec, policy.tensor_parallel),
        spec.head_dim,
        spec.vocab,
        padded_vocab(spec, policy.tensor_parallel),
    )


def layer_offset(model: GPTModel) -> int:
    """Global index of the first layer of this rank's part."""
    layers = model.decoder.layers
    return int(layers[0].layer_number) - 1 if len(layers) else 0


def _tensor_rank() -> tuple[int, int]:
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
