"""Grouped products side by side: experts with many rows, and experts with a few.

Experts with many rows are bound by the matrix units, experts with a few by reading their weights.
Each kind has its own kernels, and a program of each is resident on every multiprocessor, on two
streams: weights arrive while the matrix units work, and somewhat slower while they would be there
too soon. An expert's rows all go one way, so the order in which they were counted cannot change a
bit. With a few rows the weights are the M side of the matrix unit, so that 16 rows cost 16 and not
64.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,index,arg-type"

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels.pace import is_ahead, look, meet, reached, report, report_end
from moeprof.live.kernels.parts import ACTIVATION_CODES, activated, processors
from moeprof.live.kernels.sorting import ENTRY, SortedRows, TileTables
from moeprof.live.kernels.tiles import HIGH, LOW, TALL, PairTiles, ProductTiles


@triton.jit
def _entry(table, tile, tiles_across, total):
    """Returns (expert, first row, rows from there on) of a tile; zeros where there is none."""
    at = table + (tile // tiles_across) * ENTRY
    here = tile < total
    expert = tl.load(at, mask=here, other=0)
    first = tl.load(at + 1, mask=here, other=0)
    left = tl.load(at + 2, mask=here, other=0)
    return expert, first, left


@triton.jit
def _multiplied(weight, rows, total, WEIGHTS_FIRST: tl.constexpr):
    """Adds weight @ rows.T, or its transpose."""
    if WEIGHTS_FIRST:
        return tl.dot(weight, rows.T, total)
    else:
        return tl.dot(rows, weight.T, total)


@triton.jit
def _shifted(value, bias, is_column, WEIGHTS_FIRST: tl.constexpr):
    """Adds the bias of each column."""
    shift = tl.load(bias, mask=is_column, other=0.0).to(tl.float32)
    if WEIGHTS_FIRST:
        return value + shift[:, None]
    else:
        return value + shift[None, :]


@triton.jit
def _summed(
    rows, matrix, first, matrix_row, num_columns, DEPTH: tl.constexpr, HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH_STEP: tl.constexpr, WEIGHTS_FIRST: tl.constexpr,
    GATED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Returns a tile's products and those it gates, through ``STAGES`` buffers."""
    if WEIGHTS_FIRST:
        value = tl.zeros((COLUMNS, HEIGHT), dtype=tl.float32)
        up = tl.zeros((COLUMNS, HEIGHT), dtype=tl.float32)
    else:
        value = tl.zeros((HEIGHT, COLUMNS), dtype=tl.float32)
        up = tl.zeros((HEIGHT, COLUMNS), dtype=tl.float32)
    for start in tl.range(0, DEPTH, DEPTH_STEP, num_stages=STAGES):
        some = rows.load([first, start])
        weight = matrix.load([matrix_row, start])
        value = _multiplied(weight, some, value, WEIGHTS_FIRST)
        if GATED:
            weight = matrix.load([matrix_row + num_columns, start])
            up = _multiplied(weight, some, up, WEIGHTS_FIRST)
    return value, up


@triton.jit
def _run_table(
    begin_at, rows, matrix, bias, out, table, total_down, num_columns, progress, tiles_before,
    tiles_in_all, begun, DEPTH: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH_STEP: tl.constexpr, WEIGHTS_FIRST: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, STAGES: tl.constexpr, PRODUCT: tl.constexpr, REPORTS: tl.constexpr,
    PACED: tl.constexpr, SLOW_STAGES: tl.constexpr,
):  # fmt: skip
    """Computes this program's share of a table's tiles.

    The loop over tiles must not be flattened: with values carried from tile to tile, Triton 3.6
    then computes wrong products.

    With REPORTS the first program says how far it is, with PACED the program slows down to end with
    the one that does.
    """
    stride = tl.num_programs(0)
    tiles_across = tl.cdiv(num_columns, COLUMNS)
    total = total_down * tiles_across
    matrix_rows = num_columns * 2 if GATED else num_columns
    next_expert, next_first, next_left = _entry(table, begin_at, tiles_across, total)
    if PACED:
        looked = look(progress)
    for tile in tl.range(begin_at, total, stride):
        expert, first, left = next_expert, next_first, next_left
        # Asked for a tile ahead: nobody waits for it.
        next_expert, next_first, next_left = _entry(table, tile + stride, tiles_across, total)
        if REPORTS:
            if begin_at == 0:
                # All programs together are half a round further; in the last one there may be less.
                report(progress, tile + stride // 2, total, PRODUCT)
        left_column = (tile % tiles_across) * COLUMNS
        matrix_row = expert * matrix_rows + left_column
        if PACED:
            ahead = is_ahead(tiles_before + tile, tiles_in_all, reached(looked), begun)
            # Looked for a tile ahead, too.
            looked = look(progress)
            if ahead:
                value, up = _summed(
                    rows, matrix, first, matrix_row, num_columns, DEPTH, HEIGHT, COLUMNS,
                    DEPTH_STEP, WEIGHTS_FIRST, GATED, SLOW_STAGES,
                )  # fmt: skip
            else:
                value, up = _summed(
                    rows, matrix, first, matrix_row, num_columns, DEPTH, HEIGHT, COLUMNS,
                    DEPTH_STEP, WEIGHTS_FIRST, GATED, STAGES,
                )  # fmt: skip
        else:
            value, up = _summed(
                rows, matrix, first, matrix_row, num_columns, DEPTH, HEIGHT, COLUMNS, DEPTH_STEP,
                WEIGHTS_FIRST, GATED, STAGES,
            )  # fmt: skip
        column = left_column + tl.arange(0, COLUMNS)
        is_column = column < num_columns
        row = tl.arange(0, HEIGHT)
        if BIAS:
            shift = bias + expert * matrix_rows + column
            value = _shifted(value, shift, is_column, WEIGHTS_FIRST)
        if ACTIVATION >= 0:
            value = activated(value, ACTIVATION)
        if GATED:
            if BIAS:
                up = _shifted(up, bias + expert * matrix_rows + num_columns + column, is_column,
                              WEIGHTS_FIRST)  # fmt: skip
            value = value * up
        kept = value.to(out.dtype.element_ty)
        place = (first + row).to(tl.int64) * num_columns
        if WEIGHTS_FIRST:
            mask = (row < left)[None, :] & is_column[:, None]
            tl.store(out + place[None, :] + column[:, None], kept, mask=mask)
        else:
            mask = (row < left)[:, None] & is_column[None, :]
            tl.store(out + place[:, None] + column[None, :], kept, mask=mask)


@triton.jit
def _tall_product(
    rows, matrix, bias, out, table, totals, progress, num_columns, DEPTH: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH_STEP: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, STAGES: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """out[rows of e] = activation(rows @ matrix[e].T + bias[e]) for experts with many rows."""
    program = tl.program_id(0)
    _run_table(
        program, rows, matrix, bias, out, table, tl.load(totals), num_columns, progress, 0, 0, 0,
        DEPTH, HEIGHT, COLUMNS, DEPTH_STEP, False, GATED, BIAS, ACTIVATION, STAGES, PRODUCT, True,
        False, STAGES,
    )  # fmt: skip
    if program == 0:
        report_end(progress, PRODUCT)


@triton.jit
def _short_product(
    low_rows, high_rows, matrix, bias, out, low_table, high_table, totals, progress, num_columns,
    DEPTH: tl.constexpr, LOW_HEIGHT: tl.constexpr, HIGH_HEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH_STEP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr, PRODUCT: tl.constexpr, SLOW_STAGES: tl.constexpr,
):  # fmt: skip
    """The same for experts with a few rows: the higher tiles, then the lower ones."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_low, num_high = tl.load(totals + 1), tl.load(totals + 2)
    tiles_across = tl.cdiv(num_columns, COLUMNS)
    tiles_before = num_high * tiles_across
    tiles_in_all = tl.maximum((num_high + num_low) * tiles_across, 1)
    # Only then, and only the low tiles, which are most: what tall tiles lose by a stream beside
    # them, they lose in their second product.
    PACED: tl.constexpr = PRODUCT == 1
    begun = 0
    if PACED:
        begun = reached(look(progress))
    _run_table(
        program, high_rows, matrix, bias, out, high_table, num_high, num_columns, progress, 0,
        tiles_in_all, begun, DEPTH, HIGH_HEIGHT, COLUMNS, DEPTH_STEP, True, GATED, BIAS, ACTIVATION,
        STAGES, PRODUCT, False, False, SLOW_STAGES,
    )  # fmt: skip
    # The programs that had one tile fewer begin with the first low ones.
    before = tiles_before % programs
    _run_table(
        (program - before + programs) % programs, low_rows, matrix, bias, out, low_table, num_low,
        num_columns, progress, tiles_before, tiles_in_all, begun, DEPTH, LOW_HEIGHT, COLUMNS,
        DEPTH_STEP, True, GATED, BIAS, ACTIVATION, STAGES, PRODUCT, False, PACED,
        SLOW_STAGES,
    )  # fmt: skip


@triton.jit
def _short_products(
    low_rows, high_rows, low_inner, high_inner, matrix_in, matrix_out, bias_in, bias_out, inner,
    out, low_table, high_table, totals, progress, arrived, num_inner, num_columns,
    DEPTH: tl.constexpr, INNER_DEPTH: tl.constexpr, LOW_HEIGHT: tl.constexpr,
    HIGH_HEIGHT: tl.constexpr, COLUMNS_IN: tl.constexpr, COLUMNS_OUT: tl.constexpr,
    DEPTH_STEP: tl.constexpr, GATED: tl.constexpr, BIAS_IN: tl.constexpr, BIAS_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, STAGES: tl.constexpr, SLOW_STAGES: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """Both products of the experts with a few rows, by programs that stay where they are.

    With a launch for each, programs of the second one landed two on a multiprocessor where the
    other stream was between its launches, too, and kept a tall one out: a layer then took a fifth
    longer.
    """
    _short_product(
        low_rows, high_rows, matrix_in, bias_in, inner, low_table, high_table, totals, progress,
        num_inner, DEPTH, LOW_HEIGHT, HIGH_HEIGHT, COLUMNS_IN, DEPTH_STEP, GATED, BIAS_IN,
        ACTIVATION, STAGES, 0, SLOW_STAGES,
    )  # fmt: skip
    meet(arrived, ON_GPU)
    _short_product(
        low_inner, high_inner, matrix_out, bias_out, out, low_table, high_table, totals, progress,
        num_columns, INNER_DEPTH, LOW_HEIGHT, HIGH_HEIGHT, COLUMNS_OUT, DEPTH_STEP, False, BIAS_OUT,
        -1, STAGES, 1, SLOW_STAGES,
    )  # fmt: skip


@dataclass(frozen=True)
class _Matrices:
    """One product of a layer, for all experts.

    Attributes:
        rows: [n, depth], in expert order.
        matrix: [num_experts, columns, depth], or [num_experts, 2 * columns, depth] where gated.
        bias: [num_experts, rows of matrix] or None.
        out: [n, columns].
        gated: True where the first half of ``matrix`` gates the second.
        activation: Code of the activation; -1 for none.
    """

    rows: torch.Tensor
    matrix: torch.Tensor
    bias: torch.Tensor | None
    out: torch.Tensor
    gated: bool
    activation: int

    def blocks_of_rows(self, height: int, tiles: ProductTiles) -> TensorDescriptor:
        """Returns how a tile's rows are loaded."""
        return TensorDescriptor.from_tensor(self.rows, [height, tiles.depth])

    def blocks_of_weights(self, tiles: ProductTiles) -> TensorDescriptor:
        """Returns how a tile's weights are loaded."""
        flat = self.matrix.view(-1, self.matrix.shape[-1])
        return TensorDescriptor.from_tensor(flat, [tiles.columns, tiles.depth])

    def launch(self, tiles: ProductTiles) -> dict[str, object]:
        """Returns what the tall kernel is compiled with."""
        capped = {} if tiles.registers is None else {"maxnreg": tiles.registers}
        return {
            "DEPTH": self.rows.shape[1],
            "COLUMNS": tiles.columns,
            "DEPTH_STEP": tiles.depth,
            "GATED": self.gated,
            "BIAS": self.bias is not None,
            "ACTIVATION": self.activation,
            "STAGES": tiles.num_stages,
            "num_warps": tiles.num_warps,
            **capped,
        }


def _run_tall(of: _Matrices, tables: TileTables, tiles: ProductTiles, product: int) -> None:
    _tall_product[(processors(of.rows.device) * tiles.programs,)](
        of.blocks_of_rows(TALL, tiles), of.blocks_of_weights(tiles), of.bias, of.out, tables.tall,
        tables.totals, tables.progress, of.out.shape[1], HEIGHT=TALL, PRODUCT=product,
        **of.launch(tiles),
    )  # fmt: skip


def _run_short(first: _Matrices, second: _Matrices, tables: TileTables, tiles: PairTiles) -> None:
    one, other = tiles.short_in, tiles.short_out
    is_cuda = first.rows.device.type == "cuda"
    _short_products[(processors(first.rows.device),)](
        first.blocks_of_rows(LOW, one), first.blocks_of_rows(HIGH, one),
        second.blocks_of_rows(LOW, other), second.blocks_of_rows(HIGH, other),
        first.blocks_of_weights(one), second.blocks_of_weights(other), first.bias, second.bias,
        first.out, second.out, tables.low, tables.high, tables.totals, tables.progress,
        tables.arrived, first.out.shape[1], second.out.shape[1], DEPTH=first.rows.shape[1],
        INNER_DEPTH=second.rows.shape[1], LOW_HEIGHT=LOW, HIGH_HEIGHT=HIGH, COLUMNS_IN=one.columns,
        COLUMNS_OUT=other.columns, DEPTH_STEP=one.depth, GATED=first.gated,
        BIAS_IN=first.bias is not None, BIAS_OUT=second.bias is not None,
        ACTIVATION=first.activation, STAGES=one.num_stages,
        SLOW_STAGES=tiles.slow_stages, ON_GPU=is_cuda, num_warps=one.num_warps,
        **({"launch_cooperative_grid": True} if is_cuda else {}),
    )  # fmt: skip


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def run_pairs(
    sent: SortedRows,
    experts: ExpertWeights,
    inner: torch.Tensor,
    out: torch.Tensor,
    tiles: PairTiles,
) -> None:
    """Runs both products of the rows that the tables of ``sent`` name.

    All tensors must live until the current stream's next work: they are read on another stream,
    which the current one waits for. Can be captured.

    Args:
        sent: Rows, and tables of their tiles.
        experts: Contiguous weights.
        inner: [n, d_ff], receives the hidden layer.
        out: [n, d_model], receives the rows.
        tiles: Tile sizes.
    """
    tables = sent.tables
    if tables is None:
        raise ValueError("rows were sorted without tables of tiles")
    code = ACTIVATION_CODES[experts.activation]
    first = _Matrices(sent.rows, experts.w_in, experts.b_in, inner, experts.gated, code)
    second = _Matrices(inner, experts.w_out, experts.b_out, out, gated=False, activation=-1)

    def few() -> None:
        _run_short(first, second, tables, tiles)

    def many() -> None:
        _run_tall(first, tables, tiles.tall_in, 0)
        _run_tall(second, tables, tiles.tall_out, 1)

    device = sent.rows.device
    if device.type != "cuda":
        few()
        many()
        return
    current, side = torch.cuda.current_stream(device), _side_stream(device.index)
    side.wait_stream(current)
    try:
        # First, so that every multiprocessor has one of these programs before tall ones fill it.
        with torch.cuda.stream(side):
            few()
        many()
    finally:
        current.wait_stream(side)
