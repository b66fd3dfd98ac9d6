"""Prompts from a file: JSON lines with labels, or plain text with one prompt a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprof.errors import MoeprofError

_LABELS = ("domain", "language", "source_language", "reference")
_FORMAT_HINT = (
    'give one prompt a line as text, or a .jsonl file of lines such as {"text": "...", '
    '"domain": "..."}'
)


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        id: Unique within its file.
        text: What the model reads.
        domain: Label of the kind of text, if any.
        language: Tag of the target language; None for language models.
        source_language: Tag of the language of ``text``, if known.
        reference: A reference translation, if there is one.
    """

    id: str
    text: str
    domain: str | None = None
    language: str | None = None
    source_language: str | None = None
    reference: str | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads the prompts of a file.

    Files that end in ``.jsonl`` (or ``.json``) hold one object a line with the fields of `Prompt`
    (``prompt`` is taken for ``text``; further fields are ignored); any other file holds one prompt
    a line. Empty lines do not count.

    Raises:
        MoeprofError: The file is missing, empty, binary or malformed.
    """
    path = Path(path)
    lines = [
        (number, line)
        for number, line in enumerate(_read_text(path).split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise MoeprofError(f"{path} holds no prompts", hint=_FORMAT_HINT)
    if path.suffix not in {".jsonl", ".json"}:
        return [
            Prompt(id=f"{path.stem}-{number}", text=line.rstrip("\r")) for number, line in lines
        ]
    prompts = [_parse(path, number, line) for number, line in lines]
    seen: dict[str, int] = {}
    for (number, _), prompt in zip(lines, prompts, strict=True):
        if prompt.id in seen:
            raise MoeprofError(
                f"{path}, line {number}: the id {prompt.id!r} was used in line {seen[prompt.id]}",
                hint="give every prompt an id of its own, or leave the ids out",
            )
        seen[prompt.id] = number
    return prompts


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MoeprofError(f"there is no prompts file {path}", hint=_FORMAT_HINT) from None
    except OSError as error:
        raise MoeprofError(
            f"cannot read the prompts file {path}: {error.strerror}", hint=_FORMAT_HINT
        ) from None
    zero = data.find(b"\0")
    if zero >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise MoeprofError(
            f"{path}, line {line}: a NUL byte, so this is a binary file", hint=_FORMAT_HINT
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MoeprofError(
            f"{path}, line {line}: not valid UTF-8",
            hint="save the prompts as UTF-8 text",
        ) from None


def _parse(path: Path, number: int, line: str) -> Prompt:
    where = f"{path}, line {number}"
    try:
        fields: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise MoeprofError(f"{where}: not JSON ({error.msg})", hint=_FORMAT_HINT) from None
    if not isinstance(fields, dict):
        raise MoeprofError(f"{where}: not a JSON object", hint=_FORMAT_HINT)
    text = fields.get("text", fields.get("prompt"))
    if not isinstance(text, str) or not text.strip():
        raise MoeprofError(f"{where}: no field 'text' with a prompt in it", hint=_FORMAT_HINT)
    labels: dict[str, str | None] = {}
    for name in _LABELS:
        value = fields.get(name)
        if value is not None and not isinstance(value, str):
            raise MoeprofError(
                f"{where}: the field {name!r} is not a string", hint=f"write {name!r} as a string"
            )
        labels[name] = value
    return Prompt(id=str(fields.get("id", f"{path.stem}-{number}")), text=text, **labels)
