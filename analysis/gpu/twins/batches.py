"""Batches of training and held-out text, gathered on the device from the packed tokens.

Leaves out the packing (`pack`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from analysis.gpu.twins.pack import END, FIRST_LANGUAGE, PAD, SPLITS, Ids, LmPack, MtPack, Texts

TRAIN, TEST = SPLITS.index("train"), SPLITS.index("test")
_WIDTH_STEP = 8
_LENGTH_NOISE = 3.0

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's texts.

    Attributes:
        input_ids: [B, S] what the model reads; the source of a translation.
        labels: [B, S'] the tokens to predict, `PAD` where there is none.
        attention_mask: [B, S] 0 for padding of the source; None for a language model.
        decoder_input_ids: [B, S'] what the decoder reads; None for a language model.
        num_tokens: Tokens that the stacks process, padding left out.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None = None
    decoder_input_ids: torch.Tensor | None = None
    num_tokens: int

    @property
    def decoder_mask(self) -> torch.Tensor | None:
        """[B, S'] 0 for padding of the target; None for a language model."""
        return None if self.decoder_input_ids is None else (self.labels != PAD).long()


class LmBatches:
    """Random windows of the training documents, which lie one after another in random order.

    Attributes:
        counts: [vocabulary] how often each token is to be predicted.

    Args:
        pack: The documents.
        window: Tokens per sequence.
        batch_tokens: Tokens per step.
        device: Where.
        seed: Of the order and of the windows.
    """

    def __init__(
        self, pack: LmPack, *, window: int, batch_tokens: int, device: torch.device, seed: int
    ) -> None:
        documents = pack.documents.split()
        order = np.random.default_rng(seed).permutation(len(documents))
        parts: list[Ids] = []
        for index in order:
            if pack.split[index] == TRAIN:
                parts += [np.array([END], np.uint16), documents[index]]
        tokens = np.concatenate(parts).astype(np.int32)
        self.counts = np.bincount(tokens, minlength=pack.token_bytes.size)
        self._tokens = torch.from_numpy(tokens).to(device)
        self._window, self._batch = window, max(1, batch_tokens // window)
        self._span = torch.arange(window + 1, device=device)
        self._generator = torch.Generator(device).manual_seed(seed)

    @property
    def epoch_tokens(self) -> int:
        """Training tokens."""
        return self._tokens.numel()

    @property
    def batch_tokens(self) -> int:
        """Tokens per step."""
        return self._batch * self._window

    def shrink(self) -> None:
        """Halves the batch."""
        self._batch = max(1, self._batch // 2)

    def next(self) -> Batch:
        """Returns the next step's windows."""
        starts = torch.randint(
            self.epoch_tokens - self._window,
            (self._batch, 1),
            device=self._tokens.device,
            generator=self._generator,
        )
        tokens = self._tokens[starts + self._span].long()
        return Batch(
            input_ids=tokens[:, :-1], labels=tokens[:, 1:], num_tokens=self._batch * self._window
        )


class _Side:
    """Texts of one side on the device, gathered into padded rows."""

    def __init__(self, texts: Texts, device: torch.device) -> None:
        lengths = texts.lengths.astype(np.int64)
        self.lengths = lengths
        self._starts = torch.from_numpy(np.cumsum(lengths) - lengths).to(device)
        self._lengths = torch.from_numpy(lengths).to(device)
        self._tokens = torch.from_numpy(texts.tokens.astype(np.int32)).to(device)

    def rows(self, texts: torch.Tensor, width: int) -> torch.Tensor:
        """Returns [B, width] tokens, `END` after each text and `PAD` after that."""
        column = torch.arange(width, device=texts.device)
        length = self._lengths[texts][:, None]
        where = (self._starts[texts][:, None] + column).clamp(max=self._tokens.numel() - 1)
        tokens = self._tokens[where].long()
        tokens = torch.where(column < length, tokens, torch.full_like(tokens, PAD))
        return torch.where(column == length, torch.full_like(tokens, END), tokens)


class MtBatches:
    """Sentence pairs of like lengths, in random order, every epoch anew.

    Attributes:
        counts: [vocabulary] how often each token is to be predicted.
        training: Training pairs that fit.
        held_out: Held-out pairs that fit.

    Args:
        pack: The pairs.
        max_positions: Longest sequence the model takes; longer pairs are left out.
        batch_tokens: Tokens per step, both sides and padding counted.
        device: Where.
        seed: Of the order.
    """

    def __init__(
        self,
        pack: MtPack,
        *,
        max_positions: int,
        batch_tokens: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self._sources, self._targets = _Side(pack.sources, device), _Side(pack.targets, device)
        self._source, self._target = pack.source.astype(np.int64), pack.target.astype(np.int64)
        self._tags = pack.language.astype(np.int64) + FIRST_LANGUAGE
        self._source_length = self._sources.lengths[self._source] + 1
        self._target_length = self._targets.lengths[self._target] + 1
        longest = np.maximum(self._source_length, self._target_length)
        fits = longest + _WIDTH_STEP <= max_positions
        self.training: Ints = np.flatnonzero(fits & (pack.split == TRAIN))
        self.held_out: Ints = np.flatnonzero(fits & (pack.split == TEST))
        uses = np.bincount(self._target[self.training], minlength=pack.targets.lengths.size)
        self.counts = np.bincount(
            pack.targets.tokens,
            weights=np.repeat(uses, pack.targets.lengths),
            minlength=pack.token_bytes.size,
        )
        self.counts[END] += self.training.size
        self.batch_tokens = batch_tokens
        self._device = device
        self._rng = np.random.default_rng(seed)
        self._queue: list[Ints] = []

    @property
    def epoch_tokens(self) -> int:
        """Training tokens of both sides."""
        pairs = self.training
        return int(self._source_length[pairs].sum() + self._target_length[pairs].sum())

    def shrink(self) -> None:
        """Halves the batch."""
        self.batch_tokens = max(1, self.batch_tokens // 2)
        self._queue = []

    def next(self) -> Batch:
        """Returns the next step's pairs."""
        if not self._queue:
            self._queue = self._epoch()
        return self.batch(self._queue.pop())

    def _epoch(self) -> list[Ints]:
        pairs = self.training
        longest = np.maximum(self._source_length[pairs], self._target_length[pairs])
        noisy = longest + self._rng.random(longest.size) * _LENGTH_NOISE
        order = np.argsort(noisy)
        padded = 2 * _rounded(longest[order] + int(_LENGTH_NOISE))
        batch = np.cumsum(padded) // max(self.batch_tokens, int(padded.max()))
        parts = np.split(pairs[order], np.flatnonzero(np.diff(batch)) + 1)
        return [parts[i] for i in self._rng.permutation(len(parts))]

    def by_length(self, pairs: Ints) -> Ints:
        """Returns pairs, shortest sources first."""
        return pairs[np.argsort(self._source_length[pairs], kind="stable")]

    def source_lengths(self, pairs: Ints) -> Ints:
        """Returns the tokens of the sources of some pairs, the end counted."""
        return self._source_length[pairs]

    def batch(self, pairs: Ints) -> Batch:
        """Returns the batch of some pairs."""
        source_length, target_length = self._source_length[pairs], self._target_length[pairs]
        source = torch.from_numpy(self._source[pairs]).to(self._device)
        target = torch.from_numpy(self._target[pairs]).to(self._device)
        tags = torch.from_numpy(self._tags[pairs]).to(self._device)
        input_ids = self._sources.rows(source, int(_rounded(source_length.max())))
        labels = self._targets.rows(target, int(_rounded(target_length.max())))
        return Batch(
            input_ids=input_ids,
            labels=labels,
            attention_mask=(input_ids != PAD).long(),
            decoder_input_ids=torch.cat([tags[:, None], labels[:, :-1]], dim=1),
            num_tokens=int(source_length.sum() + target_length.sum()),
        )


def _rounded(length: Any) -> Any:
    """Returns the next multiple of 8 of numbers or of one: few shapes, and aligned rows."""
    return -(-length // _WIDTH_STEP) * _WIDTH_STEP


def windows(pack: LmPack, domain: int, length: int) -> list[Ids]:
    """Returns whole windows of the held-out documents of a domain, all first windows first."""
    documents = pack.documents.split()
    chosen = np.flatnonzero((pack.split == TEST) & (pack.domain == domain))
    found: list[tuple[int, int, Ids]] = []
    for index in chosen:
        stream = np.concatenate([np.array([END], np.uint16), documents[index]])
        found += [
            (start, int(index), stream[start : start + length])
            for start in range(0, stream.size - length + 1, length)
        ]
    return [window for _, _, window in sorted(found, key=lambda item: item[:2])]
