"""What an expert buffer is given, and what it tells of itself.

Sites, settings and what is wrong with them, bytes and counts: all that does not run
(`expert_buffer`) and that caches are planned from (`cache_plans`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moeprof.errors import UsageError
from moeprof.live.expert_store import ExpertStore
from moeprof.live.experts import ExpertWeights
from moeprof.replay.cache import policies, streams
from moeprof.replay.cache.residency import MISS_ACTIONS
from moeprof.replay.serving_settings import check_prefetch

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

_FORESEEING = ("min", "min_bypass", "pinned")

RunExpert = Callable[[int, ExpertWeights, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class BufferedSite:
    """One MoE site whose experts are buffered.

    Attributes:
        site: Site id, as in a trace.
        stack: Its stack.
        layer: Model layer inside the stack.
        store: Its experts, or this device's share of them.
        expert_ids: Id of each expert in the store; ascending. None: 0, 1, 2, ...
        run: Runs rows through one expert; `ExpertWeights.run` when None.
    """

    site: int
    stack: str
    layer: int
    store: ExpertStore
    expert_ids: Sequence[int] | None = None
    run: RunExpert | None = None


@dataclass(frozen=True, kw_only=True)
class BufferSettings:
    """How experts are buffered.

    Attributes:
        capacity: Slots per cache (int), share of all expert bytes (float) or text, as
            `moeprof.replay.buffering` takes it. None: all experts stay on the device.
        policy: Name in `moeprof.replay.cache.policies.TABLE`.
        scope: What shares a cache: ``layer``, ``stack`` or ``global``.
        miss: ``load``, ``host`` or ``split``; see `moeprof.replay.cache.residency.MissRule`.
        host_rows: Most rows of an expert that ``split`` computes on the host.
        initial: ``empty`` or ``full``.
        staging: Slots beside the caches, for experts that are not kept and for copies ahead of the
            last reader; None: 2 where the policy does not keep every miss, else 0.
        prefetch: Experts of the next site that are copied ahead after each dispatch, at most
            (`moeprof.replay.cache.foresight`): so many slots more, beside the caches. Decisions of
            the policy, and so hits, are those without.
        future: Trace of the same run, for policies that plan on it (``min``, ``min_bypass``,
            ``pinned``).
        device_index: Which of ``num_devices`` this is, where experts are spread over several.
        num_devices: Devices that experts are spread over, each with caches of its own.
    """

    capacity: int | float | str | None
    policy: str = "lru"
    scope: str = "layer"
    miss: str = "load"
    host_rows: int = 1
    initial: str = "empty"
    staging: int | None = None
    prefetch: int = 0
    future: Trace | None = None
    device_index: int = 0
    num_devices: int = 1


@dataclass(frozen=True, kw_only=True)
class BufferMemory:
    """Bytes, as requested; how the allocator rounds them is another matter.

    Attributes:
        expert_bytes: All experts of all sites.
        cache_bytes: Slots of all caches; all experts where nothing is buffered.
        staging_bytes: Slots beside the caches, those of what is copied ahead included.
        padding_bytes: Part of both that only aligns tensors within a block.
        workspace_bytes: Rows in order of expert.
        host_bytes: Blocks in host memory.
    """

    expert_bytes: int
    cache_bytes: int
    staging_bytes: int
    padding_bytes: int
    workspace_bytes: int
    host_bytes: int

    @property
    def saved_bytes(self) -> int:
        """Device bytes that the experts no longer take."""
        return self.expert_bytes - self.cache_bytes - self.staging_bytes


@dataclass(frozen=True, kw_only=True)
class BufferCounts:
    """What a buffer did since it was made or reset.

    Attributes:
        dispatches: Dispatches.
        lookups: Active experts.
        hits: Of them resident.
        copies: Copies of an expert to the device, those ahead of its lookup included.
        copied_bytes: Bytes of them.
        prefetches: Copies ahead, of all copies.
        prefetch_bytes: Bytes of them.
        prefetch_used: Copies ahead that a lookup found.
        initial_copies: Copies that filled the caches before the first dispatch.
        host_experts: Misses computed on the host.
        host_rows: Rows of them.
        waits: Times the host waited for the device to learn the active experts.
        wait_s: Time of them, what the device still had to do before included.
    """

    dispatches: int
    lookups: int
    hits: int
    copies: int
    copied_bytes: int
    prefetches: int
    prefetch_bytes: int
    prefetch_used: int
    initial_copies: int
    host_experts: int
    host_rows: int
    waits: int
    wait_s: float


def check_settings(settings: BufferSettings) -> None:
    """Checks what matters whether or not there are caches; see `check_caches`.

    Raises:
        UsageError: The settings make no sense.
    """
    if settings.miss not in MISS_ACTIONS:
        raise UsageError(
            f"there is no miss action {settings.miss!r}", hint=f"one of {MISS_ACTIONS}"
        )
    check_prefetch(settings.prefetch, settings.capacity)


def check_caches(settings: BufferSettings) -> None:
    """Checks what matters to caches, before they are planned.

    Raises:
        UsageError: The settings make no sense.
    """
    check_prefetch(settings.prefetch, settings.capacity)
    for name, known in (
        ("policy", tuple(policies.POLICIES)),
        ("scope", streams.SCOPES),
        ("initial", policies.INITIALS),
    ):
        if getattr(settings, name) not in known:
            raise UsageError(
                f"there is no {name} {getattr(settings, name)!r}", hint=f"one of {', '.join(known)}"
            )
    if settings.policy in _FORESEEING and settings.future is None:
        raise UsageError(
            f"{settings.policy} is planned on a trace of the same run",
            hint="record the run, then give future=moeprof.open(PATH)",
        )


def described(settings: BufferSettings) -> dict[str, Any]:
    """Returns settings as plain values, to store beside a result."""
    plain = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    plain["future"] = None if settings.future is None else str(settings.future.path)
    return plain
