"""Trains a twin by the clock and says what it learned on held-out text.

Cross-entropy plus GShard's balancing loss summed over layers, as fairseq's language models were
trained (`--moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum`). Leaves out the data
(`batches`) and the recording (`recording`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from analysis.gpu.twins.batches import Batch, LmBatches, MtBatches, windows
from analysis.gpu.twins.model import Twin
from analysis.gpu.twins.pack import LANGUAGES, PAD, LmPack, MtPack

_LOOKS = 24
_LOSS_ROWS = 8192
_MAX_SHRINKS = 3
_HELD_OUT_WINDOWS = 48
_HELD_OUT_PAIRS = 960
_NATS_PER_BIT = math.log(2)


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """How a twin is trained.

    Attributes:
        train_s: Seconds of training.
        max_steps: Most steps.
        peak_rate: Largest learning rate.
        final_share: Share of it that is left at the end of its cosine.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Of matrices.
        balance_weight: Weight of the balancing loss.
        smoothing: Label smoothing.
        max_norm: Gradients are clipped to this norm.
    """

    train_s: float
    max_steps: int
    peak_rate: float
    final_share: float = 0.05
    warmup_steps: int = 200
    weight_decay: float = 0.05
    balance_weight: float = 0.01
    smoothing: float = 0.0
    max_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Look:
    """A point of the loss curve; means are over the steps since the look before.

    Attributes:
        step: Steps taken.
        seconds: Since training began.
        num_tokens: Tokens seen.
        loss: Mean cross-entropy per predicted token, nats, with label smoothing.
        balance: Mean balancing loss of a layer; 1 where routing is even.
        rare_share: Share of experts with less than a tenth of an even share of rows.
        largest_share: Rows of the busiest expert of a layer over an even share, mean of layers.
        gradient_norm: Of the last step, before clipping.
        learning_rate: Of the last step.
    """

    step: int
    seconds: float
    num_tokens: int
    loss: float
    balance: float
    rare_share: float
    largest_share: float
    gradient_norm: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a training run did.

    Attributes:
        steps: Steps taken.
        seconds: Training took.
        num_tokens: Tokens seen, padding left out.
        epochs: The same over the training tokens.
        batch_tokens: Tokens per step at the end.
        num_shrinks: How often the batch was halved because memory ran out.
        peak_bytes: Most device memory in use; None without a device.
        curve: The loss curve.
    """

    steps: int
    seconds: float
    num_tokens: int
    epochs: float
    batch_tokens: int
    num_shrinks: int
    peak_bytes: int | None
    curve: tuple[Look, ...]


@dataclass
class _Since:
    """Sums since the last look, kept on the device so that nothing waits for it."""

    loss: Any = 0.0
    balance: Any = 0.0
    load: Any = 0.0
    steps: int = 0

    def add(self, loss: torch.Tensor, balance: torch.Tensor, load: torch.Tensor) -> None:
        self.loss = self.loss + loss
        self.balance = self.balance + balance
        self.load = self.load + load
        self.steps += 1


@dataclass
class _Clock:
    """How far a run is, by time or by steps, whichever is further."""

    options: LearningOptions
    start: float = field(default_factory=time.perf_counter)
    looked: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def progress(self, step: int) -> float:
        return max(self.seconds / self.options.train_s, step / self.options.max_steps)

    def rate(self, step: int) -> float:
        options = self.options
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress(step))))
        decayed = options.final_share + (1 - options.final_share) * cosine
        return options.peak_rate * min(1.0, (step + 1) / options.warmup_steps) * decayed

    def look_due(self, step: int) -> bool:
        interval = self.options.train_s / _LOOKS
        steps = max(1, self.options.max_steps // _LOOKS)
        due = time.perf_counter() - self.looked > interval or step % steps == 0
        if due:
            self.looked = time.perf_counter()
        return due


def _chunk_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(
        logits, labels, ignore_index=PAD, reduction="sum", label_smoothing=smoothing
    )


def mean_loss(model: Twin, batch: Batch, smoothing: float) -> torch.Tensor:
    """Returns the mean cross-entropy; logits exist for some thousand tokens at a time."""
    hidden = model(
        batch.input_ids, batch.attention_mask, batch.decoder_input_ids, batch.decoder_mask
    )
    flat, labels = hidden.flatten(0, 1), batch.labels.flatten()
    total: torch.Tensor = flat.new_zeros((), dtype=torch.float32)
    for first in range(0, labels.numel(), _LOSS_ROWS):
        rows = slice(first, first + _LOSS_ROWS)
        total = total + checkpoint(
            _chunk_loss, flat[rows], model.embedding.weight, labels[rows], smoothing,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return total / (labels != PAD).sum().clamp(min=1)


def _optimizer(model: Twin, options: LearningOptions) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = matrices[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=options.peak_rate, betas=(0.9, 0.98), fused=fused)


def learn(model: Twin, batches: LmBatches | MtBatches, options: LearningOptions) -> Learned:
    """Trains until the clock or the steps are over, printing as it goes."""
    model.train()
    optimizer = _optimizer(model, options)
    parameters = list(model.parameters())
    device = parameters[0].device
    clock, since = _Clock(options), _Since()
    curve: list[Look] = []
    step = num_tokens = num_shrinks = 0
    over = False
    while not over:
        rate = clock.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            batch = batches.next()
            loss = mean_loss(model, batch, options.smoothing)
            balance, load = model.last_balance()
            (loss + options.balance_weight * balance.sum()).backward()
        except torch.OutOfMemoryError:
            if num_shrinks == _MAX_SHRINKS:
                raise
            num_shrinks += 1
            batches.shrink()
            model.forget()
            optimizer.zero_grad(set_to_none=True)
            print(f"out of memory: {batches.batch_tokens} tokens a step from here", flush=True)
            continue
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        num_tokens += batch.num_tokens
        since.add(loss.detach(), balance.detach().mean(), load)
        over = clock.progress(step) >= 1
        if clock.look_due(step) or over:
            look = _look(since, step, clock.seconds, num_tokens, float(norm), rate)
            curve.append(look)
            print(
                f"step {step} at {look.seconds:.0f} s, {num_tokens / clock.seconds:.0f} tokens/s: "
                f"loss {look.loss:.3f}, balance {look.balance:.2f}, rare experts "
                f"{look.rare_share:.1%}, busiest {look.largest_share:.1f}x, gradient "
                f"{look.gradient_norm:.2f}, rate {rate:.1e}",
                flush=True,
            )
            if not math.isfinite(look.loss):
                raise SystemExit(f"training diverged at step {step}: use a smaller --rate")
            since = _Since()
    return Learned(
        steps=step,
        seconds=round(clock.seconds, 1),
        num_tokens=num_tokens,
        epochs=num_tokens / batches.epoch_tokens,
        batch_tokens=batches.batch_tokens,
        num_shrinks=num_shrinks,
        peak_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        curve=tuple(curve),
    )


def _look(
    since: _Since, step: int, seconds: float, num_tokens: int, norm: float, rate: float
) -> Look:
    load = since.load.double().cpu().numpy()
    even = load.mean(axis=1, keepdims=True)
    return Look(
        step=step,
        seconds=round(seconds, 1),
        num_tokens=num_tokens,
        loss=round(float(since.loss) / since.steps, 4),
        balance=round(float(since.balance) / since.steps, 4),
        rare_share=round(float((load < 0.1 * even).mean()), 4),
        largest_share=round(float((load.max(axis=1) / even[:, 0]).mean()), 3),
        gradient_norm=round(norm, 4),
        learning_rate=rate,
    )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How well a group of held-out texts is predicted.

    Attributes:
        group: Domain (language model) or target language (translation).
        num_tokens: Tokens predicted.
        num_bytes: Bytes of text they stand for.
        nats_per_token: Cross-entropy per token, without label smoothing.
        bits_per_byte: The same per byte of text.
        unigram_bits_per_byte: What the token frequencies of the training text alone give.
    """

    group: str
    num_tokens: int
    num_bytes: int
    nats_per_token: float
    bits_per_byte: float
    unigram_bits_per_byte: float


@torch.no_grad()
def held_out(
    model: Twin, pack: LmPack | MtPack, batches: LmBatches | MtBatches, *, rows: int
) -> list[HeldOut]:
    """Returns one entry per domain or language; ``rows`` texts run at a time."""
    model.eval()
    frequencies = (batches.counts + 1) / (batches.counts + 1).sum()
    surprise = torch.from_numpy(-np.log2(frequencies)).to(model.embedding.weight.device)
    sizes = torch.from_numpy(pack.token_bytes).to(surprise.device)
    result = []
    for group, parts in _groups(model, pack, batches, rows):
        nats, unigram, num_bytes, num_tokens = 0.0, 0.0, 0, 0
        for batch in parts:
            keep = batch.labels != PAD
            num = int(keep.sum())
            nats += float(mean_loss(model, batch, 0.0)) * num
            unigram += float(surprise[batch.labels][keep].sum())
            num_bytes += int(sizes[batch.labels][keep].sum())
            num_tokens += num
        if num_bytes:
            entry = HeldOut(
                group=group,
                num_tokens=num_tokens,
                num_bytes=num_bytes,
                nats_per_token=round(nats / num_tokens, 4),
                bits_per_byte=round(nats / _NATS_PER_BIT / num_bytes, 4),
                unigram_bits_per_byte=round(unigram / num_bytes, 4),
            )
            print(f"held out: {asdict(entry)}", flush=True)
            result.append(entry)
    return result


def _groups(
    model: Twin, pack: LmPack | MtPack, batches: LmBatches | MtBatches, rows: int
) -> Iterator[tuple[str, list[Batch]]]:
    device = model.embedding.weight.device
    if isinstance(batches, MtBatches):
        assert isinstance(pack, MtPack)
        for language, name in enumerate(LANGUAGES):
            pairs = batches.held_out[pack.language[batches.held_out] == language]
            pairs = batches.by_length(pairs[:: max(1, pairs.size // _HELD_OUT_PAIRS)])
            parts = [pairs[first : first + rows] for first in range(0, pairs.size, rows)]
            yield name, [batches.batch(part) for part in parts]
        return
    assert isinstance(pack, LmPack)
    length = model.config.max_positions
    for domain, name in enumerate(pack.domains):
        found = windows(pack, domain, length + 1)[:_HELD_OUT_WINDOWS]
        passes = []
        for first in range(0, len(found), rows):
            tokens = torch.from_numpy(np.stack(found[first : first + rows]).astype(np.int64))
            tokens = tokens.to(device)
            passes.append(
                Batch(
                    input_ids=tokens[:, :-1],
                    labels=tokens[:, 1:],
                    num_tokens=tokens.numel() - len(tokens),
                )
            )
        yield name, passes
