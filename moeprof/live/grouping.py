"""Whether torch has a grouped matrix product that is fast for given tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_ROW_ALIGNMENT_BYTES = 16
_GROUPED_CAPABILITY = (9, 0)


def can_group(weight: torch.Tensor, rows: torch.Tensor) -> bool:
    """Returns True where torch has a fast grouped matrix product for these tensors."""
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16:
        return False
    if not hasattr(F, "grouped_mm"):
        return False
    widths = (weight.shape[1], weight.shape[2])
    aligned = all(n * rows.element_size() % _ROW_ALIGNMENT_BYTES == 0 for n in widths)
    return aligned and torch.cuda.get_device_capability(rows.device) >= _GROUPED_CAPABILITY
