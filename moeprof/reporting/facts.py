"""What was recorded, where and how: run facts, banners, and findings about the recording itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moeprof.replay import wording
from moeprof.replay.result import SEVERITY_INVALID, SEVERITY_WARNING, Finding
from moeprof.reporting.layout import FactData
from moeprof.trace import schema
from moeprof.trace.reader import Trace

SECTION = "run"

_HASH_LENGTH = 12
_MAX_COMMAND = 400
_LISTED_PACKAGES = ("moeprof", "torch", "transformers", "numpy", "pyarrow", "python")


def recording_findings(trace: Trace) -> list[Finding]:
    """Returns what has to be known about a recording before any of its numbers, worst first."""
    info, capture = trace.info, trace.info.capture
    findings = []

    def add(text: str, severity: int) -> None:
        findings.append(Finding(text=text, severity=severity, section=SECTION))

    if capture.num_executed_disagreeing:
        note = f" ({capture.execution_note.rstrip('.')})" if capture.execution_note else ""
        add(
            f"The model executes other experts than its router chose: rows executed disagree with "
            f"rows routed in {capture.num_executed_disagreeing:,} of "
            f"{capture.num_executed_checked:,} dispatches{note}. Its outputs are wrong, and times "
            "and memory are those of the wrong computation.",
            SEVERITY_INVALID,
        )
    if info.missing_ranks:
        ranks = ", ".join(str(rank) for rank in info.missing_ranks)
        add(
            f"Parts of rank {ranks} are missing: loads and reuse are too small.",
            SEVERITY_INVALID - 2,
        )
    if not trace.complete:
        add(
            "The recording did not end in good order: steps after the last commit are missing.",
            SEVERITY_INVALID - 5,
        )
    if capture.num_calls_seen < capture.num_calls_expected:
        add(
            f"{capture.num_calls_seen:,} of {capture.num_calls_expected:,} calls of MoE layers "
            "were captured: whatever passed the others is missing.",
            SEVERITY_INVALID - 4,
        )
    if capture.num_tokens_dropped:
        lost = capture.num_tokens_dropped / max(capture.num_tokens_seen, 1)
        add(
            f"{wording.percent(lost)} of the tokens could not be kept and are missing from all "
            "routing numbers.",
            SEVERITY_WARNING,
        )
    if info.model.random_weights:
        add(
            "The weights are random: times and bytes mean what they say, but the routing means "
            "nothing, and nothing is concluded from it.",
            SEVERITY_WARNING,
        )
    too_few = wording.few_requests_finding(trace, SECTION)
    return [*findings, *([too_few] if too_few else [])]


def banners(trace: Trace) -> list[str]:
    """Returns sentences that every reader of the trace's numbers has to see."""
    own = [finding.text for finding in recording_findings(trace)]
    said = " ".join(own).lower()
    notes = []
    for note in trace.info.notes:
        # What the recorder noted and the findings say in their own words is not said twice.
        random_twice = "random" in note.lower() and trace.info.model.random_weights
        executed_twice = bool(
            trace.info.capture.num_executed_disagreeing and re.search("execut", note.lower())
        )
        if note.lower() not in said and not random_twice and not executed_twice:
            notes.append(note)
    return [*own, *notes]


def run_facts(trace: Trace) -> list[FactData]:
    """Returns the header block of a trace, fact by fact."""
    info = trace.info
    facts = [
        _fact("Model", *_model_lines(info)),
        _fact("MoE layers", *_site_lines(info)),
        _fact("Traffic", *_traffic_lines(trace)),
        _fact("Device", *_device_lines(info.hardware)),
        _fact("Recording", *_recording_lines(trace)),
        _fact("Versions", *_version_lines(info)),
        _fact("Command", info.command[:_MAX_COMMAND]),
    ]
    if info.origin:
        facts.append(
            _fact("Origin", *(f"{key}: {value}" for key, value in sorted(info.origin.items())))
        )
    return [fact for fact in facts if fact["lines"]]


def _fact(label: str, *lines: str) -> FactData:
    return FactData(label=label, lines=[line for line in lines if line])


def _model_lines(info: schema.TraceInfo) -> list[str]:
    model = info.model
    layers = ", ".join(
        f"{count} {stack} layers" if len(model.num_layers) > 1 else f"{count} layers"
        for stack, count in model.num_layers.items()
    )
    weights = ""
    if model.weight_hash:
        weights = f"weights {model.weight_hash[:_HASH_LENGTH]}"
    elif model.revision:
        weights = f"revision {model.revision}"
    size = (
        f"{wording.num_bytes(model.static_bytes.total)} of parameters" if model.static_bytes else ""
    )
    return [
        model.architecture if model.architecture != model.name else "",
        ", ".join(part for part in (layers, model.dtype, size) if part),
        ", ".join(
            part for part in (weights, "random weights" if model.random_weights else "") if part
        ),
        f"fixes applied: {', '.join(model.fixes)}" if model.fixes else "",
    ]


def _site_lines(info: schema.TraceInfo) -> list[str]:
    lines = []
    for stack in info.stacks:
        sites = info.sites_of(stack)
        experts = _range([site.num_experts for site in sites])
        top_k = _range([site.top_k for site in sites])
        size = {site.expert_bytes for site in sites}
        each = f", {wording.num_bytes(min(size))} each" if len(size) == 1 and min(size) else ""
        where = f"{stack}: " if len(info.stacks) > 1 else ""
        bounded = ", capacity bounded" if any(site.capacity_rule for site in sites) else ""
        lines.append(
            f"{where}{len(sites)} MoE layers, {experts} experts{each}, top-{top_k}{bounded}"
        )
        shared = max(site.num_shared_experts for site in sites)
        if shared:
            lines.append(f"{where}{shared} shared experts per layer")
    kernels = ", ".join(f"{phase}: {name}" for phase, name in info.kernels.items())
    return [*lines, f"experts run by {kernels}" if kernels else ""]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _traffic_lines(trace: Trace) -> list[str]:
    capture, requests, steps = trace.info.capture, trace.requests, trace.steps
    phases = steps.groupby("phase", observed=True).size()
    counted = ", ".join(
        f"{int(phases[phase]):,} {phase}" for phase in schema.PHASES if phase in phases.index
    )
    lines = [
        f"{_counted(len(requests), 'request')}, {_counted(int(steps['num_tokens'].sum()), 'token')}"
        f" in {_counted(len(steps), 'step')} ({counted})"
    ]
    for kind in ("domain", "language"):
        names = sorted({str(name) for name in requests[kind].dropna()}) if kind in requests else []
        if names:
            lines.append(f"{kind}{'s' if len(names) > 1 else ''}: {', '.join(names)}")
    if capture.num_padded_tokens:
        lines.append(f"{capture.num_padded_tokens:,} padding rows counted and left out")
    if capture.num_tokens_dropped:
        lines.append(f"{capture.num_tokens_dropped:,} tokens could not be kept")
    return lines


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _device_lines(hardware: schema.Hardware) -> list[str]:
    device = hardware.device_name or (hardware.device if hardware.device != "cpu" else "CPU only")
    if hardware.num_devices > 1:
        device = f"{hardware.num_devices} x {device}"
    memory = (
        f", {wording.num_bytes(hardware.device_memory_bytes)}"
        if hardware.device_memory_bytes
        else ""
    )
    cpu = hardware.cpu_name or ""
    if hardware.num_cpus:
        cpu = f"{cpu + ', ' if cpu else ''}{_counted(hardware.num_cpus, 'CPU')}"
    if hardware.host_memory_bytes:
        cpu = f"{cpu}, {wording.num_bytes(hardware.host_memory_bytes)} host memory"
    return [
        f"{device}{memory}", cpu, f"driver {hardware.driver}" if hardware.driver else "",
    ]  # fmt: skip


def _recording_lines(trace: Trace) -> list[str]:
    info, capture = trace.info, trace.info.capture
    created = info.created.replace("T", " ").split("+")[0].split(".")[0]
    lines = [
        f"{created} UTC" if created else "",
        f"mode {info.mode}, schema {info.schema_version}, "
        f"{wording.num_bytes(trace.num_bytes)}, {'complete' if trace.complete else 'incomplete'}",
    ]
    if capture.num_calls_expected:
        lines.append(
            f"{capture.num_calls_seen:,} of {capture.num_calls_expected:,} MoE calls captured"
        )
    if capture.num_executed_checked:
        agree = capture.num_executed_checked - capture.num_executed_disagreeing
        lines.append(
            f"rows executed equal rows routed in {agree:,} of "
            f"{capture.num_executed_checked:,} dispatches checked"
        )
    if len(info.ranks) > 1:
        lines.append(f"{len(info.ranks)} ranks")
    return lines


def _version_lines(info: schema.TraceInfo) -> list[str]:
    listed = [f"{name} {info.versions[name]}" for name in _LISTED_PACKAGES if name in info.versions]
    return [", ".join(listed)] if listed else []
