"""Choose the held-out prompts that ship with the built-in models.

Language model: 16 openings or passages a domain, 60 to 200 tokens, domains interleaved.
Translation: 32 held-out sentences a target language with their references, languages interleaved.
Only public-domain and permissive text, the Brown corpus and (translation) the LibreOffice help
under MPL-2.0 are quoted.

    python analysis/zoo/select_prompts.py --pack .zoo-pack --models moeprof/zoo
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import zip_longest
from pathlib import Path

from clean import fraction
from transformers import AutoTokenizer
from vocabulary import read_rows

PER_DOMAIN = 16
PER_LANGUAGE = 32
DOMAINS = ("prose", "scripture", "code", "manual", "facts", "literature")
QUOTABLE = re.compile(r"public domain|Brown|PSF|BSD|MIT|Linux-man-pages|Artistic")


def passages(row: dict[str, str]) -> list[str]:
    """Cut a document into the passages that could be a prompt."""
    lines = row["text"].split("\n")
    starts = [0] + [
        i
        for i in range(1, len(lines))
        if lines[i].strip() and (not lines[i - 1].strip() or row["domain"] in {"prose", "facts"})
    ]
    return ["\n".join(lines[i : i + 24]) for i in starts[:60]]


def language_model_prompts(pack: Path) -> list[dict[str, str]]:
    """Pick one passage from each of 16 held-out documents of each domain."""
    tokenizer = AutoTokenizer.from_pretrained(pack / "lm", model_max_length=10**9)
    rows = [r for r in read_rows(pack / "lm.jsonl.xz") if r["split"] == "test"]
    chosen: dict[str, list[dict[str, str]]] = {domain: [] for domain in DOMAINS}
    rounds = 0
    while any(len(found) < PER_DOMAIN for found in chosen.values()):
        rounds += 1
        assert rounds < 10, {domain: len(found) for domain, found in chosen.items()}
        for row in sorted(rows, key=lambda r: fraction(f"prompt {r['id']}")):
            found = chosen[row["domain"]]
            if len(found) == PER_DOMAIN or not QUOTABLE.search(row["licence"]):
                continue
            options = sorted(passages(row), key=lambda t: fraction(f"prompt {rounds} {t}"))
            length = 60 + int(141 * fraction(f"length {rounds} {row['id']}"))
            for text in options:
                ids = tokenizer(text)["input_ids"]
                prompt = tokenizer.decode(ids[:length]).rstrip()
                words = len(re.findall(r"[A-Za-z]{2,}", prompt))
                if len(ids) >= length and words >= 0.25 * length:
                    if all(prompt[:60] != other["text"][:60] for other in found):
                        found.append(
                            {
                                "id": f"{row['domain']}-{len(found):02d}",
                                "text": prompt,
                                "domain": row["domain"],
                                "source": row["id"],
                            }
                        )
                    break
    return interleave(list(chosen.values()))


def translation_prompts(pack: Path) -> list[dict[str, str]]:
    """Pick 32 held-out sentences a language: help, for Spanish eight verses among them."""
    rows = [r for r in read_rows(pack / "mt.jsonl.xz") if r["split"] == "test"]
    languages = ("deu_Latn", "fra_Latn", "spa_Latn")
    chosen: dict[str, list[dict[str, str]]] = {language: [] for language in languages}
    seen: set[tuple[str, str]] = set()
    for row in sorted(rows, key=lambda r: fraction(f"prompt {r['source']}")):
        found = chosen[row["language"]]
        words = len(row["source"].split())
        quota = {"help": PER_LANGUAGE, "scripture": 8}
        if row["language"] == "spa_Latn":
            quota["help"] -= 8
        taken = sum(p["domain"] == row["domain"] for p in found)
        key = (row["source"], row["language"])
        if taken >= quota.get(row["domain"], 0) or not 6 <= words <= 40 or key in seen:
            continue
        seen.add(key)
        found.append(
            {
                "id": f"{row['language'][:3]}-{len(found):02d}",
                "text": row["source"],
                "source_language": "eng_Latn",
                "language": row["language"],
                "reference": row["target"],
                "domain": row["domain"],
            }
        )
    assert all(len(found) == PER_LANGUAGE for found in chosen.values())
    return interleave(list(chosen.values()))


def interleave(groups: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    """Take one prompt of each group in turn."""
    return [p for turn in zip_longest(*groups) for p in turn if p is not None]


def main() -> None:
    """Write both prompt files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pack", type=Path, default=Path(".zoo-pack"))
    parser.add_argument("--models", type=Path, default=Path("moeprof/zoo"))
    args = parser.parse_args()
    for task, choose in (("lm", language_model_prompts), ("mt", translation_prompts)):
        path = args.models / task / "prompts.jsonl"
        prompts = choose(args.pack)
        lines = [json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
