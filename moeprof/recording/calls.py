"""Reads what a model or `generate` was called with: tokens, cache, logits, end tokens.

Looks at host objects only; nothing here waits for a device. Leaves out whose tokens they are
(`tokens`).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import nn

from moeprof.recording.tokens import Episode, Generation

MATRIX_DIM = 2
CACHE_ARGUMENTS = ("past_key_values", "past", "cache", "kv_cache", "past_key_value")
PACKED_ARGUMENTS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")
"""Given where several sequences lie in one row, one after another."""

TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "hidden_states", "x")


@functools.cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)[1:]


def named_arguments(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the arguments a module was called with, by name."""
    # The class, not the instance: accelerate and tensor parallelism replace `instance.forward`.
    names = _parameter_names(type(module).forward) if args else ()
    return {**dict(zip(names, args, strict=False)), **kwargs}


def is_matrix(value: Any) -> TypeGuard[torch.Tensor]:
    """Says whether a value is a tensor of two dimensions."""
    return isinstance(value, torch.Tensor) and value.dim() == MATRIX_DIM


def token_argument(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Returns token ids or embeddings a stack was called with; None where it got no tensor."""
    named = named_arguments(module, args, kwargs)
    for name in TOKEN_ARGUMENTS:
        value = named.get(name)
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


def cache_argument(
    named: Mapping[str, Any], *, columns: int, generating: bool
) -> tuple[Any, int | None]:
    """Returns the cache and its length; None for a length that only the device knows.

    The device is asked in one case: a longer pass over a preallocated cache outside `generate` may
    begin another sequence, and nothing else tells.
    """
    past = next((named[n] for n in CACHE_ARGUMENTS if named.get(n) is not None), None)
    if past is None:
        return None, 0
    get_length = getattr(past, "get_seq_length", None)
    if callable(get_length):
        try:
            length = get_length()
        except (ValueError, TypeError, IndexError):
            return past, None  # A cache of recurrent states has no length.
        if isinstance(length, int):
            return past, length
        if isinstance(length, torch.Tensor) and length.numel() == 1:
            on_host = length.device.type == "cpu"
            return past, int(length) if on_host or (columns > 1 and not generating) else None
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


def compiles_by_itself(model: Any) -> bool:
    """Says whether the model's `generate` is the one of transformers."""
    library = sys.modules.get("transformers.generation.utils")
    return library is not None and isinstance(model, library.GenerationMixin)


def describe_generation(model: Any, args: Any, kwargs: Mapping[str, Any]) -> Generation:
    """Returns what a call of `generate` says of its inputs and of the tokens that end it."""
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]

    def setting(name: str) -> Any:
        if kwargs.get(name) is not None:
            return kwargs[name]
        values = (getattr(config, name, None) for config in configs if config is not None)
        return next((value for value in values if value is not None), None)

    def ids(name: str) -> frozenset[int]:
        value = setting(name)
        if isinstance(value, torch.Tensor):
            value = value.reshape(-1).tolist()
        values = [value] if isinstance(value, int) else list(value or [])
        return frozenset(int(i) for i in values)

    given = [args[0] if args else None, *(kwargs.get(n) for n in ("inputs", "input_ids"))]
    tokens = next((value for value in given if isinstance(value, torch.Tensor)), None)
    embeddings = kwargs.get("inputs_embeds")
    given = [embeddings, tokens, kwargs.get("input_features")]
    inputs = next((value for value in given if isinstance(value, torch.Tensor)), None)
    matrix = inputs is not None and inputs.dim() >= MATRIX_DIM
    echoed = tokens.shape[1] if is_matrix(tokens) else 0
    makes_first_token = inputs is None or _is_encoder_decoder(model)
    eos, pad = ids("eos_token_id"), ids("pad_token_id")
    # A row that meets an end of the caller's own goes on with padding.
    other_ends = kwargs.get("stopping_criteria") or setting("stop_strings")
    return Generation(
        num_inputs=inputs.shape[0] if inputs is not None else None,
        num_prompt_columns=inputs.shape[1] if inputs is not None and matrix else None,
        num_echoed_columns=None if makes_first_token else echoed,
        eos_ids=eos,
        filler_ids=pad - eos if other_ends else frozenset(),
        forced_first_token=setting("forced_bos_token_id") is not None,
        prompt_mask=_prompt_mask(model, kwargs, tokens if embeddings is None else None, pad, eos),
        speculative=kwargs.get("assistant_model") is not None
        or setting("prompt_lookup_num_tokens") is not None,
    )


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _prompt_mask(
    model: Any,
    kwargs: Mapping[str, Any],
    tokens: torch.Tensor | None,
    pad: frozenset[int],
    eos: frozenset[int],
) -> torch.Tensor | None:
    """Returns the mask of the decoder's prompt: the one given, else the one `generate` makes."""
    if _is_encoder_decoder(model):
        mask = kwargs.get("decoder_attention_mask")
        return mask if is_matrix(mask) else None
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor):
        return mask if is_matrix(mask) else None
    if not is_matrix(tokens) or len(pad) != 1 or pad & eos:
        return None
    return tokens != next(iter(pad))


def output_tokens(
    sequences: torch.Tensor | None, decoder: Episode, generation: Generation
) -> np.ndarray:
    """Returns [requests] tokens generated, the end token included, for each first sequence."""
    if sequences is None or sequences.dim() != MATRIX_DIM:
        return decoder.decoded_tokens()
    rows = sequences.to("cpu").numpy()
    start = generation.num_echoed_columns
    if start is None:
        start = decoder.num_prompt_columns or 0
    width = max(1, rows.shape[0] // max(1, decoder.num_requests))
    generated = rows[::width, start:]
    counts = np.full(generated.shape[0], generated.shape[1], dtype=np.int64)
    for ids, counted in ((generation.eos_ids, 1), (generation.filler_ids, 0)):
        ends = np.isin(generated, list(ids))
        ended_at = np.where(ends.any(axis=1), ends.argmax(axis=1) + counted, counts)
        counts = np.minimum(counts, ended_at)
    return counts


def kept_columns(sequences: torch.Tensor | None, generation: Generation) -> int | None:
    """Returns the columns that ran and were kept when `generate` ended; None when it failed."""
    if sequences is None:
        return None
    given = 0
    if generation.num_echoed_columns is not None:
        given = (generation.num_prompt_columns or 0) - generation.num_echoed_columns
    # The last token was chosen and not run.
    return given + sequences.shape[-1] - 1
