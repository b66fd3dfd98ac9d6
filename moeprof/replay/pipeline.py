"""How long a step takes when host, copies and computations overlap.

Three clocks, as in the live expert buffer: the host asks, copies follow each other on one stream,
computations on another. A dispatch runs in pieces (`moeprof.replay.cache.pieces`), each of them one
lookup or several. The host waits for the device once per dispatch, to learn which experts are
active; a piece waits for the copies that it reads; a copy waits for the last reader of its slot;
either takes a handover from one stream to the other. A step ends when all three are done. On a
device without a queue of its own everything is done in turn. Copies ahead of their lookup are
copies like others: they keep the link, and count in the step that asks for them. Leaves out where
the times come from (`cost_model`) and what is copied (`buffer_plans`).
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
    "combine_host", "combine_device", "sync", "handover",
)  # fmt: skip
"""Kinds of work whose times may be wrong by a factor each, in the order of `step_times`."""

NOTHING = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What the steps of a run do, with the time of each part in seconds.

    Attributes:
        step_starts: [steps + 1] first dispatch of each step.
        piece_starts: [dispatches + 1] first piece of each dispatch.
        copy_starts: [dispatches + 1] first copy of each dispatch.
        waits: [dispatches] 1 where the host waits for the device before the experts run.
        known_s: [dispatches] host time until it knows (an idle device assumed), or does not care.
        sort_s: [dispatches] device time until then.
        decide_s: [dispatches] host time to decide.
        foresee_s: [dispatches] host time to say what is copied ahead, once the last piece was
            launched.
        on_host: [dispatches] 1 where the host computes experts.
        host_s: [dispatches] host time of them.
        combine_host_s: [dispatches] host time after the experts.
        combine_device_s: [dispatches] device time after the experts.
        launch_s: [pieces] host time to launch the piece.
        expert_s: [pieces] device time of its experts.
        awaits: [pieces] last copy of this step that the piece reads, of its own dispatch or one
            before, or `NOTHING`.
        before: [copies] place within the dispatch of the piece before which the copy is asked for;
            the number of pieces where after all of them. Never falls within a dispatch.
        after: [copies] place of the piece that it waits for, below ``before``, or `NOTHING`.
        load_s: [copies] host time to ask for the copy.
        copy_s: [copies] time of the copy.
        handover_s: From the end of a reader to the start of the copy that waited for it, and from
            the arrival of a copy to the start of the piece that waited for it.
        fetch_s: Time until rows are on the host.
        return_s: Host time to send rows back.
        sync_s: Wait for an idle device at the end of a step.
        is_serial: Nothing overlaps.
    """

    step_starts: Int32s
    piece_starts: Int32s
    copy_starts: Int32s
    waits: Bools
    known_s: Floats
    sort_s: Floats
    decide_s: Floats
    foresee_s: Floats
    on_host: Bools
    host_s: Floats
    combine_host_s: Floats
    combine_device_s: Floats
    launch_s: Floats
    expert_s: Floats
    awaits: Int32s
    before: Int32s
    after: Int32s
    load_s: Floats
    copy_s: Floats
    handover_s: float
    fetch_s: float
    return_s: float
    sync_s: float
    is_serial: bool

    @property
    def num_steps(self) -> int:
        """Steps."""
        return len(self.step_starts) - 1

    def unoverlapped_s(self) -> Floats:
        """Returns [steps] the sum of all parts, but handovers and the rows' way to the host."""
        per_dispatch = (
            self.known_s + self.sort_s + self.decide_s + self.foresee_s + self.host_s
            + self.combine_host_s + self.combine_device_s
            + _sums(self.launch_s + self.expert_s, self.piece_starts)
            + _sums(self.load_s + self.copy_s, self.copy_starts)
        )  # fmt: skip
        return _sums(per_dispatch, self.step_starts) + self.sync_s


def _sums(values: Floats, starts: Int32s) -> Floats:
    """Returns the sums of ``values`` between each of ``starts`` and the next."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    found: Floats = np.diff(total[starts])
    return found


def step_times(work: Work, factors: Floats | None = None) -> Floats:
    """Returns the time [draws, steps] of every step in seconds.

    Args:
        work: What is done.
        factors: [draws, len(PARTS)] by which the times of each kind are multiplied; all 1 when
            None.
    """
    given = np.ones((1, len(PARTS))) if factors is None else np.ascontiguousarray(factors)
    times = np.empty((len(given), work.num_steps))
    constants = np.array([work.fetch_s, work.return_s, work.sync_s, work.handover_s])
    fill = _fill_serial if work.is_serial else _fill_times
    fill(
        work.step_starts, work.piece_starts, work.copy_starts, work.waits, work.known_s,
        work.sort_s, work.decide_s, work.foresee_s, work.on_host, work.host_s,
        work.combine_host_s, work.combine_device_s, work.launch_s, work.expert_s, work.awaits,
        work.before, work.after, work.load_s, work.copy_s, constants, given, times,
    )  # fmt: skip
    return times


_SIGNATURE = (
    "void(int32[::1], int32[::1], int32[::1], uint8[::1], float64[::1], float64[::1],"
    " float64[::1], float64[::1], uint8[::1], float64[::1], float64[::1], float64[::1],"
    " float64[::1], float64[::1], int32[::1], int32[::1], int32[::1], float64[::1],"
    " float64[::1], float64[::1], float64[:, ::1], float64[:, ::1])"
)


@compiled(_SIGNATURE)
def _fill_times(  # noqa: PLR0917
    step_starts: Int32s,
    piece_starts: Int32s,
    copy_starts: Int32s,
    waits: Bools,
    known_s: Floats,
    sort_s: Floats,
    decide_s: Floats,
    foresee_s: Floats,
    on_host: Bools,
    host_s: Floats,
    combine_host_s: Floats,
    combine_device_s: Floats,
    launch_s: Floats,
    expert_s: Floats,
    awaits: Int32s,
    before: Int32s,
    after: Int32s,
    load_s: Floats,
    copy_s: Floats,
    constants: Floats,
    factors: Floats,
    times: Floats,
) -> None:
    """Fills [draws, steps] with the three clocks of each step run out."""
    arrived = np.zeros(len(copy_s))
    finished = np.zeros(len(launch_s))
    for draw in range(len(factors)):
        own = factors[draw]
        handover = constants[3] * own[12]
        for step in range(len(step_starts) - 1):
            host = 0.0
            device = 0.0
            link = 0.0
            for dispatch in range(step_starts[step], step_starts[step + 1]):
                first, end = piece_starts[dispatch], piece_starts[dispatch + 1]
                upcoming, last = copy_starts[dispatch], copy_starts[dispatch + 1]
                begun = host
                host += known_s[dispatch] * own[0]
                if waits[dispatch]:
                    host = max(host, device + sort_s[dispatch] * own[1])
                    device = host
                else:
                    device = max(max(device, begun) + sort_s[dispatch] * own[1], host)
                host += decide_s[dispatch] * own[2]
                fetched = device
                for piece in range(first, end + 1):
                    if piece == end:
                        host += foresee_s[dispatch] * own[2]
                    while upcoming < last and before[upcoming] <= piece - first:
                        host += load_s[upcoming] * own[3]
                        start = max(link, host)
                        if after[upcoming] >= 0:
                            start = max(start, finished[first + after[upcoming]] + handover)
                        link = start + copy_s[upcoming] * own[4]
                        arrived[upcoming] = link
                        upcoming += 1
                    if piece == end:
                        continue
                    start = max(device, host)
                    if awaits[piece] >= 0:
                        start = max(start, arrived[awaits[piece]] + handover)
                    host += launch_s[piece] * own[5]
                    device = max(start + expert_s[piece] * own[6], host)
                    finished[piece] = device
                if on_host[dispatch]:
                    host = max(host, fetched + constants[0] * own[8])
                    host += host_s[dispatch] * own[7] + constants[1] * own[8]
                begun = host
                host += combine_host_s[dispatch] * own[9]
                device = max(
                    max(device, begun) + combine_device_s[dispatch] * own[10],
                    host,
                )
            times[draw, step] = max(host, device, link) + constants[2] * own[11]


@compiled(_SIGNATURE)
def _fill_serial(  # noqa: PLR0917
    step_starts: Int32s,
    piece_starts: Int32s,
    copy_starts: Int32s,
    waits: Bools,
    known_s: Floats,
    sort_s: Floats,
    decide_s: Floats,
    foresee_s: Floats,
    on_host: Bools,
    host_s: Floats,
    combine_host_s: Floats,
    combine_device_s: Floats,
    launch_s: Floats,
    expert_s: Floats,
    awaits: Int32s,
    before: Int32s,
    after: Int32s,
    load_s: Floats,
    copy_s: Floats,
    constants: Floats,
    factors: Floats,
    times: Floats,
) -> None:
    """Fills [draws, steps] with the sum of everything."""
    for draw in range(len(factors)):
        own = factors[draw]
        for step in range(len(step_starts) - 1):
            total = constants[2] * own[11]
            for dispatch in range(step_starts[step], step_starts[step + 1]):
                total += known_s[dispatch] * own[0] + sort_s[dispatch] * own[1]
                total += (decide_s[dispatch] + foresee_s[dispatch]) * own[2]
                total += combine_host_s[dispatch] * own[9] + combine_device_s[dispatch] * own[10]
                for piece in range(piece_starts[dispatch], piece_starts[dispatch + 1]):
                    total += launch_s[piece] * own[5] + expert_s[piece] * own[6]
                for copy in range(copy_starts[dispatch], copy_starts[dispatch + 1]):
                    total += load_s[copy] * own[3] + copy_s[copy] * own[4]
                if on_host[dispatch]:
                    total += host_s[dispatch] * own[7]
                    total += (constants[0] + constants[1]) * own[8]
            times[draw, step] = total
