"""What there is to know about a trace before any analysis.

Leaves out judgement (`validator`) and everything that needs the routing itself (`replay`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moeprof.trace.reader import Trace


def trace_facts(trace: Trace) -> dict[str, Any]:
    """Returns what there is to know about a trace before any analysis."""
    info = trace.info
    rows = {
        stack: sum(part.num_rows for part in trace.parts(f"routing/{stack}"))
        for stack in trace.stacks
    }
    decisions = sum(rows[stack] * info.num_slots(stack) for stack in trace.stacks)
    routing_bytes = sum(
        part.num_bytes for stack in trace.stacks for part in trace.parts(f"routing/{stack}")
    )
    sites = [
        f"{stack}: {len(info.sites_of(stack))} sites, "
        f"{_span(site.num_experts for site in info.sites_of(stack))} experts, "
        f"top {_span(site.top_k for site in info.sites_of(stack))}"
        for stack in trace.stacks
    ]
    hardware = info.hardware
    return {
        "trace": str(trace.path),
        "schema_version": info.schema_version,
        "complete": trace.complete,
        "missing_ranks": list(info.missing_ranks),
        "created": info.created,
        "command": info.command,
        "model": info.model.name,
        "architecture": info.model.architecture,
        "dtype": info.model.dtype,
        "random_weights": info.model.random_weights,
        "fixes": list(info.model.fixes),
        "mode": info.mode,
        "device": hardware.device_name or hardware.cpu_name or hardware.device,
        "versions": dict(info.versions),
        "sites": sites,
        "requests": len(trace.requests),
        "steps": sum(part.num_rows for part in trace.parts("steps")),
        "tokens": rows,
        "decisions": decisions,
        "size_bytes": trace.num_bytes,
        "routing_bytes": routing_bytes,
        "routing_bytes_per_decision": routing_bytes / decisions if decisions else None,
        "notes": list(info.notes),
    }


def _span(values: Iterable[int]) -> str:
    """Returns one number, or the smallest and largest of several."""
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
