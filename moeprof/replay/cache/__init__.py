"""Expert caches: policies as state machines, fast kernels, exact curves, bounds.

`moeprof.replay.buffering` is made from these. `policies` is the definition of every policy, and
what live runs and plug-ins use; `kernels` and `curves` are accelerations of it, tested lookup by
lookup against it.
"""

from __future__ import annotations
