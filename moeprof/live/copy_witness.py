"""Independent witnesses of host-to-device copies: the profiler's and the PCIe counters'.

Neither knows the buffer: the profiler lists what the driver was asked to copy, the counters count
what came over the link, other traffic and protocol overhead included.
"""

from __future__ import annotations

import bisect
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeprof.recording.devices import DeviceMeter, DeviceSampler, open_meter

STEP_NAME = "moeprof step"

_STEP = re.compile(rf"^{STEP_NAME} (\d+)$")
_SAMPLE_INTERVAL_S = 0.05
_SETTLE_S = 0.1


@dataclass(frozen=True, kw_only=True)
class StepCopies:
    """Large host-to-device copies of one step, as the profiler saw them.

    Attributes:
        step: The step.
        copies: Copies.
        num_bytes: Bytes of all of them.
    """

    step: int
    copies: int
    num_bytes: int


def copies_by_step(profile: Mapping[str, Any], *, least_bytes: int) -> list[StepCopies]:
    """Returns the copies of each step of a profile in Chrome's format.

    A copy belongs to the step in which the host asked for it; where the profiler did not see that
    (it does not follow every call of the driver), to the step in which it began: a step ends with
    the device at rest.

    Args:
        profile: As `torch.profiler` exports it; steps are ranges named by `step_range`.
        least_bytes: Smaller copies are something else.
    """
    events = [event for event in profile["traceEvents"] if event.get("ph") == "X"]
    asked: dict[int, float] = {}
    steps: dict[int, tuple[float, float]] = {}
    for event in events:
        category = event.get("cat", "")
        arguments = event.get("args", {})
        if category in ("cuda_runtime", "cuda_driver") and "correlation" in arguments:
            asked[int(arguments["correlation"])] = float(event["ts"])
        match = _STEP.match(event.get("name", ""))
        if match is not None and category == "user_annotation":
            begun = float(event["ts"])
            steps[int(match.group(1))] = (begun, begun + float(event["dur"]))
    found = {step: [0, 0] for step in steps}
    for event in events:
        if not _is_copy(event, least_bytes):
            continue
        size = int(event["args"]["bytes"])
        moment = asked.get(int(event["args"]["correlation"]), float(event["ts"]))
        for step, (begun, ended) in steps.items():
            if begun <= moment <= ended:
                found[step][0] += 1
                found[step][1] += size
                break
    return [
        StepCopies(step=step, copies=count, num_bytes=size)
        for step, (count, size) in sorted(found.items())
    ]


def overlapped_share(profile: Mapping[str, Any], *, least_bytes: int) -> float | None:
    """Returns the share of the time of copies in which kernels ran too; None without copies.

    The profiler slows the host down, so that less overlaps than without it.

    Args:
        profile: As `torch.profiler` exports it.
        least_bytes: Smaller copies are something else.
    """
    copies, kernels = [], []
    for event in profile["traceEvents"]:
        if event.get("ph") != "X":
            continue
        interval = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        if event.get("cat") == "kernel":
            kernels.append(interval)
        elif _is_copy(event, least_bytes):
            copies.append(interval)
    total = sum(ended - begun for begun, ended in copies)
    if not total:
        return None
    busy = _united(kernels)
    return sum(_common(interval, busy) for interval in copies) / total


def _is_copy(event: Mapping[str, Any], least_bytes: int) -> bool:
    if event.get("cat") != "gpu_memcpy" or "HtoD" not in event.get("name", ""):
        return False
    return int(event["args"]["bytes"]) >= least_bytes


def _united(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns intervals without overlaps, ascending."""
    found: list[tuple[float, float]] = []
    for begun, ended in sorted(intervals):
        if found and begun <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], ended))
        else:
            found.append((begun, ended))
    return found


def _common(interval: tuple[float, float], busy: list[tuple[float, float]]) -> float:
    begun, ended = interval
    first = max(0, bisect.bisect_right(busy, (begun, math.inf)) - 1)
    total = 0.0
    for start, stop in busy[first:]:
        if start >= ended:
            break
        total += max(0.0, min(stop, ended) - max(start, begun))
    return total


def step_range(step: int) -> Any:
    """Returns a context in which everything belongs to a step, for `copies_by_step`."""
    return torch.profiler.record_function(f"{STEP_NAME} {step}")


def profiled(run: Callable[[], None]) -> dict[str, Any]:
    """Returns the profile of ``run`` in Chrome's format."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        profiler.export_chrome_trace(str(path))
        profile: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return profile


@dataclass
class LinkBytes:
    """Bytes over a device's link while it was watched, overhead of the protocol included.

    Attributes:
        num_bytes: Received; None where the device does not say.
        sent_bytes: Sent, likewise.
        elapsed_s: Time watched.
        reason: Why there is no figure; empty where there is one.
    """

    num_bytes: int | None = None
    sent_bytes: int | None = None
    elapsed_s: float = 0.0
    reason: str = ""


@contextmanager
def watched_link(meter: DeviceMeter | None = None) -> Iterator[LinkBytes]:
    """Counts what the first visible device receives, from here to the end of the context.

    The counters wrap within 70 ms at full speed: a thread reads them all the while.

    Args:
        meter: What to read; the machine's when None.
    """
    own = meter is None
    meter = open_meter() if meter is None else meter
    found = LinkBytes(reason=meter.reason)
    sampler = DeviceSampler(meter, interval_s=_SAMPLE_INTERVAL_S, t0=time.perf_counter())
    begun_s = time.perf_counter()
    sampler.start()
    try:
        yield found
    finally:
        found.elapsed_s = time.perf_counter() - begun_s
        if meter.devices:
            time.sleep(_SETTLE_S)
        sampler.stop()
        rows = [row for row in sampler.rows if row["device"] == 0]
        found.num_bytes = _difference(rows, "pcie_rx_bytes")
        found.sent_bytes = _difference(rows, "pcie_tx_bytes")
        if not meter.devices:
            found.reason = meter.reason
        elif found.num_bytes is None:
            found.reason = "the device does not count PCIe bytes, or a wrap was missed"
        if own:
            meter.close()


def _difference(rows: Sequence[Mapping[str, Any]], name: str) -> int | None:
    if not rows or rows[0][name] is None or rows[-1][name] is None:
        return None
    return int(rows[-1][name] - rows[0][name])


def link_overhead(
    slot: torch.Tensor, block: torch.Tensor, *, count: int, meter: DeviceMeter | None = None
) -> float | None:
    """Returns received bytes per byte copied, from copies of a known number; None if unknown.

    Args:
        slot: Where to, on the device.
        block: What, in page-locked host memory.
        count: Copies.
        meter: What to read.
    """
    with watched_link(meter) as link:
        for _ in range(count):
            slot[: block.numel()].copy_(block, non_blocking=True)
        torch.cuda.synchronize(slot.device)
    if link.num_bytes is None:
        return None
    return link.num_bytes / (count * block.numel())
