"""Routing twins: models of the founding paper's routing geometry, trained to have real routing.

`pack` makes the training text small, `batches` reads it, `shape`, `routing` and `model` are what is
trained, `learning` trains it by the clock, `recording` records it on held-out text, `evidence` says
what its routing is worth.
"""
