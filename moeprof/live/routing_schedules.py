"""Routing on a device, for runners that call layers themselves: nothing is uploaded in a step.

Every pass lies on the device before the first one runs; passes are views, and for CUDA graphs
they are copied into buffers that stay where they are. Leaves out whole models (`forcing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from moeprof.errors import UsageError
from moeprof.live.routing_sources import Routing, RoutingSource, SiteRouting, read_routing
from moeprof.trace.reader import Trace
from moeprof.trace.schema import NO_EXPERT


class Dispatched(NamedTuple):
    """What one site computes with in one pass.

    Attributes:
        expert_ids: [T, k] int, -1 in slots that are not executed.
        weights: [T, k], 0 in slots that are not executed.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceRouting:
    """The passes of one stack on a device; ``routing[step][site]`` is a `Dispatched`.

    Taking a pass makes views on the host and nothing on the device; a timed loop takes them
    beforehand: ``passes = list(routing)``.

    Attributes:
        expert_ids: [sites, tokens, k] all passes one after another. Tokens that a site did not
            see, and slots beyond a site's own k, hold -1.
        weights: [sites, tokens, k].
        starts: First token of each pass, and the end of the last.
        phases: Phase of each pass.
        num_experts: Experts of each site.
        source: Where the routing comes from.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    starts: tuple[int, ...]
    phases: tuple[str, ...]
    num_experts: tuple[int, ...]
    source: RoutingSource

    def __len__(self) -> int:
        return len(self.phases)

    def __getitem__(self, step: int) -> tuple[Dispatched, ...]:
        ids, weights = self.step_tensors(step)
        return tuple(map(Dispatched, ids.unbind(0), weights.unbind(0)))

    def __iter__(self) -> Iterator[tuple[Dispatched, ...]]:
        return (self[step] for step in range(len(self)))

    @property
    def num_sites(self) -> int:
        """Sites."""
        return self.expert_ids.shape[0]

    @property
    def top_k(self) -> int:
        """Slots per token."""
        return self.expert_ids.shape[2]

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Tokens of each pass."""
        return tuple(np.diff(self.starts).tolist())

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest pass."""
        return max(self.num_tokens, default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in (self.expert_ids, self.weights))

    def step_tensors(self, step: int) -> Dispatched:
        """Returns the ids and weights of all sites in one pass, [sites, T, k] each.

        Raises:
            IndexError: There is no such pass.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"there are {len(self)} passes, no pass {step}")
        rows = slice(self.starts[step], self.starts[step + 1])
        return Dispatched(self.expert_ids[:, rows], self.weights[:, rows])

    def buffers(self, num_tokens: int | None = None) -> RoutingBuffers:
        """Returns empty buffers.

        Args:
            num_tokens: Tokens they have room for; those of the largest pass when None.
        """
        rows = self.max_tokens if num_tokens is None else num_tokens
        shape = (self.num_sites, rows, self.top_k)
        return RoutingBuffers(
            routing=self,
            expert_ids=self.expert_ids.new_full(shape, NO_EXPERT),
            weights=self.weights.new_zeros(shape),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingBuffers:
    """Tensors of fixed size and address that a captured graph reads.

    Load a pass, then replay: ``buffers.load(step); graph.replay()``.

    Attributes:
        routing: The passes.
        expert_ids: [sites, T, k] the pass loaded last; -1 beyond its tokens.
        weights: [sites, T, k], 0 beyond its tokens.
    """

    routing: DeviceRouting
    expert_ids: torch.Tensor
    weights: torch.Tensor

    def load(self, step: int) -> int:
        """Copies a pass in, on the device and without waiting; returns its number of tokens.

        Raises:
            UsageError: The pass has more tokens than the buffers.
        """
        ids, weights = self.routing.step_tensors(step)
        rows, room = ids.shape[1], self.expert_ids.shape[1]
        if rows > room:
            raise UsageError(
                f"pass {step} has {rows} tokens, the buffers hold {room}",
                hint="make them larger: routing.buffers(num_tokens)",
            )
        self.expert_ids[:, :rows].copy_(ids)
        self.weights[:, :rows].copy_(weights)
        if rows < room:
            self.expert_ids[:, rows:].fill_(NO_EXPERT)
            self.weights[:, rows:].zero_()
        return int(rows)

    def site(self, index: int) -> Dispatched:
        """Returns the buffers of one site, [T, k] each: always the same memory."""
        return Dispatched(self.expert_ids[index], self.weights[index])


def routing_of(
    routing: Trace | Routing,
    *,
    stack: str | None = None,
    sites: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int64,
) -> DeviceRouting:
    """Returns the passes of one stack on a device, everything uploaded.

    Args:
        routing: A trace, or what `read_routing` or a control made of one.
        stack: The stack; may be left out where there is one.
        sites: Site ids wanted, in the order in which layers run; a site may drive several layers,
            which the source then says. All when None.
        device: Where.
        dtype: Of weights.
        ids_dtype: Of expert ids.

    Raises:
        UsageError: There is no such stack or site.
    """
    host = routing if isinstance(routing, Routing) else read_routing(routing)
    own = host.stack(stack)
    known = {site.site: site for site in own.sites}
    chosen = list(own.sites) if sites is None else [_known(known, site) for site in sites]
    num_tokens, top_k = int(own.starts[-1]), max(site.top_k for site in chosen)
    ids = np.full((len(chosen), num_tokens, top_k), NO_EXPERT, np.int32)
    weights = np.zeros(ids.shape, np.float32)
    for index, site in enumerate(chosen):
        rows = slice(None) if site.tokens is None else site.tokens
        ids[index, rows, : site.top_k] = site.experts
        weights[index, rows, : site.top_k] = site.weights
    source = host.source
    if sites is not None:
        source = source.changed(f"layers driven by sites {', '.join(map(str, sites))}")
    if len(host.stacks) > 1:
        source = source.changed(f"{own.stack} only")
    return DeviceRouting(
        expert_ids=torch.from_numpy(ids).to(device=device, dtype=ids_dtype),
        weights=torch.from_numpy(weights).to(device=device, dtype=dtype),
        starts=tuple(own.starts.tolist()),
        phases=own.phases,
        num_experts=tuple(site.num_experts for site in chosen),
        source=source,
    )


def _known(known: dict[int, SiteRouting], site: int) -> SiteRouting:
    if site not in known:
        raise UsageError(
            f"this routing has no site {site}", hint=f"it has: {', '.join(map(str, known))}"
        )
    return known[site]
