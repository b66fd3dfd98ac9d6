"""Made-up traffic: when requests run, and which tokens each forward pass holds.

Requests are admitted first come, first served, as soon as there is room in the batch, and leave
when they have all their tokens. Leaves out what the experts do (`synthetic`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeprof.trace import schema as spec

Array = np.ndarray[Any, Any]

DECODER_START_TOKENS = 2
"""Prompt tokens of an MT decoder: start and language."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What arrives and how it is batched; fields as in `synthetic.synthetic_trace`."""

    num_requests: int
    batch: int
    prompt_tokens: int
    output_tokens: int
    length_spread: float
    num_sequences: int
    mixed_steps: bool
    stacks: tuple[str, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests of one rank: id, prompt length, output length, first and last step."""

    request: Array
    prompt: Array
    output: Array
    first_step: Array
    last_step: Array

    @classmethod
    def draw(cls, plan: Plan, *, rank: int, num_ranks: int) -> Requests:
        """Returns the requests dealt to ``rank``; they have not run yet."""
        rng = np.random.default_rng([plan.seed, 1 << 21])
        prompt = _lengths(rng, plan.prompt_tokens, plan)
        output = _lengths(rng, plan.output_tokens, plan)
        mine = np.arange(rank, plan.num_requests, num_ranks)
        zeros = np.zeros(len(mine), np.int64)
        return cls(
            request=mine,
            prompt=prompt[mine],
            output=output[mine],
            first_step=zeros,
            last_step=zeros.copy(),
        )


@dataclass(frozen=True)
class Tokens:
    """The tokens of all steps of one stack, in order of execution."""

    step: Array
    row: Array
    request: Array
    sequence: Array
    position: Array
    phase: Array
    last_of_prompt: Array

    def rows(self, which: slice) -> Tokens:
        """Returns a range of the tokens."""
        return Tokens(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


@dataclass
class Schedule:
    """Steps in order of execution."""

    stack: list[str] = field(default_factory=list)
    columns: dict[str, list[Array]] = field(default_factory=dict)

    def add(self, stack: str, *groups: Mapping[str, Array]) -> None:
        """Adds a step made of groups of tokens."""
        self.stack.append(stack)
        for name in groups[0]:
            joined = np.concatenate([group[name] for group in groups])
            self.columns.setdefault(name, []).append(joined)

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each step."""
        return [len(values) for values in self.columns["request"]]

    def tokens(self, stack: str) -> Tokens:
        """Returns the tokens of one stack."""
        steps = [index for index, name in enumerate(self.stack) if name == stack]
        num_tokens = self.num_tokens
        sizes = [num_tokens[index] for index in steps]
        none = np.zeros(0, np.int64)
        joined = {
            name: np.concatenate([none, *(values[index] for index in steps)])
            for name, values in self.columns.items()
        }
        return Tokens(
            step=np.repeat(np.array(steps, np.int64), sizes),
            row=np.concatenate([none, *(np.arange(size) for size in sizes)]),
            request=joined["request"],
            sequence=joined["sequence"],
            position=joined["position"],
            phase=joined["phase"].astype(np.uint8),
            last_of_prompt=joined["last_of_prompt"].astype(bool),
        )


def run(plan: Plan, requests: Requests) -> Schedule:
    """Returns the steps that serve ``requests``, whose first and last step it fills in."""
    schedule = Schedule()
    translates = "encoder" in plan.stacks
    prompt = np.full_like(requests.prompt, DECODER_START_TOKENS) if translates else requests.prompt
    done = np.ones(len(requests.request), np.int64)
    active = np.zeros(0, np.int64)
    waiting = np.arange(len(requests.request))
    while len(waiting) or len(active):
        admitted, waiting = np.split(waiting, [plan.batch - len(active)])
        decode = _decode_group(plan, requests, prompt, done, active)
        done[active] += 1
        if len(admitted):
            requests.first_step[admitted] = len(schedule.stack)
            if translates:
                source = requests.prompt[admitted]
                schedule.add("encoder", _prompt_group(requests, admitted, source, "encode", 1))
            prefill = _prompt_group(
                requests, admitted, prompt[admitted], "prefill", plan.num_sequences
            )
            if plan.mixed_steps and len(active):
                schedule.add("decoder", prefill, decode)
            else:
                schedule.add("decoder", prefill)
        if len(active) and not (plan.mixed_steps and len(admitted)):
            schedule.add("decoder", decode)
        active = np.concatenate([active, admitted])
        requests.last_step[active] = len(schedule.stack) - 1
        active = active[done[active] < requests.output[active]]
    return schedule


def _lengths(rng: np.random.Generator, mean: int, plan: Plan) -> Array:
    low = max(1, round(mean * (1 - plan.length_spread)))
    high = max(low, round(mean * (1 + plan.length_spread)))
    return rng.integers(low, high + 1, plan.num_requests)


def _prompt_group(
    requests: Requests, chosen: Array, length: Array, phase: str, num_sequences: int
) -> dict[str, Array]:
    """Returns the prompt tokens of the chosen requests, once per sequence."""
    ids = np.repeat(requests.request[chosen], num_sequences)
    length = np.repeat(length, num_sequences)
    position = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    return {
        "request": np.repeat(ids, length),
        "sequence": np.repeat(np.tile(np.arange(num_sequences), len(chosen)), length),
        "position": position,
        "phase": np.full(len(position), spec.TOKEN_PHASES.index(phase)),
        "last_of_prompt": position == np.repeat(length, length) - 1,
    }


def _decode_group(
    plan: Plan, requests: Requests, prompt: Array, done: Array, active: Array
) -> dict[str, Array]:
    """Returns one token of each sequence of the active requests."""
    num_sequences = plan.num_sequences
    position = np.repeat(prompt[active] + done[active] - 1, num_sequences)
    return {
        "request": np.repeat(requests.request[active], num_sequences),
        "sequence": np.tile(np.arange(num_sequences), len(active)),
        "position": position,
        "phase": np.full(len(position), spec.TOKEN_PHASES.index("decode")),
        "last_of_prompt": np.zeros(len(position), bool),
    }
