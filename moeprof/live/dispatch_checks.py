"""What every entry point that runs experts asks of a dispatch before it touches the device.

Checks what the host knows without waiting: shapes, dtypes, devices, whether gradients are wanted.
Leaves out which ids there are: those lie on the device.
"""

from __future__ import annotations

import torch

from moeprof.errors import UsageError

_ID_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


def check_dispatch(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    d_model: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Refuses tensors that are no dispatch; waits for no device.

    Args:
        hidden: [T, d_model], floating point.
        ids: [T, k], of an integer dtype.
        weights: [T, k], floating point; None where only rows are moved, which needs none.
        d_model: Width of the experts.
        dtype: Of the experts, which ``hidden`` must have; any when None.
        device: Where the experts lie, with its index as tensors have it; that of ``hidden`` when
            None.

    Raises:
        UsageError: They do not fit together or the experts, or lie elsewhere.
    """
    num_tokens, *by_slot = ids.shape or (0,)
    fits = len(by_slot) == 1 and hidden.shape == (num_tokens, d_model)
    if not fits or (weights is not None and weights.shape != ids.shape):
        rows = f"rows {tuple(hidden.shape)}"
        given = (
            f"{rows} and ids {tuple(ids.shape)}"
            if weights is None
            else f"{rows}, ids {tuple(ids.shape)} and weights {tuple(weights.shape)}"
        )
        raise UsageError(
            f"{given} are no dispatch over experts of width {d_model}",
            hint=f"pass rows [T, {d_model}], ids [T, k] and weights [T, k]",
        )
    if ids.dtype not in _ID_DTYPES:
        raise UsageError(
            f"ids of experts are {ids.dtype}, expected integers", hint="pass ids.long()"
        )
    for name, tensor in (("rows", hidden), ("weights", weights)):
        if tensor is not None and not tensor.is_floating_point():
            raise UsageError(f"{name} are {tensor.dtype}, expected floating point")
    if dtype is not None and hidden.dtype != dtype:
        raise UsageError(
            f"rows are {hidden.dtype}, the experts {dtype}", hint=f"pass rows.to({dtype})"
        )
    where = hidden.device if device is None else device
    for tensor in (hidden, ids, weights):
        if tensor is not None and tensor.device != where:
            raise UsageError(
                f"a dispatch lies on {tensor.device}, its {'rows' if device is None else 'experts'}"
                f" on {where}"
            )


def refuse_gradients(*tensors: torch.Tensor, what: str) -> None:
    """Refuses to run where gradients are wanted that would be lost without a word.

    Args:
        tensors: All that a gradient could be wanted of: rows, weights of the router, experts.
        what: What is about to run, as the subject of a sentence in the singular.

    Raises:
        UsageError: Gradients are enabled and one of the tensors requires one.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UsageError(
            f"{what} is for inference only: no gradient would reach what requires one",
            hint="run it under torch.no_grad()",
        )
