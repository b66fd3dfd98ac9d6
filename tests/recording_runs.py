"""Records tiny models beside an independent witness of what they were called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import moeprof
from moeprof.recording.anatomy import anatomy
from moeprof.recording.sites import find_sites
from moeprof.trace.validator import check


@dataclass
class Call:
    """One forward pass of a stack: the tokens it was given and the ids its experts were given."""

    stack: str
    tokens: torch.Tensor
    experts: dict[int, torch.Tensor] = field(default_factory=dict)


class Witness:
    """Hooks of its own, which know nothing of requests, padding or traces."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.calls: list[Call] = []
        self._handles: list[Any] = []
        found = find_sites(model)
        for stack, module in anatomy(model, found).stacks.items():
            self._handles.append(
                module.register_forward_pre_hook(self._stack_hook(stack), with_kwargs=True)
            )
        for site, place in enumerate(found):
            if place.adapter.name == "experts_arguments":
                self._handles.append(
                    place.watched.register_forward_pre_hook(self._site_hook(site), with_kwargs=True)
                )

    def _stack_hook(self, stack: str) -> Callable[..., None]:
        def begins(module: Any, args: Any, kwargs: Any) -> None:
            names = ("input_ids", "inputs_embeds")
            given = [kwargs.get(name) for name in names] + list(args[:1])
            tokens = next(value for value in given if value is not None)
            self.calls.append(Call(stack, tokens.clone()))

        return begins

    def _site_hook(self, site: int) -> Callable[..., None]:
        def begins(module: Any, args: Any, kwargs: Any) -> None:
            tensors = (value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
            ids = next(tensor for tensor in tensors if not tensor.is_floating_point())
            self.calls[-1].experts[site] = ids.clone()

        return begins

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass
class Run:
    """A finished recording.

    Attributes:
        trace: The `Trace` that was recorded.
        calls: What the witness saw.
        result: What the run returned.
        recorder: The recorder.
    """

    trace: Any
    calls: list[Call]
    result: Any
    recorder: Any

    @property
    def tokens(self) -> Any:
        """One row per recorded token, with the id the model was fed there."""
        frames = []
        for stack in self.trace.stacks:
            names = ("step", "stack", "row", "request", "sequence", "parent_sequence", "position")
            routing = self.trace.routing(
                stack=stack, columns=[*names, "phase", "site", "slot", "accepted"]
            )
            first = (routing["site"] == routing["site"].min()) & (routing["slot"] == 0)
            frames.append(routing[first])
        table = pd.concat(frames).sort_values(["step", "row"], ignore_index=True)
        fed = [
            int(self.calls[step].tokens.reshape(-1)[row])
            if not self.calls[step].tokens.is_floating_point()
            else -1
            for step, row in zip(table["step"], table["row"], strict=True)
        ]
        return table.assign(token=fed)

    @property
    def phases(self) -> Any:
        return self.trace.steps.sort_values("step")["phase"].tolist()


def record_run(model: torch.nn.Module, path: Path, run: Callable[[], Any], **options: Any) -> Run:
    """Records ``run`` and checks what must hold for every recording."""
    witness = Witness(model)
    try:
        with moeprof.record(model, path, **options) as recorder:
            result = run()
    finally:
        witness.remove()
    trace: Any = moeprof.open(recorder.path)
    done = Run(trace, witness.calls, result, recorder)
    check_run(done)
    return done


def check_run(run: Run) -> None:
    """Checks ids against the witness, counts against each other, and the trace as a whole."""
    trace = run.trace
    steps = trace.steps.sort_values("step")
    assert steps["step"].tolist() == list(range(len(run.calls)))
    for step, call in zip(steps.itertuples(), run.calls, strict=True):
        assert step.stack == call.stack
        assert step.num_tokens + step.num_padded_tokens == np.prod(call.tokens.shape[:2])
        if call.experts:
            _check_ids(trace, int(step.step), call)
    capture = trace.info.capture
    assert capture.num_calls_seen == capture.num_calls_expected
    assert capture.num_tokens_recorded == capture.num_tokens_seen
    assert capture.num_padded_tokens == steps["num_padded_tokens"].sum()
    assert capture.num_executed_disagreeing == 0
    result = check(trace)
    assert result.ok, [problem for problem in result.problems if problem.severity == "error"]


def _check_ids(trace: Any, step: int, call: Call) -> None:
    routing = trace.routing(
        stack=call.stack, steps=step, columns=["row", "site", "slot", "expert", "status"]
    )
    for site, given in call.experts.items():
        ids = given.reshape(-1, given.shape[-1]).numpy()
        table = routing[routing["site"] == site].pivot(index="row", columns="slot", values="expert")
        assert np.array_equal(table.to_numpy(), ids[table.index]), f"step {step}, site {site}"


def tokens_of(run: Run, request: int, sequence: int = 0, stack: str = "decoder") -> list[int]:
    """Returns the tokens fed for one sequence, in order; fails where a position repeats."""
    table = run.tokens
    mine = table[
        (table["request"] == request) & (table["sequence"] == sequence) & (table["stack"] == stack)
    ]
    assert mine["position"].tolist() == list(range(len(mine)))
    return [int(token) for token in mine["token"]]


def padded_batch(
    lengths: list[int], *, side: str = "left", width: int = 7, pad: int = 0, seed: int = 3
) -> dict[str, torch.Tensor]:
    """Returns a batch of random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 95, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padding = slice(0, width - length) if side == "left" else slice(length, width)
        ids[row, padding] = pad
        mask[row, padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def hook_count(model: torch.nn.Module) -> int:
    """Returns the number of hooks on a model."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
