"""A kernel that asks what a paced kernel asks, for tests of the answer."""

import triton
import triton.language as tl

from moeprof.live.kernels.pace import is_ahead, look, reached


@triton.jit
def ask_is_ahead(done, total, progress, begun, out):
    answer = is_ahead(tl.load(done), tl.load(total), reached(look(progress)), tl.load(begun))
    tl.store(out, answer.to(tl.int32))
