"""Pure functions from a trace to a Result; no torch, no terminal, no plots."""
