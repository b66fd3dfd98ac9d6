"""Tiny models of families whose MoE layers are built in ways of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import COMMON, _build, jetmoe

MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}


def _lm(name: str, config: str, **settings: Any) -> torch.nn.Module:
    return _build(f"{name}ForCausalLM", config, **{**COMMON, **settings})


def llama4() -> torch.nn.Module:
    """Two experts a token, every second layer dense."""
    return _lm(
        "Llama4",
        "Llama4TextConfig",
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        interleave_moe_layer_step=2,
        num_hidden_layers=4,
        head_dim=8,
    )


def dbrx() -> torch.nn.Module:
    """Experts stacked in two dimensions; its own names for everything."""
    return _build(
        "DbrxForCausalLM",
        "DbrxConfig",
        vocab_size=99,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )


def jamba() -> torch.nn.Module:
    """Recurrent layers between attention, MoE in every second layer."""
    return _lm(
        "Jamba",
        "JambaConfig",
        num_experts=4,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
    )


def phimoe() -> torch.nn.Module:
    """Weights that follow from logits by no common rule."""
    return _lm("Phimoe", "PhimoeConfig", **LOCAL_EXPERTS)


def qwen3_next() -> torch.nn.Module:
    return _lm(
        "Qwen3Next",
        "Qwen3NextConfig",
        **EXPERTS,
        **LINEAR_ATTENTION,
        num_hidden_layers=4,
        shared_expert_intermediate_size=16,
        head_dim=8,
    )


def granite_moe_shared() -> torch.nn.Module:
    """Its shared expert stands beside the block."""
    return _lm(
        "GraniteMoeShared", "GraniteMoeSharedConfig", **LOCAL_EXPERTS, shared_intermediate_size=16
    )


def ernie() -> torch.nn.Module:
    """Its selection bias sits in a module below the router."""
    return _lm(
        "Ernie4_5_Moe",
        "Ernie4_5_MoeConfig",
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    )


def minimax() -> torch.nn.Module:
    return _lm(
        "MiniMax",
        "MiniMaxConfig",
        **LOCAL_EXPERTS,
        block_size=8,
        layer_types=["full_attention", "linear_attention", "full_attention"],
    )


def longcat() -> torch.nn.Module:
    """Twelve ids, of which the last four compute nothing."""
    return _build(
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        **{**COMMON, **MLA},
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        num_layers=2,
        n_routed_experts=8,
        zero_expert_num=4,
        moe_topk=3,
        head_dim=4,
    )


def aria() -> torch.nn.Module:
    """Its experts choose inside."""
    return _build(
        "AriaTextForCausalLM",
        "AriaTextConfig",
        **COMMON,
        moe_num_experts=8,
        moe_topk=2,
        moe_num_shared_experts=2,
    )


FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    f.__name__: f
    for f in (
        jetmoe, llama4, dbrx, jamba, phimoe, qwen3_next, granite_moe_shared, ernie, minimax,
        longcat, aria,
    )
}  # fmt: skip
