"""Measures held-out perplexity of the shipped checkpoint and, given the corpus, of the baselines.

Never trains. Takes a minute of one CPU core, and needs the checkpoint and this directory:

    python examples/nano/evaluate.py
"""

import argparse
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from export import read_checkpoint, read_trained
from model import Step3
from ngram import Trigram, Unigram
from tokenizers import Tokenizer
from torch.nn import functional
from train_tokenizer import EOS

HERE = Path(__file__).parent
CHECKPOINT = HERE.parents[1] / "python/step3rt/data/nano"
# Longer documents are cut into windows of this length, and no window sees the one before it.
WINDOW_TOKENS = 2048

log = logging.getLogger("evaluate")
LogProbability = Callable[[np.ndarray], np.ndarray]


def load_documents(path: Path, tokenizer: Tokenizer) -> list[tuple[str, int, np.ndarray]]:
    """Reads (source, UTF-8 bytes, u16[N]) of every held-out document: bos, its tokens, eos."""
    eos = tokenizer.token_to_id(EOS)
    documents = []
    for line in path.read_text().splitlines():
        document = json.loads(line)
        ids = np.array([*tokenizer.encode(document["text"]).ids, eos], dtype=np.uint16)
        documents.append((document["source"], len(document["text"].encode()), ids))
    return documents


def model_log_probability(model: Step3, kv_dtype: torch.dtype | None) -> LogProbability:
    """Returns a function that gives nats, float64[N-1], for tokens 1… of a document."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def log_probability(document: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(document.astype(np.int64)).to(device)
        parts = []
        for start in range(0, len(tokens) - 1, WINDOW_TOKENS):
            window = tokens[start : start + WINDOW_TOKENS + 1]
            logits, _ = model(window[None, :-1], kv_dtype)
            parts.append(
                -functional.cross_entropy(logits[0].double(), window[1:], reduction="none")
            )
        return torch.cat(parts).cpu().numpy()

    return log_probability


def report(
    name: str, log_probability: LogProbability, documents: list[tuple[str, int, np.ndarray]]
) -> dict[str, object]:
    """Logs and returns perplexity a token (all documents and by source) and bits a byte."""
    nats: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    for source, _, ids in documents:
        nats[source] -= float(log_probability(ids).sum())
        tokens[source] += len(ids) - 1
    total_nats, total_bytes = sum(nats.values()), sum(size for _, size, _ in documents)
    result = {
        "model": name,
        "perplexity": round(math.exp(total_nats / sum(tokens.values())), 3),
        "bits_per_byte": round(total_nats / math.log(2) / total_bytes, 4),
        "by_source": {source: round(math.exp(nats[source] / tokens[source]), 2) for source in nats},
    }
    log.info("%s", json.dumps(result))
    return result


def main() -> None:
    """Prints one JSON line for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.jsonl")
    parser.add_argument(
        "--corpus", type=Path, help="output of prepare.py: adds the n-gram baselines"
    )
    parser.add_argument(
        "--weights", type=Path, help="output of train.py: adds the BF16 weights before FP8 rounding"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    documents = load_documents(args.heldout, tokenizer)
    count = sum(len(ids) - 1 for _, _, ids in documents)
    log.info("%d held-out documents, %d predicted tokens", len(documents), count)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.corpus:
        train_tokens = np.load(args.corpus / "train.npy")
        report(
            "unigram", Unigram(train_tokens, tokenizer.get_vocab_size()).log_probability, documents
        )
        report(
            "trigram", Trigram(train_tokens, tokenizer.get_vocab_size()).log_probability, documents
        )
    if args.weights:
        weights, config = read_trained(args.weights)
        model = Step3(config)
        model.load_state_dict(weights)
        report("bf16", model_log_probability(model.eval().to(device), None), documents)
    model = read_checkpoint(args.checkpoint).to(device)
    report("fp8", model_log_probability(model, None), documents)
    report("fp8 + fp8 kv", model_log_probability(model, torch.float8_e4m3fn), documents)


if __name__ == "__main__":
    main()
