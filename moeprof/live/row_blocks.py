"""Rows in order of expert, and back: what surrounds experts that run one by one.

Rows of an expert lie together, tokens in order; the combination adds a token's slots in their
order. So the same rows, weights and experts give the same bits, wherever the experts lie. All large
tensors are taken once and used again.
"""

from __future__ import annotations

import time

import torch

from moeprof.live.transfers import new_event

ROW_MARGIN = 2
_LARGE = 1 << 62
"""Slots are sorted by their id modulo this: those that are not executed behind every expert."""


class UnknownExpertError(IndexError):
    """An id goes beyond the experts of a site."""


class Workspace:
    """Tensors that serve every dispatch of one site shape; they grow when a dispatch is larger.

    What grows lets go of memory: whoever asks for more than ``num_rows`` has waited for those who
    still read it.

    Args:
        num_experts: Most experts of a site.
        d_model: Width of a row.
        dtype: Of rows.
        device: Where experts run.
    """

    def __init__(
        self, *, num_experts: int, d_model: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._width = d_model
        self.num_rows = 0
        pinned = device.type == "cuda"
        with torch.inference_mode(False):
            # One more: where the slots that are not executed begin.
            self._host_ends = torch.zeros(num_experts + 1, dtype=torch.int32, pin_memory=pinned)
        self._bounds: dict[int, torch.Tensor] = {}
        self._ready = new_event() if pinned else None
        self.wait_s = 0.0
        self.num_waits = 0
        self.num_growths = 0
        self._grow(1)

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        held = (self.given, self.returned, self._places, *self._bounds.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def _grow(self, num_rows: int) -> None:
        shape = (num_rows, self._width)
        with torch.inference_mode(False):
            self.given = torch.zeros(shape, dtype=self._dtype, device=self._device)
            self.returned = torch.zeros(shape, dtype=self._dtype, device=self._device)
            self._places = torch.arange(num_rows, device=self._device)
        self.num_rows = num_rows
        self.num_growths += 1

    def reserve(self, num_rows: int) -> None:
        """Makes room for that many rows, and for some more where it has to grow."""
        if num_rows > self.num_rows:
            self._grow(max(num_rows, min(ROW_MARGIN * self.num_rows, num_rows * ROW_MARGIN)))

    def prepare(self, num_experts: int) -> None:
        """Makes what dispatches of a site of so many experts need beside room for their rows.

        That is the largest id sorted before the end of each expert, and of those that are executed.
        """
        if num_experts in self._bounds:
            return
        with torch.inference_mode(False):
            bounds = torch.arange(num_experts + 1, device=self._device)
            bounds[num_experts:].fill_(_LARGE // 2)
        self._bounds[num_experts] = bounds

    def sorted_rows(
        self, hidden: torch.Tensor, ids: torch.Tensor, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Brings rows into order of expert; waits for the device once.

        Args:
            hidden: [T, d_model].
            ids: [T, k]; -1 in slots that are not executed.
            num_experts: Experts of the site.

        Returns:
            (rows [T * k, d_model], those of slots that are not executed last; slots [T * k] int64,
            the flat slot of each row; end of each expert's rows).

        Raises:
            UnknownExpertError: There is no expert of some id.
        """
        flat = ids.reshape(-1).long()
        self.reserve(flat.numel())
        by_expert, slots = flat.bitwise_and(_LARGE - 1).sort(stable=True)
        self.prepare(num_experts)
        bounds = self._bounds[num_experts]
        self._send(torch.searchsorted(by_expert, bounds, right=True, out_int32=True))
        given = self.given[: flat.numel()]
        torch.index_select(hidden, 0, slots // ids.shape[1], out=given)
        *ends, num_executed = self._received(num_experts + 1)
        if num_executed > ends[-1]:
            raise UnknownExpertError(f"ids go beyond {num_experts} experts")
        return given, slots, ends

    def ends_on_host(self, ends: torch.Tensor) -> list[int]:
        """Returns ``ends`` [experts] on the host; waits for the device once."""
        self._send(ends)
        return self._received(ends.numel())

    def _send(self, ends: torch.Tensor) -> None:
        self._host_ends[: ends.numel()].copy_(ends, non_blocking=True)
        if self._ready is not None:
            self._ready.record(torch.cuda.current_stream(self._device))

    def _received(self, count: int) -> list[int]:
        begun_s = time.perf_counter()
        if self._ready is not None:
            self._ready.synchronize()
        self.wait_s += time.perf_counter() - begun_s
        self.num_waits += 1
        ends: list[int] = self._host_ends[:count].tolist()
        return ends

    def combined(
        self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, num_executed: int
    ) -> torch.Tensor:
        """Adds each token's rows, weighted, slot by slot, in single precision or better.

        Args:
            rows: [T * k, d_model] as sorted.
            slots: As `sorted_rows` returned them.
            weights: [T, k].
            num_executed: Rows that were computed; the others count as zero.

        Returns:
            [T, d_model] in the dtype of ``rows``.
        """
        num_tokens, top_k = weights.shape
        inverse = torch.empty_like(slots)
        inverse[slots] = self._places[: slots.numel()]
        precise = torch.promote_types(rows.dtype, torch.float32)
        parts = rows.index_select(0, inverse).view(num_tokens, top_k, rows.shape[1]).to(precise)
        parts = parts * weights[..., None].to(precise)
        if num_executed < slots.numel():
            executed = (inverse < num_executed).view(num_tokens, top_k, 1)
            parts = torch.where(executed, parts, 0)
        out = parts[:, 0]
        for slot in range(1, top_k):
            out = out + parts[:, slot]
        return out.to(rows.dtype)
