"""Whose tokens a forward pass holds: request, sequence, position, phase, padding.

While the model runs only host integers and references are kept (`Tracker`); masks and token ids
are read later, on the host, in order of execution (`Episode.attribute`). Token ids are used to
find padding and finished sequences and are not stored. Leaves out routing (`recorder`).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeprof.trace.schema import TOKEN_PHASES

ENCODE, PREFILL, DECODE = (TOKEN_PHASES.index(name) for name in ("encode", "prefill", "decode"))
MATRIX_DIM = 2


@dataclass(frozen=True)
class RequestLabel:
    """What the caller knows about one request.

    Attributes:
        prompt_id: The caller's name for the prompt; never its text.
        domain: Label of its domain.
        language: Target language (mt).
        source_language: Source language (mt).
        slo_ms: Latency objective.
    """

    prompt_id: str | None = None
    domain: str | None = None
    language: str | None = None
    source_language: str | None = None
    slo_ms: float | None = None


@dataclass(frozen=True)
class TokenTable:
    """Tokens of one forward pass, padding and finished rows left out.

    Attributes:
        row: [T] row of the flattened batch.
        request: [T] request id.
        sequence: [T] beam or sample within the request.
        parent_sequence: [T] the sequence it continued from.
        position: [T] position in the sequence.
        phase: [T] index into `TOKEN_PHASES`.
        last_of_prompt: [T] True on the last prompt token of a sequence in this pass.
        num_padded: Rows left out.
    """

    row: np.ndarray
    request: np.ndarray
    sequence: np.ndarray
    parent_sequence: np.ndarray
    position: np.ndarray
    phase: np.ndarray
    last_of_prompt: np.ndarray
    num_padded: int


@dataclass
class Episode:
    """One batch of sequences running through one stack, over all its forward passes.

    Attributes:
        stack: ``encoder`` or ``decoder``.
        first_request: Id of the request of row 0.
        num_requests: Requests in the batch.
        num_rows: Rows of the batch: requests x sequences.
        generating: True inside `generate`, where the first pass holds the prompt.
        num_prompt_columns: Columns of the padded prompt; None when it is not known.
        eos_ids: Token ids that end a sequence; empty when not generating.
    """

    stack: str
    first_request: int
    num_requests: int
    num_rows: int
    generating: bool
    num_prompt_columns: int | None
    eos_ids: frozenset[int]
    _seen: np.ndarray = field(init=False)
    _padding: np.ndarray = field(init=False)
    _prompt: np.ndarray = field(init=False)
    _finished: np.ndarray = field(init=False)
    _columns: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._seen = np.zeros(self.num_rows, dtype=np.int64)
        self._padding = np.zeros(self.num_rows, dtype=np.int64)
        self._prompt = np.zeros(self.num_rows, dtype=np.int64)
        self._finished = np.zeros(self.num_rows, dtype=bool)

    @property
    def sequences_per_request(self) -> int:
        """Beams or samples of each request."""
        return max(1, self.num_rows // max(1, self.num_requests))

    def _widen(self, num_rows: int) -> None:
        """Follows a batch that was expanded to beams or samples after its first pass."""
        if num_rows == self.num_rows:
            return
        if num_rows > self.num_rows and num_rows % self.num_rows == 0:
            index = np.repeat(np.arange(self.num_rows), num_rows // self.num_rows)
        else:
            index = np.arange(num_rows) % self.num_rows
        for name in ("_seen", "_padding", "_prompt", "_finished"):
            setattr(self, name, getattr(self, name)[index])
        self.num_rows = num_rows

    def attribute(
        self,
        shape: tuple[int, int],
        *,
        past_length: int | None,
        mask: np.ndarray | None,
        token_ids: np.ndarray | None,
        beam_index: np.ndarray | None,
        score: bool,
    ) -> TokenTable:
        """Returns the tokens of the next forward pass; call in order of execution.

        Args:
            shape: (rows, columns) of the pass.
            past_length: Cache length before it, padding counted; None when not known.
            mask: [rows, >= columns] attention mask, 1 = token; None when all are tokens.
            token_ids: [rows, columns] input ids; None when the model was given embeddings.
            beam_index: [rows] row each row continued from; None when unchanged.
            score: True for teacher-forced scoring: everything is prefill.
        """
        rows, columns = shape
        self._widen(rows)
        parent_row = np.arange(rows)
        if beam_index is not None and beam_index.size == rows:
            parent_row = beam_index.astype(np.int64)
            for name in ("_seen", "_padding", "_prompt", "_finished"):
                setattr(self, name, getattr(self, name)[parent_row])
        if past_length is not None and past_length != self._columns:
            # Speculation took tokens back, or the pass starts over without a cache.
            self._seen = np.maximum(past_length - np.minimum(self._padding, past_length), 0)
            self._columns = past_length
        valid = np.ones(shape, dtype=bool)
        if mask is not None and mask.ndim == MATRIX_DIM and mask.shape[0] == rows:
            valid = mask[:, -columns:] != 0 if mask.shape[1] >= columns else valid
        column = self._columns + np.arange(columns)
        first_pass = self._columns == 0
        prompt_columns = self.num_prompt_columns
        if first_pass and prompt_columns is None:
            prompt_columns = columns
        in_prompt = np.zeros(columns, dtype=bool)
        if self.stack == "encoder" or score:
            in_prompt[:] = True
        elif self.generating and prompt_columns is not None:
            in_prompt = column < prompt_columns
        else:
            in_prompt[:] = first_pass or columns > 1
        finished = np.repeat(self._finished[:, None], columns, axis=1)
        if token_ids is not None and self.eos_ids and self.generating and not in_prompt.all():
            ended = np.isin(token_ids, list(self.eos_ids)) & ~in_prompt[None, :]
            # An end token is fed back only because other rows of the batch go on.
            finished |= np.logical_or.accumulate(ended, axis=1)
            self._finished = finished[:, -1]
        keep = valid & ~finished
        position = self._seen[:, None] + np.cumsum(valid, axis=1) - 1
        if first_pass:
            self._padding = (~valid).sum(axis=1)
        self._seen = self._seen + valid.sum(axis=1)
        self._prompt = self._prompt + (keep & in_prompt[None, :]).sum(axis=1)
        self._columns += columns
        prompt_rank = np.where(keep & in_prompt[None, :], position, -1)
        last = (prompt_rank == prompt_rank.max(axis=1, keepdims=True)) & (prompt_rank >= 0)
        width = self.sequences_per_request
        row_of = np.repeat(np.arange(rows)[:, None], columns, axis=1)
        phase = np.where(in_prompt, PREFILL, DECODE)
        if self.stack == "encoder":
            phase = np.full(columns, ENCODE)
        selected = np.flatnonzero(keep.reshape(-1))
        flat_row = row_of.reshape(-1)[selected]
        return TokenTable(
            row=selected.astype(np.int32),
            request=(self.first_request + flat_row // width).astype(np.int32),
            sequence=(flat_row % width).astype(np.int16),
            parent_sequence=(parent_row[flat_row] % width).astype(np.int16),
            position=position.reshape(-1)[selected].astype(np.int32),
            phase=np.repeat(phase[None, :], rows, axis=0).reshape(-1)[selected].astype(np.uint8),
            last_of_prompt=last.reshape(-1)[selected],
            num_padded=int(rows * columns - selected.size),
        )

    def prompt_tokens(self) -> np.ndarray:
        """Returns [requests] prompt tokens seen so far, of each request's first sequence."""
        return np.asarray(self._prompt[:: self.sequences_per_request])

    def decoded_tokens(self) -> np.ndarray:
        """Returns [requests] tokens after the prompt seen so far, of the first sequence."""
        return np.asarray((self._seen - self._prompt)[:: self.sequences_per_request])


@dataclass
class Generation:
    """One call of `generate`.

    Attributes:
        num_inputs: Rows of the inputs the caller gave.
        num_input_columns: Their columns.
        eos_ids: Token ids that end a sequence.
        forced_first_token: True where the first generated token is forced (a language tag).
        episodes: Episode of each stack, once it ran.
    """

    num_inputs: int | None
    num_input_columns: int | None
    eos_ids: frozenset[int]
    forced_first_token: bool
    episodes: dict[str, Episode] = field(default_factory=dict)


class Tracker:
    """Finds the episode each forward pass belongs to, and numbers requests.

    Args:
        encoder_decoder: True where requests start in the encoder.
    """

    def __init__(self, *, encoder_decoder: bool) -> None:
        self._encoder_decoder = encoder_decoder
        self._next_request = 0
        self._labels: deque[RequestLabel] = deque()
        self._by_cache: weakref.WeakKeyDictionary[Any, Episode] = weakref.WeakKeyDictionary()
        self._last: dict[str, Episode] = {}
        self.generation: Generation | None = None
        self.labels: dict[int, RequestLabel] = {}

    def announce(self, labels: Sequence[RequestLabel]) -> None:
        """Labels the next requests to start, in order."""
        self._labels.extend(labels)

    def begin_generation(self, generation: Generation) -> None:
        """Enters a call of `generate`."""
        self.generation = generation

    def end_generation(self) -> Generation | None:
        """Leaves it and returns it."""
        ended, self.generation = self.generation, None
        return ended

    def enter(
        self, stack: str, shape: tuple[int, int], past: Any, past_length: int | None
    ) -> tuple[Episode, bool]:
        """Returns the episode of a forward pass and whether it is new.

        Args:
            stack: The stack that runs.
            shape: (rows, columns).
            past: The cache object handed in; None without one.
            past_length: Its length when it is a host integer.
        """
        generation = self.generation
        if generation is not None:
            episode = generation.episodes.get(stack)
            if episode is not None:
                return episode, False
        elif past is not None and past_length != 0 and stack != "encoder":
            episode = self._find(past) or self._last.get(stack)
            if episode is not None and shape[0] % episode.num_rows == 0:
                return episode, False
        episode = self._start(stack, shape)
        if generation is not None:
            generation.episodes[stack] = episode
        self._last[stack] = episode
        self.remember(past, episode)
        return episode, True

    def remember(self, past: Any, episode: Episode) -> None:
        """Ties a cache object to its episode."""
        if past is None or isinstance(past, (tuple, list, Mapping)):
            return
        try:
            self._by_cache[past] = episode
        except TypeError:
            return

    def _find(self, past: Any) -> Episode | None:
        try:
            return self._by_cache.get(past)
        except TypeError:
            return None

    def _start(self, stack: str, shape: tuple[int, int]) -> Episode:
        rows, columns = shape
        generation = self.generation
        follows = self._last.get("encoder") if stack == "decoder" else None
        prompt_columns = None
        if generation is not None:
            prompt_columns = generation.num_input_columns
            if self._encoder_decoder and stack == "decoder":
                prompt_columns = columns + (columns == 1 and generation.forced_first_token)
            prompt_columns = prompt_columns or columns
        if self._encoder_decoder and follows is not None and rows % follows.num_requests == 0:
            first, count = follows.first_request, follows.num_requests
        else:
            count = rows
            if generation is not None and generation.num_inputs:
                count = generation.num_inputs if rows % generation.num_inputs == 0 else rows
            first = self._number(count)
        return Episode(
            stack=stack,
            first_request=first,
            num_requests=count,
            num_rows=rows,
            generating=generation is not None,
            num_prompt_columns=prompt_columns,
            eos_ids=generation.eos_ids if generation is not None else frozenset(),
        )

    def _number(self, count: int) -> int:
        first = self._next_request
        self._next_request += count
        for request in range(first, first + count):
            if self._labels:
                self.labels[request] = self._labels.popleft()
        return first

    @property
    def num_requests(self) -> int:
        """Requests started so far."""
        return self._next_request
