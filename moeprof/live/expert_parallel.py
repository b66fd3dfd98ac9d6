"""A Mixture-of-Experts layer whose experts lie on several devices, over torch.distributed.

As in "Towards MoE Deployment" (arXiv 2303.06182, section V): the ranks tell each other how many
rows each expert gets of them (size exchange), send the rows (an all-to-all of unequal parts), run
the experts they have on what came, send the results back, and each adds its tokens' rows slot by
slot. Nothing is padded, nothing is dropped, and every rank may come with any number of tokens, none
included.

The size exchange carries the counts of all experts to all ranks, not only those of a rank's own
experts: a row's number among all rows of its expert decides which replica it goes to, and that
needs the counts of the ranks before. It is still one all-to-all of a few KiB.

A slot's rows arrive in the order in which one device would have them. So outputs are, to the bit,
those of one device that runs the same rows together (`on_one_device`) wherever a matrix product of
the same shape gives the same bits there, as it does with the kernel ``dynamic_loop``; without
replicas that is the plain layer.

For inference only: rows travel as bytes, which no gradient follows, and so gradients are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from moeprof.errors import UsageError
from moeprof.live.dispatch_checks import check_dispatch, refuse_gradients
from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels import kernel_named
from moeprof.live.kernels.slots import RowOrder, combine_rows, rows_by_expert
from moeprof.live.parallel_clocks import PartClock
from moeprof.live.parallel_plans import Ints, RankPlan, check_layout, rank_plan
from moeprof.replay.loads import Layout

PARTS = ("size_exchange", "token_exchange", "experts", "return", "combine")
"""Parts of a step, in order."""
DEFAULT_KERNEL = "dynamic_loop"


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotTables:
    """A placement on a device.

    Attributes:
        slots: [experts, most replicas] slot of each replica of each expert; the first one again
            where there are fewer.
        copies: [experts] replicas of each expert.
        is_replicated: True where some expert has more than one.
    """

    slots: torch.Tensor
    copies: torch.Tensor
    is_replicated: bool

    @classmethod
    def of(cls, layout: Layout, device: torch.device | str) -> SlotTables:
        """Returns the tables of a placement."""
        copies = layout.counts
        slots = np.zeros((layout.num_experts, int(copies.max())), np.int64)
        first = layout.replica == 0
        slots[layout.expert[first]] = np.flatnonzero(first)[:, None]
        slots[layout.expert, layout.replica] = np.arange(len(layout.expert))
        return cls(
            slots=torch.from_numpy(slots).to(device),
            copies=torch.from_numpy(copies).to(device),
            is_replicated=bool((copies > 1).any()),
        )


def slot_ids(
    expert_ids: torch.Tensor, tables: SlotTables, rows_before: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the slot that each row goes to: row i of an expert to its replica i mod r.

    Args:
        expert_ids: [T, k]; -1 where a slot of a token is not executed, and so in what is returned.
        tables: The placement.
        rows_before: [experts] rows of each expert on the ranks before; none when None.

    Returns:
        [T, k] int64.
    """
    executed = expert_ids >= 0
    known = expert_ids.long().clamp(min=0)
    if not tables.is_replicated:
        return torch.where(executed, tables.slots[known, 0], -1)
    order = rows_by_expert(expert_ids, len(tables.copies))
    of_row = order.experts.clamp(max=len(tables.copies) - 1)
    starts = torch.cat([order.ends.new_zeros(1), order.ends[:-1]]).long()
    places = torch.arange(order.slots.numel(), device=expert_ids.device)
    number = torch.empty_like(order.slots)
    number[order.slots] = places - starts[of_row]
    number = number.view(expert_ids.shape)
    if rows_before is not None:
        number = number + rows_before[known]
    return torch.where(executed, tables.slots[known, number % tables.copies[known]], -1)


def on_one_device(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    layout: Layout,
    *,
    kernel: str = DEFAULT_KERNEL,
) -> torch.Tensor:
    """Returns what one device computes that has every slot of a placement.

    Args:
        hidden: [T, d_model], the tokens of all ranks one after another.
        expert_ids: [T, k]; -1: not executed.
        weights: [T, k].
        experts: All experts of the layer.
        layout: The placement.
        kernel: Name of a gating kernel.

    Raises:
        UsageError: The tensors do not fit together, the experts or the placement, or there is no
            such kernel.
    """
    check_layout(layout, num_experts=experts.num_experts, num_ranks=layout.num_devices)
    check_dispatch(hidden, expert_ids, weights, d_model=experts.d_model)
    where = slot_ids(expert_ids, SlotTables.of(layout, hidden.device))
    every = torch.from_numpy(layout.expert).to(experts.w_in.device)
    return kernel_named(kernel)(hidden, where, weights, experts.select(every))


def experts_of_rank(experts: ExpertWeights, layout: Layout, rank: int) -> ExpertWeights:
    """Returns a copy of the weights of one device's slots, in their order.

    Args:
        experts: All experts of the layer.
        layout: The placement.
        rank: The device.

    Raises:
        UsageError: The placement is for other experts, or has no such device.
    """
    check_layout(layout, num_experts=experts.num_experts, num_ranks=layout.num_devices)
    if not 0 <= rank < layout.num_devices:
        raise UsageError(f"the placement is for {layout.num_devices} devices, there is no {rank}")
    per_device = len(layout.expert) // layout.num_devices
    own = layout.expert[rank * per_device : (rank + 1) * per_device]
    return experts.select(torch.from_numpy(own).to(experts.w_in.device))


class Sent(NamedTuple):
    """Rows on their way, as one rank sees it.

    Attributes:
        order: Of this rank's rows, by slot; needed to bring them back.
        plan: How many rows go where.
        rows: [received, d_model] what came: rank by rank, of a rank slot by slot.
        slots: [received] int64, own slot of each.
    """

    order: RowOrder
    plan: RankPlan
    rows: torch.Tensor
    slots: torch.Tensor


class ParallelExperts:
    """The experts of one layer, spread over the ranks of a group; call it as a gating kernel.

    Every rank of the group calls it, each with its own tokens. The host waits for the device once
    a step: it must know the counts.

    For inference only: a call is refused where gradients are enabled and rows, weights or experts
    require one. What the host knows (shapes, dtypes, devices, gradients) is refused on its own rank
    before anything is sent; ids of no expert are refused on all ranks.

    Args:
        own: Weights of this rank's slots, as `experts_of_rank` returns them.
        layout: The placement; device ``d`` is rank ``d`` of the group.
        group: The group; None is all ranks.
        kernel: Name of the gating kernel that runs the own experts.

    Raises:
        UsageError: The placement does not fit the group or the weights, or there is no such kernel.
    """

    def __init__(
        self,
        own: ExpertWeights,
        layout: Layout,
        *,
        group: dist.ProcessGroup | None = None,
        kernel: str = DEFAULT_KERNEL,
    ) -> None:
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        check_layout(layout, num_experts=layout.num_experts, num_ranks=self.num_ranks)
        per_device = len(layout.expert) // layout.num_devices
        if own.num_experts != per_device:
            raise UsageError(
                f"the placement has {per_device} slots per device, the weights {own.num_experts}",
                hint="take them from experts_of_rank(experts, layout, rank)",
            )
        self.own = own
        self.layout = layout
        self.device = own.w_in.device
        self._group = group
        self._kernel = kernel_named(kernel)
        self._tables = SlotTables.of(layout, self.device)
        # Own slots, once for every rank that rows come from.
        self._every_slot = torch.arange(per_device, device=self.device).repeat(self.num_ranks)

    def __call__(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        clock: PartClock | None = None,
    ) -> torch.Tensor:
        """Returns the layer's output for this rank's tokens.

        Args:
            hidden: [T, d_model]; T may differ from rank to rank and may be 0.
            expert_ids: [T, k] ids over all experts of the layer; -1: not executed.
            weights: [T, k].
            clock: Takes the times of `PARTS`.

        Returns:
            [T, d_model] in the dtype of ``hidden``.

        Raises:
            UsageError: The tensors do not fit together or the experts, or lie elsewhere; some
                rank's ids are of no expert; or a gradient is wanted.
        """
        self._check(hidden, expert_ids, weights)
        if clock is not None:
            clock.begin()
        sent = self._send(hidden, expert_ids, clock)
        results = self.run(sent)
        _mark(clock, "experts")
        returned = self.send_back(results, sent)
        _mark(clock, "return")
        out = combine_rows(returned, sent.order, weights)
        _mark(clock, "combine")
        return out

    def send(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, *, clock: PartClock | None = None
    ) -> Sent:
        """Exchanges sizes, then rows.

        Args:
            hidden: [T, d_model].
            expert_ids: [T, k]; -1: not executed.
            clock: Takes the times of both exchanges.

        Raises:
            UsageError: As of a call.
        """
        self._check(hidden, expert_ids, None)
        return self._send(hidden, expert_ids, clock)

    def _check(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor | None
    ) -> None:
        check_dispatch(
            hidden,
            expert_ids,
            weights,
            d_model=self.own.d_model,
            dtype=self.own.w_in.dtype,
            device=self.device,
        )
        given = (hidden,) if weights is None else (hidden, weights)
        refuse_gradients(*given, *self.own.tensors(), what="expert parallelism")

    def _send(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, clock: PartClock | None
    ) -> Sent:
        plan, where = self.exchange_sizes(expert_ids)
        _mark(clock, "size_exchange")
        order = rows_by_expert(where, len(self.layout.expert))
        given = hidden.index_select(0, order.slots[: plan.num_sent] // expert_ids.shape[1])
        rows = hidden.new_empty(plan.num_received, hidden.shape[1])
        self._all_to_all(rows, given, plan.receive_splits, plan.send_splits)
        times = torch.from_numpy(plan.received.reshape(-1)).to(self.device)
        slots = torch.repeat_interleave(self._every_slot, times, output_size=plan.num_received)
        _mark(clock, "token_exchange")
        return Sent(order=order, plan=plan, rows=rows, slots=slots)

    def exchange_sizes(self, expert_ids: torch.Tensor) -> tuple[RankPlan, torch.Tensor]:
        """Tells every rank this rank's counts, waits for theirs, and plans.

        Without replicas, where rows go is found meanwhile.

        Args:
            expert_ids: [T, k]; -1: not executed.

        Returns:
            (the plan, slot of each row [T, k]).

        Raises:
            UsageError: Ids of some rank are of no expert: on all ranks, so that none is left
                waiting.
        """
        num_experts = self.layout.num_experts
        flat = expert_ids.reshape(-1).long()
        # Counted apart: below -1, -1, then the experts, then what is too high.
        counts = torch.zeros(num_experts + 3, dtype=torch.int64, device=self.device)
        counts.scatter_add_(0, flat.clamp(-2, num_experts) + 2, torch.ones_like(flat))
        mine = counts.expand(self.num_ranks, -1).contiguous()
        every = torch.empty_like(mine)
        work = dist.all_to_all_single(every, mine, group=self._group, async_op=True)
        # A table read past its end would stop the device before the host can say why.
        known = flat.clamp(max=num_experts - 1).view(expert_ids.shape)
        where = None if self._tables.is_replicated else slot_ids(known, self._tables)
        work.wait()
        if where is None:
            where = slot_ids(known, self._tables, every[: self.rank, 2:-1].sum(dim=0))
        rows = every.cpu().numpy()
        self._refuse_unknown(rows[:, 0] + rows[:, -1])
        return rank_plan(rows[:, 2:-1], self.layout, self.rank), where

    def _refuse_unknown(self, num_unknown: Ints) -> None:
        """Refuses ids that are of no expert.

        Args:
            num_unknown: [ranks] how many each rank has.
        """
        ranks = np.flatnonzero(num_unknown)
        if len(ranks):
            raise UsageError(
                f"{int(num_unknown.sum())} ids on rank {', '.join(map(str, ranks))} are of no"
                f" expert: the layer has {self.layout.num_experts}",
                hint=f"ids run from 0 to {self.layout.num_experts - 1}; -1 is not executed",
            )

    def run(self, sent: Sent) -> torch.Tensor:
        """Returns [received, d_model] what the own experts make of the rows that came."""
        if not sent.plan.num_received:
            return torch.empty_like(sent.rows)
        ones = torch.ones(sent.plan.num_received, 1, device=self.device)
        return self._kernel(sent.rows, sent.slots[:, None], ones, self.own)

    def send_back(self, results: torch.Tensor, sent: Sent) -> torch.Tensor:
        """Returns [T * k, d_model] this rank's rows in the order of ``sent.order``.

        Rows of slots that are not executed come last and hold anything.
        """
        returned = results.new_empty(sent.order.slots.numel(), results.shape[1])
        mine = returned[: sent.plan.num_sent]
        self._all_to_all(mine, results, sent.plan.send_splits, sent.plan.receive_splits)
        return returned

    def _all_to_all(
        self, received: torch.Tensor, given: torch.Tensor, came: list[int], went: list[int]
    ) -> None:
        # As bytes: not every backend knows every dtype.
        dist.all_to_all_single(
            received.view(torch.uint8),
            given.contiguous().view(torch.uint8),
            output_split_sizes=came,
            input_split_sizes=went,
            group=self._group,
        )


def _mark(clock: PartClock | None, part: str) -> None:
    if clock is not None:
        clock.mark(part)
