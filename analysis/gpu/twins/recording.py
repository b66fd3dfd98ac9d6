"""Records a trained twin on held-out text, in the batches that serve as routing for live runs.

Language model: teacher-forced batches of whole windows, one domain at a time as the founding paper
forwards its subsets, then sampled continuations of prompts of mixed domains. Translation: the same
English sentences into every language, encoded and decoded greedily in batches of like lengths.
Leaves out what the routing is worth (`evidence`).
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moeprof
from analysis.gpu.twins.batches import Ints, MtBatches, windows
from analysis.gpu.twins.model import Twin
from analysis.gpu.twins.pack import END, LANGUAGES, LmPack, MtPack
from moeprof.recording.tokens import RequestLabel

_SAMPLE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class LmPlan:
    """What is recorded of a language model.

    Attributes:
        domains: Names, in the order they run.
        sequences: Whole windows per domain.
        batch: Windows per pass.
        prompts: Prompts per domain.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens sampled after it.
        generate_batch: Prompts per call, of mixed domains.
        temperature: Of sampling.
    """

    domains: tuple[str, ...] = ("facts", "prose", "code", "manual")
    sequences: int = 16
    batch: int = 8
    prompts: int = 4
    prompt_tokens: int = 256
    new_tokens: int = 64
    generate_batch: int = 16
    temperature: float = 0.8


@dataclass(frozen=True, kw_only=True)
class MtPlan:
    """What is recorded of a translation model.

    Attributes:
        batch: Sentences per batch.
        batches: Batches per language.
        source_tokens: Shortest and longest source.
        new_tokens: Most tokens decoded.
    """

    batch: int = 96
    batches: int = 4
    source_tokens: tuple[int, int] = (6, 64)
    new_tokens: int = 96


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What was recorded.

    Attributes:
        requests: Sequences that ran.
        groups: How many of each domain or language.
        finished_share: Translations that ended by themselves; None for a language model.
        examples: Some continuations or translations, as tokens: (label, given, made, reference).
    """

    requests: int
    groups: dict[str, int]
    finished_share: float | None
    examples: tuple[tuple[str, list[int], list[int], list[int]], ...]


def record_lm(recorder: Any, model: Twin, pack: LmPack, plan: LmPlan) -> Recorded:
    """Runs scoring, then generation, under an open recorder."""
    device = model.embedding.weight.device
    length = model.config.max_positions
    torch.manual_seed(_SAMPLE_SEED)
    groups: dict[str, int] = {}
    prompts: list[tuple[RequestLabel, np.ndarray]] = []
    for domain in plan.domains:
        found = windows(pack, pack.domains.index(domain), length)
        scored, rest = found[: plan.sequences], found[plan.sequences :]
        groups[domain] = len(scored)
        for first in range(0, len(scored), plan.batch):
            some = scored[first : first + plan.batch]
            recorder.announce(
                [
                    RequestLabel(prompt_id=f"{domain}-{first + i}", domain=domain)
                    for i in range(len(some))
                ]
            )
            model(_on(device, np.stack(some)))
        prompts += [
            (
                RequestLabel(prompt_id=f"{domain}-prompt-{i}", domain=domain),
                window[: plan.prompt_tokens],
            )
            for i, window in enumerate((rest or found)[: plan.prompts])
        ]
    # One prompt of each domain in turn, so that every batch mixes them.
    prompts.sort(key=lambda item: int(str(item[0].prompt_id).rpartition("-")[2]))
    examples: list[tuple[str, list[int], list[int], list[int]]] = []
    for first in range(0, len(prompts), plan.generate_batch):
        labels, texts = zip(*prompts[first : first + plan.generate_batch], strict=True)
        recorder.announce(labels)
        tokens = model.generate(
            _on(device, np.stack(texts)),
            max_new_tokens=plan.new_tokens,
            temperature=plan.temperature,
        ).tolist()
        made = tokens[0][plan.prompt_tokens :]
        examples.append((str(labels[0].domain), tokens[0][: plan.prompt_tokens], made, []))
    for label, _ in prompts:
        groups[str(label.domain)] += 1
    return Recorded(
        requests=sum(groups.values()), groups=groups, finished_share=None, examples=tuple(examples)
    )


def shared_sources(pack: MtPack, batches: MtBatches, plan: MtPlan) -> list[Ints]:
    """Returns per language the held-out pairs of the same English sentences, shortest first.

    Sentences with a translation into every language come first; where they do not suffice, each
    language is filled up with pairs of its own.
    """
    lengths = batches.source_lengths(batches.held_out)
    shortest, longest = plan.source_tokens
    pairs = batches.held_out[(lengths >= shortest) & (lengths <= longest)]
    per_language = [pairs[pack.language[pairs] == i] for i in range(len(LANGUAGES))]
    firsts = [
        own[np.unique(pack.source[own], return_index=True)[1]] for own in per_language if own.size
    ]
    common = pack.source[firsts[0]]
    for own in firsts[1:]:
        common = np.intersect1d(common, pack.source[own])
    rng = np.random.default_rng(_SAMPLE_SEED)
    order = np.concatenate([rng.permutation(common), np.setdiff1d(pack.source[pairs], common)])
    rank = np.empty(pack.sources.lengths.size, np.int64)
    rank[order] = np.arange(order.size)
    wanted = plan.batch * plan.batches
    return [batches.by_length(own[np.argsort(rank[pack.source[own]])][:wanted]) for own in firsts]


def record_mt(
    recorder: Any, model: Twin, pack: MtPack, batches: MtBatches, plan: MtPlan
) -> Recorded:
    """Encodes and decodes under an open recorder."""
    groups: dict[str, int] = {}
    examples: list[tuple[str, list[int], list[int], list[int]]] = []
    finished = num_rows = 0
    for pairs in shared_sources(pack, batches, plan):
        language = LANGUAGES[int(pack.language[pairs[0]])]
        groups[language] = pairs.size
        for first in range(0, pairs.size, plan.batch):
            some = pairs[first : first + plan.batch]
            batch = batches.batch(some)
            recorder.announce(
                [
                    RequestLabel(
                        prompt_id=f"source-{pack.source[pair]}",
                        domain=pack.domains[int(pack.domain[pair])],
                        language=language,
                        source_language="eng_Latn",
                    )
                    for pair in some
                ]
            )
            assert batch.decoder_input_ids is not None
            tokens = model.generate(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                decoder_input_ids=batch.decoder_input_ids[:, :1],
                max_new_tokens=plan.new_tokens,
                eos_token_id=END,
            )
            finished += int((tokens == END).any(dim=1).sum())
            num_rows += len(some)
            if first == 0:
                given, made, reference = (
                    t[-1].tolist() for t in (batch.input_ids, tokens, batch.labels)
                )
                examples.append((language, given, made, reference))
    return Recorded(
        requests=num_rows,
        groups=groups,
        finished_share=finished / num_rows,
        examples=tuple(examples),
    )


def record(
    path: Path,
    model: Twin,
    pack: LmPack | MtPack,
    batches: Any,
    plan: LmPlan | MtPlan,
    **options: Any,
) -> Recorded:
    """Records a frozen twin into ``path``; options are those of `moeprof.record`."""
    with torch.no_grad(), moeprof.record(model, path, mode="forward", **options) as recorder:
        if isinstance(plan, LmPlan):
            assert isinstance(pack, LmPack)
            return record_lm(recorder, model, pack, plan)
        assert isinstance(pack, MtPack)
        return record_mt(recorder, model, pack, batches, plan)


def archive(trace: Path, target: Path) -> None:
    """Packs a trace's folder into one file."""
    with tarfile.open(target, "w:gz") as packed:
        packed.add(trace, arcname=trace.name)


def _on(device: torch.device, tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tokens.astype(np.int64)).to(device)
