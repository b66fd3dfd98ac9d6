"""Tile sizes of the products for many tokens, and when which of them run."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Heights in rows of an expert. Single products cut rows into TALL tiles and SHORT ones. In pairs an
# expert's rows are one LOW tile or one HIGH tile, or as many TALL ones as it takes.
TALL, SHORT = 128, 64
LOW, HIGH = 16, 32
# Mean rows per expert from which pairs are considered at all; None: they never run.
PAIR_FROM_ROWS: int | None = 64
# Pairs run while no more of the active experts than this have rows for one tall tile in part only:
# such a tile keeps neither the matrix units busy nor the memory.
MOST_PARTLY_FILLED_PERCENT = 50


@dataclass(frozen=True)
class ProductTiles:
    """Tile sizes of one grouped product.

    Attributes:
        columns: Output columns per tile; of the gate and as many of what it multiplies, where the
            experts are gated.
        depth: Columns of the rows per step.
        num_stages: Steps whose loads are under way at once.
        num_warps: Warps per program.
        programs: Programs per multiprocessor.
        flatten: True to let one tile's end overlap the next one's first loads; not in pairs.
        registers: Most registers per thread; None: as many as the compiler likes.
    """

    columns: int
    depth: int
    num_stages: int
    num_warps: int
    programs: int
    flatten: bool = False
    registers: int | None = None


@dataclass(frozen=True)
class PairTiles:
    """Tile sizes of products that run side by side.

    A program of each must fit a multiprocessor together: in shared memory, tall takes
    (TALL + columns) x depth x bytes x stages, short (columns + HIGH) x the same, twice the columns
    where gated, and 1 KiB each, of an H100's or H200's 228 KiB; and in registers, threads x what
    each takes, of 65,536.

    Attributes:
        tall_in: First product, experts with many rows.
        tall_out: Second product of the same.
        short_in: First product, experts with up to `HIGH` rows; ``columns`` are a multiple of 64.
        short_out: Second product of the same, by the same launch: only columns may differ.
        slow_stages: Buffers that low tiles of that second product load through while it is further
            than it must be to end with the tall one; fewer than it has.

    Raises:
        ValueError: If the short products do not make one launch, or have no more buffers than that.
    """

    tall_in: ProductTiles
    tall_out: ProductTiles
    short_in: ProductTiles
    short_out: ProductTiles
    slow_stages: int

    def __post_init__(self) -> None:
        one, other = self.short_in, self.short_out
        if replace(one, columns=other.columns) != other:
            raise ValueError("short products are one launch: they may differ in columns only")
        if one.programs != 1 or one.flatten or one.registers is not None:
            raise ValueError(
                "short products run in one program per multiprocessor, not flattened, with as many"
                " registers as they like"
            )
        # With as many, the compiler keeps two sets of buffers (Triton 3.6: 144 instead of 80 KiB),
        # and no tall program fits beside them: kinds would run one after the other.
        if not 0 < self.slow_stages < one.num_stages:
            raise ValueError(
                f"slow_stages must be from 1 to {one.num_stages - 1}: {self.slow_stages}"
            )


@dataclass(frozen=True)
class ManyPlan:
    """How the two products for many tokens are cut.

    Attributes:
        tiles_in: First product, in tiles of two heights by one kernel.
        tiles_out: Second product of the same.
        pair: Kernels side by side, which the device takes instead where routing is skewed; None
            where they are not considered.
    """

    tiles_in: ProductTiles
    tiles_out: ProductTiles
    pair: PairTiles | None


_SINGLE = ProductTiles(128, 64, num_stages=3, num_warps=4, programs=2)
_TALL = ProductTiles(256, 64, num_stages=3, num_warps=8, programs=1)
_SHORT = ProductTiles(128, 64, num_stages=4, num_warps=4, programs=1)
_SLOW_STAGES = 3
PLAN = ManyPlan(
    _SINGLE,
    _SINGLE,
    PairTiles(
        tall_in=_TALL, tall_out=_TALL, short_in=_SHORT, short_out=_SHORT, slow_stages=_SLOW_STAGES
    ),
)
GATED_PLAN = ManyPlan(
    ProductTiles(128, 64, num_stages=3, num_warps=8, programs=1, flatten=True),
    _SINGLE,
    PairTiles(
        # Two sums of 128 x 128: beside a short program there are 65,536 registers in all.
        tall_in=replace(_TALL, columns=128, registers=216),
        tall_out=_TALL,
        short_in=replace(_SHORT, columns=64),
        short_out=_SHORT,
        slow_stages=_SLOW_STAGES,
    ),
)


def plan_for(num_slots: int, num_experts: int, *, gated: bool) -> ManyPlan:
    """Returns the plan of a layer, by what the host knows: shapes, not what the router chose.

    Args:
        num_slots: Tokens times k.
        num_experts: Experts of the layer.
        gated: True for gated experts.
    """
    plan = GATED_PLAN if gated else PLAN
    if PAIR_FROM_ROWS is None or num_slots < PAIR_FROM_ROWS * num_experts:
        return replace(plan, pair=None)
    return plan
