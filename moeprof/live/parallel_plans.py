"""Who sends which rows to whom: what follows from a placement and from every rank's counts.

A placement is the replay's `moeprof.replay.loads.Layout`: expert and replica of every slot, slots
in equal parts on the devices. Rows of an expert are numbered over all ranks: rank by rank, on a
rank token by token, of a token slot by slot. Row i goes to replica i mod r (`round_robin`). How
many rows a slot gets so follows from the counts alone; which token meets which replica follows from
that order, and equals what the replay counts where each rank holds a contiguous piece of the
replay's tokens. Leaves out moving anything (`expert_parallel`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeprof.errors import UsageError
from moeprof.replay.loads import Layout

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class RankPlan:
    """What one rank sends and receives in one dispatch, in rows.

    Attributes:
        rank: The rank; its device has the same number.
        sent: [ranks, slots per device] rows it sends to each slot of each device.
        received: [ranks, slots per device] rows that each rank sends to each of its own slots.
    """

    rank: int
    sent: Ints
    received: Ints

    @property
    def send_splits(self) -> list[int]:
        """Rows sent to each rank, its own included."""
        splits: list[int] = self.sent.sum(axis=1).tolist()
        return splits

    @property
    def receive_splits(self) -> list[int]:
        """Rows received from each rank, its own included."""
        splits: list[int] = self.received.sum(axis=1).tolist()
        return splits

    @property
    def num_sent(self) -> int:
        """Rows sent."""
        return int(self.sent.sum())

    @property
    def num_received(self) -> int:
        """Rows received: the load of the device."""
        return int(self.received.sum())

    @property
    def slot_rows(self) -> Ints:
        """[slots per device] rows that each of its slots gets."""
        return np.asarray(self.received.sum(axis=0), np.int64)


def rank_plan(counts: ArrayLike, layout: Layout, rank: int) -> RankPlan:
    """Returns what a rank sends and receives.

    Args:
        counts: [ranks, experts] rows of each rank.
        layout: The placement; as many devices as ranks.
        rank: Whose plan.
    """
    rows = rows_to_slots(counts, layout)
    by_device = rows.reshape(layout.num_devices, layout.num_devices, -1)
    return RankPlan(rank=rank, sent=by_device[rank], received=by_device[:, rank])


def rows_to_slots(counts: ArrayLike, layout: Layout) -> Ints:
    """Returns [ranks, slots] the rows that each rank sends to each slot.

    Args:
        counts: [ranks, experts] rows of each rank.
        layout: The placement.
    """
    rows = np.asarray(counts, np.int64)
    ends = np.cumsum(rows, axis=0)[:, layout.expert]
    own = rows[:, layout.expert]
    replicas = layout.counts[layout.expert]
    # Numbers below x that leave the remainder j when divided by r: (x - j + r - 1) // r.
    shift = replicas - 1 - layout.replica
    return np.asarray((ends + shift) // replicas - (ends - own + shift) // replicas, np.int64)


def rows_between(counts: ArrayLike, layout: Layout) -> Ints:
    """Returns [ranks, devices] the rows that each rank sends to each device.

    Args:
        counts: [ranks, experts] rows of each rank.
        layout: The placement; ranks and devices need not be as many.
    """
    rows = rows_to_slots(counts, layout)
    return np.asarray(rows.reshape(len(rows), layout.num_devices, -1).sum(axis=-1), np.int64)


def busiest_rows(between: Ints) -> int:
    """Returns the most rows that one device sends to others, or receives from them.

    Args:
        between: [devices, devices] as `rows_between` returns them.
    """
    others = between - np.diag(np.diag(between))
    return int(max(others.sum(axis=0).max(), others.sum(axis=1).max()))


def shard_starts(num_tokens: int, num_ranks: int) -> Ints:
    """Returns [ranks + 1] the first token of each rank: contiguous parts, as equal as can be."""
    return np.arange(num_ranks + 1) * num_tokens // num_ranks


def shard_counts(experts: NDArray[Any], starts: ArrayLike, num_experts: int) -> Ints:
    """Returns [ranks, experts] the rows of each rank.

    Args:
        experts: [tokens, top_k]; negative ids count nowhere.
        starts: [ranks + 1] first token of each rank.
        num_experts: Experts of the layer.

    Raises:
        UsageError: An id is of no expert.
    """
    if experts.size and experts.max() >= num_experts:
        raise UsageError(f"there is no expert {experts.max()} in a layer of {num_experts}")
    bounds = np.asarray(starts, np.int64)
    rank = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    chosen = experts >= 0
    key = (rank[:, None] * num_experts + experts)[chosen]
    counts = np.bincount(key, minlength=(len(bounds) - 1) * num_experts)
    return counts.reshape(len(bounds) - 1, num_experts)


def check_layout(layout: Layout, *, num_experts: int, num_ranks: int) -> None:
    """Refuses placements that a group of ranks cannot carry out.

    Args:
        layout: The placement.
        num_experts: Experts of the layer.
        num_ranks: Ranks of the group.

    Raises:
        UsageError: Experts or devices differ, slots are not in equal parts, or an expert has none.
    """
    if layout.num_experts != num_experts:
        raise UsageError(
            f"the placement is for {layout.num_experts} experts, the layer has {num_experts}"
        )
    if layout.num_devices != num_ranks:
        raise UsageError(
            f"the placement is for {layout.num_devices} devices, the group has {num_ranks} ranks",
            hint="plan for as many devices as ranks run",
        )
    if len(layout.expert) % layout.num_devices:
        raise UsageError(
            f"{len(layout.expert)} slots cannot be dealt evenly to {layout.num_devices} devices",
            hint="choose a number of redundant slots that makes them divisible",
        )
    if not (layout.counts > 0).all():
        missing = int(np.flatnonzero(layout.counts == 0)[0])
        raise UsageError(f"the placement has no slot for expert {missing}")
