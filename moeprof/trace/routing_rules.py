"""Rules on routing, applied to one stack and rank as it streams by.

Each block of whole steps is judged by vectorised rules; what must be compared with other tables
is summed per (step, site) and left to `validator`. Leaves out those comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeprof.trace import schema as spec
from moeprof.trace.problems import Problems
from moeprof.trace.schema import SlotStatus

Array = np.ndarray[Any, Any]

MIN_FROZEN_TOKENS = 32
"""Tokens with one and the same expert set from which a site counts as frozen."""

MIN_STALE_TOKENS = 16
"""Consecutive tokens of a sequence with the same ids and weights at every site."""

MIN_STALE_TOKENS_WITHOUT_WEIGHTS = 32

WEIGHT_TOLERANCE = 0.01
"""Relative; covers weights computed in bfloat16 and rounded to float16."""

_DENSE_COUNTS = 1 << 23
_PRUNED, _EXITED = SlotStatus.PRUNED_LAST_LAYER, SlotStatus.EARLY_EXIT
_PREFILL = spec.TOKEN_PHASES.index("prefill")
_DECODE = spec.TOKEN_PHASES.index("decode")


@dataclass(frozen=True)
class SiteCounts:
    """What one stack and rank routed, per step and site [step, site].

    Attributes:
        steps: Step numbers, increasing.
        num_tokens: Tokens per step.
        num_prefill: Prefill tokens per step.
        num_decode: Decode tokens per step.
        seen: Tokens the site saw.
        routed: Decisions applied.
        dropped: Decisions dropped by capacity.
        active: Distinct experts applied.
        busiest: Decisions applied by the busiest expert.
    """

    steps: Array
    num_tokens: Array
    num_prefill: Array
    num_decode: Array
    seen: Array
    routed: Array
    dropped: Array
    active: Array
    busiest: Array


class RoutingRules:
    """Judges the routing of one stack and rank; feed it blocks of whole steps in order.

    Args:
        problems: Where findings go.
        stack: The stack.
        sites: Its sites in order of execution.
        rank: The rank.
        weighted: True where the blocks hold weights.
        label: Added to places in messages, such as `` on rank 1``.
    """

    def __init__(
        self,
        problems: Problems,
        *,
        stack: str,
        sites: Sequence[spec.Site],
        rank: int,
        weighted: bool,
        label: str,
    ) -> None:
        self._problems = problems
        self._table = f"routing/{stack}"
        self._stack = stack
        self._sites = sites
        self._rank = rank
        self._weighted = weighted
        self._label = label
        rng = np.random.default_rng(0)
        widest = max(site.top_k for site in sites)
        self._slot_keys = rng.integers(1, 1 << 62, widest) | 1
        self._site_keys = rng.integers(1, 1 << 62, len(sites)) | 1
        self._frozen = [
            {phase: _Frozen() for phase in range(len(spec.TOKEN_PHASES))} for _ in sites
        ]
        self._digests = np.zeros(len(sites), np.int64)
        self._weight_peaks = np.zeros(len(sites))
        self._num_weighed = np.zeros(len(sites), np.int64)
        self._counts: list[SiteCounts] = []
        self._last_step: tuple[int, int] | None = None
        self._sequences = _Sequences()
        self.num_tokens = 0

    def feed(self, rows: Mapping[str, Array]) -> None:
        """Judges a block of whole steps.

        Args:
            rows: Columns as in `blocks.stream_rows`, with ``row``, ``parent_sequence`` and
                ``accepted``.
        """
        self.num_tokens += len(rows["step"])
        starts = np.flatnonzero(np.diff(rows["step"], prepend=-1))
        of_token = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(rows["step"]))))
        self._check_rows(rows)
        self._check_positions(rows)
        hashes = np.zeros((len(rows["step"]), len(self._sites)), np.int64)
        kinds = np.zeros((len(rows["step"]), len(self._sites)), np.uint8)
        sums = []
        for index, site in enumerate(self._sites):
            slots = slice(site.first_slot, site.first_slot + site.top_k)
            expert, status = rows["expert"][:, slots], rows["status"][:, slots]
            self._check_ids(rows, site, expert, status)
            kinds[:, index] = self._token_kinds(rows, site, status)
            if self._weighted:
                self._check_weights(rows, index, status, rows["weight"][:, slots])
            hashes[:, index] = expert.astype(np.int64) @ self._slot_keys[: site.top_k]
            sums.append(_site_sums(site, expert, status, of_token, len(starts)))
        self._check_unseen(rows, kinds)
        self._check_repetition(rows, hashes, starts)
        self._note_frozen(rows, hashes, kinds)
        phases = rows["phase"]
        self._counts.append(
            SiteCounts(
                steps=rows["step"][starts],
                num_tokens=np.bincount(of_token, minlength=len(starts)),
                num_prefill=np.bincount(of_token[phases == _PREFILL], minlength=len(starts)),
                num_decode=np.bincount(of_token[phases == _DECODE], minlength=len(starts)),
                **{
                    name: np.stack([each[name] for each in sums], axis=1)
                    for name in ("seen", "routed", "dropped", "active", "busiest")
                },
            )
        )

    def finish(self) -> SiteCounts | None:
        """Judges what needs all blocks; returns the sums, None where no row was fed."""
        if not self._counts:
            return None
        for index, site in enumerate(self._sites):
            where = self._where(site)
            for phase, frozen in self._frozen[index].items():
                if frozen.is_constant and site.num_experts > site.top_k:
                    collapsed = site.top_k == 1 and frozen.weights_vary
                    self._problems.add(
                        "frozen_site",
                        "{where}: all {count} "
                        f"{spec.TOKEN_PHASES[phase]} tokens carry the same experts, "
                        + (
                            "with different weights: its router may have collapsed"
                            if collapsed
                            else "as a capture that failed does"
                        ),
                        severity="warning" if collapsed else "error",
                        table=self._table,
                        where=where,
                        count=frozen.num_tokens,
                    )
            if self._num_weighed[index] and self._weight_peaks[index] == 0:
                self._problems.add(
                    "zero_weights",
                    "{where}: the weights of all {count} decisions are 0",
                    table=self._table,
                    where=where,
                    count=int(self._num_weighed[index]),
                )
        self._check_doubled_sites()
        return SiteCounts(
            **{
                name: np.concatenate([getattr(counts, name) for counts in self._counts])
                for name in SiteCounts.__dataclass_fields__
            }
        )

    def _where(self, site: spec.Site) -> str:
        return f"site {site.site} ({self._stack} layer {site.layer}){self._label}"

    def _add(
        self,
        code: str,
        sentence: str,
        bad: Array,
        rows: Mapping[str, Array],
        *,
        where: str = "",
        severity: str = "error",
    ) -> None:
        """Adds a finding for the tokens (or tokens x slots) marked in ``bad``."""
        if not bad.any():
            return
        token = int(np.flatnonzero(bad.any(axis=1) if bad.ndim > 1 else bad)[0])
        self._problems.add(
            code,
            sentence,
            severity=severity,
            table=self._table,
            where=where or f"{self._stack}{self._label}",
            count=int(np.count_nonzero(bad)),
            first=_place(rows, token),
        )

    def _check_rows(self, rows: Mapping[str, Array]) -> None:
        key = (rows["step"].astype(np.int64) << 32) | rows["row"]
        order = np.argsort(key, kind="stable")
        self._add(
            "doubled_row",
            "{where}: {count} rows repeat the (step, row) of another (first: {first})",
            _repeats(key[order], order),
            rows,
        )

    def _check_positions(self, rows: Mapping[str, Array]) -> None:
        self._add(
            "negative_position",
            "{where}: {count} tokens have a negative position, as padding does (first: {first})",
            rows["position"] < 0,
            rows,
        )
        found = self._sequences.feed(rows)
        self._add(
            "doubled_token",
            "{where}: {count} tokens are recorded twice in one step (first: {first})",
            found["doubled"],
            rows,
        )
        self._add(
            "repeated_position",
            "{where}: {count} tokens come again in a later step, as without a cache "
            "(first: {first})",
            found["repeated"],
            rows,
            severity="warning",
        )
        self._add(
            "position_gap",
            "{where}: {count} tokens do not continue their sequence: the token before is missing "
            "(first: {first})",
            found["gap"],
            rows,
        )
        self._add(
            "late_start",
            "{where}: {count} requests start after position 0, as with a prefix cache "
            "(first: {first})",
            found["late"],
            rows,
            severity="warning",
        )

    def _check_ids(
        self, rows: Mapping[str, Array], site: spec.Site, expert: Array, status: Array
    ) -> None:
        where = self._where(site)
        chosen = status <= SlotStatus.DROPPED
        self._add(
            "unknown_status",
            "{where}: {count} slots have a status that does not exist (first: {first})",
            status > max(SlotStatus),
            rows,
            where=where,
        )
        self._add(
            "routed_without_expert",
            "{where}: {count} slots are marked as routed and hold no expert (first: {first})",
            chosen & (expert == spec.NO_EXPERT),
            rows,
            where=where,
        )
        self._add(
            "expert_out_of_range",
            "{where}: {count} slots name an expert outside 0.."
            f"{site.num_experts - 1}"
            " (first: {first})",
            (expert >= site.num_experts) | (expert < spec.NO_EXPERT),
            rows,
            where=where,
        )
        self._add(
            "expert_without_routing",
            "{where}: {count} slots hold an expert though their status says that none was chosen "
            "(first: {first})",
            ~chosen & (expert >= 0),
            rows,
            where=where,
        )
        if site.top_k > 1:
            ordered = np.sort(expert, axis=1)
            self._add(
                "repeated_expert",
                "{where}: {count} tokens name an expert twice (first: {first})",
                ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1),
                rows,
                where=where,
            )

    def _token_kinds(self, rows: Mapping[str, Array], site: spec.Site, status: Array) -> Array:
        """Returns per token 0 (seen), or the status of all its slots where it was not seen."""
        first = status[:, 0]
        if not status.any():
            return np.zeros(len(status), np.uint8)
        same = (status == first[:, None]).all(axis=1)
        unseen = np.isin(status, (_PRUNED, _EXITED))
        where = self._where(site)
        self._add(
            "status_mixed",
            "{where}: {count} tokens are seen in one slot and unseen in another (first: {first})",
            unseen.any(axis=1) & ~same,
            rows,
            where=where,
        )
        self._add(
            "token_missing",
            "{where}: {count} tokens of its steps have no expert there though other sites saw "
            "them (first: {first})",
            same & (first == SlotStatus.UNUSED),
            rows,
            where=where,
        )
        return np.where(same & unseen[:, 0], first, 0).astype(np.uint8)

    def _check_unseen(self, rows: Mapping[str, Array], kinds: Array) -> None:
        if not kinds.any():
            return
        pruned, exited = kinds == _PRUNED, kinds == _EXITED
        for index, site in enumerate(self._sites[:-1]):
            self._add(
                "token_missing",
                "{where}: {count} tokens are marked as pruned before the last layer "
                "(first: {first})",
                pruned[:, index],
                rows,
                where=self._where(site),
            )
        last = pruned[:, -1]
        where = self._where(self._sites[-1])
        self._add(
            "token_missing",
            "{where}: {count} tokens are missing that are no prompt tokens before the last one "
            "(first: {first})",
            last & ((rows["phase"] != _PREFILL) | ~_precedes_seen(rows, last)),
            rows,
            where=where,
        )
        for index, site in enumerate(self._sites[1:], start=1):
            self._add(
                "exit_not_final",
                "{where}: {count} tokens are seen again after they left the model early "
                "(first: {first})",
                exited[:, index - 1] & ~exited[:, index] & ~pruned[:, index],
                rows,
                where=self._where(site),
            )

    def _check_weights(
        self, rows: Mapping[str, Array], index: int, status: Array, weight: Array
    ) -> None:
        site = self._sites[index]
        where = self._where(site)
        routed = status == SlotStatus.ROUTED
        finite = np.isfinite(weight)
        self._add(
            "weight_not_finite",
            "{where}: {count} weights are NaN or infinite (first: {first})",
            ~finite,
            rows,
            where=where,
        )
        self._add(
            "weight_without_routing",
            "{where}: {count} slots that were not routed carry a weight (first: {first})",
            ~routed & finite & (weight != 0),
            rows,
            where=where,
        )
        whole = routed.all(axis=1) & finite.all(axis=1)
        self._num_weighed[index] += np.count_nonzero(routed)
        applied = np.where(routed & finite, weight, 0)
        self._weight_peaks[index] = max(self._weight_peaks[index], np.abs(applied).max(initial=0))
        self._check_weight_sums(rows, site, applied.sum(axis=1, dtype=np.float32), whole)
        if site.slot_order == "by_weight" and site.top_k > 1:
            rising = (applied[:, 1:] > applied[:, :-1]) & routed[:, 1:] & routed[:, :-1]
            self._add(
                "slots_out_of_order",
                "{where}: {count} tokens have slots that are not in order of weight, as stated "
                "(first: {first})",
                rising.any(axis=1),
                rows,
                where=where,
            )

    def _check_weight_sums(
        self, rows: Mapping[str, Array], site: spec.Site, total: Array, whole: Array
    ) -> None:
        scale = 1.0 if site.scaling_factor is None else site.scaling_factor
        slack = WEIGHT_TOLERANCE * abs(scale)
        if site.renormalized and site.scaling_factor is not None:
            self._add(
                "weight_sum",
                "{where}: the weights of {count} tokens do not sum to "
                f"{scale:g}, as stated (first: {{first}})",
                whole & (np.abs(total - scale) > slack),
                rows,
                where=self._where(site),
            )
        elif site.scoring == "softmax" and site.scaling_factor is not None:
            self._add(
                "weight_sum",
                "{where}: the weights of {count} tokens sum to more than "
                f"{scale:g}, which softmax weights cannot (first: {{first}})",
                whole & (total > scale + slack),
                rows,
                where=self._where(site),
            )

    def _check_repetition(self, rows: Mapping[str, Array], hashes: Array, starts: Array) -> None:
        """Finds steps that repeat the step before, and sequences whose rows froze."""
        content = hashes @ self._site_keys
        token = (rows["position"].astype(np.int64) << 24) ^ (
            rows["request"].astype(np.int64) * 1_000_003 + rows["sequence"]
        )
        mixed = (content ^ (token * int(self._site_keys[0]))) * (
            2 * rows["row"].astype(np.int64) + 1
        )
        digests = np.add.reduceat(mixed, starts).tolist()
        sizes = np.diff(np.append(starts, len(content))).tolist()
        signatures = list(zip(digests, sizes, strict=True))
        before = [self._last_step, *signatures[:-1]]
        same = np.array([now == then for now, then in zip(signatures, before, strict=True)])
        self._last_step = signatures[-1]
        doubled = np.zeros(len(content), bool)
        doubled[starts[same]] = True
        self._add(
            "doubled_step",
            "{where}: {count} steps repeat the step before row by row, as a stage that was "
            "recorded twice (first: {first})",
            doubled,
            rows,
        )
        self._check_stale(rows, content)
        weights = _mix(token + rows["step"])
        self._digests += (hashes * weights[:, None]).sum(axis=0)

    def _check_stale(self, rows: Mapping[str, Array], content: Array) -> None:
        order = np.lexsort((rows["position"], rows["step"], rows["sequence"], rows["request"]))
        same = np.zeros(len(content), bool)
        same[1:] = content[order[1:]] == content[order[:-1]]
        for name in ("request", "sequence"):
            same[1:] &= rows[name][order[1:]] == rows[name][order[:-1]]
        same[1:] &= rows["position"][order[1:]] > rows["position"][order[:-1]]
        telling = np.zeros(len(content), bool)
        if self._weighted:
            again = np.flatnonzero(same)
            weight = rows["weight"][order[again]]
            same[again] = (weight == rows["weight"][order[again - 1]]).all(axis=1)
            telling[again] = same[again] & (weight.max(axis=1) != weight.min(axis=1))
        sentence = (
            "{where}: {count} tokens repeat the routing of the token before them at every site, "
            "as rows that were never overwritten do (first: {first})"
        )
        stale = np.zeros(len(content), bool)
        stale[order] = _in_long_runs(telling, MIN_STALE_TOKENS - 1)
        self._add("stale_rows", sentence, stale, rows)
        if not stale.any():
            stale[order] = _in_long_runs(same, MIN_STALE_TOKENS_WITHOUT_WEIGHTS - 1)
            self._add("stale_rows", sentence, stale, rows, severity="warning")

    def _note_frozen(self, rows: Mapping[str, Array], hashes: Array, kinds: Array) -> None:
        for phase in np.flatnonzero(np.bincount(rows["phase"])).tolist():
            of_phase = rows["phase"] == phase
            for index in range(len(self._sites)):
                frozen = self._frozen[index][phase]
                if not frozen.varies:
                    seen = of_phase & (kinds[:, index] == 0)
                    slot = self._sites[index].first_slot
                    weights = rows["weight"][seen, slot] if self._weighted else hashes[:0, 0]
                    frozen.feed(hashes[seen, index], weights)

    def _check_doubled_sites(self) -> None:
        if self.num_tokens < MIN_FROZEN_TOKENS:
            return
        seen: dict[tuple[int, int, int], spec.Site] = {}
        for site, digest in zip(self._sites, self._digests.tolist(), strict=True):
            key = (site.num_experts, site.top_k, digest)
            twin = seen.setdefault(key, site)
            if twin is not site and site.num_experts > site.top_k:
                self._problems.add(
                    "doubled_site",
                    f"{{where}} repeats site {twin.site} token by token: one of them was captured "
                    "in place of the other",
                    table=self._table,
                    where=self._where(site),
                )


@dataclass
class _Frozen:
    """Whether all expert sets seen so far are one and the same."""

    num_tokens: int = 0
    value: int = 0
    varies: bool = False
    weight: float | None = None
    weights_vary: bool = False

    @property
    def is_constant(self) -> bool:
        return not self.varies and self.num_tokens >= MIN_FROZEN_TOKENS

    def feed(self, hashes: Array, weights: Array) -> None:
        """Takes the hashes of more expert sets, and the weights of their first slots."""
        if not len(hashes):
            return
        if len(weights):
            self.weight = float(weights[0]) if self.weight is None else self.weight
            self.weights_vary = self.weights_vary or bool((weights != self.weight).any())
        if not self.num_tokens:
            self.value = int(hashes[0])
        self.num_tokens += len(hashes)
        self.varies = bool((hashes != self.value).any())


class _Sequences:
    """Follows positions along sequences, across blocks."""

    def __init__(self) -> None:
        self._keys = np.zeros(0, np.int64)
        self._last = np.zeros(0, np.int64)

    def feed(self, rows: Mapping[str, Array]) -> dict[str, Array]:
        """Returns per token: doubled, repeated, gap, late."""
        num_tokens = len(rows["step"])
        found = {
            name: np.zeros(num_tokens, bool) for name in ("doubled", "repeated", "gap", "late")
        }
        kept = np.flatnonzero(rows["accepted"].astype(bool) & (rows["position"] >= 0))
        if not len(kept):
            return found
        request = rows["request"][kept].astype(np.int64)
        position = rows["position"][kept].astype(np.int64)
        own = _sequence_key(request, rows["sequence"][kept])
        parent = _sequence_key(request, rows["parent_sequence"][kept])
        keys, inverse = np.unique(np.concatenate([own, parent, self._keys]), return_inverse=True)
        own_id, parent_id = inverse[: len(kept)], inverse[len(kept) : 2 * len(kept)]
        known = inverse[2 * len(kept) :]
        last = np.full(len(keys), -1, np.int64)
        last[known] = self._last
        at = (own_id << 32) | position
        order = np.argsort(at, kind="stable")
        doubled, repeated = _repeated(at, order, rows["step"][kept])
        found["doubled"][kept] = doubled
        found["repeated"][kept] = repeated | (position <= last[own_id])
        continues = position == 0
        continues[order[1:]] |= np.diff(at[order]) == 1
        continues |= last[own_id] == position - 1
        continues &= own_id == parent_id
        moved = np.flatnonzero(~continues & (position > 0))
        before = (parent_id[moved] << 32) | (position[moved] - 1)
        continues[moved] = np.isin(before, np.concatenate([at, (known << 32) | self._last]))
        continues |= position == 0
        open_ends = np.flatnonzero(~continues)
        if len(open_ends):
            fresh = self._starts(open_ends, own_id, position, last)
            sibling = self._has_sibling(open_ends[fresh], request, position)
            bad = np.ones(len(open_ends), bool)
            bad[np.flatnonzero(fresh)[sibling]] = False
            first = self._first_of_request(open_ends, request, position)
            found["late"][kept[open_ends[bad & first]]] = True
            found["gap"][kept[open_ends[bad & ~first]]] = True
        order = np.argsort(own_id, kind="stable")
        ends = np.flatnonzero(np.diff(own_id[order], append=-1))
        last[own_id[order[ends]]] = position[order[ends]]
        present = last >= 0
        self._keys, self._last = keys[present], last[present]
        return found

    @staticmethod
    def _starts(open_ends: Array, own_id: Array, position: Array, last: Array) -> Array:
        """Returns True for tokens that begin their sequence."""
        lowest = np.full(len(last), np.iinfo(np.int64).max)
        np.minimum.at(lowest, own_id, position)
        own = own_id[open_ends]
        begins: Array = (last[own] < 0) & (position[open_ends] == lowest[own])
        return begins

    def _has_sibling(self, tokens: Array, request: Array, position: Array) -> Array:
        """Returns True where any sequence of the request holds the position before."""
        before = (request[tokens] << 32) | (position[tokens] - 1)
        known = (_request_of(self._keys) << 32) | self._last
        return np.isin(before, np.concatenate([(request << 32) | position, known]))

    def _first_of_request(self, tokens: Array, request: Array, position: Array) -> Array:
        """Returns True for the lowest token of a request that was not seen before."""
        names, inverse = np.unique(request, return_inverse=True)
        lowest = np.full(len(names), np.iinfo(np.int64).max)
        np.minimum.at(lowest, inverse, position)
        new = ~np.isin(names, _request_of(self._keys))
        index = inverse[tokens]
        first: Array = new[index] & (position[tokens] == lowest[index])
        return first


def _repeated(at: Array, order: Array, step: Array) -> tuple[Array, Array]:
    """Returns True for tokens that come again in the same step, and in a later one.

    Args:
        at: Sequence and position in one number.
        order: Stable order by ``at``.
        step: Step.
    """
    doubled, repeated = np.zeros(len(order), bool), np.zeros(len(order), bool)
    same = np.diff(at[order]) == 0
    if same.any():
        at_once = same & (np.diff(step[order]) == 0)
        doubled[order[1:]] = at_once
        repeated[order[1:]] = same & ~at_once
    return doubled, repeated


def _sequence_key(request: Array, sequence: Array) -> Array:
    return (request << 16) | (sequence.astype(np.int64) & 0xFFFF)


def _request_of(keys: Array) -> Array:
    return keys >> 16


def _site_sums(
    site: spec.Site, expert: Array, status: Array, of_token: Array, num_steps: int
) -> dict[str, Array]:
    """Returns what a site did in each step of a block."""
    routed = (status == SlotStatus.ROUTED) & (expert >= 0) & (expert < site.num_experts)
    unseen = np.isin(status, (_PRUNED, _EXITED)).all(axis=1)
    key = (of_token[:, None] * site.num_experts + expert)[routed]
    sums = {
        "seen": np.bincount(of_token[~unseen], minlength=num_steps),
        "routed": _per_step(of_token, routed, num_steps),
        "dropped": _per_step(of_token, status == SlotStatus.DROPPED, num_steps),
    }
    if num_steps * site.num_experts <= max(_DENSE_COUNTS, 4 * key.size):
        counts = np.bincount(key, minlength=num_steps * site.num_experts)
        table = counts.reshape(num_steps, site.num_experts)
        sums["active"] = np.count_nonzero(table, axis=1)
        sums["busiest"] = table.max(axis=1)
        return sums
    cells, counts = np.unique(key, return_counts=True)
    step = cells // site.num_experts
    busiest = np.zeros(num_steps, np.int64)
    np.maximum.at(busiest, step, counts)
    return {**sums, "active": np.bincount(step, minlength=num_steps), "busiest": busiest}


def _per_step(of_token: Array, chosen: Array, num_steps: int) -> Array:
    if not chosen.any():
        return np.zeros(num_steps, np.int64)
    counts = np.bincount(of_token, weights=np.count_nonzero(chosen, axis=1), minlength=num_steps)
    return counts.astype(np.int64)


def _precedes_seen(rows: Mapping[str, Array], unseen: Array) -> Array:
    """Returns True for prompt tokens that come before every seen one of their sequence and step.

    A sequence whose prompt tokens are all unseen has no such token at its end: its last is judged
    missing.
    """
    prompt = np.flatnonzero(rows["phase"] == _PREFILL)
    names = ("position", "sequence", "request", "step")
    order = prompt[np.lexsort([rows[name][prompt] for name in names])]
    starts_group = np.ones(len(order), bool)
    starts_group[1:] = False
    for name in names[1:]:
        starts_group[1:] |= np.diff(rows[name][order]) != 0
    group = np.cumsum(starts_group) - 1
    num_groups = int(group[-1]) + 1 if len(group) else 0
    place = np.arange(len(order))
    last = np.zeros(num_groups, np.int64)
    last[group] = place
    first_seen = last.copy()
    seen = ~unseen[order]
    np.minimum.at(first_seen, group[seen], place[seen])
    before = np.zeros(len(unseen), bool)
    before[order] = place < first_seen[group]
    return before


def _repeats(ordered: Array, order: Array) -> Array:
    """Returns True for elements equal to the one before them in ``order``."""
    found = np.zeros(len(order), bool)
    found[order[1:][ordered[1:] == ordered[:-1]]] = True
    return found


def _in_long_runs(same: Array, least: int) -> Array:
    """Returns True for the elements of runs of at least ``least`` True values."""
    padded = np.concatenate([[False], same, [False]])
    edges = np.flatnonzero(np.diff(padded.astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    keep = ends - starts >= least
    marks = np.zeros(len(same) + 1, np.int64)
    np.add.at(marks, starts[keep], 1)
    np.add.at(marks, ends[keep], -1)
    found: Array = np.cumsum(marks[:-1]) > 0
    return found


def _mix(values: Array) -> Array:
    """Returns well-spread odd numbers for ``values`` (splitmix64)."""
    mixed = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Array = ((mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)).view(np.int64)
    return result


def _place(rows: Mapping[str, Array], token: int) -> str:
    return (
        f"step {rows['step'][token]}, request {rows['request'][token]}, "
        f"position {rows['position'][token]}"
    )
