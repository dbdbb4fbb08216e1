"""Rows of logits for the sampler's GPU tests, and the CPU's answers to them."""

from dataclasses import replace

import numpy as np
import torch

from step3rt.ops.sample import DeviceSamplingRow, Samples, pack_rows, sample_on_device
from step3rt.ops.sampling import SamplingRow, sample
from tests.kernels.mfa_inputs import DEVICE

POISON_TOKEN = -12345
LARGEST = torch.finfo(torch.float32).max


def make_logits(
    num_rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    spread: float = 3.0,
    device: torch.device = DEVICE,
) -> torch.Tensor:
    """Random logits in padded rows."""
    return repadded((torch.randn(num_rows, vocab_size, device=device) * spread).to(dtype))


def repadded(logits: torch.Tensor) -> torch.Tensor:
    """The same logits in padded rows; the padding holds NaN."""
    num_rows, vocab_size = logits.shape
    stride = -(-vocab_size // 8) * 8 + 8
    padded = logits.new_full((num_rows, stride), float("nan"))
    padded[:, :vocab_size] = logits
    return padded[:, :vocab_size]


def fp32(value: float) -> float:
    """The value as the kernel gets it."""
    return float(np.float32(value))


def run(logits: torch.Tensor, rows: list[DeviceSamplingRow]) -> Samples:
    """Samples on the device into poisoned outputs."""
    batch = pack_rows(rows, logits.shape[1], logits.device)
    out = Samples.empty(len(rows), max(1, batch.num_top), logits.device)
    out.token_ids.fill_(POISON_TOKEN)
    out.is_corrupt.fill_(POISON_TOKEN)
    out.top_ids.fill_(POISON_TOKEN)
    sample_on_device(logits, batch, out)
    return out


def edited_logits(logits: torch.Tensor, row: DeviceSamplingRow) -> torch.Tensor:
    """f32[V]: bias, repetition, frequency and presence in float64, then masks, token by token."""
    edited = logits.float().cpu().clone()
    known = set(row.generated)
    if row.repetition != 1:
        known |= set(row.prompt_token_ids)
    if row.presence == 0 and row.frequency == 0 and row.repetition == 1:
        known = set()
    for token, bias in row.bias.items():
        edited[token] += bias
    for token in known:
        exact = float(edited[token])
        exact = exact / row.repetition if exact > 0 else exact * row.repetition
        exact -= row.frequency * row.generated.get(token, 0)
        exact -= row.presence * (row.generated.get(token, 0) > 0)
        edited[token] = min(max(exact, -LARGEST), LARGEST)
    edited[[token for token in row.masked_token_ids if token < len(edited)]] = -torch.inf
    return edited


def reference_tokens(logits: torch.Tensor, rows: list[DeviceSamplingRow]) -> list[int]:
    """What `ops.sampling.sample` chooses on the CPU from the edited logits."""
    tokens = []
    for logit_row, row in zip(logits, rows, strict=True):
        plain = SamplingRow(
            temperature=row.temperature,
            top_k=row.top_k,
            top_p=row.top_p,
            min_p=row.min_p,
            seed=row.seed,
            position=row.position,
        )
        tokens += sample(edited_logits(logit_row, row)[None], [plain])
    return tokens


def vary(row: DeviceSamplingRow, count: int) -> list[DeviceSamplingRow]:
    """The row with `count` different seeds and positions."""
    return [
        replace(row, seed=(index * 0x9E3779B97F4A7C15 + 1) % 2**64, position=index * 7)
        for index in range(count)
    ]
