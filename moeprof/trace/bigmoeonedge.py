"""Imports BigMoeOnEdge's ``route_trace v1``: expert routing of a run on a device, row by row.

A ``#`` preamble gives the geometry (``model= arch= n_layer= n_expert= n_expert_used=``, then
``layer= expert_bytes= dense_bytes=`` per layer); rows are ``turn,phase,step,layer,slot,expert,
weight,residency,expert_bytes`` and, in newer files, ``dropped``; columns are found by name. All
prompt rows of a turn are one forward pass, every generated token is one of its own; a turn becomes
a request. A weight of ``nan`` means that the run could not tell; ``dropped`` marks a choice that
was discarded instead of read. Leaves out ``residency``: it is what the device's own cache did, not
routing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moeprof.errors import TraceError
from moeprof.trace import schema as spec
from moeprof.trace.reader import Trace, open_trace
from moeprof.trace.schema import SlotStatus
from moeprof.trace.writer import TraceWriter

Array = np.ndarray[Any, Any]

FORMAT_LINE = "route_trace v1"
_FORMAT = re.compile(r"\broute_trace v1\b")
COLUMNS = (
    "turn",
    "phase",
    "step",
    "layer",
    "slot",
    "expert",
    "weight",
    "residency",
    "expert_bytes",
)
DROPPED = "dropped"
"""A column that older files lack."""
PREFILL, DECODE = 0, 1

_INTEGERS = (*(name for name in COLUMNS if name != "weight"), DROPPED)
_LARGEST = {"layer": np.iinfo(np.int16).max, "expert_bytes": np.iinfo(np.int64).max}
_LARGEST_OTHERWISE = np.iinfo(np.int32).max
_PAIR = re.compile(r"(\w+)=(\S+)")
_STACK = "decoder"
_UNIT_STEPS = 4096


def convert(source: Path, output: Path, *, force: bool = False) -> Trace:
    """Writes the trace and returns it.

    Raises:
        TraceError: The file is not a ``route_trace v1``, or contradicts itself.
    """
    geometry = _preamble(source)
    rows = read_rows(source)
    sites = _sites(geometry, rows)
    tokens = _tokens(rows, sites)
    num_steps = int(tokens["step"][-1]) + 1
    num_tokens = len(tokens["step"])
    info = spec.TraceInfo(
        model=spec.ModelInfo(
            name=re.split(r"[/\\]", geometry.values.get("model", source.stem))[-1],
            architecture=geometry.values.get("arch", ""),
            num_layers={_STACK: geometry.integer("n_layer", sites[-1].layer + 1)},
        ),
        sites=sites,
        mode="import",
        command=f"import bigmoeonedge {source.name}",
        origin={"format": FORMAT_LINE, "file": source.name},
        notes=_notes(rows),
        capture=spec.CaptureCounts(
            num_sites=len(sites),
            num_calls_expected=num_steps * len(sites),
            num_calls_seen=num_steps * len(sites),
            num_tokens_seen=num_tokens,
            num_tokens_recorded=num_tokens,
        ),
    )
    with TraceWriter.create(output, info, force=force, flush_interval_s=float("inf")) as writer:
        writer.append({"requests": _requests(tokens)})
        for first in range(0, num_steps, _UNIT_STEPS):
            start, stop = np.searchsorted(tokens["step"], (first, first + _UNIT_STEPS))
            chosen = {name: values[start:stop] for name, values in tokens.items()}
            writer.append(_unit(chosen, sites))
    return open_trace(output)


def read_rows(source: Path) -> pd.DataFrame:
    """Returns the rows of a route CSV in order of execution: turn, phase, step, layer, slot.

    Raises:
        TraceError: Columns are missing or hold no numbers, or there are no rows.
    """
    try:
        rows = pd.read_csv(source, comment="#", skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise TraceError(f"{source} is no {FORMAT_LINE}: {str(error).strip()}") from None
    missing = [name for name in COLUMNS if name not in rows]
    if missing:
        raise TraceError(
            f"{source} lacks the column {missing[0]}",
            hint=f"columns of {FORMAT_LINE}: " + ",".join(COLUMNS),
        )
    if rows.empty:
        raise TraceError(f"{source} holds no rows")
    rows[DROPPED] = rows.get(DROPPED, 0)
    for name in (*COLUMNS, DROPPED):
        _check_numbers(source, name, rows[name])
    for name in _INTEGERS:
        rows[name] = rows[name].astype(np.int64)
    if (rows["step"] < 0).any():
        raise TraceError(f"{source}: column step holds rows without a position (below 0)")
    if not rows["phase"].isin((PREFILL, DECODE)).all():
        raise TraceError(f"{source}: column phase holds values other than 0 and 1")
    order = ["turn", "phase", "step", "layer", "slot"]
    twice = rows.duplicated(order)
    if twice.any():
        raise TraceError(f"{source}: row {int(np.flatnonzero(twice)[0]) + 1} is there twice")
    return rows.sort_values(order, kind="stable", ignore_index=True)


def _check_numbers(source: Path, name: str, column: pd.Series) -> None:
    """Refuses what is no number, or no whole one where whole ones belong."""
    if not pd.api.types.is_numeric_dtype(column):
        wrong = True
    elif name == "weight":
        wrong = bool(np.isinf(column).any())
    else:
        wrong = bool(column.isna().any())
    if wrong:
        raise TraceError(
            f"{source}: column {name} holds something that is no number",
            hint="the file may be cut short; copy it again",
        )
    if name in _INTEGERS:
        largest = _LARGEST.get(name, _LARGEST_OTHERWISE)
        if ((column % 1 != 0) | (column.abs() > largest)).any():
            raise TraceError(
                f"{source}: column {name} holds something else than whole numbers up to {largest:,}"
            )


def _notes(rows: pd.DataFrame) -> tuple[str, ...]:
    """Returns what the trace lacks and the log does not say."""
    unknown = int(rows["weight"].isna().sum())
    if not unknown:
        return ()
    return (f"{unknown:,} of {len(rows):,} choices have no weight in the log: weights left out",)


class _Geometry:
    """What the preamble says."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.values: dict[str, str] = {}
        self.expert_bytes: dict[int, int] = {}

    def integer(self, name: str, default: int | None = None) -> int:
        """Returns a number of the preamble."""
        text = self.values.get(name)
        if text is None and default is not None:
            return default
        if text is None or not text.isdigit():
            raise TraceError(f"{self.source}: the preamble does not give {name} as a number")
        return int(text)


def _preamble(source: Path) -> _Geometry:
    geometry = _Geometry(source)
    with source.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
        if not _FORMAT.search(first):
            raise TraceError(
                f"{source} is no {FORMAT_LINE}",
                hint=f"its first line should be '# {FORMAT_LINE}'",
            )
        for line in file:
            if not line.startswith("#"):
                break
            values = dict(_PAIR.findall(line))
            layer = values.get("layer", "")
            if layer.isdigit():
                size = values.get("expert_bytes", "")
                geometry.expert_bytes[int(layer)] = int(size) if size.isdigit() else 0
            else:
                geometry.values.update(values)
    return geometry


def _sites(geometry: _Geometry, rows: pd.DataFrame) -> tuple[spec.Site, ...]:
    """Returns one site per layer that has rows."""
    num_experts = geometry.integer("n_expert")
    top_k = max(geometry.integer("n_expert_used", 1), int(rows["slot"].max()) + 1)
    highest = int(rows["expert"].max())
    if highest >= num_experts or int(rows["expert"].min()) < 0 or int(rows["slot"].min()) < 0:
        raise TraceError(
            f"{geometry.source}: an expert or slot lies outside the {num_experts} experts"
        )
    if top_k > num_experts:
        raise TraceError(
            f"{geometry.source}: {top_k} slots per token cannot hold different experts of "
            f"{num_experts}"
        )
    falling = _falling(rows)
    read = rows.groupby("layer")["expert_bytes"].max()
    sites = []
    for index, layer in enumerate(int(layer) for layer in read.index):
        size = geometry.expert_bytes.get(layer) or int(read[layer])
        if size <= 0:
            raise TraceError(f"{geometry.source}: no expert_bytes for layer {layer}")
        sites.append(
            spec.Site(
                site=index,
                stack=_STACK,
                layer=layer,
                name=f"blk.{layer}.ffn",
                num_experts=num_experts,
                top_k=top_k,
                first_slot=index * top_k,
                expert_bytes=size,
                slot_order="by_weight" if falling[layer] else "by_score",
                adapter="bigmoeonedge",
            )
        )
    return tuple(sites)


def _falling(rows: pd.DataFrame) -> dict[int, bool]:
    """Returns, per layer, whether weights never rise from slot to slot.

    Slots are in the router's rank order; where that ranks biased scores, weights may rise.
    """
    kept = rows[rows[DROPPED] == 0]
    token = ["turn", "phase", "step", "layer"]
    same = (kept[token].diff().iloc[1:] == 0).all(axis=1).to_numpy()
    # As they are stored, so that the trace keeps what is stated.
    weight = kept["weight"].to_numpy().astype(np.float16)
    rising = np.zeros(len(kept), bool)
    rising[1:] = same & ~(weight[1:] <= weight[:-1])
    unknown = kept["weight"].isna().any()
    wrong = set(kept["layer"][rising].tolist())
    return {int(layer): not unknown and layer not in wrong for layer in rows["layer"].unique()}


def _tokens(rows: pd.DataFrame, sites: tuple[spec.Site, ...]) -> dict[str, Array]:
    """Returns one row per token with its slots, steps counted."""
    turn, phase, position = (rows[name].to_numpy() for name in ("turn", "phase", "step"))
    layers = np.array([site.layer for site in sites])
    site = np.searchsorted(layers, rows["layer"].to_numpy())
    new_token = np.ones(len(rows), bool)
    new_token[1:] = (np.diff(turn) != 0) | (np.diff(phase) != 0) | (np.diff(position) != 0)
    token = np.cumsum(new_token) - 1
    turn, phase, position = turn[new_token], phase[new_token], position[new_token]
    num_tokens, top_k = len(turn), sites[0].top_k
    slot = site * top_k + rows["slot"].to_numpy()
    expert = np.full((num_tokens, len(sites) * top_k), spec.NO_EXPERT, np.int32)
    weight = np.zeros(expert.shape, np.float32)
    status = np.full(expert.shape, SlotStatus.UNUSED, np.uint8)
    dropped = rows[DROPPED].to_numpy() != 0
    expert[token, slot] = rows["expert"].to_numpy()
    # The log keeps the weight that the router gave a discarded choice; what was applied is 0.
    weight[token, slot] = np.where(dropped, 0.0, rows["weight"].to_numpy())
    status[token, slot] = np.where(dropped, SlotStatus.DROPPED, SlotStatus.ROUTED)
    _mark_unseen(status, top_k)
    opens = np.ones(num_tokens, bool)
    opens[1:] = (np.diff(turn) != 0) | (phase[1:] == DECODE) | (np.diff(phase) != 0)
    step = np.cumsum(opens) - 1
    first_of_turn = np.ones(num_tokens, bool)
    first_of_turn[1:] = np.diff(turn) != 0
    turn_index = np.cumsum(first_of_turn) - 1
    _, row = _counts_within(step)
    return {
        "step": step.astype(np.int32),
        "row": row,
        "request": turn_index.astype(np.int32),
        "position": (position - position[first_of_turn][turn_index]).astype(np.int32),
        "decode": phase == DECODE,
        "expert": expert,
        **({} if rows["weight"].isna().any() else {"weight": weight}),
        "status": status,
    }


def _mark_unseen(status: Array, top_k: int) -> None:
    """Marks slots of sites that did not see a token, in place."""
    per_site = status.reshape(len(status), -1, top_k)
    unseen = (per_site == SlotStatus.UNUSED).all(axis=2)
    # No site from here on saw the token.
    left = np.logical_and.accumulate(unseen[:, ::-1], axis=1)[:, ::-1]
    if unseen.shape[1] > 1:
        only_last = left[:, -1] & ~left[:, -2]
        per_site[only_last, -1] = SlotStatus.PRUNED_LAST_LAYER
        left[only_last, -1] = False
    per_site[left] = SlotStatus.EARLY_EXIT


def _counts_within(group: Array) -> tuple[Array, Array]:
    """Returns the size of each run of equal values, and the place of each value in its run."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(np.append(starts, len(group)))
    return sizes, np.arange(len(group)) - np.repeat(starts, sizes)


def _requests(tokens: dict[str, Array]) -> dict[str, Any]:
    num_turns = int(tokens["request"].max()) + 1
    decode = np.bincount(tokens["request"], weights=tokens["decode"], minlength=num_turns)
    every = np.bincount(tokens["request"], minlength=num_turns)
    return {
        "request": np.arange(num_turns),
        "task": "lm",
        "num_prompt_tokens": (every - decode).astype(np.int64),
        "num_output_tokens": decode.astype(np.int64),
        "num_sequences": 1,
        "arrival_s": 0.0,
    }


def _unit(tokens: dict[str, Array], sites: tuple[spec.Site, ...]) -> dict[str, dict[str, Any]]:
    """Returns the rows of every table for whole steps."""
    sizes, _ = _counts_within(tokens["step"])
    first = np.cumsum(sizes) - sizes
    steps = tokens["step"][first]
    decode = np.add.reduceat(tokens["decode"].astype(np.int64), first)
    phase = np.where(decode == 0, "prefill", "decode")
    of_token = np.repeat(np.arange(len(steps)), sizes)
    layers: dict[str, list[Array]] = {
        name: [] for name in ("step", "layer", "site", "tokens", "active", "dropped")
    }
    for site in sites:
        slots = slice(site.first_slot, site.first_slot + site.top_k)
        routed = tokens["status"][:, slots] == SlotStatus.ROUTED
        dropped = tokens["status"][:, slots] == SlotStatus.DROPPED
        key = (of_token[:, None] * site.num_experts + tokens["expert"][:, slots])[routed]
        active = np.bincount(np.unique(key) // site.num_experts, minlength=len(steps))
        layers["step"].append(steps)
        layers["layer"].append(np.full(len(steps), site.layer))
        layers["site"].append(np.full(len(steps), site.site))
        layers["tokens"].append(
            np.bincount(of_token, weights=(routed | dropped).any(axis=1), minlength=len(steps))
        )
        layers["dropped"].append(
            np.bincount(of_token, weights=dropped.sum(axis=1), minlength=len(steps))
        )
        layers["active"].append(active)
    joined = {name: np.concatenate(parts) for name, parts in layers.items()}
    order = np.lexsort((joined["site"], joined["step"]))
    joined = {name: values[order] for name, values in joined.items()}
    return {
        "steps": {
            "step": steps,
            "stack": _STACK,
            "phase": phase,
            "batch": 1,
            "num_tokens": sizes,
            "num_prefill_tokens": sizes - decode,
            "num_decode_tokens": decode,
            "num_padded_tokens": 0,
            "probed": False,
            "start_s": 0.0,
        },
        "layers": {
            "step": joined["step"],
            "stack": _STACK,
            "layer": joined["layer"],
            "site": joined["site"],
            "num_tokens": joined["tokens"],
            "num_rows": joined["tokens"],
            "num_active_experts": joined["active"],
            "num_dropped": joined["dropped"],
            "component_source": None,
        },
        f"routing/{_STACK}": {
            "step": tokens["step"],
            "row": tokens["row"],
            "request": tokens["request"],
            "sequence": 0,
            "parent_sequence": 0,
            "position": tokens["position"],
            "phase": np.where(tokens["decode"], "decode", "prefill"),
            "expert": tokens["expert"],
            "status": tokens["status"],
            **({"weight": tokens["weight"]} if "weight" in tokens else {}),
        },
    }
