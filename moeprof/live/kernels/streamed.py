"""Runs the experts of a dispatch piece by piece, with few launches, for an expert buffer.

The host learns the choice of the router with one small copy and needs no order of rows; a piece is
two launches however many experts it has. So a dispatch of a few tokens is bound by copies and
weights, not by launches. Leaves out which expert belongs to which piece and where weights lie.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence

import numpy as np
import torch

from moeprof.live.expert_store import ALIGNMENT_BYTES, BlockShape, Bytes
from moeprof.live.kernels.fused import FEW_TOKENS, suits_device
from moeprof.live.transfers import new_event

_WIDTH_ALIGNMENT = 8
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
    """Dispatches of up to `FEW_TOKENS` tokens over experts of one shape.

    In turn: `begin`, `active`, any number of `run` and `put`, `combined`. Device memory is taken
    when a dispatch is larger than all before.

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
        self._grow(FEW_TOKENS)

    def _grow(self, num_slots: int) -> None:
        count = max(self._num_experts, num_slots)
        with torch.inference_mode(False):
            self._host_ids = torch.zeros(num_slots, dtype=torch.int64, pin_memory=self._is_cuda)
            # Kernels read it where it lies: a copy would queue behind those of experts.
            self._table = torch.zeros(3, count, dtype=torch.int32, pin_memory=self._is_cuda)
            self._inner = torch.zeros(
                num_slots, self._d_ff, dtype=self._shape.dtype, device=self._device
            )
            self._rows = torch.zeros(
                num_slots, self._width, dtype=torch.float32, device=self._device
            )
        self._entries = self._table.numpy()
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
        assert 0 < hidden.shape[0] <= FEW_TOKENS
        self._hidden = hidden.contiguous()
        self._ids = ids.long().contiguous()
        self._weights = weights.contiguous()
        self._filled = 0
        self.reserve(ids.numel())
        self._host_ids[: ids.numel()].copy_(self._ids.view(-1), non_blocking=True)
        if self._ready is not None:
            self._ready.record(torch.cuda.current_stream(self._device))

    def active(self) -> tuple[list[int], list[int]]:
        """Waits for the device; returns the experts that have rows, ascending, and their rows."""
        begun_s = time.perf_counter()
        if self._ready is not None:
            self._ready.synchronize()
        self.wait_s += time.perf_counter() - begun_s
        self.num_waits += 1
        chosen = self._host_ids[: self._ids.numel()].numpy()
        counts = np.bincount(chosen[chosen >= 0], minlength=self._num_experts)
        found = np.flatnonzero(counts)
        return found.tolist(), counts[found].tolist()

    def slots_of(self, expert: int) -> list[int]:
        """Returns the flat slots that have an expert; known after `active`."""
        chosen = self._host_ids[: self._ids.numel()].numpy()
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
        from moeprof.live.kernels.few import FEW_ROWS, IN_TILES, OUT_TILES
        from moeprof.live.kernels.parts import ACTIVATION_CODES, next_power
        from moeprof.live.kernels.piecewise import piece_in, piece_out

        first, count = self._filled, len(experts)
        self._filled += count
        self._entries[0, first : first + count] = experts
        self._entries[1, first : first + count] = offsets
        (num_tokens, top_k), width, d_ff = self._ids.shape, self._width, self._d_ff
        has_bias = "b_in" in self._offsets
        common = {
            "TABLE": self._table.shape[1],
            "UNIT": ALIGNMENT_BYTES // self._shape.itemsize,
            "TOP_K": top_k,
            "TOKENS": next_power(num_tokens),
            "ROWS": FEW_ROWS,
            "BIAS": has_bias,
            "DEPENDENT": self._is_cuda,
        }
        piece_in[(count * -(-d_ff // IN_TILES.columns),)](
            self._hidden, self._ids, self._table, pool, self._inner, first, num_tokens, d_ff,
            W_IN=self._offsets["w_in"], B_IN=self._offsets.get("b_in", 0), D_MODEL=width,
            COLUMNS=IN_TILES.columns, DEPTH_STEP=IN_TILES.depth, GATED=self._shape.gated,
            ACTIVATION=ACTIVATION_CODES[self._shape.activation], num_stages=IN_TILES.num_stages,
            num_warps=IN_TILES.num_warps, **common,
        )  # fmt: skip
        piece_out[(count * -(-width // OUT_TILES.columns),)](
            self._inner, self._ids, self._table, pool, self._rows, first, num_tokens, width,
            W_OUT=self._offsets["w_out"], B_OUT=self._offsets.get("b_out", 0), D_FF=d_ff,
            COLUMNS=OUT_TILES.columns, DEPTH_STEP=OUT_TILES.depth, num_stages=OUT_TILES.num_stages,
            num_warps=OUT_TILES.num_warps, **common,
            **({"launch_pdl": True} if self._is_cuda else {}),
        )  # fmt: skip

    def put(self, slots: Sequence[int], rows: torch.Tensor) -> None:
        """Takes rows that were computed elsewhere.

        Args:
            slots: Flat slots, each once per dispatch.
            rows: [slots, d_model] on the device.
        """
        from moeprof.live.kernels.piecewise import put_rows

        count = len(slots)
        self._entries[2, :count] = slots
        tiles = -(-self._width // _ADDED_COLUMNS)
        put_rows[(count * tiles,)](
            rows, self._table[2], self._rows, self._width, COLUMNS=_ADDED_COLUMNS
        )

    def combined(self) -> torch.Tensor:
        """Returns the output [T, d_model]: each token's rows, weighted and added slot by slot."""
        from moeprof.live.kernels.piecewise import add_slots

        num_tokens, top_k = self._ids.shape
        out = torch.empty_like(self._hidden)
        add_slots[(num_tokens * -(-self._width // _ADDED_COLUMNS),)](
            self._rows, self._ids, self._weights, out, self._width, TOP_K=top_k,
            COLUMNS=_ADDED_COLUMNS,
        )  # fmt: skip
        return out
