"""Runs the experts of a dispatch piece by piece, with few launches, for an expert buffer.

The host learns the choice of the router with one small copy and needs no order of rows; a piece is
two launches however many experts it has. So a dispatch of a few tokens is bound by copies and
weights, not by launches. Dispatches of a kind that ran before can be asked for from compiled code
(`moeprof.live.direct_dispatch`). Leaves out which expert belongs to which piece and where weights
lie.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from moeprof.live.device_copies import copy_to_host
from moeprof.live.direct_launches import (
    CELL,
    CELLS,
    KERNELS,
    Launches,
    PreparedKernel,
    launches_of,
    prepared,
)
from moeprof.live.dispatch_checks import check_dispatch
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
_OUT, _WORDS = CELL["out"], CELL["words"]
_HIDDEN, _IDS, _WEIGHTS, _TOKENS = (CELL[each] for each in ("hidden", "ids", "weights",
                                                            "num_tokens"))  # fmt: skip


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
    is taken when a dispatch has more than ``num_slots`` (token, slot) rows; that lets go of what
    was taken before, so whoever asks for more has waited for those who still read it.

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
        self.num_slots = 0
        self._filled = 0
        self.wait_s = 0.0
        self.num_waits = 0
        self.num_growths = 0
        self._unit = ALIGNMENT_BYTES // shape.itemsize
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._prepare: Callable[[Any], PreparedKernel | None] = prepared
        self._launches: dict[tuple[Any, ...], Launches | None] = {}
        self.cells = np.zeros(len(CELLS), np.int64)
        from moeprof.live.kernels import few, parts, piecewise

        self._kernels = piecewise
        self._tiles = (few.IN_TILES, few.OUT_TILES)
        self._activation = parts.ACTIVATION_CODES[shape.activation]
        with torch.inference_mode(False):
            # Kernels read it where it lies: a copy would queue behind those of experts. Its size is
            # in their code, so it never changes.
            self._table = torch.zeros(2, num_experts, dtype=torch.int32, pin_memory=self._is_cuda)
        self.entries = self._table.numpy()
        self.cells[CELL["table"]] = self._table.data_ptr()
        self.cells[CELL["D_FF"]], self.cells[CELL["D_MODEL"]] = self._d_ff, self._width
        self._grow(STREAMED_TOKENS)

    def _grow(self, num_slots: int) -> None:
        # Where memory is short, some is gone: then all is taken anew.
        self.num_slots = 0
        with torch.inference_mode(False):
            self._host_ids, self._words = (
                torch.zeros(num_slots, dtype=torch.int64, pin_memory=self._is_cuda)
                for _ in range(2)
            )
            self._put_slots = torch.zeros(num_slots, dtype=torch.int32, pin_memory=self._is_cuda)
            self._inner = torch.zeros(
                num_slots, self._d_ff, dtype=self._shape.dtype, device=self._device
            )
            self._rows = torch.zeros(
                num_slots, self._width, dtype=torch.float32, device=self._device
            )
        self._put_entries, self.chosen = self._put_slots.numpy(), self._host_ids.numpy()
        for name, tensor in (("inner", self._inner), ("rows", self._rows), ("words", self._words)):
            self.cells[CELL[name]] = tensor.data_ptr()
        self._host_address = self._host_ids.data_ptr()
        self.num_slots = num_slots
        self.num_growths += 1

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return sum(each.numel() * each.element_size() for each in (self._inner, self._rows))

    @property
    def top_k(self) -> int:
        """Slots per token of the dispatch."""
        return self._ids.shape[1]

    @property
    def num_ids(self) -> int:
        """(token, slot) pairs of the dispatch."""
        return self._ids.numel()

    @property
    def words_address(self) -> int:
        """Where the device writes what it chose, for `moeprof.live.direct_dispatch.learn`."""
        return int(self.cells[_WORDS])

    def out(self) -> torch.Tensor:
        """Returns memory for the output of the dispatch [T, d_model], and writes it to `cells`."""
        out = torch.empty_like(self._hidden)
        self.cells[_OUT] = out.data_ptr()
        return out

    def let_go(self) -> None:
        """Lets go of the memory of blocks; what was counted stays."""
        self._pools.clear()

    def reserve(self, num_slots: int) -> None:
        """Makes room for dispatches of that many (token, slot) rows."""
        if num_slots > self.num_slots:
            self._grow(num_slots)

    def begin(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Takes a dispatch and asks for its experts.

        Args:
            hidden: [T, d_model].
            ids: [T, k]; -1 in slots that are not executed.
            weights: [T, k].

        Raises:
            UsageError: They do not fit together, or lie elsewhere.
        """
        assert 0 < hidden.shape[0] <= STREAMED_TOKENS and hidden.dtype == self._shape.dtype
        self._check(hidden, ids, weights)
        self._take(hidden, ids, weights)
        if self._ready is None:
            self._host_ids[: ids.numel()].copy_(self._ids.view(-1))
            return
        stream = torch.cuda.current_stream(self._device)
        copy_to_host(
            self._host_address, self._ids.data_ptr(), _ID_BYTES * ids.numel(), stream.cuda_stream
        )
        self._ready.record(stream)

    def _publish(self) -> None:
        """Launches what writes the ids where the host looks for them."""
        words = self._num_words()
        self._call(
            self._code_of("publish"), 1, (self._ids, self._words, 0, self._ids.numel(), words), {}
        )

    def _take(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self._hidden = hidden.contiguous()
        self._ids = ids.to(torch.int64).contiguous()
        self._weights = weights.contiguous()
        self._filled = 0
        self.reserve(ids.numel())

    def _check(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Refuses what kernels would read beyond, or cannot read: they do not look."""
        check_dispatch(hidden, ids, weights, d_model=self._width, device=self._rows.device)

    def active(self) -> tuple[list[int], list[int]]:
        """Waits for the device; returns the experts that have rows, ascending, and their rows."""
        begun_s = time.perf_counter()
        if self._ready is not None:
            self._ready.synchronize()
        self.wait_s += time.perf_counter() - begun_s
        self.num_waits += 1
        chosen = self.chosen[: self._ids.numel()]
        # However large an id is that nobody has, it is counted in one place.
        there = np.minimum(chosen[chosen >= 0], self._num_experts)
        counts = np.bincount(there, minlength=self._num_experts)
        found = np.flatnonzero(counts)
        return found.tolist(), counts[found].tolist()

    def launches(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Launches | None:
        """Takes a dispatch, to be asked for from compiled code.

        Args:
            hidden: As in `begin`, as for the others.
            ids: See there.
            weights: See there.

        Returns:
            What launches it, with its arguments in `cells`; None where none like it ran before, or
            only Triton can launch it: then it has to `begin`.

        Raises:
            UsageError: As in `begin`.
        """
        self._take(hidden, ids, weights)
        places = self._hidden.data_ptr(), self._ids.data_ptr(), self._weights.data_ptr()
        key = (
            hidden.shape, ids.shape, weights.shape, ids.dtype, weights.dtype,
            hidden.device, ids.device, weights.device,
            *[place % _POINTER_ALIGNMENT for place in places],
        )  # fmt: skip
        if key not in self._launches:
            self._check(hidden, ids, weights)
            own = [self._compiled.get(self._code_of(name)) for name in KERNELS]
            if any(one is None for one in own):
                # The next one like this learns its experts from that.
                self._publish()
                return None
            self._launches[key] = self._laid_out(own)
        cells = self.cells
        cells[_HIDDEN], cells[_IDS], cells[_WEIGHTS] = places
        cells[_TOKENS] = self._ids.shape[0]
        return self._launches[key]

    def _laid_out(self, compiled: Sequence[Any]) -> Launches | None:
        """Returns launches of the kernels of a dispatch, as Triton compiled them."""
        kernels = [self._prepare(one) for one in compiled]
        if any(one is None for one in kernels):
            return None
        tiles_in, tiles_out = self._tiles
        programs = (
            1,
            -(-self._d_ff // tiles_in.columns),
            -(-self._width // tiles_out.columns),
            self._ids.shape[0] * -(-self._width // _ADDED_COLUMNS),
        )
        return launches_of([one for one in kernels if one is not None], programs, self.cells)

    def _code_of(self, kernel: str) -> tuple[Any, ...]:
        """Returns what names the code of a kernel for this dispatch, besides own sizes."""
        num_tokens, top_k = self._ids.shape
        tokens = self._padded(num_tokens)
        variant: tuple[Any, ...]
        if kernel == "publish":
            variant = (self._num_words(),)
        elif kernel == "piece_in":
            variant = (tokens, top_k, self._hidden.data_ptr() % _POINTER_ALIGNMENT)
        elif kernel == "piece_out":
            variant = (tokens, top_k)
        else:
            at = self._weights.data_ptr() % _POINTER_ALIGNMENT
            variant = (top_k, self._weights.dtype, at)
        return kernel, *variant, self._ids.data_ptr() % _POINTER_ALIGNMENT

    def _num_words(self) -> int:
        """Returns the words that the kernel counts slots up to."""
        return max(_LEAST_TOKENS, 1 << (self._ids.numel() - 1).bit_length())

    def slots_of(self, expert: int) -> list[int]:
        """Returns the flat slots that have an expert; known after `active`."""
        chosen = self.chosen[: self._ids.numel()]
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
        self.entries[0, first : first + count] = experts
        self.entries[1, first : first + count] = offsets
        shape, (num_tokens, top_k) = self._shape, self._ids.shape
        width, d_ff, offset = self._width, self._d_ff, self._offsets
        tokens, table, unit = self._padded(num_tokens), self._table.shape[1], self._unit
        tiles_in, tiles_out = self._tiles
        has_bias = "b_in" in offset
        self._call(
            self._code_of("piece_in"),
            count * -(-d_ff // tiles_in.columns),
            (
                self._hidden, self._ids, self._table, pool, self._inner, first, num_tokens, d_ff,
                table, unit, offset["w_in"], offset.get("b_in", 0), width, top_k, tokens,
                tiles_in.columns, tiles_in.depth, ROWS_AT_ONCE, shape.gated, has_bias,
                self._activation, self._is_cuda,
            ),
            {"num_stages": tiles_in.num_stages, "num_warps": tiles_in.num_warps},
        )  # fmt: skip
        self._call(
            self._code_of("piece_out"),
            count * -(-width // tiles_out.columns),
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
        code: tuple[Any, ...],
        num_programs: int,
        given: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        """Launches a kernel; what Triton compiled for a variant is launched without asking again.

        Args:
            code: Name of the kernel, then what its code depends on besides this object's own sizes.
            num_programs: How many.
            given: Arguments, those that are constants to the compiler included.
            options: For the compiler.
        """
        compiled = self._compiled.get(code)
        if compiled is None:
            kernel = getattr(self._kernels, code[0])
            # None in Triton's interpreter, which compiles nothing.
            self._compiled[code] = kernel[(num_programs,)](*given, **options)
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
            ("put_rows", rows.dtype, rows.data_ptr() % _POINTER_ALIGNMENT),
            count * -(-self._width // _ADDED_COLUMNS),
            (rows, self._put_slots, self._rows, self._width, _ADDED_COLUMNS),
            {},
        )

    def combined(self) -> torch.Tensor:
        """Returns the output [T, d_model]: each token's rows, weighted and added slot by slot."""
        num_tokens, top_k = self._ids.shape
        out = torch.empty_like(self._hidden)
        self._call(
            self._code_of("add_slots"),
            num_tokens * -(-self._width // _ADDED_COLUMNS),
            (self._rows, self._ids, self._weights, out, self._width, top_k, _ADDED_COLUMNS),
            {},
        )
        return out
