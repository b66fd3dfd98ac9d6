"""Instrumentation: discovery of MoE sites, adapters, timing, memory, devices."""
