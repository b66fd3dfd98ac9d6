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

NEVER = np.iinfo(np.int64).max
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
        column: [T] column of the padded sequence.
        num_padded: Rows left out.
    """

    row: np.ndarray
    request: np.ndarray
    sequence: np.ndarray
    parent_sequence: np.ndarray
    position: np.ndarray
    phase: np.ndarray
    column: np.ndarray
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
        end_ids: Token ids that are fed only to rows that have ended; empty when not generating.
        prompt_mask: [inputs, columns] mask of the prompt (a tensor), for passes that show none.
        starts_requests: True where its requests were not started by another stack.
        speculative: True where passes run on guessed tokens, some of which are taken back.
    """

    stack: str
    first_request: int
    num_requests: int
    num_rows: int
    generating: bool
    num_prompt_columns: int | None
    end_ids: frozenset[int]
    prompt_mask: Any = None
    starts_requests: bool = True
    speculative: bool = False
    _seen: np.ndarray = field(init=False)
    _padding: np.ndarray = field(init=False)
    _prompt: np.ndarray = field(init=False)
    _ended_at: np.ndarray = field(init=False)
    _columns: int = field(init=False, default=0)
    _num_passes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._seen = np.zeros(self.num_rows, dtype=np.int64)
        self._padding = np.zeros(self.num_rows, dtype=np.int64)
        self._prompt = np.zeros(self.num_rows, dtype=np.int64)
        self._ended_at = np.full(self.num_rows, NEVER)

    @property
    def sequences_per_request(self) -> int:
        """Beams or samples of each request."""
        return max(1, self.num_rows // max(1, self.num_requests))

    def _follow_rows(self, index: np.ndarray) -> None:
        """Lets row i go on from where row ``index[i]`` was."""
        for name in ("_seen", "_padding", "_prompt", "_ended_at"):
            setattr(self, name, getattr(self, name)[index])

    def _widen(self, num_rows: int) -> None:
        """Follows a batch that was expanded to beams or samples after its first pass."""
        if num_rows == self.num_rows:
            return
        if num_rows > self.num_rows and num_rows % self.num_rows == 0:
            index = np.repeat(np.arange(self.num_rows), num_rows // self.num_rows)
        else:
            index = np.arange(num_rows) % self.num_rows
        self._follow_rows(index)
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
            mask: [rows, >= columns] attention mask, 1 = token; None when the pass shows none.
            token_ids: [rows, columns] input ids; None when the model was given embeddings.
            beam_index: [rows] row each row continued from; None when unchanged.
            score: True for teacher-forced scoring: everything is prefill.
        """
        rows, columns = shape
        self._widen(rows)
        parent_row = np.arange(rows)
        if beam_index is not None and beam_index.size == rows:
            parent_row = beam_index.astype(np.int64)
            self._follow_rows(parent_row)
        self._move_to(past_length)
        valid = self._valid(shape, mask)
        in_prompt = self._in_prompt(columns, score=score)
        keep = valid & ~self._finished(shape, token_ids, in_prompt)
        position = self._seen[:, None] + np.cumsum(valid, axis=1) - 1
        first_column = self._columns
        self._count(valid, keep, in_prompt)
        phase = np.where(in_prompt, PREFILL, DECODE)
        if self.stack == "encoder":
            phase = np.full(columns, ENCODE)
        width = self.sequences_per_request
        selected = np.flatnonzero(keep.reshape(-1))
        row = selected // columns
        return TokenTable(
            row=selected.astype(np.int32),
            request=(self.first_request + row // width).astype(np.int32),
            sequence=(row % width).astype(np.int16),
            parent_sequence=(parent_row[row] % width).astype(np.int16),
            position=position.reshape(-1)[selected].astype(np.int32),
            phase=phase[selected % columns].astype(np.uint8),
            column=first_column + selected % columns,
            num_padded=int(rows * columns - selected.size),
        )

    def _move_to(self, past_length: int | None) -> None:
        """Goes back where speculation took tokens back, or where a pass starts over."""
        if past_length is None or past_length == self._columns:
            return
        self._seen = np.maximum(past_length - np.minimum(self._padding, past_length), 0)
        self._ended_at[self._ended_at >= past_length] = NEVER
        self._columns = past_length

    def _valid(self, shape: tuple[int, int], mask: np.ndarray | None) -> np.ndarray:
        """Returns [rows, columns] True for tokens, False for padding."""
        rows, columns = shape
        end = self._columns + columns
        if mask is None and self.prompt_mask is not None:
            prompt = self.prompt_mask.to("cpu").numpy()
            mask = np.pad(prompt, ((0, 0), (0, max(0, end - prompt.shape[1]))), constant_values=1)
        if mask is not None and mask.shape[0] and rows % mask.shape[0] == 0:
            mask = np.repeat(mask != 0, rows // mask.shape[0], axis=0)
            if mask.shape[1] >= end:
                # The mask covers what is in the cache too, so positions follow from it alone.
                self._seen = mask[:, : self._columns].sum(axis=1)
                return np.asarray(mask[:, self._columns : end])
            if mask.shape[1] >= columns:
                return np.asarray(mask[:, -columns:])
        return np.ones(shape, dtype=bool)

    def _in_prompt(self, columns: int, *, score: bool) -> np.ndarray:
        """Returns [columns] True where a column lies in the prompt."""
        if self.stack == "encoder" or score:
            return np.ones(columns, dtype=bool)
        if self.generating and self.num_prompt_columns is not None:
            return self._columns + np.arange(columns) < self.num_prompt_columns
        return np.full(columns, self._columns == 0 or columns > 1)

    def _finished(
        self, shape: tuple[int, int], token_ids: np.ndarray | None, in_prompt: np.ndarray
    ) -> np.ndarray:
        """Returns [rows, columns] True where a row has ended and only its batch goes on."""
        if not self.end_ids:
            return np.zeros(shape, dtype=bool)
        column = self._columns + np.arange(shape[1])
        if token_ids is not None and not in_prompt.all():
            ends = np.isin(token_ids, list(self.end_ids)) & ~in_prompt
            first = np.where(ends.any(axis=1), column[ends.argmax(axis=1)], NEVER)
            self._ended_at = np.minimum(self._ended_at, first)
        finished = column >= self._ended_at[:, None]
        if self._columns == 0 and self._num_passes:
            # Without a cache all of a row runs again; none of it where the row has ended.
            finished |= finished.any(axis=1, keepdims=True)
        return np.asarray(finished)

    def _count(self, valid: np.ndarray, keep: np.ndarray, in_prompt: np.ndarray) -> None:
        columns = valid.shape[1]
        prompt = (keep & in_prompt).sum(axis=1)
        if not self.generating:
            self._prompt = self._prompt + prompt
        elif in_prompt.any():
            self._prompt = np.maximum(self._prompt, self._seen + prompt)
        if self._columns == 0:
            self._padding = np.zeros(self.num_rows, dtype=np.int64)
        self._padding = self._padding + (~valid).sum(axis=1)
        self._seen = self._seen + valid.sum(axis=1)
        self._columns += columns
        self._num_passes += 1

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
        num_prompt_columns: Columns of the prompt an LM is given.
        num_echoed_columns: Columns of what is returned that were given, for an LM; None where the
            model makes up its own first token.
        eos_ids: Token ids that end a sequence.
        filler_ids: Token ids fed to rows that ended in another way.
        forced_first_token: True where the first generated token is forced (a language tag).
        prompt_mask: [inputs, columns] mask of the decoder's prompt; None where all are tokens.
        speculative: True where passes run on guessed tokens, some of which are taken back.
        episodes: Episode of each stack, once it ran.
    """

    num_inputs: int | None
    num_prompt_columns: int | None
    num_echoed_columns: int | None
    eos_ids: frozenset[int]
    filler_ids: frozenset[int]
    forced_first_token: bool
    prompt_mask: Any = None
    speculative: bool = False
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
        self._generated_from: Episode | None = None
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
            if episode is not None and shape[0] % episode.num_rows == 0:
                return episode, False
        elif past is not None and past_length != 0 and stack != "encoder":
            # A cache that cannot be told from others belongs to the pass before.
            episode = self._by_cache.get(past) if _is_trackable(past) else self._last.get(stack)
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
        if past is not None and _is_trackable(past):
            self._by_cache[past] = episode

    def _start(self, stack: str, shape: tuple[int, int]) -> Episode:
        rows, columns = shape
        generation = self.generation
        is_prompt = stack == "decoder" or not self._encoder_decoder
        prompt_columns = None
        if generation is not None:
            prompt_columns = generation.num_prompt_columns
            if self._encoder_decoder and stack == "decoder":
                prompt_columns = columns + (columns == 1 and generation.forced_first_token)
            prompt_columns = prompt_columns or columns
        encoded = self._encoded(stack)
        if encoded is not None and rows % encoded.num_requests == 0:
            first, count = encoded.first_request, encoded.num_requests
        else:
            encoded = None
            count = rows
            if generation is not None and generation.num_inputs:
                count = generation.num_inputs if rows % generation.num_inputs == 0 else rows
            first = self._number(count)
        ends = generation.eos_ids | generation.filler_ids if generation else frozenset()
        return Episode(
            stack=stack,
            first_request=first,
            num_requests=count,
            num_rows=rows,
            generating=generation is not None,
            num_prompt_columns=prompt_columns,
            end_ids=ends,
            prompt_mask=generation.prompt_mask if generation and is_prompt else None,
            starts_requests=encoded is None,
            speculative=is_prompt and generation is not None and generation.speculative,
        )

    def _encoded(self, stack: str) -> Episode | None:
        """Returns the encoder's episode whose requests a decoder's new episode continues."""
        if not self._encoder_decoder or stack != "decoder":
            return None
        if self.generation is None:
            return self._last.get("encoder")
        encoded = self.generation.episodes.get("encoder")
        if encoded is None and self._last.get("encoder") is not self._generated_from:
            # The encoder ran by itself before, and its output was handed over.
            encoded = self._last.get("encoder")
        self._generated_from = encoded
        return encoded

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


def _is_trackable(past: Any) -> bool:
    """Says whether a cache is an object of its own that lives as long as its sequences."""
    if isinstance(past, (tuple, list, Mapping)):
        return False
    try:
        weakref.ref(past)
        hash(past)
    except TypeError:
        return False
    return True
