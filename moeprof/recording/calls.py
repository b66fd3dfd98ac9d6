"""Reads what a model or `generate` was called with: tokens, cache, logits, end tokens.

Looks at host objects only; nothing here waits for a device. Leaves out whose tokens they are
(`tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from moeprof.recording.tokens import Episode, Generation

MATRIX_DIM = 2
CACHE_ARGUMENTS = ("past_key_values", "past", "cache", "kv_cache", "past_key_value")
TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "hidden_states", "x")


def is_matrix(value: Any) -> bool:
    """Says whether a value is a tensor of two dimensions."""
    return isinstance(value, torch.Tensor) and value.dim() == MATRIX_DIM


def token_argument(args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Returns token ids or embeddings a stack was called with; None where it got no tensor."""
    for name in TOKEN_ARGUMENTS:
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor):
            return value
    tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
    return next(tensors, None)


def token_shape(tokens: torch.Tensor) -> tuple[int, int]:
    """Returns (rows, columns) of token ids [B, S], embeddings [B, S, D] or rows [T, D]."""
    if tokens.dim() == 1:
        return 1, tokens.shape[0]
    if tokens.dim() == MATRIX_DIM and tokens.is_floating_point():
        return 1, tokens.shape[0]
    return tokens.shape[0], tokens.shape[1]


def cache_argument(kwargs: Mapping[str, Any], *, generating: bool) -> tuple[Any, int | None]:
    """Returns the cache and its length; a length only where no device has to be asked."""
    past = next((kwargs[n] for n in CACHE_ARGUMENTS if kwargs.get(n) is not None), None)
    if past is None:
        return None, 0
    get_length = getattr(past, "get_seq_length", None)
    if callable(get_length):
        length = get_length()
        if isinstance(length, int):
            return past, length
    if isinstance(past, (tuple, list, Mapping)) and len(past) == 0:
        return None, 0
    return past, None


def router_logits(output: Any, num_experts: int) -> torch.Tensor | None:
    """Returns the router's scores over all experts, [T, E]; None where it shows none."""
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    candidates = [
        o
        for o in outputs
        if isinstance(o, torch.Tensor)
        and o.is_floating_point()
        and o.dim() >= MATRIX_DIM
        and o.shape[-1] == num_experts
    ]
    if not candidates:
        return None
    # Routers that also return combine weights return logits last among those of this width.
    chosen = candidates[-1] if type(output) is tuple and len(candidates) > 1 else candidates[0]
    return chosen.detach().reshape(-1, num_experts)


def describe_generation(model: Any, args: Any, kwargs: Mapping[str, Any]) -> Generation:
    """Returns what a call of `generate` says of its inputs and of the tokens that end it."""
    names = ("inputs", "input_ids", "inputs_embeds", "input_features")
    given = [args[0] if args else None, *(kwargs.get(name) for name in names)]
    inputs = next((value for value in given if isinstance(value, torch.Tensor)), None)
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]

    def setting(name: str) -> Any:
        if kwargs.get(name) is not None:
            return kwargs[name]
        values = (getattr(config, name, None) for config in configs if config is not None)
        return next((value for value in values if value is not None), None)

    eos = setting("eos_token_id")
    if isinstance(eos, torch.Tensor):
        eos = eos.reshape(-1).tolist()
    ids = [eos] if isinstance(eos, int) else list(eos or [])
    matrix = inputs is not None and inputs.dim() >= MATRIX_DIM
    return Generation(
        num_inputs=inputs.shape[0] if inputs is not None else None,
        num_input_columns=inputs.shape[1] if inputs is not None and matrix else None,
        eos_ids=frozenset(int(i) for i in ids),
        forced_first_token=setting("forced_bos_token_id") is not None,
    )


def output_tokens(sequences: torch.Tensor | None, decoder: Episode) -> np.ndarray:
    """Returns [requests] tokens generated, the end token included, for each first sequence."""
    if sequences is None or sequences.dim() != MATRIX_DIM:
        return decoder.decoded_tokens()
    rows = sequences.to("cpu").numpy()
    start = decoder.num_prompt_columns or 0
    width = max(1, rows.shape[0] // max(1, decoder.num_requests))
    generated = rows[::width, start:]
    ends = np.isin(generated, list(decoder.eos_ids))
    ended_at = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, generated.shape[1])
    return np.asarray(ended_at, dtype=np.int64)
