"""How kernels that run side by side keep step: one says how far it is, the other slows down.

Products of experts with a few rows stream weights; products of experts with many keep the matrix
units busy, and what they load waits behind the stream. While the stream is further than it must be
to end with the other one, it may as well run somewhat slower and leave that one more room. It is
slowed by keeping fewer loads under way, which changes no sum.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# Progress through both products. The first one takes more of the time than it has of the work: 9/16
# of it on an H200 at the paper's LM geometry, for it ends a tile, and writes one, more often.
WHOLE = tl.constexpr(4096)
FIRST = tl.constexpr(2304)
_READERS = tl.constexpr(128)


@triton.jit
def report(progress, done, total, PRODUCT: tl.constexpr):
    """Says how far a product is: ``done`` of ``total`` tiles, or all where that is more."""
    share = tl.minimum(done, total).to(tl.int64)
    now = share * FIRST // total if PRODUCT == 0 else FIRST + share * (WHOLE - FIRST) // total
    tl.store(progress, now.to(tl.int32))


@triton.jit
def report_end(progress, PRODUCT: tl.constexpr):
    """Says that a product is over."""
    tl.store(progress, FIRST if PRODUCT == 0 else WHOLE)


@triton.jit
def look(progress):
    """Asks for the other kernel's progress, for `reached` to await."""
    # Not hoisted, not cached: it changes while this runs.
    return tl.load(progress + tl.zeros([_READERS], dtype=tl.int32), volatile=True)


@triton.jit
def reached(looked):
    """Returns the progress that was asked for; one value for all warps.

    Each thread reads for itself while the other kernel writes: without agreeing on one value, warps
    would part ways where they branch by it, and wait for each other for ever.
    """
    return tl.max(looked, 0)


@triton.jit
def is_ahead(done, total, now, begun):
    """Returns whether a kernel is further than it must be to end with the other one.

    Args:
        done: Its tiles done.
        total: Its tiles.
        now: Progress of the other one.
        begun: The same when this one began.
    """
    own = done.to(tl.int64) * (WHOLE - begun)
    other = (now - begun).to(tl.int64) * total
    return (own > other) & (now < WHOLE)


@triton.jit
def meet(arrived, ON_GPU: tl.constexpr):
    """Waits until all programs of the launch are here; what they wrote can then be read by blocks.

    All of them must be resident, as a cooperative launch sees to. ``arrived`` counts them, launch
    by launch of as many programs; zero before the first. Not ON_GPU there is one program, and
    nobody to wait for.
    """
    if ON_GPU:
        programs = tl.num_programs(0)
        tl.debug_barrier()
        before = tl.atomic_add(arrived, 1, sem="acq_rel")
        all_here = (before // programs + 1) * programs
        here = before + 1
        while here < all_here:
            here = tl.atomic_add(arrived, 0, sem="acquire")
        # Blocks are loaded by a unit of its own, which must see what programs stored.
        tl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [here], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
        tl.debug_barrier()
