"""What can be chosen when a model is served: a gating kernel, or an expert buffer."""

from __future__ import annotations

from dataclasses import dataclass

from moeprof.errors import UsageError
from moeprof.replay.cache import policies
from moeprof.replay.cache.residency import MISS_ACTIONS
from moeprof.replay.cache.sizes import parse_capacity

STATIC_KERNELS = ("static_mask", "static_grouped", "static_index")
DYNAMIC_KERNELS = ("dynamic_loop", "dynamic_grouped", "dynamic")
KERNEL_NAMES = (*STATIC_KERNELS, *DYNAMIC_KERNELS)
GROUP_TOKENS = 1024
UNBUFFERED = "unbuffered"

_AHEAD = "ahead="
_HINT = (
    "gating:KERNEL, POLICY:CAPACITY[:MISS][:ahead=N] or unbuffered, as in lru:32:split or "
    "lru:25%:ahead=2"
)


@dataclass(frozen=True, kw_only=True)
class GatingSetting:
    """All experts on the device, run by one gating kernel; nothing is dropped.

    Attributes:
        kernel: One of `KERNEL_NAMES`.
    """

    kernel: str

    def __post_init__(self) -> None:
        """Refuses unknown kernels."""
        if self.kernel not in KERNEL_NAMES:
            raise UsageError(
                f"there is no gating kernel {self.kernel!r}",
                hint=f"one of {', '.join(KERNEL_NAMES)}",
            )

    @property
    def name(self) -> str:
        """As `parse_setting` reads it."""
        return f"gating:{self.kernel}"


@dataclass(frozen=True, kw_only=True)
class BufferingSetting:
    """Some experts on the device, the rest in host memory; see `moeprof.live.BufferSettings`.

    Attributes:
        capacity: Slots per cache (int), share (float) or text; None: all on the device.
        policy: A policy of `moeprof.replay.buffering`.
        miss: ``load``, ``host`` or ``split``.
        host_rows: Most rows that ``split`` computes on the host.
        scope: What shares a cache.
        initial: ``empty`` or ``full``.
        prefetch: Experts that are copied ahead after each dispatch, at most.
    """

    capacity: int | float | str | None
    policy: str = "lru"
    miss: str = "load"
    host_rows: int = 1
    scope: str = "layer"
    initial: str = "empty"
    prefetch: int = 0

    def __post_init__(self) -> None:
        """Refuses what no buffer can do."""
        if self.capacity is not None:
            parse_capacity(self.capacity)
        for what, value, known in (
            ("policy", self.policy, tuple(policies.POLICIES)),
            ("miss action", self.miss, MISS_ACTIONS),
        ):
            if value not in known:
                raise UsageError(f"there is no {what} {value!r}", hint=f"one of {', '.join(known)}")
        check_prefetch(self.prefetch, self.capacity)

    @property
    def name(self) -> str:
        """As `parse_setting` reads it, where scope and start are the usual ones."""
        if self.capacity is None:
            return UNBUFFERED
        parts = [self.policy, str(self.capacity)]
        if self.miss != "load":
            parts.append(self.miss)
        if self.miss == "split" and self.host_rows != 1:
            parts[-1] += f"<={self.host_rows}"
        if self.prefetch:
            parts.append(f"{_AHEAD}{self.prefetch}")
        named = ":".join(parts)
        extra = [
            f"{key}={value}"
            for key, value, usual in (
                ("scope", self.scope, "layer"),
                ("initial", self.initial, "empty"),
            )
            if value != usual
        ]
        return " ".join([named, *extra])


def check_prefetch(prefetch: int, capacity: int | float | str | None) -> None:
    """Refuses what cannot be copied ahead.

    Raises:
        UsageError: It is negative, or there is nothing that is not on the device.
    """
    if prefetch < 0:
        raise UsageError(
            f"{prefetch} experts cannot be copied ahead", hint="ahead=1 or more, or leave it out"
        )
    if prefetch and capacity is None:
        raise UsageError(
            "all experts are on the device, so none is copied ahead", hint="give a capacity"
        )


Setting = GatingSetting | BufferingSetting


def parse_setting(text: str) -> Setting:
    """Returns a setting from text.

    Args:
        text: ``gating:dynamic``, ``lru:32``, ``lru:25%``, ``lru:32:host``, ``lru:32:split``,
            ``lru:32:split<=4``, ``lru:25%:ahead=2``, ``lru:32:split:ahead=4`` or ``unbuffered``.

    Raises:
        UsageError: It is none of these.
    """
    no_setting = UsageError(f"{text!r} is no setting", hint=_HINT)
    parts = [part.strip() for part in text.split(":")]
    if parts == [UNBUFFERED]:
        return BufferingSetting(capacity=None)
    if parts[0] == "gating" and len(parts) == 2:  # noqa: PLR2004
        return GatingSetting(kernel=parts[1])
    prefetch = "0"
    if parts[-1].startswith(_AHEAD):
        prefetch = parts.pop().removeprefix(_AHEAD)
    if len(parts) not in (2, 3) or not all(parts):
        raise no_setting
    capacity: int | str = int(parts[1]) if parts[1].isdecimal() else parts[1]
    miss, _, rows = (parts[2] if len(parts) > 2 else "load").partition("<=")  # noqa: PLR2004
    if not prefetch.isdecimal() or (rows and not rows.isdecimal()):
        raise no_setting
    return BufferingSetting(
        policy=parts[0],
        capacity=capacity,
        miss=miss,
        host_rows=int(rows) if rows else 1,
        prefetch=int(prefetch),
    )
