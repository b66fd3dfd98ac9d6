"""One forward pass as the hooks saw it, and its translation into rows of a trace.

`StepCapture` holds references and host numbers only, so filling it never waits for a device.
`build_unit` runs later and reads them. Leaves out when either happens (`recorder`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moeprof.errors import CaptureError
from moeprof.recording.adapters import SlotTable
from moeprof.recording.anatomy import LayerParts
from moeprof.recording.execution import RowWitness
from moeprof.recording.memory import MemoryReading
from moeprof.recording.scoring import ScoringRule, affinity, infer_scoring
from moeprof.recording.sites import FoundSite
from moeprof.recording.timing import Clock
from moeprof.recording.tokens import Episode, TokenTable
from moeprof.trace.schema import NO_EXPERT, TOKEN_PHASES, Site, SlotStatus

LAYER_KEYS = ("layer", "attention", "dense_ffn")
SITE_KEYS = ("moe", "gate", "dispatch", "experts", "combine", "shared_experts")
STEP_KEYS = ("embedding", "head")
MATRIX_DIM = 2

SpanKey = tuple[str, int]
"""(component, index): a layer's position for `LAYER_KEYS`, a site id for `SITE_KEYS`."""


@dataclass
class StepCapture:
    """What the hooks kept of one forward pass.

    Attributes:
        step: Step number.
        stack: The stack that ran.
        episode: Whose tokens it held.
        new_episode: True on its first pass.
        shape: (rows, columns).
        past_length: Cache length before the pass; None when it is no host integer.
        mask: Attention mask as given; None without one.
        token_ids: Input ids as given, inside `generate`; None when the model got embeddings.
        beam_index: Rows each row continued from; None when unchanged.
        start_s: Host seconds since the trace started.
        thread: The thread it ran in.
        probed: Executed rows and per-layer memory are watched.
        routing: Captured tensors by site id; more than one entry where a site ran in pieces.
        logits: Router logits by site id, where they were asked for.
        spans: (key, start mark, end mark).
        witnesses: Watched calls of fused experts by site id.
        module_rows: Rows per expert module by site id.
        capacity: Slots per expert by site id, where the model has a capacity.
        layer_peaks: Peak less start of allocated bytes by layer position.
        peak_bytes: Highest peak read inside the pass.
        kept_length: Columns that speculation kept after the pass; None without speculation.
    """

    step: int
    stack: str
    episode: Episode
    new_episode: bool
    shape: tuple[int, int]
    past_length: int | None
    mask: torch.Tensor | None
    token_ids: torch.Tensor | None
    beam_index: torch.Tensor | None
    start_s: float
    thread: int
    probed: bool
    host_start: int = 0
    host_end: int = 0
    device_start: Any = None
    device_end: Any = None
    score: bool = False
    routing: dict[int, list[tuple[torch.Tensor, ...]]] = field(default_factory=dict)
    logits: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    spans: list[tuple[SpanKey, Any, Any]] = field(default_factory=list)
    witnesses: dict[int, list[RowWitness]] = field(default_factory=dict)
    module_rows: dict[int, np.ndarray] = field(default_factory=dict)
    capacity: dict[int, int] = field(default_factory=dict)
    layer_peaks: dict[int, int] = field(default_factory=dict)
    memory: MemoryReading = field(default_factory=MemoryReading)
    peak_bytes: int = 0
    kept_length: int | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes the kept tensors hold, views counted by what they show."""
        tensors = [t for raws in self.routing.values() for raw in raws for t in raw]
        tensors += [t for kept in self.logits.values() for t in kept]
        tensors += [t for t in (self.mask, self.token_ids) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class ModelView:
    """What `build_unit` must know of the model.

    Attributes:
        found: Sites with their modules, by id.
        sites: Their geometry, by id.
        layers: All layers.
        clock: The clock the marks came from.
        with_scores: Store affinity and selection scores.
    """

    found: Sequence[FoundSite]
    sites: Sequence[Site]
    layers: Sequence[LayerParts]
    clock: Clock
    with_scores: bool


@dataclass
class Observation:
    """Counts and findings that accumulate over steps.

    Attributes:
        num_calls_expected: Site calls that should have been seen.
        num_calls_seen: Site calls seen.
        num_tokens_seen: Tokens that passed.
        num_tokens_recorded: Tokens stored.
        num_tokens_dropped: Tokens a site saw in a form that cannot be attributed.
        num_padded_tokens: Padding rows and rows of finished sequences.
        num_executed_checked: Dispatches whose executed rows were counted.
        num_executed_disagreeing: Those that differ from the routed rows.
        execution_note: One line on the first disagreement.
        missing: Names of sites that were silent in a step, with counts.
        scoring: Established rule per site; None where none fits.
        by_weight: False once a site's slots were not in order of weight.
        by_score: False once they were not in order of selection score.
    """

    num_calls_expected: int = 0
    num_calls_seen: int = 0
    num_tokens_seen: int = 0
    num_tokens_recorded: int = 0
    num_tokens_dropped: int = 0
    num_padded_tokens: int = 0
    num_executed_checked: int = 0
    num_executed_disagreeing: int = 0
    execution_note: str | None = None
    missing: dict[str, int] = field(default_factory=dict)
    scoring: dict[int, ScoringRule | None] = field(default_factory=dict)
    by_weight: dict[int, bool] = field(default_factory=dict)
    by_score: dict[int, bool] = field(default_factory=dict)


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns host copies; tensors of one shape and type travel together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype, tuple(tensor.shape)), []).append(i)
    result: list[torch.Tensor | None] = [None] * len(tensors)
    with torch.no_grad():
        for (device, _, _), members in groups.items():
            if device.type == "cpu":
                for i in members:
                    result[i] = tensors[i]
                continue
            stacked = torch.stack([tensors[i] for i in members]).to("cpu")
            for row, i in enumerate(members):
                result[i] = stacked[row]
    return [tensor for tensor in result if tensor is not None]


def _host_arrays(capture: StepCapture) -> StepCapture:
    """Moves everything a capture holds to the host, in as few copies as possible."""
    if capture.device_end is not None:
        capture.device_end.synchronize()  # The pass may have run on a stream of its own.
    flat: list[torch.Tensor] = []
    for raws in capture.routing.values():
        flat.extend(t for raw in raws for t in raw)
    for kept in capture.logits.values():
        flat.extend(kept)
    flat.extend(t for t in (capture.mask, capture.token_ids, capture.beam_index) if t is not None)
    moved = iter(to_host(flat))
    for site, raws in capture.routing.items():
        capture.routing[site] = [tuple(next(moved) for _ in raw) for raw in raws]
    for site, kept in capture.logits.items():
        capture.logits[site] = [next(moved) for _ in kept]
    for name in ("mask", "token_ids", "beam_index"):
        if getattr(capture, name) is not None:
            setattr(capture, name, next(moved))
    return capture


def site_table(capture: StepCapture, site: int, found: FoundSite) -> SlotTable | None:
    """Returns the routing of one site in one step, padding rows included; None when silent."""
    raws = capture.routing.get(site)
    if not raws:
        return None
    tables = [found.adapter.decode(raw, found.modules) for raw in raws]
    largest = max((int(table.experts.max(initial=0)) for table in tables), default=0)
    if largest >= found.num_experts:
        raise CaptureError(
            f"{found.name} routed to expert {largest}, but has {found.num_experts} experts",
            hint="pass num_experts to moeprof.register",
        )
    rows = capture.shape[0] * capture.shape[1]
    if len(tables) == 1 or len(tables[0].experts) == rows:
        # A second full pass is a recomputation (gradient checkpointing), not another dispatch.
        return tables[0]
    return SlotTable(
        experts=np.concatenate([t.experts for t in tables]),
        weights=np.concatenate([t.weights for t in tables]),
        status=np.concatenate([t.status for t in tables]),
    )


def _numpy(tensor: torch.Tensor | None) -> np.ndarray | None:
    if tensor is None:
        return None
    return tensor.to(torch.float32).numpy() if tensor.is_floating_point() else tensor.numpy()


def build_unit(
    capture: StepCapture, view: ModelView, observed: Observation
) -> tuple[dict[str, dict[str, Any]], TokenTable]:
    """Returns the rows of one step for every table, and its tokens.

    Call in order of execution: attribution carries state from step to step.
    """
    capture = _host_arrays(capture)
    mask = _numpy(capture.mask)
    tokens = capture.episode.attribute(
        capture.shape,
        past_length=capture.past_length,
        mask=mask,
        token_ids=_numpy(capture.token_ids),
        beam_index=_numpy(capture.beam_index),
        score=capture.score,
    )
    observed.num_tokens_seen += tokens.row.size
    observed.num_padded_tokens += tokens.num_padded
    unit: dict[str, dict[str, Any]] = {}
    stack_sites = [i for i, found in enumerate(view.found) if found.stack == capture.stack]
    tables: dict[int, SlotTable] = {}
    for site in stack_sites:
        observed.num_calls_expected += 1
        table = site_table(capture, site, view.found[site])
        if table is None:
            name = view.found[site].name
            observed.missing[name] = observed.missing.get(name, 0) + 1
            continue
        observed.num_calls_seen += 1
        tables[site] = table
    if stack_sites:
        unit[f"routing/{capture.stack}"] = _routing(capture, view, observed, tokens, tables)
        observed.num_tokens_recorded += tokens.row.size
    durations = _durations(capture, view.clock)
    executed, disagreements = _executed(capture, view, tables, stack_sites)
    if executed["site"].size:
        unit["executed"] = executed
    observed.num_executed_checked += disagreements[0]
    observed.num_executed_disagreeing += disagreements[1]
    if observed.execution_note is None:
        observed.execution_note = disagreements[2]
    unit["layers"] = _layers(capture, view, tokens, tables, durations)
    unit["steps"] = _step(capture, view, tokens, durations)
    return unit, tokens


def _routing(
    capture: StepCapture,
    view: ModelView,
    observed: Observation,
    tokens: TokenTable,
    tables: Mapping[int, SlotTable],
) -> dict[str, Any]:
    """Returns the columns of the routing table for one step."""
    sites = [site for site in view.sites if site.stack == capture.stack]
    num_slots = sum(site.top_k for site in sites)
    count = tokens.row.size
    expert = np.full((count, num_slots), NO_EXPERT, dtype=np.int32)
    status = np.full((count, num_slots), SlotStatus.UNUSED, dtype=np.uint8)
    weight = np.zeros((count, num_slots), dtype=np.float32)
    score = np.full((count, num_slots), np.nan, dtype=np.float32)
    selection = np.full((count, num_slots), np.nan, dtype=np.float32)
    has_bias = any(site.selection_bias is not None for site in sites)
    rows_expected = capture.shape[0] * capture.shape[1]
    for site in sites:
        table = tables.get(site.site)
        if table is None:
            continue
        width = table.experts.shape[1]
        if width > site.top_k:
            raise CaptureError(
                f"{site.name} chose {width} experts a token, after {site.top_k}",
                hint="show ids of one width, -1 where a slot is empty (moeprof.register)",
            )
        slots = slice(site.first_slot, site.first_slot + width)
        rows = tokens.row
        where: Any = slice(None)
        if table.experts.shape[0] != rows_expected:
            if table.experts.shape[0] != capture.shape[0]:
                observed.num_tokens_dropped += count
                continue
            # One row per sequence: the layer saw only the last token of each.
            where = np.flatnonzero((rows + 1) % capture.shape[1] == 0)
            status[:, slots] = SlotStatus.PRUNED_LAST_LAYER
            rows = rows[where] // capture.shape[1]
        block = (
            (where, slots)
            if isinstance(where, slice)
            else np.ix_(where, np.arange(slots.start, slots.stop))
        )
        expert[block] = table.experts[rows]
        status[block] = table.status[rows]
        weight[block] = table.weights[rows]
        kept = capture.logits.get(site.site)
        logits = None
        if kept and kept[0].shape[0] == table.experts.shape[0]:
            logits = _numpy(kept[0])
        assert logits is None or isinstance(logits, np.ndarray)
        _learn(site, observed, table, rows, logits, eps=_spacing(capture.routing[site.site][0]))
        rule = observed.scoring.get(site.site)
        if view.with_scores and logits is not None and rule is not None:
            ids = np.maximum(table.experts[rows], 0).astype(np.int64)
            values = affinity(logits[rows], ids, rule.scoring)
            score[block] = values
            bias = site.selection_bias
            selection[block] = values + (np.asarray(bias, np.float32)[ids] if bias else 0.0)
    columns: dict[str, Any] = {
        "step": capture.step,
        "row": tokens.row,
        "request": tokens.request,
        "sequence": tokens.sequence,
        "parent_sequence": tokens.parent_sequence,
        "position": tokens.position,
        "phase": np.asarray(TOKEN_PHASES, dtype=object)[tokens.phase],
        "accepted": None if capture.kept_length is None else tokens.column < capture.kept_length,
        "expert": expert,
        "status": status,
        "weight": weight,
    }
    if view.with_scores:
        columns["score"] = score
        if has_bias:
            columns["selection_score"] = selection
    return columns


def _spacing(tensors: Sequence[torch.Tensor]) -> float:
    """Returns the relative spacing of the coarsest numbers among captured tensors."""
    return max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0.0)


def _learn(
    site: Site,
    observed: Observation,
    table: SlotTable,
    rows: np.ndarray,
    logits: np.ndarray | None,
    *,
    eps: float,
) -> None:
    """Updates what is known of a site's scoring rule and slot order."""
    experts, weights = table.experts[rows], table.weights[rows]
    routed = (table.status[rows] == SlotStatus.ROUTED).all(axis=1)
    if logits is not None and observed.scoring.get(site.site) is None and routed.any():
        width = min(experts.shape[1], logits.shape[1])
        observed.scoring[site.site] = infer_scoring(
            logits[rows][routed],
            experts[routed][:, :width].astype(np.int64),
            weights[routed],
            eps=eps,
        )
    if experts.shape[1] > 1 and routed.any():
        falling = bool((np.diff(weights[routed], axis=1) <= 0).all())
        observed.by_weight[site.site] = observed.by_weight.get(site.site, True) and falling
        rule = observed.scoring.get(site.site)
        if logits is not None and rule is not None and site.selection_bias is not None:
            ids = experts[routed].astype(np.int64)
            chosen = affinity(logits[rows][routed], ids, rule.scoring)
            chosen = chosen + np.asarray(site.selection_bias, np.float32)[ids]
            ordered = bool((np.diff(chosen, axis=1) <= 0).all())
            observed.by_score[site.site] = observed.by_score.get(site.site, True) and ordered


def _durations(capture: StepCapture, clock: Clock) -> dict[SpanKey, float]:
    """Returns milliseconds per key; a module that ran twice adds up."""
    totals: dict[SpanKey, float] = {}
    for key, start, end in capture.spans:
        totals[key] = totals.get(key, 0.0) + clock.elapsed_ms(start, end)
    return totals


def _executed(
    capture: StepCapture,
    view: ModelView,
    tables: Mapping[int, SlotTable],
    stack_sites: Sequence[int],
) -> tuple[dict[str, Any], tuple[int, int, str | None]]:
    """Returns the rows of the executed table and (checked, disagreeing, note)."""
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("site", "expert", "num_routed_rows", "num_executed_rows")
    }
    checked, disagreeing, note = 0, 0, None
    for site in stack_sites:
        found = view.found[site]
        table = tables.get(site)
        counts = capture.module_rows.get(site)
        if counts is None and site in capture.witnesses:
            seen = [c for w in capture.witnesses[site] if (c := w.counts()) is not None]
            counts = np.sum(seen, axis=0) if seen else None
        if counts is None or table is None:
            continue
        sent = table.experts[table.status == SlotStatus.ROUTED]
        routed = np.bincount(sent, minlength=found.num_experts)
        checked += 1
        computing = slice(found.num_weighted)
        agree = np.array_equal(routed[computing], counts[computing])
        if not agree and not found.runs_all_experts:
            disagreeing += 1
            lit = np.flatnonzero(counts)
            note = note or (
                f"{found.name}: the router sent rows to {np.count_nonzero(routed)} experts, "
                f"{lit.size} ran ({_some(lit)}); rows routed {int(routed.sum())}, "
                f"executed {int(counts.sum())}"
            )
        columns["site"].append(np.full(found.num_experts, site, dtype=np.int16))
        columns["expert"].append(np.arange(found.num_experts, dtype=np.int32))
        columns["num_routed_rows"].append(routed.astype(np.int32))
        executed = counts.astype(np.float64)
        executed[found.num_weighted :] = np.nan  # Nothing shows where nothing is computed.
        columns["num_executed_rows"].append(executed)
    joined = {
        name: np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        for name, parts in columns.items()
    }
    return {"step": capture.step, **joined}, (checked, disagreeing, note)


def _some(experts: np.ndarray, limit: int = 4) -> str:
    shown = ", ".join(str(e) for e in experts[:limit])
    return f"experts {shown}" + (", ..." if experts.size > limit else "")


def _layers(
    capture: StepCapture,
    view: ModelView,
    tokens: TokenTable,
    tables: Mapping[int, SlotTable],
    durations: Mapping[SpanKey, float],
) -> dict[str, Any]:
    """Returns the rows of the layers table: one per layer, or per site where it has several."""
    rows: list[dict[str, Any]] = []
    timed = "hook" if durations and not capture.probed else None
    placed: set[int] = set()
    for position, layer in enumerate(view.layers):
        if layer.stack != capture.stack:
            continue
        for order, site in enumerate(layer.sites or (None,)):
            row: dict[str, Any] = {"layer": layer.index, "site": site, "component_source": timed}
            if order == 0:
                for key in LAYER_KEYS:
                    row[f"{key}_ms"] = durations.get((key, position))
                row["activation_peak_bytes"] = capture.layer_peaks.get(position)
            if site is not None:
                placed.add(site)
                row.update(_site_row(capture, site, tokens, tables, durations))
            rows.append(row)
    for site, found in enumerate(view.found):
        if found.stack == capture.stack and site not in placed:
            row = {"layer": max(found.layer, 0), "site": site, "component_source": timed}
            row.update(_site_row(capture, site, tokens, tables, durations))
            rows.append(row)
    names = (
        "layer", "site", "num_tokens", "num_rows", "num_active_experts",
        *(f"{key}_ms" for key in (*LAYER_KEYS, *SITE_KEYS)),
        "component_source", "activation_peak_bytes", "capacity", "num_dropped",
    )  # fmt: skip
    columns: dict[str, Any] = {
        name: np.array([row.get(name) for row in rows], dtype=object) for name in names
    }
    return {"step": capture.step, "stack": capture.stack, **columns}


def _site_row(
    capture: StepCapture,
    site: int,
    tokens: TokenTable,
    tables: Mapping[int, SlotTable],
    durations: Mapping[SpanKey, float],
) -> dict[str, Any]:
    row: dict[str, Any] = {f"{key}_ms": durations.get((key, site)) for key in SITE_KEYS}
    table = tables.get(site)
    if table is None:
        return row
    rows = tokens.row
    if table.experts.shape[0] == capture.shape[0] and capture.shape[1] > 1:
        rows = rows[(rows + 1) % capture.shape[1] == 0] // capture.shape[1]
    if rows.size and rows.max() >= table.experts.shape[0]:
        return row
    status, experts = table.status[rows], table.experts[rows]
    row["num_tokens"] = int(rows.size)
    row["num_rows"] = int(table.experts.shape[0])
    row["num_active_experts"] = int(np.unique(experts[status == SlotStatus.ROUTED]).size)
    row["capacity"] = capture.capacity.get(site)
    if row["capacity"] is not None or (status == SlotStatus.DROPPED).any():
        row["num_dropped"] = int((status == SlotStatus.DROPPED).sum())
    return row


def _step(
    capture: StepCapture,
    view: ModelView,
    tokens: TokenTable,
    durations: Mapping[SpanKey, float],
) -> dict[str, Any]:
    """Returns the row of the steps table."""
    kinds = {TOKEN_PHASES[i] for i in np.unique(tokens.phase)}
    if len(kinds) == 1:
        phase = next(iter(kinds))
    elif kinds:
        phase = "mixed"
    else:
        phase = "encode" if capture.stack == "encoder" else "decode"
    wall_ms = (capture.host_end - capture.host_start) / 1e6
    device_ms = None
    if capture.device_end is not None:
        device_ms = view.clock.elapsed_ms(capture.device_start, capture.device_end)
    times = {key: durations.get((key, 0)) for key in STEP_KEYS}
    layer_ms = [ms for (key, _), ms in durations.items() if key == "layer"]
    other = None
    if layer_ms:
        total = device_ms if device_ms is not None else wall_ms
        other = max(0.0, total - sum(layer_ms) - sum(ms or 0.0 for ms in times.values()))
    memory = capture.memory
    peak = memory.peak_bytes
    return {
        "step": capture.step,
        "stack": capture.stack,
        "phase": phase,
        "batch": capture.shape[0],
        "num_tokens": int(tokens.row.size),
        "num_prefill_tokens": int((tokens.phase < TOKEN_PHASES.index("decode")).sum()),
        "num_decode_tokens": int((tokens.phase == TOKEN_PHASES.index("decode")).sum()),
        "num_padded_tokens": tokens.num_padded,
        "probed": capture.probed,
        "start_s": capture.start_s,
        "wall_ms": wall_ms,
        "device_ms": device_ms,
        "embedding_ms": times["embedding"],
        "head_ms": times["head"],
        "other_ms": other,
        "allocated_bytes": memory.allocated_bytes,
        "reserved_bytes": memory.reserved_bytes,
        "peak_bytes": None if peak is None else max(peak, capture.peak_bytes),
        "process_bytes": memory.process_bytes,
    }
