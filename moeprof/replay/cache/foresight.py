"""Which experts the next layer will look up, learned from what it looked up before.

The method. Experts of neighbouring layers are active together: for each site a matrix counts how
often expert b was active at the next site right after expert a was active here. The next site's
experts are ranked by the sum of those counts over the experts that are active now. It is the
family of prefetchers that need no second look at hidden rows: the activation matrices of
MoE-Infinity (arXiv 2401.14361) keep such counts per sequence and match them against past ones.
ProMoE (arXiv 2410.22134) trains a predictor on hidden rows, and the speculation of
mixtral-offloading (arXiv 2312.17238), HOBBIT (arXiv 2411.01433) and AdapMoE (arXiv 2408.10284)
applies the next layer's gate to the rows of this one.

Left out: rows and gate weights (an active expert counts once, however many tokens it has), layers
further ahead than the next, sequences (all of them teach the same counts), forgetting, and
training before the run. Counts start at nothing and learn as the run goes on, so that a replay
knows what a device would have known, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int32]
Ints = NDArray[np.intp]

_NOBODY: Ints = np.zeros(0, np.intp)


class Foresight:
    """Counts of experts that are active one after the other, for every site and its next.

    The site after the last of a stack is its first, in the next step. Dispatches without active
    experts are as if they had not been; where a pass skips a site, nothing is learned about it.

    Args:
        stacks: For each stack its sites in order of execution, with their number of experts.

    Attributes:
        stacks: As given.
    """

    def __init__(self, stacks: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.stacks = tuple(tuple(sites) for sites in stacks)
        self._next: dict[int, int] = {}
        self._stack: dict[int, int] = {}
        self._counts: dict[int, Counts] = {}
        for index, sites in enumerate(stacks):
            for (site, count), (after, others) in zip(sites, [*sites[1:], sites[0]], strict=True):
                self._next[site] = after
                self._stack[site] = index
                self._counts[site] = np.zeros((count, others), np.int32)
        self._last: dict[int, tuple[int, Ints]] = {}

    def reset(self) -> None:
        """Forgets everything."""
        for counts in self._counts.values():
            counts[:] = 0
        self._last.clear()

    def site_after(self, site: int) -> int:
        """Returns the site that is expected next."""
        return self._next[site]

    def learn(self, site: int, experts: Sequence[int]) -> None:
        """Takes the active experts of a dispatch.

        Args:
            site: The site.
            experts: Its active experts, each once; not empty.
        """
        active = np.array(experts, np.intp)
        stack = self._stack[site]
        before, earlier = self._last.get(stack, (None, _NOBODY))
        if before is not None and self._next[before] == site:
            counts = self._counts[before]
            # Flat, which is half the time of a row and a column.
            counts.reshape(-1)[earlier[:, None] * counts.shape[1] + active] += 1
        self._last[stack] = (site, active)

    def ranked(self, site: int) -> list[int]:
        """Returns experts of the next site, most likely first; ties: lower id.

        Only those that were active there after one of the experts that are active now.

        Args:
            site: Of the last dispatch of its stack.
        """
        known, active = self._last[self._stack[site]]
        assert known == site
        chosen = self._counts[site].take(active, axis=0)
        scores = np.add.reduce(chosen, axis=0, dtype=np.int32)
        (seen,) = scores.nonzero()
        found: list[int] = seen[(-scores[seen]).argsort(kind="stable")].tolist()
        return found
