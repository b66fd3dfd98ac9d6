"""The trace format: every table, column and `trace.json` field, spelled once.

`traces/README.md` is the prose of this module; a test holds the two together. Leaves out how
tables are written (`writer`) and read (`reader`).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1
TRACE_SUFFIX = ".moeprof"
INFO_FILE = "trace.json"
COMMIT_LOG_PREFIX = "commits"

PHASES = ("encode", "prefill", "decode", "mixed")
TOKEN_PHASES = PHASES[:3]
SITE_KINDS = ("ffn", "attention")
SLOT_ORDERS = ("by_weight", "by_score", "none")
COMPONENT_SOURCES = ("hook", "kernel")
TASKS = ("lm", "mt")
MODES = ("generate", "score", "forward", "import", "synthetic")

NO_EXPERT = -1
"""Expert id of a slot that holds no expert."""

MAX_INT16_EXPERT = 32767


class SlotStatus(IntEnum):
    """What happened to one routing slot of one token at one site."""

    ROUTED = 0
    """The site saw the token and applied the expert."""
    DROPPED = 1
    """The router chose the expert, its capacity was exhausted; the id is kept, the weight is 0."""
    PRUNED_LAST_LAYER = 2
    """The last layer did not see the token: only the last prompt token of a sequence went on."""
    EARLY_EXIT = 3
    """The token left the model before this layer."""
    UNUSED = 4
    """The site saw the token but filled fewer than top_k slots (adaptive k)."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        name: Column name; carries the unit suffix.
        type: Arrow type; for routing lists the element type.
        doc: What it holds, in one line.
        nullable: Null means "not seen"; never 0.
        per_slot: True for fixed-size lists over a stack's routing slots.
    """

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False
    per_slot: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of a trace.

    Attributes:
        name: Folder name inside the trace.
        row: What one row stands for.
        columns: In stored order.
        per_stack: True when each stack has its own subfolder.
        optional: True when a trace may lack it.
    """

    name: str
    row: str
    columns: tuple[Column, ...]
    per_stack: bool = False
    optional: bool = False

    def arrow_schema(self, *, num_slots: int = 0, wide_ids: bool = False) -> pa.Schema:
        """Returns the Arrow schema.

        Args:
            num_slots: Routing slots of the stack (sum of top_k over its sites).
            wide_ids: True where a site has more than 32,768 experts (ids as int32).
        """
        fields = []
        for column in self.columns:
            arrow_type = column.type
            if wide_ids and column.name == "expert" and column.per_slot:
                arrow_type = pa.int32()
            if column.per_slot:
                element = pa.field("element", arrow_type, nullable=False)
                arrow_type = pa.list_(element, num_slots)
            fields.append(pa.field(column.name, arrow_type, nullable=column.nullable))
        return pa.schema(fields)

    def column(self, name: str) -> Column:
        """Returns the column called ``name``; KeyError when there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)


_TEXT = pa.dictionary(pa.int32(), pa.string())


def _c(
    name: str,
    arrow_type: pa.DataType,
    doc: str,
    *,
    nullable: bool = False,
    per_slot: bool = False,
) -> Column:
    return Column(name=name, type=arrow_type, doc=doc, nullable=nullable, per_slot=per_slot)


_RANK = _c("rank", pa.int16(), "process rank under torch.distributed, else 0")
_STEP = _c("step", pa.int32(), "forward pass of one stack; one counter per rank over all stacks")
_STACK = _c("stack", _TEXT, "encoder or decoder (an LM is a decoder)")
_SITE = _c("site", pa.int16(), "MoE site id from trace.json")
_LAYER = _c("layer", pa.int16(), "model layer inside the stack, from 0")


def _ms(name: str, doc: str) -> Column:
    return _c(name, pa.float32(), doc, nullable=True)


REQUESTS = Table(
    name="requests",
    row="request; written when it starts and once more when it ends: the last row counts",
    columns=(
        _RANK,
        _c("request", pa.int32(), "request id, unique per rank"),
        _c("task", _TEXT, "lm or mt"),
        _c("domain", _TEXT, "label of the prompt's domain", nullable=True),
        _c("language", _TEXT, "target language (mt)", nullable=True),
        _c("source_language", _TEXT, "source language (mt)", nullable=True),
        _c(
            "prompt_id",
            pa.string(),
            "the caller's name for the prompt; never its text",
            nullable=True,
        ),
        _c("num_prompt_tokens", pa.int32(), "prompt tokens without padding", nullable=True),
        _c("num_output_tokens", pa.int32(), "tokens generated; null while running", nullable=True),
        _c("num_sequences", pa.int16(), "beams or samples"),
        _c("arrival_s", pa.float64(), "seconds since the trace started"),
        _c(
            "end_s",
            pa.float64(),
            "seconds since the trace started; null while running",
            nullable=True,
        ),
        _c("slo_ms", pa.float32(), "latency objective the caller set", nullable=True),
    ),
)

STEPS = Table(
    name="steps",
    row="(rank, step)",
    columns=(
        _RANK,
        _STEP,
        _STACK,
        _c("phase", _TEXT, "encode, prefill, decode, or mixed when tokens of both are present"),
        _c("batch", pa.int32(), "rows of the batch (requests x sequences)"),
        _c("num_tokens", pa.int32(), "tokens recorded: padding and finished rows left out"),
        _c("num_prefill_tokens", pa.int32(), "tokens whose position lies in the prompt"),
        _c("num_decode_tokens", pa.int32(), "tokens after the prompt"),
        _c("num_padded_tokens", pa.int32(), "padding rows and rows of finished sequences"),
        _c("probed", pa.bool_(), "executed rows were watched in this step: its times include that"),
        _c("start_s", pa.float64(), "seconds since the trace started, host clock"),
        _ms("wall_ms", "host time of the forward pass"),
        _ms("device_ms", "device time of the forward pass (CUDA events)"),
        _ms("embedding_ms", "embedding modules"),
        _ms("head_ms", "output head"),
        _ms("other_ms", "forward pass less embedding, head and layers"),
        _c("allocated_bytes", pa.int64(), "device memory allocated after the step", nullable=True),
        _c("reserved_bytes", pa.int64(), "device memory the allocator holds", nullable=True),
        _c(
            "peak_bytes",
            pa.int64(),
            "peak of allocated device memory within the step",
            nullable=True,
        ),
        _c(
            "process_bytes",
            pa.int64(),
            "resident memory of the process after the step",
            nullable=True,
        ),
    ),
)

LAYERS = Table(
    name="layers",
    row="(rank, step, layer, site); dense layers too",
    columns=(
        _RANK,
        _STEP,
        _STACK,
        _LAYER,
        _c("site", pa.int16(), "MoE site id; null for a dense layer", nullable=True),
        _c(
            "num_tokens",
            pa.int32(),
            "tokens recorded; null where the layer shows none",
            nullable=True,
        ),
        _c(
            "num_rows",
            pa.int32(),
            "tokens with padding; null where the layer shows none",
            nullable=True,
        ),
        _c(
            "num_active_experts",
            pa.int32(),
            "distinct experts of the recorded tokens",
            nullable=True,
        ),
        _ms("layer_ms", "the whole layer"),
        _ms("attention_ms", "attention modules (self and cross)"),
        _ms("dense_ffn_ms", "feed-forward module of a dense layer"),
        _ms("moe_ms", "the whole MoE block"),
        _ms("gate_ms", "router"),
        _ms("dispatch_ms", "bringing rows to experts, where a module shows it"),
        _ms("experts_ms", "the experts module; may hide dispatch and combine (see kernels)"),
        _ms("combine_ms", "bringing rows back, where a module shows it"),
        _ms("shared_experts_ms", "shared experts"),
        _c(
            "component_source", _TEXT, "hook or kernel; null where nothing was timed", nullable=True
        ),
        _c(
            "activation_peak_bytes",
            pa.int64(),
            "peak of allocated device memory within the layer less that at its start",
            nullable=True,
        ),
        _c(
            "capacity",
            pa.int32(),
            "slots per expert; null where the model has no capacity",
            nullable=True,
        ),
        _c("num_dropped", pa.int32(), "routing decisions dropped by capacity", nullable=True),
    ),
)

ROUTING = Table(
    name="routing",
    row="(rank, step, token row) of one stack; lists over that stack's sites x top_k, site-major",
    per_stack=True,
    columns=(
        _RANK,
        _STEP,
        _c("row", pa.int32(), "row of the flattened batch, padding rows counted"),
        _c("request", pa.int32(), "request id"),
        _c("sequence", pa.int16(), "beam or sample within the request"),
        _c(
            "parent_sequence",
            pa.int16(),
            "the sequence this one continued from (beam search); itself otherwise",
        ),
        _c("position", pa.int32(), "position in the sequence, padding left out"),
        _c("phase", _TEXT, "encode, prefill or decode"),
        _c(
            "accepted",
            pa.bool_(),
            "speculation: the token was kept; null without speculation",
            nullable=True,
        ),
        _c(
            "expert",
            pa.int16(),
            "expert ids in the model's slot order; -1 where none",
            per_slot=True,
        ),
        _c("status", pa.uint8(), "SlotStatus of each slot", per_slot=True),
        _c("weight", pa.float16(), "weight the model applied, rounded once", per_slot=True),
        _c("score", pa.float32(), "affinity before bias and renormalization", per_slot=True),
        _c(
            "selection_score",
            pa.float32(),
            "score the selection used, where it differs",
            per_slot=True,
        ),
    ),
)
"""Columns ``weight``, ``score`` and ``selection_score`` may be absent from a stack's files."""

OPTIONAL_ROUTING_COLUMNS = ("weight", "score", "selection_score")

EXECUTED = Table(
    name="executed",
    row="(rank, step, site, expert)",
    columns=(
        _RANK,
        _STEP,
        _SITE,
        _c("expert", pa.int32(), "expert id"),
        _c("num_routed_rows", pa.int32(), "rows the router sent, padding rows counted"),
        _c(
            "num_executed_rows",
            pa.int32(),
            "rows the expert ran on; null where it cannot be seen",
            nullable=True,
        ),
    ),
)

DEVICES = Table(
    name="devices",
    row="sample of one device",
    columns=(
        _RANK,
        _c("time_s", pa.float64(), "seconds since the trace started"),
        _c("device", pa.int16(), "device index"),
        _c("utilization_pct", pa.float32(), "share of time a kernel ran", nullable=True),
        _c("memory_used_bytes", pa.int64(), "device memory in use, all processes", nullable=True),
        _c("power_w", pa.float32(), "board power", nullable=True),
        _c("energy_j", pa.float64(), "energy counter since driver load", nullable=True),
        _c(
            "pcie_tx_bytes",
            pa.int64(),
            "PCIe bytes sent by the device since the first sample",
            nullable=True,
        ),
        _c(
            "pcie_rx_bytes",
            pa.int64(),
            "PCIe bytes received by the device since the first sample",
            nullable=True,
        ),
    ),
)

KERNELS = Table(
    name="kernels",
    row="(rank, profiled step, layer, region, component); from a short pass of its own",
    optional=True,
    columns=(
        _RANK,
        _c("profile_step", pa.int32(), "forward pass within the profiled pass"),
        _STACK,
        _c("phase", _TEXT, "encode, prefill or decode"),
        _LAYER,
        _c("site", pa.int16(), "MoE site id"),
        _c("region", _TEXT, "module the kernels ran in: experts, or block outside experts"),
        _c("component", _TEXT, "dispatch, experts, combine or unclassified"),
        _c("device_ms", pa.float32(), "kernel time (CPU operator self time without a GPU)"),
        _c("num_kernels", pa.int32(), "kernels or operators counted"),
    ),
)

_TOKEN_KEYS = (_RANK, _STEP, _c("row", pa.int32(), "row of the flattened batch"))

SCORES = Table(
    name="scores",
    row="(rank, step, token row, site)",
    optional=True,
    columns=(*_TOKEN_KEYS, _SITE, _c("score", pa.list_(pa.float16()), "affinity to all experts")),
)
LOOKAHEAD = Table(
    name="lookahead",
    row="(rank, step, token row, site, later site)",
    optional=True,
    columns=(
        *_TOKEN_KEYS,
        _SITE,
        _c("later_site", pa.int16(), "the site whose gate was applied"),
        _c("score", pa.list_(pa.float16()), "its scores on this site's input"),
    ),
)
NORMS = Table(
    name="norms",
    row="(rank, step, token row, site)",
    optional=True,
    columns=(
        *_TOKEN_KEYS,
        _SITE,
        _c("norm", pa.list_(pa.float16()), "L2 norm of each selected expert's output"),
    ),
)
HIDDEN = Table(
    name="hidden",
    row="(rank, step, token row, site), sampled",
    optional=True,
    columns=(*_TOKEN_KEYS, _SITE, _c("hidden", pa.list_(pa.float16()), "gate input")),
)
TOKEN_IDS = Table(
    name="token_ids",
    row="(rank, step, token row)",
    optional=True,
    columns=(*_TOKEN_KEYS, _c("token_id", pa.int32(), "vocabulary id; stored only when asked for")),
)

RESERVED = (SCORES, LOOKAHEAD, NORMS, HIDDEN, TOKEN_IDS)
TABLES: Mapping[str, Table] = types.MappingProxyType(
    {
        table.name: table
        for table in (
            REQUESTS,
            STEPS,
            LAYERS,
            ROUTING,
            EXECUTED,
            DEVICES,
            KERNELS,
            *RESERVED,
        )
    }
)


@dataclass(frozen=True, kw_only=True)
class CapacityRule:
    """How a site bounds the tokens per expert.

    Attributes:
        rule: ``token_fraction`` (slots = ceil(value x tokens)), ``capacity_factor``
            (slots = ceil(value x k x tokens / E)) or ``fixed`` (slots = value).
        value: The parameter.
    """

    rule: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Site:
    """One MoE site: a router with its experts.

    Attributes:
        site: Id, unique in the trace; the order of ids within a stack is execution order.
        stack: ``encoder`` or ``decoder``.
        layer: Model layer inside the stack.
        kind: ``ffn`` or ``attention`` (mixtures of attention experts).
        name: Qualified module name.
        num_experts: Routed experts.
        top_k: Routing slots per token.
        first_slot: Offset of this site's slots in the stack's routing lists.
        expert_bytes: Bytes of one routed expert's parameters.
        matrices_per_expert: Weight matrices of one expert (2 ungated, 3 gated).
        d_model: Width of the residual stream.
        d_ff: Hidden width of one expert.
        num_shared_experts: Experts every token passes.
        shared_expert_bytes: Bytes of all shared experts together.
        scoring: ``softmax``, ``sigmoid``, ``softmax_topk`` or None when not established.
        renormalized: True when applied weights sum to scaling_factor; None when not established.
        scaling_factor: Constant the weights were multiplied by; None when not established.
        selection_bias: Per-expert bias used for selection only; None where the model has none.
        capacity_rule: None where the model never drops.
        slot_order: Meaning of the slot order.
        runs_all_experts: True where every expert runs on every row by design, whatever is routed.
        adapter: How the recorder reads this site.
    """

    site: int
    stack: str
    layer: int
    kind: str = "ffn"
    name: str = ""
    num_experts: int
    top_k: int
    first_slot: int
    expert_bytes: int
    matrices_per_expert: int | None = None
    d_model: int | None = None
    d_ff: int | None = None
    num_shared_experts: int = 0
    shared_expert_bytes: int = 0
    scoring: str | None = None
    renormalized: bool | None = None
    scaling_factor: float | None = None
    selection_bias: tuple[float, ...] | None = None
    capacity_rule: CapacityRule | None = None
    slot_order: str = "none"
    runs_all_experts: bool = False
    adapter: str = ""


@dataclass(frozen=True, kw_only=True)
class StaticBytes:
    """Bytes of parameters and buffers by part; shared storage is counted once."""

    embedding: int = 0
    attention: int = 0
    dense_ffn: int = 0
    experts: int = 0
    shared_experts: int = 0
    router: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model that was recorded."""

    name: str
    architecture: str = ""
    task: str = "lm"
    revision: str | None = None
    weight_hash: str | None = None
    dtype: str = ""
    num_layers: Mapping[str, int] = field(default_factory=dict)
    static_bytes: StaticBytes | None = None
    random_weights: bool = False
    """True where the weights were never trained: its routing means nothing."""
    fixes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Parallelism coordinates of one process."""

    rank: int = 0
    world_size: int = 1
    tensor_parallel: int = 0
    pipeline_parallel: int = 0
    expert_parallel: int = 0
    data_parallel: int = 0


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where the run happened; None where the machine does not say."""

    device: str = "cpu"
    device_name: str | None = None
    device_memory_bytes: int | None = None
    num_devices: int = 0
    driver: str | None = None
    cpu_name: str | None = None
    num_cpus: int | None = None
    host_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CaptureCounts:
    """What the recorder saw against what it should have seen.

    Attributes:
        num_sites: Sites found in the model.
        num_calls_expected: Site calls expected: steps x sites of their stack.
        num_calls_seen: Site calls captured.
        num_tokens_seen: Token rows that passed the stacks, padding left out.
        num_tokens_recorded: Token rows written.
        num_tokens_dropped: Token rows that could not be kept (memory bound, unattributable).
        num_padded_tokens: Padding rows and rows of finished sequences, left out.
        num_executed_checked: Dispatches whose executed rows were counted.
        num_executed_disagreeing: Those whose executed rows differ from the routed rows.
        execution_note: One line on the first disagreement.
    """

    num_sites: int = 0
    num_calls_expected: int = 0
    num_calls_seen: int = 0
    num_tokens_seen: int = 0
    num_tokens_recorded: int = 0
    num_tokens_dropped: int = 0
    num_padded_tokens: int = 0
    num_executed_checked: int = 0
    num_executed_disagreeing: int = 0
    execution_note: str | None = None


@dataclass(frozen=True, kw_only=True)
class TraceInfo:
    """Everything in `trace.json`.

    Attributes:
        schema_version: Version of this format.
        created: ISO 8601 time the recording started, UTC.
        model: The model.
        sites: All MoE sites, by id.
        mode: ``generate``, ``score``, ``forward``, ``import`` or ``synthetic``.
        command: The command line, or the call that made the trace.
        kernels: Experts implementation per phase, as the model reported it.
        capture: Counters, final once ``complete``.
        ranks: One entry per rank that wrote.
        missing_ranks: Ranks whose parts are missing.
        hardware: Where it ran.
        versions: Package versions.
        notes: Sentences every reader should see (random weights, disagreeing execution, ...).
        complete: False until the recording ended in good order.
        origin: Source, commit and licence of an imported trace.
        settings: Recorder settings that change what the columns mean.
    """

    schema_version: int = SCHEMA_VERSION
    created: str = ""
    model: ModelInfo
    sites: tuple[Site, ...]
    mode: str = "generate"
    command: str = ""
    kernels: Mapping[str, str] = field(default_factory=dict)
    capture: CaptureCounts = field(default_factory=CaptureCounts)
    ranks: tuple[RankInfo, ...] = (RankInfo(),)
    missing_ranks: tuple[int, ...] = ()
    hardware: Hardware = field(default_factory=Hardware)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    complete: bool = False
    origin: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Stacks that hold MoE sites, encoder first."""
        return tuple(sorted({site.stack for site in self.sites}, key=_stack_rank))

    def sites_of(self, stack: str) -> tuple[Site, ...]:
        """Returns the sites of ``stack`` in execution order."""
        found = [site for site in self.sites if site.stack == stack]
        return tuple(sorted(found, key=lambda site: site.first_slot))

    def num_slots(self, stack: str) -> int:
        """Returns the routing slots of ``stack``: the sum of top_k over its sites."""
        return sum(site.top_k for site in self.sites_of(stack))

    def wide_ids(self, stack: str) -> bool:
        """Returns True where expert ids of ``stack`` need int32."""
        return any(site.num_experts - 1 > MAX_INT16_EXPERT for site in self.sites_of(stack))

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for `trace.json`."""
        return typing.cast("dict[str, Any]", _plain(self))


def _stack_rank(stack: str) -> tuple[int, str]:
    order = {"encoder": 0, "decoder": 1}
    return order.get(stack, 2), stack


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def info_from_json(data: Mapping[str, Any]) -> TraceInfo:
    """Returns the `TraceInfo` held by plain data.

    Fields this version does not know are ignored; missing ones take their defaults.

    Raises:
        TypeError: A required field is missing or has the wrong shape.
    """
    return typing.cast("TraceInfo", _build(TraceInfo, data))


def _build(kind: Any, data: Any) -> Any:
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return _build(next(a for a in arguments if a is not type(None)), data)
    if origin is tuple:
        return tuple(_build(arguments[0], item) for item in data)
    if origin is not None and issubclass(origin, Mapping):
        return dict(data)
    if dataclasses.is_dataclass(kind):
        if not isinstance(data, Mapping):
            raise TypeError(f"{kind} needs an object, got {type(data).__name__}")
        hints = typing.get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        return typing.cast("Any", kind)(
            **{name: _build(hints[name], item) for name, item in data.items() if name in known}
        )
    if kind is float and isinstance(data, int):
        return float(data)
    return data
