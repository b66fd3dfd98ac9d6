"""Makes Triton's interpreter look up once what it looks up at every call.

Before every kernel and every function that a kernel calls, the interpreter lists all members of
five parts of the language to find those to replace, and for every operation it writes down which
NumPy type stands for which of its own. Neither changes while a process runs; with kernels as small
as those of the tests, both take long.
"""

from __future__ import annotations

import functools
import inspect
import sys

import triton.language as tl
from triton.runtime import interpreter


def look_up_once():
    """Replaces two look-ups of the interpreter; what they find stays as it is.

    Of a Triton that looks up otherwise nothing is replaced: tests then take longer.
    """
    try:
        known = (
            list(inspect.signature(interpreter._patch_builtin).parameters)
            == ["pkg", "builder", "scope"]
            and len(inspect.signature(interpreter._get_np_dtype).parameters) == 1
            and callable(interpreter._patch_attr)
        )
    except (AttributeError, TypeError, ValueError):
        known = False
    if not known:
        print("Triton's interpreter is another one: kernels run slowly", file=sys.stderr)
        return
    parts = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    # Found before the first kernel runs: within one, members are replaced already.
    builtins = {
        part: [name for name, member in inspect.getmembers(part) if tl.core.is_builtin(member)]
        for part in parts
    }
    search_all = interpreter._patch_builtin
    numpy_type = interpreter._get_np_dtype
    # Types of the language are equal, and hash alike, by name.
    scalar_type = functools.cache(numpy_type)

    def search_known(part, builder, scope):
        if part not in builtins:
            search_all(part, builder, scope)
            return
        for name in builtins[part]:
            member = getattr(part, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(part, name, member, builder, scope)

    def type_of(own):
        return scalar_type(own) if type(own) is tl.dtype else numpy_type(own)

    interpreter._patch_builtin = search_known
    interpreter._get_np_dtype = type_of
