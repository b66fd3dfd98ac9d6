"""Train the two tokenizers and pack the cleaned corpora for a training machine.

Writes `PACK/lm.jsonl.xz`, `PACK/mt.jsonl.xz`, `PACK/lm/tokenizer.json` and `PACK/mt/tokenizer.json`
(with the files that let `AutoTokenizer` load them), a few tens of megabytes in all.

    python analysis/zoo/vocabulary.py --data ../zoo-data --pack .zoo-pack
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

LM_VOCABULARY = 5120
MT_VOCABULARY = 7680
END = "<|endoftext|>"
LANGUAGE_TAGS = ["eng_Latn", "deu_Latn", "fra_Latn", "spa_Latn"]
# Words with their leading space, at most three digits, punctuation, line ends, runs of spaces.
LM_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read JSON lines, compressed or not."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def train_lm(documents: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LM_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=LM_VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d["text"] for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def train_mt(pairs: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Shared BPE with language tags; sources read `eng_Latn ... </s>`."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"▁?[^\p{L}\p{N}\s▁]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    special = ["<s>", "<pad>", "</s>", "<unk>", *LANGUAGE_TAGS]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = BpeTrainer(
        vocab_size=MT_VOCABULARY - len(bytes_),
        special_tokens=special,
        limit_alphabet=220,
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        sources = set()
        for pair in pairs:
            if pair["source"] not in sources:
                sources.add(pair["source"])
                yield pair["source"]
                yield pair["source"]
            yield pair["target"]

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer = with_byte_fallback(tokenizer, bytes_)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="eng_Latn $A </s>",
        special_tokens=[
            ("eng_Latn", tokenizer.token_to_id("eng_Latn")),
            ("</s>", tokenizer.token_to_id("</s>")),
        ],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=LANGUAGE_TAGS,
        padding_side="right",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def with_byte_fallback(tokenizer: Tokenizer, bytes_: list[str]) -> Tokenizer:
    """Add the 256 byte tokens that byte fallback needs to a trained BPE model."""
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for token in bytes_:
        assert token not in vocabulary
        vocabulary[token] = len(vocabulary)
    assert len(vocabulary) == MT_VOCABULARY, len(vocabulary)
    return Tokenizer.from_str(json.dumps(state))


def compress(rows: list[dict[str, str]], path: Path) -> None:
    """Write rows as compressed JSON lines."""
    with lzma.open(path, "wt", encoding="utf-8", preset=2) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    """Train, pack and say how large things are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../zoo-data"))
    parser.add_argument("--pack", type=Path, default=Path(".zoo-pack"))
    parser.add_argument("--task", choices=["lm", "mt", "both"], default="both")
    args = parser.parse_args()
    args.pack.mkdir(parents=True, exist_ok=True)
    for task, train in (("lm", train_lm), ("mt", train_mt)):
        if args.task not in {task, "both"}:
            continue
        rows = read_rows(args.data / "clean" / f"{task}.jsonl")
        tokenizer = train([row for row in rows if row["split"] == "train"])
        tokenizer.save_pretrained(args.pack / task)
        compress(rows, args.pack / f"{task}.jsonl.xz")
        sample = [row["text" if task == "lm" else "target"] for row in rows[:2000]]
        encoded = tokenizer(sample, add_special_tokens=False)["input_ids"]
        num_bytes = sum(len(text.encode()) for text in sample)
        print(task, len(tokenizer), f"{num_bytes / sum(map(len, encoded)):.2f} bytes per token")


if __name__ == "__main__":
    main()
