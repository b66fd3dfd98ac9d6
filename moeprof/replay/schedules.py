"""Which tokens of which requests run in which step, under a batching policy.

Requests are known by three numbers per stack: prompt tokens, decode turns, sequences. Leaves out
what the tokens are (`composition`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SCHEDULES = ("continuous", "static")
PROMPT_PART, DECODE_PART = 0, 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """Requests in the order in which they arrive.

    Attributes:
        num_source: [requests] encoder tokens; 0 where there is no encoder.
        num_prompt: [requests] prompt tokens of the decoder, over all sequences.
        num_turns: [requests] decode turns: forward passes after the prompt.
        num_sequences: [requests] beams or samples.
        arrival_s: [requests] ascending.
        whole_prompts: True where prompts must not be cut into chunks.
    """

    num_source: Ints
    num_prompt: Ints
    num_turns: Ints
    num_sequences: Ints
    arrival_s: Floats
    whole_prompts: bool = False

    def __len__(self) -> int:
        return len(self.num_prompt)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clock:
    """How long a step takes: a constant and a time per token.

    Attributes:
        step_s: Seconds per step.
        token_s: Seconds per token.
    """

    step_s: float
    token_s: float

    def duration_s(self, num_tokens: int) -> float:
        """Returns the duration of a step."""
        return self.step_s + self.token_s * num_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedStep:
    """One forward pass of one stack.

    Attributes:
        stack: ``encoder`` or ``decoder``.
        start_s: When it starts.
        end_s: When it ends.
        request: [parts] index into the workload.
        part: [parts] `PROMPT_PART` (also of the encoder) or `DECODE_PART`.
        first: [parts] first prompt token, or the decode turn.
        last: [parts] prompt token after the last one; unused for decode turns.
        members: [members] requests that have rows in the batch, also those that ended; None where
            only those with tokens have.
    """

    stack: str
    start_s: float
    end_s: float
    request: Ints
    part: Ints
    first: Ints
    last: Ints
    members: Ints | None = None


def continuous(
    work: Workload, *, max_batch: int, chunk: int | None, clock: Clock, turn_tokens: Floats
) -> Iterator[PlannedStep]:
    """Yields the steps of continuous batching.

    First come, first served: a request is admitted once it has arrived and fewer than
    ``max_batch`` run, and leaves after its last token. A step holds one turn of every request that
    decodes, then at most ``chunk`` prompt tokens in order of admission. Encoders run on whole
    sources, as many as fit the chunk and at least one, right before the decoder's step.

    Args:
        work: The requests.
        max_batch: Most requests running at a time.
        chunk: Most prompt tokens per step; None for no limit.
        clock: Time of a step.
        turn_tokens: [requests] mean tokens of a decode turn, for the clock.
    """
    budget = np.iinfo(np.int64).max if chunk is None else chunk
    prefilling: deque[int] = deque()
    decoding = np.zeros(0, np.int64)
    turn = np.zeros(len(work), np.int64)
    done = np.zeros(len(work), np.int64)
    now, next_request = 0.0, 0
    while next_request < len(work) or prefilling or len(decoding):
        if not prefilling and not len(decoding):
            now = max(now, float(work.arrival_s[next_request]))
        while (
            next_request < len(work)
            and len(prefilling) + len(decoding) < max_batch
            and work.arrival_s[next_request] <= now
        ):
            prefilling.append(next_request)
            next_request += 1
        taken = _prompt_parts(work, prefilling, done, budget)
        sources = np.array([r for r, first, _ in taken if not first and work.num_source[r]], int)
        if len(sources):
            now, step = _timed(clock, now, "encoder", *_prompts(sources, work.num_source))
            yield step
        requests = np.concatenate([[r for r, _, _ in taken], decoding]).astype(np.int64)
        first = np.concatenate([[f for _, f, _ in taken], turn[decoding]]).astype(np.int64)
        last = np.concatenate([[x for _, _, x in taken], turn[decoding]]).astype(np.int64)
        part = np.repeat([PROMPT_PART, DECODE_PART], [len(taken), len(decoding)])
        num_tokens = sum(x - f for _, f, x in taken) + float(turn_tokens[decoding].sum())
        now, step = _timed(clock, now, "decoder", requests, part, first, last, round(num_tokens))
        yield step
        turn[decoding] += 1
        decoding = decoding[turn[decoding] < work.num_turns[decoding]]
        started = []
        for request, _, reached in taken:
            done[request] = reached
            if reached == work.num_prompt[request]:
                prefilling.popleft()
                started.append(request)
        ready = np.array(started, np.int64)
        decoding = np.concatenate([decoding, ready[work.num_turns[ready] > 0]])


def static(
    work: Workload, *, max_batch: int, clock: Clock, turn_tokens: Floats
) -> Iterator[PlannedStep]:
    """Yields the steps of static batching, which is what `generate` does.

    Batches of ``max_batch`` requests in order; each runs its prompts together and decodes until
    all have ended, before the next one starts. Requests that ended leave an empty row.

    Args:
        work: The requests.
        max_batch: Requests per batch.
        clock: Time of a step.
        turn_tokens: [requests] mean tokens of a decode turn, for the clock.
    """
    now = 0.0
    for start in range(0, len(work), max_batch):
        members = np.arange(start, min(start + max_batch, len(work)))
        now = max(now, float(work.arrival_s[members].max()))
        if work.num_source[members].any():
            now, step = _timed(
                clock, now, "encoder", *_prompts(members, work.num_source), members=members
            )
            yield step
        if work.num_prompt[members].any():
            now, step = _timed(
                clock, now, "decoder", *_prompts(members, work.num_prompt), members=members
            )
            yield step
        for turn in range(int(work.num_turns[members].max())):
            active = members[work.num_turns[members] > turn]
            turns = np.full(len(active), turn)
            part = np.full(len(active), DECODE_PART)
            num_tokens = round(float(turn_tokens[active].sum()))
            now, step = _timed(
                clock, now, "decoder", active, part, turns, turns, num_tokens, members=members
            )
            yield step


def _prompt_parts(
    work: Workload, prefilling: deque[int], done: Ints, budget: int
) -> list[tuple[int, int, int]]:
    """Returns (request, first, last) of the prompt tokens that fit the budget.

    Beams advance together; a step always holds at least one position of the first prompt.
    """
    taken: list[tuple[int, int, int]] = []
    left = budget
    for request in prefilling:
        first, whole = int(done[request]), int(work.num_prompt[request])
        width = int(work.num_sequences[request])
        source = int(work.num_source[request])
        if source or work.whole_prompts:
            # A source cannot be cut; the decoder's prompt comes with it.
            cost = source or whole
            if cost > left and taken:
                break
            taken.append((request, 0, whole))
            left = max(left - cost, 0)
        else:
            fitting = left // width * width
            if not taken:
                fitting = max(fitting, width)
            last = min(whole, first + fitting)
            if last == first and whole:
                break
            taken.append((request, first, last))
            left = max(left - (last - first), 0)
            if last < whole:
                break
        if not left:
            break
    return taken


def _prompts(requests: Ints, num_tokens: Ints) -> tuple[Ints, Ints, Ints, Ints, int]:
    last = num_tokens[requests]
    zeros = np.zeros(len(requests), np.int64)
    return requests, zeros + PROMPT_PART, zeros, last, int(last.sum())


def _timed(
    clock: Clock,
    now: float,
    stack: str,
    request: Ints,
    part: Ints,
    first: Ints,
    last: Ints,
    num_tokens: int,
    *,
    members: Ints | None = None,
) -> tuple[float, PlannedStep]:
    """Returns the end of a step and the step."""
    end = now + clock.duration_s(num_tokens)
    step = PlannedStep(
        stack=stack, start_s=now, end_s=end, request=request, part=part, first=first, last=last,
        members=members,
    )  # fmt: skip
    return end, step
