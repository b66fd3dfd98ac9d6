"""Prompts as padded batches of token ids, for generation and for teacher-forced scoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeprof.errors import MoeprofError

if TYPE_CHECKING:
    import torch

    from moeprof.zoo.loader import LoadedModel
    from moeprof.zoo.prompts import Prompt

ROOM_FOR_OUTPUT = 64  # positions kept free when a prompt is longer than the model's context


@dataclass(frozen=True)
class Batch:
    """Prompts that run together.

    Attributes:
        prompts: In row order.
        inputs: ``input_ids`` and ``attention_mask``, for ``generate()`` and for a forward pass.
        targets: For scoring a translation: the decoder's ids and mask, references included; empty
            for language models and where a prompt has no reference.
        generate_kwargs: Further arguments of ``generate()``. A translation's target languages are
            the rows of ``decoder_input_ids``, so one batch may mix languages.
    """

    prompts: tuple[Prompt, ...]
    inputs: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    generate_kwargs: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        """Prompt tokens, padding left out."""
        return int(self.inputs["attention_mask"].sum())


def batches(loaded: LoadedModel, prompts: Sequence[Prompt], batch_size: int) -> Iterator[Batch]:
    """Yields the prompts in their order, ``batch_size`` at a time.

    Language models read left-padded rows, encoders right-padded ones. A prompt that leaves less
    than 64 positions of the context for the output loses its beginning.

    Raises:
        MoeprofError: A target language that the tokenizer does not know.
    """
    assert batch_size > 0, batch_size
    for start in range(0, len(prompts), batch_size):
        group = tuple(prompts[start : start + batch_size])
        yield _translation(loaded, group) if loaded.task == "mt" else _text(loaded, group)


def _text(loaded: LoadedModel, prompts: tuple[Prompt, ...]) -> Batch:
    rows = [_clip(loaded, loaded.tokenizer(prompt.text)["input_ids"]) for prompt in prompts]
    pad = _pad_id(loaded)
    return Batch(
        prompts=prompts,
        inputs=_padded(loaded, rows, pad, left=True),
        targets={},
        generate_kwargs={"pad_token_id": pad},
    )


def _translation(loaded: LoadedModel, prompts: tuple[Prompt, ...]) -> Batch:
    pad = _pad_id(loaded)
    rows = [_source_ids(loaded, prompt) for prompt in prompts]
    heads = [_decoder_prompt(loaded, prompt) for prompt in prompts]
    if len({len(head) for head in heads}) > 1:
        raise MoeprofError(
            "prompts with and without a target language cannot share a batch",
            hint="give every prompt a field 'language', or none",
        )
    targets: dict[str, torch.Tensor] = {}
    if all(prompt.reference is not None for prompt in prompts):
        full = [
            head + _clip(loaded, _bare_ids(loaded, prompt.reference or ""))
            for head, prompt in zip(heads, prompts, strict=True)
        ]
        padded = _padded(loaded, full, pad, left=False)
        targets = {f"decoder_{name}": tensor for name, tensor in padded.items()}
    decoder = _padded(loaded, heads, pad, left=False)["input_ids"]
    return Batch(
        prompts=prompts,
        inputs=_padded(loaded, rows, pad, left=False),
        targets=targets,
        generate_kwargs={"pad_token_id": pad, "decoder_input_ids": decoder},
    )


def _source_ids(loaded: LoadedModel, prompt: Prompt) -> list[int]:
    tokenizer = loaded.tokenizer
    if prompt.source_language is not None and hasattr(tokenizer, "src_lang"):
        tokenizer.src_lang = prompt.source_language
    return _clip(loaded, tokenizer(prompt.text)["input_ids"])


def _bare_ids(loaded: LoadedModel, text: str) -> list[int]:
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _decoder_prompt(loaded: LoadedModel, prompt: Prompt) -> list[int]:
    """Returns the ids a decoder starts from: its start token and the language tag, if any."""
    config = loaded.model.config
    start = getattr(loaded.model.generation_config, "decoder_start_token_id", None)
    start = config.decoder_start_token_id if start is None else start
    assert start is not None, "an encoder-decoder model without a decoder start token"
    if prompt.language is None:
        return [start]
    tag = loaded.tokenizer.convert_tokens_to_ids(prompt.language)
    if tag is None or tag == loaded.tokenizer.unk_token_id:
        raise MoeprofError(
            f"prompt {prompt.id!r}: the tokenizer of {loaded.name} has no language tag "
            f"{prompt.language!r}",
            hint="write 'language' as the model does, for example deu_Latn, or leave it out",
        )
    return [start, tag]


def _clip(loaded: LoadedModel, ids: list[int]) -> list[int]:
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if not ids:
        ids = [_pad_id(loaded)]
    return ids[-(limit - ROOM_FOR_OUTPUT) :] if limit and limit > ROOM_FOR_OUTPUT else ids


def _pad_id(loaded: LoadedModel) -> int:
    tokenizer, config = loaded.tokenizer, loaded.model.config
    candidates = (tokenizer.pad_token_id, config.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(value) for value in candidates if value is not None)


def _padded(
    loaded: LoadedModel, rows: list[list[int]], pad: int, *, left: bool
) -> dict[str, torch.Tensor]:
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, span] = torch.tensor(row, dtype=torch.int64)
        mask[index, span] = 1
    device = loaded.model.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
