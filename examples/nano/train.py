"""Trains the small model on one GPU (a few steps work on a CPU) and keeps the best BF16 weights.

Never quantises and never sees the held-out documents.

    python examples/nano/train.py --corpus build/nano --out build/nano/model
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from model import ModelConfig, Step3
from muon import Muon
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

BALANCE_LOSS_WEIGHT = 0.01
EVALUATIONS = 16

log = logging.getLogger("train")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Hyperparameters. The defaults made the shipped checkpoint."""

    seed: int = 3
    steps: int = 1800
    warmup_steps: int = 150
    sequences_per_step: int = 8
    sequence_tokens: int = 4096
    learning_rate: float = 4e-3
    adam_learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.1


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Linear warm-up to 1, then half a cosine down to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def batches(tokens: np.ndarray, config: TrainConfig, device: torch.device) -> Iterator[Tensor]:
    """Yields int64[sequences_per_step, sequence_tokens + 1] windows, each token once an epoch.

    Every epoch starts its windows at another offset and shuffles them.
    """
    rng = np.random.default_rng(config.seed)
    corpus = torch.from_numpy(tokens.astype(np.int64)).to(device)
    span = torch.arange(config.sequence_tokens + 1, device=device)
    starts = np.empty(0, dtype=np.int64)
    while True:
        if len(starts) < config.sequences_per_step:
            offset = rng.integers(config.sequence_tokens)
            epoch = np.arange(
                offset, len(tokens) - config.sequence_tokens - 1, config.sequence_tokens
            )
            starts = np.concatenate((starts, rng.permutation(epoch)))
        taken, starts = starts[: config.sequences_per_step], starts[config.sequences_per_step :]
        yield corpus[torch.from_numpy(taken).to(device)[:, None] + span]


def next_token_loss(model: Step3, window: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy in nats of predicting window[:, 1:], and the load-balancing loss."""
    with torch.autocast(window.device.type, dtype=torch.bfloat16):
        logits, balance = model(window[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten()), balance


@torch.no_grad()
def validation_loss(
    model: Step3, tokens: np.ndarray, config: TrainConfig, device: torch.device
) -> float:
    """Mean loss in nats a token over the validation split, in windows of the training length."""
    model.eval()
    corpus = torch.from_numpy(tokens.astype(np.int64)).to(device)
    total, count = 0.0, 0
    for start in range(0, len(corpus) - 1, config.sequence_tokens):
        window = corpus[start : start + config.sequence_tokens + 1][None]
        loss, _ = next_token_loss(model, window)
        total += loss.item() * (window.shape[1] - 1)
        count += window.shape[1] - 1
    model.train()
    return total / count


def optimizers(model: Step3, config: TrainConfig) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, AdamW for the rest. All weights are float32."""
    is_matrix = {
        n: p.dim() > 1 and "layers" in n and "moe.gate." not in n
        for n, p in model.named_parameters()
    }
    matrices = [p for n, p in model.named_parameters() if is_matrix[n]]
    others = [p for n, p in model.named_parameters() if not is_matrix[n]]
    return (
        Muon(matrices, config.learning_rate, config.weight_decay),
        torch.optim.AdamW(
            others, config.adam_learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    )


def train(corpus: Path, out: Path, config: TrainConfig, model_config: ModelConfig) -> None:
    """Trains; writes `weights.safetensors` (BF16, lowest validation loss) and `log.jsonl`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    train_tokens, validation_tokens = (
        np.load(corpus / "train.npy"),
        np.load(corpus / "validation.npy"),
    )
    model = Step3(model_config, config.dropout).to(device)
    updates = optimizers(model, config)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(u, lambda step: learning_rate_factor(config, step))
        for u in updates
    ]
    out.mkdir(parents=True, exist_ok=True)
    log.info("%.2f M parameters on %s", sum(p.numel() for p in model.parameters()) / 1e6, device)

    best, started_s = math.inf, time.monotonic()
    windows = batches(train_tokens, config, device)
    with (out / "log.jsonl").open("w") as lines:
        lines.write(json.dumps({"train": asdict(config), "model": asdict(model_config)}) + "\n")
        for step in range(config.steps):
            loss, balance = next_token_loss(model, next(windows))
            (loss + BALANCE_LOSS_WEIGHT * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for update, schedule in zip(updates, schedules, strict=True):
                update.step()
                update.zero_grad()
                schedule.step()
            if (step + 1) % max(1, config.steps // EVALUATIONS) and step + 1 < config.steps:
                continue
            validation = validation_loss(model, validation_tokens, config, device)
            record = {
                "step": step + 1,
                "loss": round(loss.item(), 4),
                "balance": round(balance.item(), 4),
                "validation_loss": round(validation, 4),
                "elapsed_s": round(time.monotonic() - started_s, 1),
            }
            log.info("%s", record)
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            if validation < best:
                best = validation
                weights = {
                    n: p.detach().to("cpu", torch.bfloat16) for n, p in model.named_parameters()
                }
                save_file(weights, out / "weights.safetensors")


def main() -> None:
    """Reads the corpus of prepare.py and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("build/nano"))
    parser.add_argument("--out", type=Path, default=Path("build/nano/model"))
    for name, value in asdict(TrainConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    corpus, out = args.pop("corpus"), args.pop("out")
    train(corpus, out, TrainConfig(**args), ModelConfig())


if __name__ == "__main__":
    main()
