"""Dynamic gating as moeprof runs it: a few Triton kernels that read each active expert once.

Up to `FEW_TOKENS` tokens, two launches stream the weights of the active experts (`few`); beyond,
rows are brought into expert order and two persistent grouped products follow (`many`), or pairs of
them side by side (`pairs`), which the device decides. Nothing waits for the device and nothing is
sized by what the router chose: all can be captured as CUDA graphs.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels.plain import dynamic_grouped
from moeprof.live.kernels.slots import within_capacity

FEW_TOKENS = 64
_CAPABILITY = (9, 0)
_ALIGNMENT = 8
_TYPES = (torch.bfloat16, torch.float16)


def dynamic(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    *,
    capacity: int | None = None,
) -> torch.Tensor:
    """Dynamic gating with moeprof's kernels; bit-reproducible.

    Falls back to `dynamic_grouped` where they cannot run (see `can_fuse`). Products are summed in
    single precision, the hidden layer is rounded once to the dtype of ``hidden``.
    """
    if not can_fuse(hidden, experts):
        return dynamic_grouped(hidden, expert_ids, weights, experts, capacity=capacity)
    if hidden.device.type == "cuda" and hidden.device.index != torch.cuda.current_device():
        # Triton launches on the current device, wherever the tensors lie.
        with torch.cuda.device(hidden.device):
            return dynamic(hidden, expert_ids, weights, experts, capacity=capacity)
    kept = within_capacity(expert_ids, experts.num_experts, capacity)
    hidden, kept, weights = hidden.contiguous(), kept.contiguous(), weights.contiguous()
    if hidden.shape[0] == 0:
        return torch.empty_like(hidden)
    if hidden.shape[0] <= FEW_TOKENS:
        from moeprof.live.kernels.few import run_few

        return run_few(hidden, kept, weights, experts)
    from moeprof.live.kernels.many import run_many

    return run_many(hidden, kept, weights, experts)


def can_fuse(hidden: torch.Tensor, experts: ExpertWeights) -> bool:
    """Returns True where the Triton kernels run.

    They need Triton, a GPU of compute capability 9.0 or later, half precision, contiguous weights
    of the same type on the same device, and widths that are multiples of 8 (the copy engine moves
    16 bytes at least).
    """
    if not suits_device(hidden.device, hidden.dtype):
        return False
    same = experts.w_in.dtype == hidden.dtype and experts.w_in.device == hidden.device
    return same and fits(experts)


def suits_device(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns True where the Triton kernels run on a device with numbers of a type."""
    if device.type != "cuda" or dtype not in _TYPES:
        return False
    return _has_triton() and torch.cuda.get_device_capability(device) >= _CAPABILITY


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def fits(experts: ExpertWeights) -> bool:
    """Returns True where the shapes and strides of ``experts`` suit the kernels."""
    aligned = experts.d_model % _ALIGNMENT == 0 and experts.d_ff % _ALIGNMENT == 0
    return aligned and all(tensor.is_contiguous() for tensor in experts.tensors())
