"""Makes the corpus: fetches packages, reads and splits their text, trains the tokenizer, encodes.

Never trains the model. Needs Debian 12 (`apt-get`, `dpkg-deb`) and `tokenizers`, but no torch.

    python examples/nano/prepare.py --out build/nano
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import train_tokenizer
from sources import SOURCES, fetch
from tokenizers import Tokenizer

VOCAB_SIZE = 3072
MIN_DOCUMENT_CHARS = 200
# A paragraph repeated across pages (licence notes, redirects) would be learned by heart.
MIN_REPEATED_CHARS = 80
# One document in this many of a source, and at least one, is held out; as many are for validation.
DOCUMENTS_PER_HELDOUT = 120

log = logging.getLogger("prepare")


@dataclass(frozen=True, slots=True)
class Document:
    """A text of one source: a chapter, a page, or a group of dictionary entries."""

    source: str
    text: str


def documents(cache: Path) -> Iterator[Document]:
    """Yields the documents of all sources, without paragraphs that an earlier document had."""
    seen: set[str] = set()
    for source in SOURCES:
        for text in source.read(fetch(source, cache)):
            kept = [p for p in text.split("\n\n") if p not in seen]
            seen.update(p for p in kept if len(p) >= MIN_REPEATED_CHARS)
            if sum(map(len, kept)) >= MIN_DOCUMENT_CHARS:
                yield Document(source.name, "\n\n".join(kept))


def split(docs: Iterable[Document]) -> dict[str, list[Document]]:
    """Splits into `train`, `validation` and `heldout` by the hashes of a source's documents."""
    by_source: dict[str, list[Document]] = {source.name: [] for source in SOURCES}
    for document in docs:
        by_source[document.source].append(document)
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "heldout": []}
    for of_source in by_source.values():
        shuffled = sorted(of_source, key=lambda d: hashlib.sha256(d.text.encode()).digest())
        count = -(-len(shuffled) // DOCUMENTS_PER_HELDOUT)
        splits["heldout"] += shuffled[:count]
        splits["validation"] += shuffled[count : 2 * count]
        splits["train"] += shuffled[2 * count :]
    return splits


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Encodes to u16[N]: each document is bos, its tokens, eos."""
    eos = tokenizer.token_to_id(train_tokenizer.EOS)
    encoded = tokenizer.encode_batch(list(texts))
    return np.concatenate([np.array([*e.ids, eos], dtype=np.uint16) for e in encoded])


def main() -> None:
    """Writes documents, tokens and the tokenizer below --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/nano"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    by_split = split(documents(args.out / "packages"))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, docs in by_split.items():
        with (args.out / f"{name}.jsonl").open("w") as lines:
            for document in docs:
                lines.write(json.dumps({"source": document.source, "text": document.text}) + "\n")
        for source in SOURCES:
            chars = sum(len(d.text) for d in docs if d.source == source.name)
            log.info("%-10s %-10s %10d characters", name, source.name, chars)

    tokenizer = train_tokenizer.train(
        (d.text for d in by_split["train"]), VOCAB_SIZE, args.out / "tokenizer"
    )
    for name in ("train", "validation"):
        tokens = encode(tokenizer, (d.text for d in by_split[name]))
        chars = sum(len(d.text) for d in by_split[name])
        np.save(args.out / f"{name}.npy", tokens)
        log.info(
            "%-10s %10d tokens, %.2f characters a token", name, len(tokens), chars / len(tokens)
        )


if __name__ == "__main__":
    main()
