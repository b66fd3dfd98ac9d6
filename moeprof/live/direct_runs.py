"""Asks for the dispatches of an expert buffer from compiled code, where nothing is left to Python.

Between learning what the router chose and the last launch there is one call that decides
(`moeprof.replay.cache.decisions`) and one that asks (`direct_dispatch`). Experts that the host
computes stay with `ExpertBuffer`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from moeprof.errors import MoeprofError
from moeprof.live.device_copies import check_driver
from moeprof.live.direct_dispatch import (
    LOST,
    TURNS,
    DirectSlots,
    combine,
    copy_ahead,
    execute,
    learn,
    take_all,
)
from moeprof.live.direct_launches import Launches
from moeprof.live.expert_store import ALIGNMENT_BYTES
from moeprof.replay.cache.decisions import (
    EXPERT,
    NUM_EXPERTS,
    NUM_ON_HOST,
    ON_HOST,
    Decision,
    empty_decision,
)
from moeprof.replay.compiled import bare

if TYPE_CHECKING:
    from moeprof.live.kernels.streamed import StreamedDispatch
    from moeprof.live.transfers import Transfers
    from moeprof.replay.cache.decisions import CompiledResidency

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]

_POOL = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidentSite:
    """A site whose experts all lie on the device.

    Attributes:
        num_experts: Experts.
        slots: A slot for each; nothing is ever copied into one.
    """

    num_experts: int
    slots: DirectSlots


class DirectRuns:
    """The dispatches of a buffer, asked for from compiled code.

    Args:
        driver: From `moeprof.live.driver_calls.driver_functions`.
        most_site: Largest site id.
        most_experts: Of any site.
        residency: What decides; None where all experts lie on the device.
        transfers: Their slots; None where nothing is copied.
    """

    def __init__(
        self,
        *,
        driver: Int64s,
        most_site: int,
        most_experts: int,
        residency: CompiledResidency | None,
        transfers: Transfers | None,
    ) -> None:
        self._driver = driver
        self._residency = residency
        self._transfers = transfers
        self._blocks = np.zeros((most_site + 1, 3), np.int64)
        self._resident: dict[int, ResidentSite] = {}
        self._turn = 0
        # Compiled now, not within the first dispatch that needs them.
        self._learn, self._execute, self._combine = bare(learn), bare(execute), bare(combine)
        self._take_all, self._copy_ahead = bare(take_all), bare(copy_ahead)
        self.decision: Decision = (
            empty_decision(most_experts) if residency is None else residency.decision
        )

    def add(self, site: int, *, pool: torch.Tensor, memory: torch.Tensor, block_bytes: int) -> None:
        """Makes a site known whose experts are copied into slots.

        Args:
            site: Site id.
            pool: Memory of all its slots.
            memory: Its blocks in host memory, one behind the other.
            block_bytes: Of each.
        """
        self._blocks[site] = pool.untyped_storage().data_ptr(), memory.data_ptr(), block_bytes

    def add_resident(
        self, site: int, *, memory: torch.Tensor, block_bytes: int, num_experts: int
    ) -> None:
        """Makes a site known whose experts lie on the device, one behind the other."""
        self._blocks[site] = memory.untyped_storage().data_ptr(), 0, 0
        nobody = np.zeros(1, np.int64)
        first = memory.storage_offset()
        self._resident[site] = ResidentSite(
            num_experts=num_experts,
            slots=DirectSlots(
                address=np.zeros(num_experts, np.int64),
                offset=(
                    (first + block_bytes * np.arange(num_experts)) // ALIGNMENT_BYTES
                ).astype(np.int32),
                pending=np.zeros(num_experts, np.int64),
                is_read=np.zeros(num_experts, np.uint8),
                arrivals=nobody,
                marks=nobody,
                turns=np.zeros(3, np.int64),
            ),
        )  # fmt: skip

    def learn(self, streamed: StreamedDispatch, launches: Launches, stream: int) -> None:
        """Waits until the device has said which experts a dispatch has.

        Args:
            streamed: The dispatch.
            launches: Of it.
            stream: Handle of the stream of computations.

        Raises:
            MoeprofError: The driver refuses.
        """
        self._turn = self._turn % (TURNS - 1) + 1
        begun_s = time.perf_counter()
        error = self._learn(
            self._driver, launches.table, streamed.cells, stream, self._turn, streamed.num_ids,
            streamed.words_address, streamed.chosen,
        )  # fmt: skip
        streamed.wait_s += time.perf_counter() - begun_s
        streamed.num_waits += 1
        if error == LOST:
            raise MoeprofError(
                "the device has finished without saying which experts it chose",
                hint="run with CUDA_LAUNCH_BLOCKING=1 to see what failed",
            )
        check_driver(error)

    def decide(self, site: int, streamed: StreamedDispatch) -> int:
        """Decides what is done about the experts of a dispatch; see `decision`.

        Returns:
            Active experts.

        Raises:
            IndexError: There is no expert of some id; nothing was decided.
        """
        if self._residency is not None:
            return self._residency.decide(site, streamed.chosen, streamed.num_ids)
        own, place = self.decision, self._resident[site]
        count = self._take_all(
            streamed.chosen, streamed.num_ids, place.num_experts, own.columns, own.piece_starts,
            own.piece_places, own.copy_starts, own.counts,
        )  # fmt: skip
        if count < 0:
            raise IndexError(f"site {site} has {place.num_experts} experts")
        return count

    def on_host(self) -> list[int]:
        """Returns the experts of the dispatch that the host computes."""
        own = self.decision
        if not own.counts[NUM_ON_HOST]:
            return []
        active = own.columns[:, : own.counts[NUM_EXPERTS]]
        found: list[int] = active[EXPERT][active[ON_HOST] > 0].tolist()
        return found

    def run(
        self,
        site: int,
        streamed: StreamedDispatch,
        launches: Launches,
        stream: int,
        *,
        combines: bool,
    ) -> None:
        """Asks for the copies and pieces of a dispatch that was decided.

        Args:
            site: Site id.
            streamed: The dispatch.
            launches: Of it; ``out`` is in the cells.
            stream: Handle of the stream of computations.
            combines: Add the slots up as well: nothing else follows.

        Raises:
            MoeprofError: The driver refuses.
        """
        own, blocks = self.decision, self._blocks[site]
        slots, copies = self._slots_of(site)
        if self._is_blank:
            blocks = np.array([blocks[_POOL], 0, 0])
        check_driver(
            self._execute(
                self._driver, launches.table, streamed.cells, streamed.entries, own.columns,
                own.piece_starts, own.piece_places, own.copy_starts, own.copy_places, own.counts,
                slots.address, slots.offset, slots.pending, slots.is_read, slots.arrivals,
                slots.marks, slots.turns, blocks, stream, copies, int(combines),
            )
        )  # fmt: skip

    def copy_ahead(self, site: int) -> int:
        """Says what is copied ahead after a dispatch, and asks for it.

        Args:
            site: Site id; its dispatch was run, and its slots not yet added up.

        Returns:
            Copies.

        Raises:
            MoeprofError: The driver refuses.
        """
        assert self._residency is not None
        count = self._residency.foresee(site)
        slots, copies = self._slots_of(site)
        check_driver(
            self._copy_ahead(
                self._driver, self.decision.fetched, count, slots.address, slots.pending,
                slots.is_read, slots.arrivals, slots.turns,
                np.zeros_like(self._blocks) if self._is_blank else self._blocks, copies,
            )
        )  # fmt: skip
        return count

    @property
    def _is_blank(self) -> bool:
        return self._transfers is not None and self._transfers.is_blank

    def combine(self, launches: Launches, stream: int) -> None:
        """Adds the slots of a dispatch up."""
        check_driver(self._combine(self._driver, launches.table, stream))

    def _slots_of(self, site: int) -> tuple[DirectSlots, int]:
        if site in self._resident:
            return self._resident[site].slots, 0
        assert self._transfers is not None and self._transfers.direct is not None
        return self._transfers.direct, self._transfers.stream
