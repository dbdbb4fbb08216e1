"""Reads documents of plain English out of the file formats that Debian packages keep them in.

Never decides what is trained on: a reader yields whole documents, a blank line between paragraphs.
"""

import gzip
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

# Entries of a dictionary are short, so that many of them make one document.
ENTRIES_PER_DOCUMENT = 16
MIN_PARAGRAPH_CHARS = 60

_ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u00e6": "ae",
        "\u0153": "oe",
    }
)


def plain(text: str) -> str:
    """Maps typographic characters to ASCII, drops what has none, squeezes white space."""
    text = unicodedata.normalize("NFKD", text.translate(_ASCII)).encode("ascii", "ignore").decode()
    return " ".join(text.split())


def bible_chapters(root: Path) -> Iterator[str]:
    """Yields the chapters of the World English Bible from a SWORD `zText` module.

    A testament is three files: `.bzz` holds zlib blocks, `.bzs` a 12-byte record for each block
    (offset, compressed size, size; little endian). The blocks hold OSIS markup in reading order,
    so the verse index `.bzv` is not needed.
    """
    module = root / "usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for testament in ("ot", "nt"):
        blocks = (module / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack(
            "<III", (module / f"{testament}.bzs").read_bytes()
        ):
            yield from _osis_chapters(zlib.decompress(blocks[offset : offset + size]).decode())


def _osis_chapters(markup: str) -> Iterator[str]:
    markup = re.sub(r"<(note|title)\b.*?</\1>", " ", markup, flags=re.DOTALL)
    for chapter in re.split(r"<chapter\b[^>]*\bsID=", markup)[1:]:
        # Paragraphs are pairs of milestones; only their openings matter for plain text.
        text = re.sub(r'<div [^>]*sID=[^>]*type="x-p[^>]*>', "\n\n", "<x " + chapter)
        text = re.sub(r"<[^>]*>", "", text)
        paragraphs = [plain(p) for p in text.split("\n\n")]
        yield "\n\n".join(re.sub(r" ([,.;:!?])", r"\1", p) for p in paragraphs if p)


def austen_chapters(root: Path) -> Iterator[str]:
    """Yields the chapters of Jane Austen's novels from an R lazy-load data base.

    The data base is a sequence of (big-endian u32 size, zlib stream); each stream is one
    serialised R object.
    """
    rest = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while rest:
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(rest[4:]))
        rest = stream.unused_data
        chapter: list[str] = []
        for line in [*lines, "CHAPTER"]:
            if re.match(r"(CHAPTER|Chapter|VOLUME|FINIS|THE END)\b", line):
                yield _join_paragraphs(chapter)
                chapter = []
            else:
                chapter.append(line.replace("_", ""))


def _r_strings(serialised: bytes) -> list[str]:
    """Reads a character vector in R's XDR format 3: a STRSXP (type 16) of CHARSXPs (type 9)."""
    _, _, _, encoding_bytes = struct.unpack_from(">IIII", serialised, 2)
    at = 18 + encoding_bytes
    kind, count = struct.unpack_from(">II", serialised, at)
    at += 8
    if kind & 0xFF != 16:
        raise ValueError(
            f"R object has type {kind & 0xFF}, but text is a STRSXP (16). Another package version?"
        )
    strings = []
    for _ in range(count):
        _, size = struct.unpack_from(">Ii", serialised, at)
        at += 8
        strings.append(serialised[at : at + size].decode("utf-8", "replace"))
        at += size
    return strings


def devil_entries(root: Path) -> Iterator[str]:
    """Yields groups of entries of Ambrose Bierce's dictionary (a `dictd` file is a gzip file)."""
    text = gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("latin-1")
    entries = re.split(r"\n(?=[A-Z][A-Z-]+,? )", text)[1:]
    yield from _grouped(_join_paragraphs(entry.replace("_", "").splitlines()) for entry in entries)


def jargon_entries(root: Path) -> Iterator[str]:
    """Yields groups of entries of the Jargon File; an entry starts with `   :word:`."""
    text = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode()
    entries = re.split(r"\n   :(?=[^\n:]+:)", text)[1:]
    cleaned = (re.sub(r"/[^/\n]{2,40}/,? ?", "", re.sub(r"[{}]", "", entry)) for entry in entries)
    yield from _grouped(_join_paragraphs(entry.splitlines()) for entry in cleaned)


def sqlite_pages(root: Path) -> Iterator[str]:
    """Yields the pages of the SQLite documentation, without release logs and generated reports."""
    pages = root / "usr/share/doc/sqlite3"
    yield from _html_documents(sorted(pages.glob("*.html")))


def rust_book_pages(root: Path) -> Iterator[str]:
    """Yields the pages of the books that come with Rust, without the generated API reference."""
    html = root / "usr/share/doc/rust-doc/html"
    for book in ("book", "nomicon", "embedded-book", "edition-guide", "reference"):
        pages = sorted((html / book).rglob("*.html"))
        yield from _html_documents(p for p in pages if p.name not in ("print.html", "toc.html"))


def postgres_pages(root: Path) -> Iterator[str]:
    """Yields the pages of the PostgreSQL manual, without the release notes."""
    (html,) = root.glob("usr/share/doc/postgresql-doc-*/html")
    yield from _html_documents(p for p in sorted(html.glob("*.html")) if "release" not in p.name)


class _Prose(HTMLParser):
    """Collects the text of `<p>` elements, and drops everything inside code blocks and tables."""

    _DROPPED = ("pre", "table", "script", "style", "nav", "svg", "title")
    # HTML lets a `<p>` end by opening another block.
    _BLOCKS = (
        "p",
        "div",
        "ul",
        "ol",
        "li",
        "dl",
        "dt",
        "dd",
        "blockquote",
        "h1",
        "h2",
        "h3",
        "h4",
        "section",
    )

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._text: list[str] | None = None
        self._dropped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        if tag in self._DROPPED:
            self._dropped += 1
        if tag in self._BLOCKS or tag in self._DROPPED:
            self._end_paragraph()
        if tag == "p":
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag in self._DROPPED:
            self._dropped = max(0, self._dropped - 1)
        if tag in self._BLOCKS:
            self._end_paragraph()

    def handle_data(self, data: str) -> None:
        if self._text is not None and not self._dropped:
            self._text.append(data)

    def _end_paragraph(self) -> None:
        if self._text:
            self.paragraphs.append(plain("".join(self._text)))
        self._text = None


def _html_documents(pages: Iterable[Path]) -> Iterator[str]:
    for page in pages:
        parser = _Prose()
        parser.feed(page.read_text("utf-8", errors="replace"))
        parser.close()
        yield "\n\n".join(p for p in parser.paragraphs if is_prose(p))


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is a sentence or more, rather than code, a heading or a list of names."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        len(paragraph) >= MIN_PARAGRAPH_CHARS
        and letters >= 0.93 * len(paragraph)
        and paragraph[-1] in ".!?:\"')"
    )


def _join_paragraphs(lines: list[str]) -> str:
    paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
    return "\n\n".join(p for p in map(plain, paragraphs) if p)


def _grouped(entries: Iterable[str]) -> Iterator[str]:
    group: list[str] = []
    for entry in entries:
        group.append(entry)
        if len(group) == ENTRIES_PER_DOCUMENT:
            yield "\n\n".join(group)
            group = []
    if group:
        yield "\n\n".join(group)
