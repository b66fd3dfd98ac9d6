"""Pure functions from a trace to a Result; no torch, no terminal, no plots."""

from __future__ import annotations

from moeprof.replay.balance import balancing
from moeprof.replay.breakdown import latency
from moeprof.replay.composition import compose
from moeprof.replay.domains import transfer
from moeprof.replay.flips import agreement
from moeprof.replay.footprint import memory
from moeprof.replay.gates import gating
from moeprof.replay.result import Finding, Metric, Result
from moeprof.replay.reuse import locality
from moeprof.replay.usage import activation
from moeprof.replay.working_set import batching

__all__ = [
    "Finding",
    "Metric",
    "Result",
    "activation",
    "agreement",
    "balancing",
    "batching",
    "compose",
    "gating",
    "latency",
    "locality",
    "memory",
    "transfer",
]
