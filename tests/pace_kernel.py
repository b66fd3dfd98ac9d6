"""Kernels that say and ask what paced ones do, for tests of what is said and answered."""

import triton
import triton.language as tl

from moeprof.live.kernels.pace import is_ahead, look, reached, report


@triton.jit
def ask_is_ahead(done, total, progress, begun, out):
    answer = is_ahead(tl.load(done), tl.load(total), reached(look(progress)), tl.load(begun))
    tl.store(out, answer.to(tl.int32))


@triton.jit
def say_how_far(done, total, progress, PRODUCT: tl.constexpr):
    report(progress, tl.load(done), tl.load(total), PRODUCT)
