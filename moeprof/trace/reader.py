"""Reads a trace: pandas views of its tables, and routing streamed as NumPy.

Opening reads `trace.json` and the commit logs only; a Parquet file is touched when a table is
asked for. Leaves out the judgement whether the content makes sense (`validator`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from moeprof.errors import TraceError
from moeprof.trace import blocks, commits, parts, storage
from moeprof.trace import schema as spec
from moeprof.trace.blocks import Dispatch, RoutingBlock, SortKey
from moeprof.trace.commits import Part, RankLog
from moeprof.trace.parts import StepFilter
from moeprof.trace.storage import Store

Array = np.ndarray[Any, Any]

ROUTING_COLUMNS = (
    "rank",
    "step",
    "stack",
    "layer",
    "site",
    "request",
    "sequence",
    "position",
    "phase",
    "slot",
    "expert",
    "weight",
    "status",
)
"""Columns of `Trace.routing` unless others are asked for."""

_LOG_NAME = re.compile(rf"{spec.COMMIT_LOG_PREFIX}-r(\d+)\.jsonl")
_SITE_COLUMNS = ("stack", "layer", "site", "slot")


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """Opens a trace for reading.

    Args:
        path: Directory, ``sample:NAME`` or any URL that fsspec knows.

    Raises:
        TraceError: There is no trace, or it is damaged or of a newer version.
        UsageError: There is no such sample.
    """
    store = storage.locate(path)
    info = _read_info(store)
    return Trace(store, info, _read_logs(store))


class Trace:
    """One recorded run. Get it from `open_trace`.

    Attributes:
        path: Directory or URL.
        info: What `trace.json` says, with the counters and notes of all ranks.
        complete: True when every rank ended in good order and none is missing.
    """

    def __init__(self, store: Store, info: spec.TraceInfo, logs: Sequence[RankLog]) -> None:
        self._store = store
        self._logs = tuple(logs)
        self.path = store.path
        self.info = _merge_info(info, logs)
        self.complete = self.info.complete

    def __repr__(self) -> str:
        state = "complete" if self.complete else "incomplete"
        return f"<Trace {self.path} of {self.model.name}: {len(self.sites)} sites, {state}>"

    @property
    def sites(self) -> tuple[spec.Site, ...]:
        """All MoE sites, by id."""
        return self.info.sites

    @property
    def stacks(self) -> tuple[str, ...]:
        """Stacks that hold MoE sites, encoder first."""
        return self.info.stacks

    @property
    def model(self) -> spec.ModelInfo:
        """The model that was recorded."""
        return self.info.model

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks whose parts are present."""
        return tuple(log.rank for log in self._logs)

    @property
    def logs(self) -> tuple[RankLog, ...]:
        """What each rank committed."""
        return self._logs

    @property
    def store(self) -> Store:
        """Where the files lie."""
        return self._store

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all committed parts, the logs and `trace.json`."""
        committed = sum(part.num_bytes + 0 for log in self._logs for part in log.parts)
        logs = sum(log.num_bytes for log in self._logs)
        return committed + logs + len(self._store.read_text(spec.INFO_FILE).encode())

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request: its last row, by rank and request."""
        frame = self.table("requests").drop_duplicates(["rank", "request"], keep="last")
        return frame.sort_values(["rank", "request"], kind="stable", ignore_index=True)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The table `steps`."""
        return self.table("steps")

    @cached_property
    def layers(self) -> pd.DataFrame:
        """The table `layers`."""
        return self.table("layers")

    @cached_property
    def executed(self) -> pd.DataFrame:
        """The table `executed`."""
        return self.table("executed")

    @cached_property
    def devices(self) -> pd.DataFrame:
        """The table `devices`."""
        return self.table("devices")

    @cached_property
    def kernels(self) -> pd.DataFrame:
        """The table `kernels`; empty where the kernels were not profiled."""
        return self.table("kernels")

    def has_table(self, name: str) -> bool:
        """Returns True where rows of the table were committed."""
        return any(self.parts(each) for each in (name, *self._stack_tables(name)))

    def parts(self, name: str) -> tuple[Part, ...]:
        """Returns the committed parts of a table (``routing/STACK`` for routing), by rank."""
        return tuple(part for log in self._logs for part in log.parts if part.table == name)

    def has_column(self, name: str, column: str) -> bool:
        """Returns True where the parts of a table hold a column; reads one file's footer."""
        return self.stored_type(name, column) is not None

    def stored_type(self, name: str, column: str) -> pa.DataType | None:
        """Returns how a column is stored, None where it is not; reads one file's footer.

        Columns with a value per slot give the type of that value.
        """
        committed = self.parts(name)
        if not committed:
            return None
        with parts.OpenPart(self._store, committed[0]) as opened:
            found = opened.types.get(column)
        return getattr(found, "value_type", found)

    def table(
        self, name: str, *, columns: Sequence[str] | None = None, steps: Any = None
    ) -> pd.DataFrame:
        """Returns a table as pandas; empty where nothing was committed.

        Text is `str`; numbers that may be null are floats with NaN for null. ``routing/STACK``
        gives one row per token without the columns that hold a value per slot (see `routing`).

        Args:
            name: Table name.
            columns: Columns wanted; all when None.
            steps: Steps wanted: a step, a slice (stop excluded), a range or a collection.

        Raises:
            ValueError: There is no such table or column.
            TraceError: A part is missing or damaged.
        """
        table = self._spec_of(name)
        known = [column.name for column in table.columns if not column.per_slot]
        wanted = known if columns is None else list(columns)
        unknown = [column for column in wanted if column not in known]
        if unknown:
            raise ValueError(f"table {name} has no column {unknown[0]!r}: {', '.join(known)}")
        chosen = StepFilter.of(steps)
        pieces = [
            piece
            for log in self._logs
            for part in log.parts
            if part.table == name
            for piece in parts.read_part(self._store, part, columns=wanted, steps=chosen)
        ]
        series = {column: _series(table.column(column), pieces) for column in wanted}
        return pd.DataFrame(series, columns=wanted)

    def routing(
        self,
        *,
        stack: str | None = None,
        layers: int | Collection[int] | None = None,
        phase: str | Collection[str] | None = None,
        steps: Any = None,
        columns: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Returns routing decisions, one row per token, site and slot.

        Slots that hold no expert are rows too: see ``status`` (`schema.SlotStatus`). Only the
        columns and row groups needed are read.

        Args:
            stack: One stack; all when None.
            layers: Model layers wanted.
            phase: Token phases wanted.
            steps: Steps wanted: a step, a slice (stop excluded), a range or a collection.
            columns: Columns wanted; also ``row``, ``parent_sequence``, ``accepted``, ``score``
                and ``selection_score``. `ROUTING_COLUMNS` when None, without ``weight`` where
                the trace holds none.

        Raises:
            ValueError: There is no such stack or column.
            TraceError: A part is missing or damaged.
        """
        stacks = self.stacks if stack is None else (self._known_stack(stack),)
        wanted = self._routing_columns(stacks, columns)
        chosen = StepFilter.of(steps)
        frames = [
            self._routing_of(each, _as_set(layers), _as_set(phase), chosen, wanted)
            for each in stacks
        ]
        return pd.concat(frames, ignore_index=True) if len(frames) != 1 else frames[0]

    def blocks(
        self, stack: str, *, weights: bool = False, phase: str | None = None
    ) -> Iterator[RoutingBlock]:
        """Streams the routing of a stack in bounded memory, rank after rank.

        A step is never split over blocks.

        Args:
            stack: The stack.
            weights: Read the weights too.
            phase: Only tokens of this phase.

        Raises:
            ValueError: There is no such stack or phase.
            TraceError: A part is missing or damaged, or holds no weights.
        """
        self._known_stack(stack)
        if phase is not None and phase not in spec.TOKEN_PHASES:
            raise ValueError(f"there is no token phase {phase!r}: {', '.join(spec.TOKEN_PHASES)}")
        for log in self._logs:
            yield from self._rank_blocks(log, stack, weights=weights, phase=phase)

    def dispatches(
        self,
        *,
        stack: str | None = None,
        sites: Collection[int] | None = None,
        weights: bool = False,
    ) -> Iterator[Dispatch]:
        """Streams dispatches in order of execution: by step, then site, then rank.

        Args:
            stack: One stack; all when None.
            sites: Site ids wanted; all when None.
            weights: Read the weights too.

        Raises:
            ValueError: There is no such stack.
            TraceError: A part is missing or damaged, or holds no weights.
        """
        stacks = self.stacks if stack is None else (self._known_stack(stack),)
        streams = []
        for each in stacks:
            wanted = [s for s in self.info.sites_of(each) if sites is None or s.site in sites]
            if wanted:
                streams += [self._rank_dispatches(log, each, wanted, weights) for log in self._logs]
        return blocks.merged(streams)

    def _rank_blocks(
        self, log: RankLog, stack: str, *, weights: bool, phase: str | None
    ) -> Iterator[RoutingBlock]:
        name = f"routing/{stack}"
        return blocks.stream_blocks(
            self._store,
            [part for part in log.parts if part.table == name],
            rank=log.rank,
            stack=stack,
            num_slots=self.info.num_slots(stack),
            weights=weights,
            phase=phase,
        )

    def _rank_dispatches(
        self, log: RankLog, stack: str, sites: Sequence[spec.Site], weights: bool
    ) -> Iterator[tuple[SortKey, Dispatch]]:
        for block in self._rank_blocks(log, stack, weights=weights, phase=None):
            yield from blocks.block_dispatches(block, sites)

    def _stack_tables(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}/{stack}" for stack in self.stacks)

    def _known_stack(self, stack: str) -> str:
        if stack not in self.stacks:
            raise ValueError(f"there is no stack {stack!r}: {', '.join(self.stacks)}")
        return stack

    def _spec_of(self, name: str) -> spec.Table:
        base, _, stack = name.partition("/")
        table = spec.TABLES.get(base)
        if table is None or table.per_stack != bool(stack):
            names = [
                each
                for key, known in spec.TABLES.items()
                for each in (self._stack_tables(key) if known.per_stack else (key,))
            ]
            raise ValueError(f"there is no table {name!r}: {', '.join(names)}")
        return table

    def _routing_columns(
        self, stacks: Sequence[str], columns: Sequence[str] | None
    ) -> tuple[str, ...]:
        if columns is None:
            weighted = any(self.has_column(f"routing/{stack}", "weight") for stack in stacks)
            return tuple(name for name in ROUTING_COLUMNS if name != "weight" or weighted)
        known = {*ROUTING_COLUMNS, *(column.name for column in spec.ROUTING.columns)}
        unknown = [name for name in columns if name not in known]
        if unknown:
            raise ValueError(f"routing has no column {unknown[0]!r}: {', '.join(sorted(known))}")
        return tuple(columns)

    def _routing_of(
        self,
        stack: str,
        layers: frozenset[Any] | None,
        phases: frozenset[Any] | None,
        steps: StepFilter,
        wanted: Sequence[str],
    ) -> pd.DataFrame:
        sites = [s for s in self.info.sites_of(stack) if layers is None or s.layer in layers]
        reader = _LongReader(self.info, stack, sites, wanted)
        pieces = []
        columns = [name for name in wanted if name not in _SITE_COLUMNS]
        # At least one column is read: it tells how many rows there are.
        stored = list(dict.fromkeys([*columns, *(["phase"] if phases else [])])) or ["rank"]
        for part in self.parts(f"routing/{stack}") if sites else ():
            for table in parts.read_part(self._store, part, columns=stored, steps=steps):
                pieces.append(reader.long(table if phases is None else _of_phase(table, phases)))
        return reader.frame(pieces)


@dataclasses.dataclass(frozen=True)
class _LongReader:
    """Turns token rows into one row per token, site and slot."""

    info: spec.TraceInfo
    stack: str
    sites: Sequence[spec.Site]
    wanted: Sequence[str]

    def long(self, table: pa.Table) -> Mapping[str, Array]:
        """Returns the wanted columns of the rows of ``table``."""
        slots = np.concatenate(
            [np.arange(s.first_slot, s.first_slot + s.top_k) for s in self.sites]
        )
        return {name: self._column(name, table, slots) for name in self.wanted}

    def frame(self, pieces: Sequence[Mapping[str, Array]]) -> pd.DataFrame:
        """Returns the pieces as one frame; ``stack`` and ``phase`` are categorical."""
        series: dict[str, Any] = {}
        for name in self.wanted:
            joined = np.concatenate([self._empty(name), *(piece[name] for piece in pieces)])
            categories = {"stack": list(self.info.stacks), "phase": list(spec.TOKEN_PHASES)}
            if name in categories:
                series[name] = pd.Categorical.from_codes(
                    joined.astype(np.int64), categories=pd.Index(categories[name])
                )
            else:
                series[name] = joined
        return pd.DataFrame(series, columns=list(self.wanted))

    def _column(self, name: str, table: pa.Table, slots: Array) -> Array:
        num_rows, num_slots = table.num_rows, len(slots)
        if name == "stack":
            return np.full(num_rows * num_slots, self.info.stacks.index(self.stack), np.int8)
        if name in _SITE_COLUMNS:
            return np.tile(self._per_slot(name), num_rows)
        if name not in table.column_names:
            return np.full(num_rows * num_slots, np.nan, np.float32)
        column = table.column(name)
        if name == "phase":
            return np.repeat(blocks.phase_codes(column).astype(np.int8), num_slots)
        if spec.ROUTING.column(name).per_slot:
            values = blocks.fixed_lists(column, self.info.num_slots(self.stack))[:, slots]
            return values.astype(self._empty(name).dtype).reshape(-1)
        if name == "accepted":
            return np.repeat(column.to_numpy().astype(object), num_slots)
        return np.repeat(column.to_numpy(), num_slots)

    def _per_slot(self, name: str) -> Array:
        if name == "slot":
            return np.concatenate([np.arange(s.top_k, dtype=np.int16) for s in self.sites])
        values = [getattr(s, name) for s in self.sites]
        return np.repeat(np.array(values, np.int16), [s.top_k for s in self.sites])

    def _empty(self, name: str) -> Array:
        if name in ("stack", "phase"):
            return np.zeros(0, np.int8)
        if name == "slot":
            return np.zeros(0, np.int16)
        column = spec.ROUTING.column(name) if name not in ("layer", "site") else None
        if column is None:
            return np.zeros(0, np.int16)
        if column.name == "expert":
            return np.zeros(0, np.int32 if self.info.wide_ids(self.stack) else np.int16)
        if pa.types.is_floating(column.type):
            return np.zeros(0, np.float32)
        if column.nullable:
            return np.zeros(0, object)
        return np.zeros(0, column.type.to_pandas_dtype())


def _series(column: spec.Column, pieces: Sequence[pa.Table]) -> pd.Series[Any]:
    """Returns one column of the pieces; missing is null."""
    text = pa.types.is_dictionary(column.type) or pa.types.is_string(column.type)
    arrow_type = pa.string() if text else column.type
    if column.nullable and pa.types.is_integer(column.type):
        arrow_type = pa.float64()
    chunks = []
    for piece in pieces:
        if column.name in piece.column_names:
            chunks += piece.column(column.name).cast(arrow_type).chunks
        else:
            chunks.append(pa.nulls(piece.num_rows, arrow_type))
    series: pd.Series[Any] = pa.chunked_array(chunks, arrow_type).to_pandas()
    return series


def _of_phase(table: pa.Table, phases: frozenset[Any]) -> pa.Table:
    wanted = [index for index, name in enumerate(spec.TOKEN_PHASES) if name in phases]
    return table.filter(pa.array(np.isin(blocks.phase_codes(table.column("phase")), wanted)))


def _as_set(value: Any) -> frozenset[Any] | None:
    if value is None:
        return None
    if isinstance(value, (str, int, np.integer)):
        return frozenset([value])
    return frozenset(value)


def _read_info(store: Store) -> spec.TraceInfo:
    try:
        data = json.loads(store.read_text(spec.INFO_FILE))
    except FileNotFoundError as error:
        raise storage.not_a_trace(store.path) from error
    except ValueError as error:
        raise _bad_info(store, "is not valid JSON") from error
    if not isinstance(data, dict) or "schema_version" not in data:
        raise _bad_info(store, "is of another program: it has no schema_version")
    version = data["schema_version"]
    if not isinstance(version, int) or version < 1:
        raise _bad_info(store, f"has the schema_version {version!r}")
    if version > spec.SCHEMA_VERSION:
        raise TraceError(
            f"{store.path} was written by a newer moeprof (schema {version}, this one reads "
            f"{spec.SCHEMA_VERSION})",
            hint="pip install --upgrade moeprof",
        )
    try:
        return spec.info_from_json(data)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _bad_info(store, f"is not valid: {error}") from error


def _bad_info(store: Store, problem: str) -> TraceError:
    return TraceError(
        f"{store.path}: {spec.INFO_FILE} {problem}",
        hint="is this a moeprof trace? If so, copy it again from where it was recorded",
    )


def _read_logs(store: Store) -> tuple[RankLog, ...]:
    logs = []
    for name in store.file_names():
        match = _LOG_NAME.fullmatch(name)
        if match:
            rank = int(match.group(1))
            where = f"{store.path}/{name}"
            logs.append(commits.parse_log(store.read_text(name), rank=rank, where=where))
    return tuple(sorted(logs, key=lambda log: log.rank))


def _merge_info(info: spec.TraceInfo, logs: Sequence[RankLog]) -> spec.TraceInfo:
    """Returns ``info`` with what the other ranks left in their logs."""
    present = {log.rank for log in logs}
    world_size = max((entry.world_size for entry in info.ranks), default=1)
    expected = {entry.rank for entry in info.ranks} | set(range(world_size))
    missing = tuple(sorted(expected - present))
    known = {entry.rank: entry for entry in info.ranks}
    for log in logs:
        if log.coordinates is not None and log.rank:
            known[log.rank] = log.coordinates
    notes = [*info.notes]
    for log in logs:
        notes += [note for note in log.closing.get("notes", ()) if note not in notes]
    return dataclasses.replace(
        info,
        ranks=tuple(known[rank] for rank in sorted(known)),
        missing_ranks=missing,
        notes=tuple(notes),
        capture=_sum_counts(info.capture, [log.closing.get("capture") for log in logs]),
        complete=info.complete and not missing and all(log.closed for log in logs),
    )


def _sum_counts(
    first: spec.CaptureCounts, others: Sequence[Mapping[str, Any] | None]
) -> spec.CaptureCounts:
    totals = dataclasses.asdict(first)
    for other in others:
        for name, value in (other or {}).items():
            if isinstance(value, int) and name not in ("num_sites",) and name in totals:
                totals[name] += value
            elif name == "execution_note" and totals[name] is None:
                totals[name] = value
    return spec.CaptureCounts(**totals)
