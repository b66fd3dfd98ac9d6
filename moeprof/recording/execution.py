"""Counts the rows each expert really ran on, independently of what the router said.

Single-expert modules are counted by hooks on every step. Fused experts show nothing to a hook,
so while their module runs on a probe step every operator call is watched: which expert's slice of
the weights was multiplied with how many rows. Where neither shows, the count stays unknown.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

FUSED_DIM = 3
MATRIX_DIM = 2

_UNCHANGED = frozenset(
    {"transpose", "t", "mT", "view", "reshape", "contiguous", "to", "detach", "__get__"}
)


class RowWitness(TorchFunctionMode):
    """Watches one call of a fused experts module.

    Args:
        experts: The module.
        num_experts: Experts whose weights are stacked along the first dimension.
    """

    def __init__(self, experts: torch.nn.Module, num_experts: int) -> None:
        super().__init__()
        self._experts = experts
        self._num_experts = num_experts
        # Keys are object ids, so the objects are kept alive as long as the keys.
        self._slices: dict[int, tuple[str, Any, torch.Tensor]] = {}
        self._keep: list[Any] = []
        self._single: list[tuple[str, Any, int]] = []
        self._many: list[tuple[str, str, torch.Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operator and notes what it did with expert weights."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__getitem__":
            self._note_slice(args[0], args[1], result)
        elif name in _UNCHANGED:
            self._follow(args, result)
        elif "grouped_mm" in name:
            self._note_grouped(args, kwargs)
        elif name in ("linear", "matmul", "__matmul__", "mm", "bmm", "baddbmm", "addmm"):
            self._note_product(args, kwargs)
        return result

    def _source(self, tensor: Any) -> tuple[str, Any] | None:
        """Returns (weight name, expert index or None for all) of a tensor, if it is known."""
        if id(tensor) in self._slices:
            name, index, _ = self._slices[id(tensor)]
            return name, index
        # Looked up each time: offloading puts parameters in place while the module runs.
        for name, parameter in self._experts.named_parameters():
            if parameter is tensor:
                stacked = parameter.dim() > 1 and parameter.shape[0] % self._num_experts == 0
                return (name, None) if stacked else None
        return None

    def _remember(self, result: Any, name: str, index: Any) -> None:
        if isinstance(result, torch.Tensor):
            self._slices[id(result)] = (name, index, result)

    def _note_slice(self, tensor: Any, index: Any, result: Any) -> None:
        source = self._source(tensor)
        if source is None or source[1] is not None or tensor.dim() != FUSED_DIM:
            return
        name = source[0]
        if isinstance(index, torch.Tensor) and index.dim() > 0 and index.numel() > 1:
            # Weights gathered per row: each gathered copy serves exactly one row.
            self._many.append((name, "ids", index.detach()))
        elif isinstance(index, (int, np.integer, torch.Tensor)):
            self._remember(result, name, index)

    def _follow(self, args: tuple[Any, ...], result: Any) -> None:
        source = self._source(args[0]) if args and isinstance(args[0], torch.Tensor) else None
        if source is not None:
            self._remember(result, *source)

    def _note_grouped(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = self._source(args[1]) if len(args) > 1 else None
        offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)  # noqa: PLR2004
        if source is not None and isinstance(offsets, torch.Tensor):
            self._many.append((source[0], "offsets", offsets.detach()))

    def _note_product(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        for weight in tensors:
            source = self._source(weight)
            if source is None:
                continue
            name, index = source
            other = next((t for t in tensors if t is not weight and t.dim() >= MATRIX_DIM), None)
            if other is None:
                continue
            if index is not None:
                self._single.append((name, index, other.numel() // other.shape[-1]))
            elif other.dim() == FUSED_DIM and other.shape[0] == self._num_experts:
                # A batched product over all experts: each runs on every row it is given.
                self._many.append((name, "dense", torch.tensor(other.shape[1])))
            return

    def _single_experts(self) -> list[int]:
        """Returns the expert of each single product, with one wait for the device in all."""
        indices = [index for _, index, _ in self._single]
        tensors = [i.reshape(()) for i in indices if isinstance(i, torch.Tensor)]
        values = iter(torch.stack(tensors).tolist() if tensors else [])
        return [int(next(values) if isinstance(i, torch.Tensor) else i) for i in indices]

    def counts(self) -> np.ndarray | None:
        """Returns [experts] rows executed, or None when no expert weight was seen in use.

        Reads device values, so call it when the step is over. Of several weights of one expert
        the one with the most rows counts.
        """
        per_weight: dict[str, np.ndarray] = {}

        def rows(name: str) -> np.ndarray:
            return per_weight.setdefault(name, np.zeros(self._num_experts, dtype=np.int64))

        for (name, _, count), expert in zip(self._single, self._single_experts(), strict=True):
            if 0 <= expert < self._num_experts:
                rows(name)[expert] += count
        for name, meaning, tensor in self._many:
            values = tensor.reshape(-1).to("cpu").numpy().astype(np.int64)
            if meaning == "ids":
                inside = values[(values >= 0) & (values < self._num_experts)]
                rows(name)[:] += np.bincount(inside, minlength=self._num_experts)
            elif meaning == "offsets":
                rows(name)[: values.size] += np.diff(values, prepend=0)
            else:
                rows(name)[:] += int(values[0])
        if not per_weight:
            return None
        return np.asarray(np.maximum.reduce(list(per_weight.values())))
