"""Packs the cleaned corpora of `analysis/zoo` as tokens for `analysis.gpu.twins`.

One file per task, small enough to travel to a machine with a GPU and read with NumPy alone:

    python analysis/zoo/fetch.py --data ../zoo-data
    PYTHONHASHSEED=0 python analysis/zoo/clean.py --data ../zoo-data
    python -m analysis.gpu.twins.pack --data ../zoo-data --out .twin-pack

`lm.pack` and `mt.pack` hold LZMA-compressed tokens of a byte-level vocabulary trained on the
training split, with the domain and split of every text; `*.tokenizer.json` is that vocabulary,
which serves only to show examples as text.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PAD, END, FIRST_LANGUAGE = 0, 1, 2
LANGUAGES = ("deu_Latn", "fra_Latn", "spa_Latn")
SPECIAL = ("<pad>", "<end>", *LANGUAGES)
VOCABULARY = 16384
SPLITS = ("train", "test")
_TOKENS_PER_CALL = 20_000
# Tuned to 16-bit items: one bit of position, and of the byte before the two highest bits.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 2, "lp": 1, "pb": 1}]
_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Ids = npt.NDArray[np.uint16]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Tokenized texts of one kind, one after another.

    Attributes:
        tokens: [N] tokens of all texts, without separators.
        lengths: [texts] tokens of each.
    """

    tokens: Ids
    lengths: Ints

    def split(self) -> list[Ids]:
        """Returns the tokens of every text."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class LmPack:
    """Documents of the language model.

    Attributes:
        token_bytes: [vocabulary] bytes of text that each token stands for.
        documents: The documents.
        domain: [documents] index into ``domains``.
        split: [documents] index into `SPLITS`.
        domains: Names.
    """

    token_bytes: Ints
    documents: Texts
    domain: Ints
    split: Ints
    domains: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class MtPack:
    """Sentence pairs of the translation model.

    Attributes:
        token_bytes: [vocabulary] bytes of text that each token stands for; both sides share it.
        sources: Distinct English texts.
        targets: Distinct foreign texts.
        source: [pairs] index into ``sources``.
        target: [pairs] index into ``targets``.
        language: [pairs] index into `LANGUAGES`.
        domain: [pairs] index into ``domains``.
        split: [pairs] index into `SPLITS`.
        domains: Names.
    """

    token_bytes: Ints
    sources: Texts
    targets: Texts
    source: Ints
    target: Ints
    language: Ints
    domain: Ints
    split: Ints
    domains: tuple[str, ...]


def write_pack(path: Path, pack: LmPack | MtPack) -> None:
    """Writes a pack as one compressed file."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in vars(pack).items():
        if isinstance(value, Texts):
            arrays |= {f"{name}.{part}": array for part, array in vars(value).items()}
        else:
            arrays[name] = np.asarray(value)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(buffer.getvalue(), filters=_FILTERS))


def read_lm(path: Path) -> LmPack:
    """Reads what `write_pack` wrote."""
    return LmPack(**_fields(path))


def read_mt(path: Path) -> MtPack:
    """Reads what `write_pack` wrote."""
    return MtPack(**_fields(path))


def _fields(path: Path) -> dict[str, Any]:
    with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as stored:
        arrays = dict(stored)
    fields: dict[str, Any] = {}
    for name, array in arrays.items():
        owner, _, part = name.partition(".")
        if part:
            fields.setdefault(owner, {})[part] = array
        else:
            fields[owner] = array
    fields["domains"] = tuple(str(name) for name in fields["domains"])
    return {
        name: Texts(**value) if isinstance(value, dict) else value for name, value in fields.items()
    }


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Returns a byte-level BPE tokenizer; its first entries are `SPECIAL`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_bytes(tokenizer: Any) -> Ints:
    """Returns [vocabulary] bytes of each token; a byte-level vocabulary spells a byte a letter."""
    names = [tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size())]
    return np.array([0 if i < len(SPECIAL) else len(n) for i, n in enumerate(names)], np.int32)


def encode(tokenizer: Any, texts: Sequence[str]) -> Texts:
    """Tokenizes texts."""
    ids: list[Ids] = []
    for first in range(0, len(texts), _TOKENS_PER_CALL):
        some = list(texts[first : first + _TOKENS_PER_CALL])
        ids += [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch_fast(some)]
    return Texts(
        tokens=np.concatenate(ids) if ids else np.empty(0, np.uint16),
        lengths=np.array([len(text) for text in ids], np.int32),
    )


def pack_lm(rows: Sequence[dict[str, str]], vocab_size: int) -> tuple[LmPack, Any]:
    """Returns the documents as tokens, and the tokenizer."""
    tokenizer = train_tokenizer(
        (row["text"] for row in rows if row["split"] == "train"), vocab_size
    )
    domains = tuple(sorted({row["domain"] for row in rows}))
    pack = LmPack(
        token_bytes=token_bytes(tokenizer),
        documents=encode(tokenizer, [row["text"] for row in rows]),
        domain=np.array([domains.index(row["domain"]) for row in rows], np.int32),
        split=np.array([SPLITS.index(row["split"]) for row in rows], np.int32),
        domains=domains,
    )
    return pack, tokenizer


def pack_mt(rows: Sequence[dict[str, str]], vocab_size: int) -> tuple[MtPack, Any]:
    """Returns the pairs as tokens, each distinct text once, and the tokenizer."""
    sources = {text: i for i, text in enumerate(dict.fromkeys(row["source"] for row in rows))}
    targets = {text: i for i, text in enumerate(dict.fromkeys(row["target"] for row in rows))}
    training = [row for row in rows if row["split"] == "train"]
    texts = dict.fromkeys(row[side] for row in training for side in ("source", "target"))
    tokenizer = train_tokenizer(texts, vocab_size)
    domains = tuple(sorted({row["domain"] for row in rows}))
    pack = MtPack(
        token_bytes=token_bytes(tokenizer),
        sources=encode(tokenizer, list(sources)),
        targets=encode(tokenizer, list(targets)),
        source=np.array([sources[row["source"]] for row in rows], np.int32),
        target=np.array([targets[row["target"]] for row in rows], np.int32),
        language=np.array([LANGUAGES.index(row["language"]) for row in rows], np.int32),
        domain=np.array([domains.index(row["domain"]) for row in rows], np.int32),
        split=np.array([SPLITS.index(row["split"]) for row in rows], np.int32),
        domains=domains,
    )
    return pack, tokenizer


def main() -> None:
    """Packs and says how large things are."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=Path("../zoo-data"))
    parser.add_argument("--out", type=Path, default=Path(".twin-pack"))
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--task", choices=("lm", "mt", "both"), default="both")
    args = parser.parse_args()
    for task, packer in (("lm", pack_lm), ("mt", pack_mt)):
        if args.task not in {task, "both"}:
            continue
        with (args.data / "clean" / f"{task}.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        pack, tokenizer = packer(rows, args.vocabulary)
        path = args.out / f"{task}.pack"
        write_pack(path, pack)
        tokenizer.save(str(args.out / f"{task}.tokenizer.json"), pretty=False)
        texts = [part for part in vars(pack).values() if isinstance(part, Texts)]
        num_tokens = sum(part.tokens.size for part in texts)
        num_bytes = sum(int(pack.token_bytes[part.tokens].sum()) for part in texts)
        print(
            f"{path}: {path.stat().st_size / 2**20:.2f} MiB, {pack.token_bytes.size} entries, "
            f"{num_tokens} tokens of {num_bytes / num_tokens:.2f} bytes",
            flush=True,
        )


if __name__ == "__main__":
    main()
