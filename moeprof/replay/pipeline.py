"""How long a step takes when host, copies and computations overlap.

Three clocks, as in the live expert buffer: the host asks, copies follow each other on one stream,
computations on another. The host waits for the device once per dispatch, to learn which experts are
active; a computation waits for the copy that it reads; a copy waits for the last reader of its
slot. A step ends when all three are done. On a device without a queue of its own everything is done
in turn. Leaves out where the times come from (`cost_model`) and what is copied (`buffer_plans`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.compiled import compiled

Floats = NDArray[np.float64]
Int32s = NDArray[np.int32]
Bools = NDArray[np.uint8]

PARTS = (
    "known", "sort", "decide", "load", "copy", "launch", "expert", "host_expert", "lane",
    "combine_host", "combine_device", "sync",
)  # fmt: skip
"""Kinds of work whose times may be wrong by a factor each, in the order of `step_times`."""

NOTHING = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What the steps of a run do, with the time of each piece in seconds.

    Attributes:
        step_starts: [steps + 1] first dispatch of each step.
        starts: [dispatches + 1] first lookup of each dispatch.
        waits: [dispatches] 1 where the host waits for the device before the experts run.
        known_s: [dispatches] host time until it knows (an idle device assumed), or does not care.
        sort_s: [dispatches] device time until then.
        decide_s: [dispatches] host time to decide.
        combine_host_s: [dispatches] host time after the experts.
        combine_device_s: [dispatches] device time after the experts.
        loads: [lookups] 1 where the expert is copied.
        after: [lookups] place within the dispatch of the reader that the copy waits for, or
            `NOTHING`.
        awaits: [lookups] index of the lookup of this step whose copy is read, or `NOTHING`.
        on_host: [lookups] 1 where the host computes.
        launch_s: [lookups] host time to launch the expert.
        expert_s: [lookups] device time of the expert.
        host_s: [lookups] host time of the expert, where the host computes.
        copy_s: [lookups] time of the copy.
        load_s: Host time to ask for a copy.
        fetch_s: Time until rows are on the host.
        return_s: Host time to send rows back.
        sync_s: Wait for an idle device at the end of a step.
        is_serial: Nothing overlaps.
    """

    step_starts: Int32s
    starts: Int32s
    waits: Bools
    known_s: Floats
    sort_s: Floats
    decide_s: Floats
    combine_host_s: Floats
    combine_device_s: Floats
    loads: Bools
    after: Int32s
    awaits: Int32s
    on_host: Bools
    launch_s: Floats
    expert_s: Floats
    host_s: Floats
    copy_s: Floats
    load_s: float
    fetch_s: float
    return_s: float
    sync_s: float
    is_serial: bool

    @property
    def num_steps(self) -> int:
        """Steps."""
        return len(self.step_starts) - 1


def step_times(work: Work, factors: Floats | None = None) -> Floats:
    """Returns the time [draws, steps] of every step in seconds.

    Args:
        work: What is done.
        factors: [draws, len(PARTS)] by which the times of each kind are multiplied; all 1 when
            None.
    """
    given = np.ones((1, len(PARTS))) if factors is None else np.ascontiguousarray(factors)
    times = np.empty((len(given), work.num_steps))
    constants = np.array([work.load_s, work.fetch_s, work.return_s, work.sync_s])
    fill = _fill_serial if work.is_serial else _fill_times
    fill(
        work.step_starts, work.starts, work.waits, work.known_s, work.sort_s, work.decide_s,
        work.combine_host_s, work.combine_device_s, work.loads, work.after, work.awaits,
        work.on_host, work.launch_s, work.expert_s, work.host_s, work.copy_s, constants, given,
        times,
    )  # fmt: skip
    return times


_SIGNATURE = (
    "void(int32[::1], int32[::1], uint8[::1], float64[::1], float64[::1], float64[::1],"
    " float64[::1], float64[::1], uint8[::1], int32[::1], int32[::1], uint8[::1], float64[::1],"
    " float64[::1], float64[::1], float64[::1], float64[::1], float64[:, ::1], float64[:, ::1])"
)


@compiled(_SIGNATURE)
def _fill_times(  # noqa: PLR0917
    step_starts: Int32s,
    starts: Int32s,
    waits: Bools,
    known_s: Floats,
    sort_s: Floats,
    decide_s: Floats,
    combine_host_s: Floats,
    combine_device_s: Floats,
    loads: Bools,
    after: Int32s,
    awaits: Int32s,
    on_host: Bools,
    launch_s: Floats,
    expert_s: Floats,
    host_s: Floats,
    copy_s: Floats,
    constants: Floats,
    factors: Floats,
    times: Floats,
) -> None:
    """Fills [draws, steps] with the three clocks of each step run out."""
    arrived = np.zeros(len(loads))
    finished = np.zeros(len(loads))
    for draw in range(len(factors)):
        own = factors[draw]
        load = constants[0] * own[3]
        for step in range(len(step_starts) - 1):
            host = 0.0
            device = 0.0
            link = 0.0
            for dispatch in range(step_starts[step], step_starts[step + 1]):
                first, end = starts[dispatch], starts[dispatch + 1]
                begun = host
                host += known_s[dispatch] * own[0]
                if waits[dispatch]:
                    host = max(host, device + sort_s[dispatch] * own[1])
                    device = host
                else:
                    device = max(max(device, begun) + sort_s[dispatch] * own[1], host)
                host += decide_s[dispatch] * own[2]
                fetched = device
                host_work = 0.0
                has_host = False
                for lookup in range(first, end):
                    if on_host[lookup]:
                        has_host = True
                        host_work += host_s[lookup] * own[7]
                upcoming = first
                for lookup in range(first, end + 1):
                    # As the runtime does: every copy that may start before this expert is asked
                    # for first, in order; what is left after the last expert.
                    while upcoming < end:
                        if loads[upcoming]:
                            waiting = after[upcoming]
                            if lookup < end and waiting >= lookup - first:
                                break
                            host += load
                            start = max(link, host)
                            if waiting >= 0:
                                start = max(start, finished[first + waiting])
                            link = start + copy_s[upcoming] * own[4]
                            arrived[upcoming] = link
                        upcoming += 1
                    if lookup == end or on_host[lookup]:
                        continue
                    start = max(device, host)
                    if awaits[lookup] >= 0:
                        start = max(start, arrived[awaits[lookup]])
                    host += launch_s[lookup] * own[5]
                    device = max(start + expert_s[lookup] * own[6], host)
                    finished[lookup] = device
                if has_host:
                    host = max(host, fetched + constants[1] * own[8])
                    host += host_work + constants[2] * own[8]
                begun = host
                host += combine_host_s[dispatch] * own[9]
                device = max(
                    max(device, begun) + combine_device_s[dispatch] * own[10],
                    host,
                )
            times[draw, step] = max(host, device, link) + constants[3] * own[11]


@compiled(_SIGNATURE)
def _fill_serial(  # noqa: PLR0917
    step_starts: Int32s,
    starts: Int32s,
    waits: Bools,
    known_s: Floats,
    sort_s: Floats,
    decide_s: Floats,
    combine_host_s: Floats,
    combine_device_s: Floats,
    loads: Bools,
    after: Int32s,
    awaits: Int32s,
    on_host: Bools,
    launch_s: Floats,
    expert_s: Floats,
    host_s: Floats,
    copy_s: Floats,
    constants: Floats,
    factors: Floats,
    times: Floats,
) -> None:
    """Fills [draws, steps] with the sum of everything."""
    for draw in range(len(factors)):
        own = factors[draw]
        for step in range(len(step_starts) - 1):
            total = constants[3] * own[11]
            for dispatch in range(step_starts[step], step_starts[step + 1]):
                total += known_s[dispatch] * own[0] + sort_s[dispatch] * own[1]
                total += decide_s[dispatch] * own[2]
                total += combine_host_s[dispatch] * own[9] + combine_device_s[dispatch] * own[10]
                has_host = False
                for lookup in range(starts[dispatch], starts[dispatch + 1]):
                    if loads[lookup]:
                        total += constants[0] * own[3] + copy_s[lookup] * own[4]
                    if on_host[lookup]:
                        has_host = True
                        total += host_s[lookup] * own[7]
                    else:
                        total += launch_s[lookup] * own[5] + expert_s[lookup] * own[6]
                if has_host:
                    total += (constants[1] + constants[2]) * own[8]
            times[draw, step] = total
