"""Runs the experts of a dispatch piece by piece, with few launches, for an expert buffer.

The host learns the choice of the router with one small copy and needs no order of rows; a piece is
two launches however many experts it has. So a dispatch of a few tokens is bound by copies and
weights, not by launches. Leaves out which expert belongs to which piece and where weights lie.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moeprof.live.device_copies import copy_to_host
from moeprof.live.expert_store import ALIGNMENT_BYTES, BlockShape, Bytes
from moeprof.live.kernels.fused import suits_device
from moeprof.live.transfers import new_event

STREAMED_TOKENS = 128
"""Most tokens of a dispatch that is run in pieces."""

ROWS_AT_ONCE = 16
"""Rows of an expert that its weights are streamed once for."""

_WIDTH_ALIGNMENT = 8
_POINTER_ALIGNMENT = 16
_ID_BYTES = 8
_LEAST_TOKENS = 16
_ADDED_COLUMNS = 512


def can_stream(shape: BlockShape, device: torch.device | str) -> bool:
    """Returns True where experts of that shape can be run in pieces on a device.

    That takes Triton, a GPU of compute capability 9.0 or later, half precision, and widths that are
    multiples of 8.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    from moeprof.live.kernels.parts import ACTIVATION_CODES

    widths = (*shape.shapes["w_in"], *shape.shapes["w_out"])
    fits = all(width % _WIDTH_ALIGNMENT == 0 for width in widths)
    fits = fits and ("b_in" in shape.shapes) == ("b_out" in shape.shapes)
    return (
        fits
        and shape.activation in ACTIVATION_CODES
        and suits_device(torch.device(device), shape.dtype)
    )


class StreamedDispatch:
    """Dispatches of up to `STREAMED_TOKENS` tokens over experts of one shape.

    In turn: `begin`, `active`, any number of `run`, `put` once at most, `combined`. Device memory
    is taken when a dispatch is larger than all before.

    Args:
        shape: Of an expert's block.
        num_experts: Most experts of a site.
        device: Where they run.
    """

    def __init__(self, shape: BlockShape, *, num_experts: int, device: torch.device | str) -> None:
        self._shape = shape
        self._device = torch.device(device)
        self._num_experts = num_experts
        self._width, self._d_ff = shape.shapes["w_out"]
        self._offsets = {name: offset // shape.itemsize for name, offset in shape.offsets().items()}
        self._is_cuda = self._device.type == "cuda"
        self._ready = new_event() if self._is_cuda else None
        self._pools: dict[int, torch.Tensor] = {}
        self._num_slots = 0
        self._filled = 0
        self.wait_s = 0.0
        self.num_waits = 0
        self.num_growths = 0
        self._unit = ALIGNMENT_BYTES // shape.itemsize
        self._compiled: dict[tuple[Any, ...], Any] = {}
        from moeprof.live.kernels import few, parts, piecewise

        self._kernels = piecewise
        self._tiles = (few.IN_TILES, few.OUT_TILES)
        self._activation = parts.ACTIVATION_CODES[shape.activation]
        with torch.inference_mode(False):
            # Kernels read it where it lies: a copy would queue behind those of experts. Its size is
            # in their code, so it never changes.
            self._table = torch.zeros(2, num_experts, dtype=torch.int32, pin_memory=self._is_cuda)
        self._entries = self._table.numpy()
        self._grow(STREAMED_TOKENS)

    def _grow(self, num_slots: int) -> None:
        with torch.inference_mode(False):
            self._host_ids = torch.zeros(num_slots, dtype=torch.int64, pin_memory=self._is_cuda)
            self._put_slots = torch.zeros(num_slots, dtype=torch.int32, pin_memory=self._is_cuda)
            self._inner = torch.zeros(
                num_slots, self._d_ff, dtype=self._shape.dtype, device=self._device
            )
            self._rows = torch.zeros(
                num_slots, self._width, dtype=torch.float32, device=self._device
            )
        self._put_entries, self._chosen = self._put_slots.numpy(), self._host_ids.numpy()
        self._host_address = self._host_ids.data_ptr()
        self._num_slots = num_slots
        self.num_growths += 1

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return sum(each.numel() * each.element_size() for each in (self._inner, self._rows))

    @property
    def top_k(self) -> int:
        """Slots per token of the dispatch."""
        return self._ids.shape[1]

    def let_go(self) -> None:
        """Lets go of the memory of blocks; what was counted stays."""
        self._pools.clear()

    def reserve(self, num_slots: int) -> None:
        """Makes room for dispatches of that many (token, slot) rows."""
        if num_slots > self._num_slots:
            self._grow(num_slots)

    def begin(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Takes a dispatch and asks for its experts.

        Args:
            hidden: [T, d_model].
            ids: [T, k]; -1 in slots that are not executed.
            weights: [T, k].
        """
        assert 0 < hidden.shape[0] <= STREAMED_TOKENS and hidden.dtype == self._shape.dtype
        self._hidden = hidden.contiguous()
        self._ids = ids.long().contiguous()
        self._weights = weights.contiguous()
        self._filled = 0
        self.reserve(ids.numel())
        if self._ready is None:
            self._host_ids[: ids.numel()].copy_(self._ids.view(-1))
            return
        stream = torch.cuda.current_stream(self._device)
        copy_to_host(
            self._host_address, self._ids.data_ptr(), _ID_BYTES * ids.numel(), stream.cuda_stream
        )
        self._ready.record(stream)

    def active(self) -> tuple[list[int], list[int]]:
        """Waits for the device; returns the experts that have rows, ascending, and their rows."""
        begun_s = time.perf_counter()
        if self._ready is not None:
            self._ready.synchronize()
        self.wait_s += time.perf_counter() - begun_s
        self.num_waits += 1
        chosen = self._chosen[: self._ids.numel()]
        counts = np.bincount(chosen[chosen >= 0], minlength=self._num_experts)
        found = np.flatnonzero(counts)
        return found.tolist(), counts[found].tolist()

    def slots_of(self, expert: int) -> list[int]:
        """Returns the flat slots that have an expert; known after `active`."""
        chosen = self._chosen[: self._ids.numel()]
        found: list[int] = np.flatnonzero(chosen == expert).tolist()
        return found

    def run(self, experts: Sequence[int], blocks: Sequence[Bytes]) -> None:
        """Runs some experts on all their rows.

        Args:
            experts: Experts that have rows, each once per dispatch.
            blocks: Their blocks; all in one piece of memory, at multiples of `ALIGNMENT_BYTES`.
        """
        pool = self._pool_of(blocks[0])
        offsets = [block.storage_offset() // ALIGNMENT_BYTES for block in blocks]
        self._launch(experts, offsets, pool)

    def _pool_of(self, block: Bytes) -> torch.Tensor:
        storage = block.untyped_storage()
        address = storage.data_ptr()
        found = self._pools.get(address)
        if found is None or found.untyped_storage().nbytes() != storage.nbytes():
            with torch.inference_mode(False):
                every = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
            found = self._pools[address] = every.view(self._shape.dtype)
        return found

    def _launch(self, experts: Sequence[int], offsets: Sequence[int], pool: torch.Tensor) -> None:
        first, count = self._filled, len(experts)
        self._filled += count
        self._entries[0, first : first + count] = experts
        self._entries[1, first : first + count] = offsets
        shape, (num_tokens, top_k) = self._shape, self._ids.shape
        width, d_ff, offset = self._width, self._d_ff, self._offsets
        tokens, table, unit = self._padded(num_tokens), self._table.shape[1], self._unit
        tiles_in, tiles_out = self._tiles
        has_bias = "b_in" in offset
        self._call(
            "piece_in",
            count * -(-d_ff // tiles_in.columns),
            (tokens, top_k, self._hidden.data_ptr() % _POINTER_ALIGNMENT),
            (
                self._hidden, self._ids, self._table, pool, self._inner, first, num_tokens, d_ff,
                table, unit, offset["w_in"], offset.get("b_in", 0), width, top_k, tokens,
                tiles_in.columns, tiles_in.depth, ROWS_AT_ONCE, shape.gated, has_bias,
                self._activation, self._is_cuda,
            ),
            {"num_stages": tiles_in.num_stages, "num_warps": tiles_in.num_warps},
        )  # fmt: skip
        self._call(
            "piece_out",
            count * -(-width // tiles_out.columns),
            (tokens, top_k),
            (
                self._inner, self._ids, self._table, pool, self._rows, first, num_tokens, width,
                table, unit, offset["w_out"], offset.get("b_out", 0), d_ff, top_k, tokens,
                tiles_out.columns, tiles_out.depth, ROWS_AT_ONCE, has_bias, self._is_cuda,
            ),
            {
                "num_stages": tiles_out.num_stages,
                "num_warps": tiles_out.num_warps,
                **({"launch_pdl": True} if self._is_cuda else {}),
            },
        )  # fmt: skip

    @staticmethod
    def _padded(num_tokens: int) -> int:
        """Returns what the kernels count tokens up to."""
        return max(_LEAST_TOKENS, 1 << (num_tokens - 1).bit_length())

    def _call(
        self,
        name: str,
        num_programs: int,
        variant: tuple[Any, ...],
        given: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        """Launches a kernel; what Triton compiled for a variant is launched without asking again.

        Args:
            name: Of the kernel.
            num_programs: How many.
            variant: What its code depends on, besides this object's own sizes.
            given: Arguments, those that are constants to the compiler included.
            options: For the compiler.
        """
        key = (name, *variant, self._ids.data_ptr() % _POINTER_ALIGNMENT)
        compiled = self._compiled.get(key)
        if compiled is None:
            kernel = getattr(self._kernels, name)
            # None in Triton's interpreter, which compiles nothing.
            self._compiled[key] = kernel[(num_programs,)](*given, **options)
            return
        compiled[(num_programs, 1, 1)](*given)

    def put(self, slots: Sequence[int], rows: torch.Tensor) -> None:
        """Takes rows that were computed elsewhere; once per dispatch at most.

        Args:
            slots: Flat slots, each once per dispatch.
            rows: [slots, d_model] on the device.
        """
        count = len(slots)
        self._put_entries[:count] = slots
        self._call(
            "put_rows",
            count * -(-self._width // _ADDED_COLUMNS),
            (rows.dtype, rows.data_ptr() % _POINTER_ALIGNMENT),
            (rows, self._put_slots, self._rows, self._width, _ADDED_COLUMNS),
            {},
        )

    def combined(self) -> torch.Tensor:
        """Returns the output [T, d_model]: each token's rows, weighted and added slot by slot."""
        num_tokens, top_k = self._ids.shape
        out = torch.empty_like(self._hidden)
        self._call(
            "add_slots",
            num_tokens * -(-self._width // _ADDED_COLUMNS),
            (top_k, self._weights.dtype, self._weights.data_ptr() % _POINTER_ALIGNMENT),
            (self._rows, self._ids, self._weights, out, self._width, top_k, _ADDED_COLUMNS),
            {},
        )
        return out
