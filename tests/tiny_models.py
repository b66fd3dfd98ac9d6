"""Tiny randomly initialised models of the architectures the recorder must read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def _build(model_class: str, config_class: str, **settings: Any) -> torch.nn.Module:
    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Fresh models route near-uniformly with near-zero outputs; wider weights make
        # routing decisive and interventions visible; zero-initialised routers would only tie.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
            elif "bias" in name:
                parameter.normal_(0.0, 0.05, generator=generator)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(0.0, 0.2, generator=generator)
    return model.eval()


def mixtral() -> torch.nn.Module:
    return _build(
        "MixtralForCausalLM",
        "MixtralConfig",
        **COMMON,
        num_local_experts=8,
        num_experts_per_tok=2,
    )


def olmoe() -> torch.nn.Module:
    return _build("OlmoeForCausalLM", "OlmoeConfig", **COMMON, num_experts=8, num_experts_per_tok=3)


def qwen2_moe() -> torch.nn.Module:
    return _build(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        **COMMON,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=2,
    )


def qwen3_moe() -> torch.nn.Module:
    return _build(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **COMMON,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        head_dim=8,
    )


def deepseek_v3() -> torch.nn.Module:
    return _build(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        **{**COMMON, "num_key_value_heads": 4},
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )


def gpt_oss() -> torch.nn.Module:
    return _build(
        "GptOssForCausalLM",
        "GptOssConfig",
        **COMMON,
        num_local_experts=8,
        num_experts_per_tok=2,
        head_dim=8,
    )


def granite_moe() -> torch.nn.Module:
    return _build(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        **COMMON,
        num_local_experts=8,
        num_experts_per_tok=2,
    )


def nllb_moe(**settings: Any) -> torch.nn.Module:
    return _build(
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        **{
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "num_experts": 8,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "max_position_embeddings": 128,
            "decoder_start_token_id": 2,
            "second_expert_policy": "all",
            "attn_implementation": "eager",
            **settings,
        },
    )


def switch() -> torch.nn.Module:
    return _build(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=4,
        num_experts=8,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        decoder_start_token_id=0,
    )


def jetmoe() -> torch.nn.Module:
    return _build(
        "JetMoeForCausalLM",
        "JetMoeConfig",
        **{**COMMON, "num_key_value_heads": 2},
        num_local_experts=4,
        num_experts_per_tok=2,
        kv_channels=8,
    )


def llama4() -> torch.nn.Module:
    return _build(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        **COMMON,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        head_dim=8,
    )


LMS: dict[str, Callable[[], torch.nn.Module]] = {
    f.__name__: f for f in (mixtral, olmoe, qwen2_moe, qwen3_moe, deepseek_v3, gpt_oss, granite_moe)
}
MTS: dict[str, Callable[[], torch.nn.Module]] = {f.__name__: f for f in (nllb_moe, switch)}
OTHERS: dict[str, Callable[[], torch.nn.Module]] = {f.__name__: f for f in (jetmoe, llama4)}
