"""Judges whether the content of a trace can be trusted.

Every rule has a stable code. Damage inside the parts is reported, not raised; what cannot be
opened at all (`reader.open_trace`) still raises. Leaves out the rules on single routing rows
(`routing_rules`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moeprof.errors import TraceError
from moeprof.trace import blocks, encoding, parts
from moeprof.trace import schema as spec
from moeprof.trace.commits import Part, RankLog
from moeprof.trace.problems import Problem, Problems
from moeprof.trace.reader import Trace, open_trace
from moeprof.trace.routing_rules import RoutingRules, SiteCounts

__all__ = ["CheckResult", "Problem", "check"]

Array = np.ndarray[Any, Any]

_EXTRA_COLUMNS = ("row", "parent_sequence", "accepted")
_SHOWN_EXPERTS = 4


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What `check` found.

    Attributes:
        problems: All problems, worst first.
        num_steps: Steps checked.
        num_tokens: Token rows checked.
        num_decisions: Routing slots checked.
    """

    problems: tuple[Problem, ...]
    num_steps: int
    num_tokens: int
    num_decisions: int

    @property
    def ok(self) -> bool:
        """True where no problem is an error."""
        return not any(problem.severity == "error" for problem in self.problems)

    @property
    def codes(self) -> frozenset[str]:
        """Codes of all problems."""
        return frozenset(problem.code for problem in self.problems)


@dataclass(frozen=True)
class _Rank:
    """One rank under judgement."""

    log: RankLog
    label: str

    @property
    def number(self) -> int:
        return self.log.rank


def check(trace: Trace | str | os.PathLike[str]) -> CheckResult:
    """Judges a trace.

    Args:
        trace: A trace, or where it is.

    Raises:
        TraceError: It cannot be opened.
    """
    opened = trace if isinstance(trace, Trace) else open_trace(trace)
    problems = Problems()
    _check_info(opened, problems)
    sound = _check_parts(opened, problems)
    num_tokens = num_decisions = num_steps = 0
    for log in opened.logs:
        rank = _Rank(log, f" on rank {log.rank}" if len(opened.logs) > 1 else "")
        counts: dict[str, SiteCounts] = {}
        if _geometry_is_sound(opened, problems):
            for stack in opened.stacks:
                rules = _stream(opened, rank, stack, sound, problems)
                if rules is None:
                    continue
                num_tokens += rules.num_tokens
                num_decisions += rules.num_tokens * opened.info.num_slots(stack)
                summed = rules.finish()
                if summed is not None:
                    counts[stack] = summed
        num_steps += _check_tables(opened, rank, counts, sound, problems)
    if opened.complete and opened.info.mode != "import" and opened.info.capture.num_tokens_seen:
        _check_recorded(opened, num_tokens, problems)
    _check_execution_count(opened.info.capture, problems)
    return CheckResult(
        problems=problems.sorted(),
        num_steps=num_steps,
        num_tokens=num_tokens,
        num_decisions=num_decisions,
    )


def _check_info(trace: Trace, problems: Problems) -> None:
    """Judges `trace.json`: completeness, ranks, counters, notes."""
    info, capture = trace.info, trace.info.capture
    if not trace.complete:
        problems.add(
            "incomplete",
            "the recording did not end in good order: steps after the last commit are lost",
            severity="warning",
        )
    for rank in info.missing_ranks:
        problems.add("rank_missing", "{where} is missing", where=f"rank {rank}")
    if capture.num_calls_seen < capture.num_calls_expected:
        problems.add(
            "calls_missing",
            f"{capture.num_calls_expected - capture.num_calls_seen:,} of "
            f"{capture.num_calls_expected:,} calls of MoE layers were not seen",
        )
    kept = capture.num_tokens_recorded + capture.num_tokens_dropped
    if kept != capture.num_tokens_seen and trace.complete:
        problems.add(
            "tokens_unaccounted",
            f"{capture.num_tokens_seen:,} tokens were seen, {capture.num_tokens_recorded:,} "
            f"recorded and {capture.num_tokens_dropped:,} dropped: that does not add up",
        )
    if capture.num_tokens_dropped:
        problems.add(
            "tokens_dropped",
            f"{capture.num_tokens_dropped:,} tokens could not be kept",
            severity="warning",
        )
    for index, note in enumerate(info.notes):
        problems.add("note", _literal(note), severity="note", where=f"note {index + 1}")


def _geometry_is_sound(trace: Trace, problems: Problems) -> bool:
    """Judges the sites; False where routing cannot be read by them."""
    sound = True
    ids = [site.site for site in trace.sites]
    if not ids or len(set(ids)) != len(ids):
        problems.add("bad_geometry", "trace.json must name at least one site, each once")
        sound = False
    for stack in trace.stacks:
        first_slot = 0
        for site in trace.info.sites_of(stack):
            if site.first_slot != first_slot or not 1 <= site.top_k <= site.num_experts:
                problems.add(
                    "bad_geometry",
                    "{where}: its slots or experts make no sense "
                    f"(first_slot {site.first_slot}, top_k {site.top_k}, "
                    f"num_experts {site.num_experts})",
                    where=f"site {site.site}",
                )
                sound = False
            first_slot += site.top_k
    return sound


def _check_parts(trace: Trace, problems: Problems) -> frozenset[str]:
    """Judges the files; returns the paths of those that can be read."""
    sound = set()
    for log in trace.logs:
        for part in log.parts:
            try:
                with parts.OpenPart(trace.store, part) as opened:
                    columns, num_rows = opened.names, opened.num_rows
            except TraceError as error:
                problems.add("part_damaged", _literal(error.message), where=part.path)
                continue
            if _columns_are_sound(part, columns, problems):
                sound.add(part.path)
            if num_rows != part.num_rows:
                problems.add(
                    "part_rows",
                    f"{{where}} holds {num_rows:,} rows where {part.num_rows:,} were committed",
                    table=part.table,
                    where=part.path,
                )
    return frozenset(sound)


def _columns_are_sound(part: Part, columns: Sequence[str], problems: Problems) -> bool:
    if part.table.partition("/")[0] not in spec.TABLES:
        return False
    missing = [
        column.name
        for column in encoding.table_of(part.table).columns
        if column.name not in columns
        and not column.nullable
        and column.name not in spec.OPTIONAL_ROUTING_COLUMNS
    ]
    if missing:
        problems.add(
            "column_missing",
            f"{{where}} lacks the column {', '.join(missing)}",
            table=part.table,
            where=part.path,
        )
    return not missing


def _stream(
    trace: Trace, rank: _Rank, stack: str, sound: frozenset[str], problems: Problems
) -> RoutingRules | None:
    """Feeds the routing of one stack and rank to the rules."""
    name = f"routing/{stack}"
    committed = [part for part in rank.log.parts if part.table == name and part.path in sound]
    if not committed:
        return None
    weighted = trace.has_column(name, "weight")
    rules = RoutingRules(
        problems,
        stack=stack,
        sites=trace.info.sites_of(stack),
        rank=rank.number,
        weighted=weighted,
        label=rank.label,
    )
    try:
        for rows in blocks.stream_rows(
            trace.store,
            committed,
            num_slots=trace.info.num_slots(stack),
            weights=weighted,
            extra=_EXTRA_COLUMNS,
        ):
            rules.feed(rows)
    except TraceError as error:
        problems.add("part_damaged", _literal(error.message), table=name, where=name + rank.label)
    return rules


def _check_tables(
    trace: Trace,
    rank: _Rank,
    counts: dict[str, SiteCounts],
    sound: frozenset[str],
    problems: Problems,
) -> int:
    """Compares the tables of one rank with its routing; returns the number of steps."""
    frames = {
        name: _frame(trace, rank, name, sound, problems)
        for name in ("steps", "layers", "executed", "requests")
    }
    steps = frames["steps"]
    if steps is not None:
        _check_steps(trace, rank, steps, counts, problems)
    if frames["layers"] is not None and len(frames["layers"]):
        _check_layers(trace, rank, frames["layers"], counts, problems)
    if frames["executed"] is not None and len(frames["executed"]):
        _check_executed(trace, rank, frames["executed"], counts, problems)
    if frames["requests"] is not None and frames["requests"].shape[0]:
        _check_requests(trace, rank, frames["requests"], sound, problems)
    return 0 if steps is None else len(steps)


def _frame(
    trace: Trace, rank: _Rank, name: str, sound: frozenset[str], problems: Problems
) -> pd.DataFrame | None:
    """Returns the rows of one rank; None where a part of them cannot be read."""
    committed = [part for part in rank.log.parts if part.table == name]
    if any(part.path not in sound for part in committed):
        return None
    try:
        return Trace(trace.store, trace.info, [rank.log]).table(name)
    except TraceError as error:
        problems.add("part_damaged", _literal(error.message), table=name, where=name + rank.label)
        return None


def _check_steps(
    trace: Trace,
    rank: _Rank,
    steps: pd.DataFrame,
    counts: dict[str, SiteCounts],
    problems: Problems,
) -> None:
    table, where = "steps", f"steps{rank.label}"
    numbers = np.sort(steps["step"].to_numpy())
    gaps = np.diff(numbers)
    if (gaps == 0).any():
        problems.add(
            "doubled_step_row",
            "{where}: {count} steps are listed twice (first: {first})",
            table=table,
            where=where,
            count=int((gaps == 0).sum()),
            first=f"step {numbers[1:][gaps == 0][0]}",
        )
    if (gaps > 1).any():
        problems.add(
            "step_gap",
            "{where}: {count} gaps in the step numbers (first: {first})",
            table=table,
            where=where,
            count=int((gaps > 1).sum()),
            first=f"after step {numbers[:-1][gaps > 1][0]}",
        )
    for stack in trace.stacks:
        of_stack = steps[steps["stack"] == stack].drop_duplicates("step")
        summed = counts.get(stack)
        if summed is None:
            if (of_stack["num_tokens"] > 0).any():
                problems.add(
                    "step_tokens",
                    "{where}: steps name tokens, and there is no routing",
                    table=table,
                    where=stack + rank.label,
                )
            continue
        _compare_steps(of_stack, stack + rank.label, summed, problems)


def _compare_steps(steps: pd.DataFrame, where: str, summed: SiteCounts, problems: Problems) -> None:
    routed = pd.DataFrame(
        {
            "step": summed.steps,
            "rows": summed.num_tokens,
            "prefill": summed.num_prefill,
            "decode": summed.num_decode,
        }
    )
    both = steps.merge(routed, on="step", how="outer", indicator=True)
    unknown = both[both["_merge"] == "right_only"]
    if len(unknown):
        problems.add(
            "step_unknown",
            "{where}: {count} steps have routing and no row in steps (first: {first})",
            table="steps",
            where=where,
            count=len(unknown),
            first=f"step {unknown['step'].iloc[0]}",
        )
    known = both[both["_merge"] != "right_only"].fillna({"rows": 0, "prefill": 0, "decode": 0})
    wrong = known[known["num_tokens"] != known["rows"]]
    if len(wrong):
        first = wrong.iloc[0]
        problems.add(
            "step_tokens",
            "{where}: {count} steps name another number of tokens than routing holds "
            "(first: {first})",
            table="steps",
            where=where,
            count=len(wrong),
            first=f"step {first['step']}: {int(first['num_tokens'])} named, "
            f"{int(first['rows'])} recorded",
        )
    expected = np.select(
        [
            (known["decode"] > 0) & (known["decode"] < known["rows"]),
            known["decode"] > 0,
            known["prefill"] > 0,
            known["rows"] > 0,
        ],
        ["mixed", "decode", "prefill", "encode"],
        default="",
    )
    odd = known[
        (known["num_tokens"] == known["rows"])
        & (
            (known["num_decode_tokens"] != known["decode"])
            | ((expected != known["phase"].to_numpy()) & (expected != ""))
        )
    ]
    if len(odd):
        problems.add(
            "step_phase",
            "{where}: {count} steps name another phase than their tokens have (first: {first})",
            table="steps",
            where=where,
            count=len(odd),
            first=f"step {odd['step'].iloc[0]}",
        )


def _check_layers(
    trace: Trace,
    rank: _Rank,
    layers: pd.DataFrame,
    counts: dict[str, SiteCounts],
    problems: Problems,
) -> None:
    of_sites = layers.dropna(subset=["site"])
    doubled = of_sites.duplicated(["step", "site"])
    if doubled.any():
        problems.add(
            "doubled_dispatch",
            "{where}: {count} rows repeat the (step, site) of another (first: {first})",
            table="layers",
            where=f"layers{rank.label}",
            count=int(doubled.sum()),
            first=f"step {of_sites[doubled]['step'].iloc[0]}",
        )
    for stack, summed in counts.items():
        for index, site in enumerate(trace.info.sites_of(stack)):
            where = f"site {site.site} ({stack} layer {site.layer}){rank.label}"
            rows = of_sites[of_sites["site"] == site.site].drop_duplicates("step")
            both = _routed_frame(summed, index).merge(rows, on="step", how="left", indicator=True)
            missing = both[(both["_merge"] == "left_only") & (both["seen"] > 0)]
            if len(missing):
                problems.add(
                    "dispatch_missing",
                    "{where}: {count} dispatches have routing and no row in layers "
                    "(first: {first})",
                    table="layers",
                    where=where,
                    count=len(missing),
                    first=f"step {missing['step'].iloc[0]}",
                )
            _compare_layer(both[both["_merge"] == "both"], where, problems)


def _routed_frame(summed: SiteCounts, index: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "step": summed.steps,
            **{
                name: getattr(summed, name)[:, index]
                for name in ("seen", "routed", "dropped", "active", "busiest")
            },
        }
    )


def _compare_layer(both: pd.DataFrame, where: str, problems: Problems) -> None:
    rules = (
        ("layer_tokens", "num_tokens", "seen", "tokens"),
        ("layer_active_experts", "num_active_experts", "active", "active experts"),
        ("layer_dropped", "num_dropped", "dropped", "dropped decisions"),
    )
    for code, column, counted, noun in rules:
        wrong = both[both[column].notna() & (both[column] != both[counted])]
        if len(wrong):
            first = wrong.iloc[0]
            problems.add(
                code,
                f"{{where}}: {{count}} dispatches name another number of {noun} than routing holds "
                "(first: {first})",
                table="layers",
                where=where,
                count=len(wrong),
                first=f"step {first['step']}: {int(first[column])} named, "
                f"{int(first[counted])} in routing",
            )
    over = both[both["capacity"].notna() & (both["busiest"] > both["capacity"])]
    if len(over):
        first = over.iloc[0]
        problems.add(
            "capacity_exceeded",
            "{where}: in {count} dispatches an expert took more decisions than its capacity "
            "(first: {first})",
            table="layers",
            where=where,
            count=len(over),
            first=f"step {first['step']}: {int(first['busiest'])} of {int(first['capacity'])}",
        )


def _check_executed(
    trace: Trace,
    rank: _Rank,
    executed: pd.DataFrame,
    counts: dict[str, SiteCounts],
    problems: Problems,
) -> None:
    names = {
        site.site: f"site {site.site} ({site.stack} layer {site.layer}){rank.label}"
        for site in trace.sites
    }
    dense = [site.site for site in trace.sites if site.runs_all_experts]
    visible = executed[executed["num_executed_rows"].notna() & ~executed["site"].isin(dense)]
    differs = visible["num_executed_rows"] != visible["num_routed_rows"]
    for number in visible[differs]["site"].unique().tolist():
        rows = visible[visible["site"] == number]
        wrong = rows[rows["num_executed_rows"] != rows["num_routed_rows"]]
        ran = rows[rows["num_executed_rows"] > 0]["expert"].unique()
        chosen = rows[rows["num_routed_rows"] > 0]["expert"].nunique()
        problems.add(
            "executed_disagrees",
            "{where}: the experts did not run what the router chose in {count} of "
            f"{rows['step'].nunique():,} dispatches: {int(rows['num_routed_rows'].sum()):,} rows "
            f"routed to {chosen} experts, {int(rows['num_executed_rows'].sum()):,} executed by "
            f"{_some_experts(ran)}",
            table="executed",
            where=names.get(number, f"site {number}"),
            count=int(wrong["step"].nunique()),
        )
    totals = executed.groupby(["site", "step"])["num_routed_rows"].sum()
    for stack, summed in counts.items():
        for index, site in enumerate(trace.info.sites_of(stack)):
            if site.site not in totals.index.get_level_values("site"):
                continue
            sent = totals.loc[site.site]
            routed = pd.Series(summed.routed[:, index], index=summed.steps)
            common = sent.index.intersection(routed.index)
            fewer = sent.loc[common] < routed.loc[common]
            if fewer.any():
                problems.add(
                    "executed_too_few",
                    "{where}: in {count} dispatches fewer rows were sent than routing holds "
                    "(first: {first})",
                    table="executed",
                    where=names[site.site],
                    count=int(fewer.sum()),
                    first=f"step {fewer.index[fewer.to_numpy()][0]}",
                )


def _some_experts(ran: Array) -> str:
    if not len(ran):
        return "none"
    shown = ", ".join(str(expert) for expert in np.sort(ran)[:_SHOWN_EXPERTS])
    more = f" and {len(ran) - _SHOWN_EXPERTS} more" if len(ran) > _SHOWN_EXPERTS else ""
    return f"experts {shown}{more}" if len(ran) > 1 else f"expert {shown}"


def _check_requests(
    trace: Trace,
    rank: _Rank,
    requests: pd.DataFrame,
    sound: frozenset[str],
    problems: Problems,
) -> None:
    """Compares positions with the lengths of the requests, stack by stack."""
    last = requests.drop_duplicates("request", keep="last").set_index("request")
    for stack in trace.stacks:
        name = f"routing/{stack}"
        committed = [part for part in rank.log.parts if part.table == name]
        if not committed or any(part.path not in sound for part in committed):
            continue
        extents = _extents(Trace(trace.store, trace.info, [rank.log]), name, problems)
        if extents is None:
            continue
        where = stack + rank.label
        unknown = extents.index.difference(last.index)
        if len(unknown):
            problems.add(
                "request_unknown",
                "{where}: {count} requests have routing and no row in requests (first: {first})",
                severity="warning",
                table="requests",
                where=where,
                count=len(unknown),
                first=f"request {unknown[0]}",
            )
        if trace.model.task == "lm":
            _compare_lengths(extents.join(last, how="inner"), where, problems)


def _extents(trace: Trace, name: str, problems: Problems) -> pd.DataFrame | None:
    """Returns per request the last prompt, first decode and last decode position."""
    pieces = []
    try:
        for part in trace.parts(name):
            for table in parts.read_part(
                trace.store,
                part,
                columns=("request", "position", "phase"),
                steps=parts.StepFilter(),
            ):
                codes = blocks.phase_codes(table.column("phase"))
                decode = codes == spec.TOKEN_PHASES.index("decode")
                position = table.column("position").to_numpy().astype(np.float64)
                frame = pd.DataFrame({"request": table.column("request").to_numpy()})
                frame["last_prompt"] = np.where(decode, np.nan, position)
                frame["last_decode"] = np.where(decode, position, np.nan)
                frame["first_decode"] = frame["last_decode"]
                rules = {"last_prompt": "max", "last_decode": "max", "first_decode": "min"}
                pieces.append(frame.groupby("request").agg(rules))
    except TraceError as error:
        problems.add("part_damaged", _literal(error.message), table=name, where=name)
        return None
    if not pieces:
        return None
    return (
        pd.concat(pieces)
        .groupby(level=0)
        .agg({"last_prompt": "max", "last_decode": "max", "first_decode": "min"})
    )


def _compare_lengths(both: pd.DataFrame, where: str, problems: Problems) -> None:
    prompt, output = both["num_prompt_tokens"], both["num_output_tokens"]
    beyond = (both["last_prompt"] >= prompt) | (
        (both["last_decode"] >= prompt + output) & (both["num_sequences"] == 1)
    )
    if beyond.any():
        problems.add(
            "padding_recorded",
            "{where}: {count} requests have tokens beyond their length, as recorded padding or "
            "finished rows (first: {first})",
            table="routing",
            where=where,
            count=int(beyond.sum()),
            first=f"request {both.index[beyond.to_numpy()][0]}",
        )
    early = both["first_decode"] < prompt
    if early.any():
        problems.add(
            "token_phase",
            "{where}: {count} requests have decode tokens inside their prompt (first: {first})",
            table="routing",
            where=where,
            count=int(early.sum()),
            first=f"request {both.index[early.to_numpy()][0]}",
        )


def _check_recorded(trace: Trace, num_tokens: int, problems: Problems) -> None:
    recorded = trace.info.capture.num_tokens_recorded
    damaged = problems.has("part_damaged") or problems.has("rank_missing")
    if recorded != num_tokens and not damaged:
        problems.add(
            "tokens_recorded",
            f"trace.json counts {recorded:,} recorded tokens, routing holds {num_tokens:,}",
        )


def _check_execution_count(capture: spec.CaptureCounts, problems: Problems) -> None:
    """Reports what the recorder saw disagree where the table `executed` does not show it."""
    if capture.num_executed_disagreeing and not problems.has("executed_disagrees"):
        note = f": {capture.execution_note}" if capture.execution_note else ""
        problems.add(
            "executed_disagrees",
            "the experts did not run what the router chose in "
            f"{capture.num_executed_disagreeing:,} of {capture.num_executed_checked:,} dispatches"
            f"{_literal(note)}",
        )


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
