"""Times decoding on one GPU: whole steps as CUDA graphs, sampling greedily, no scheduler.

`step3rt bench engine` prints what it measures; figures of a served model need a server.
"""

import datetime
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from step3rt.errors import Unavailable
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.gpu_decoder import GpuDecoder, GpuDecoderOptions
from step3rt.model.gpu_weights import load_gpu_weights
from step3rt.model.step_tokens import StepTokens
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS

NUM_STEPS = 64
NUM_REPEATS = 5


def measure(model: Path, num_sequences: int, num_context_tokens: int) -> dict[str, Any]:
    """Decodes `NUM_STEPS` tokens of every sequence, from caches of random K and V.

    Args:
        model: A checkpoint's directory.
        num_sequences: Decoded together, in one bucket.
        num_context_tokens: Of each sequence at the start.

    Returns:
        Milliseconds per step and tokens per second, medians over repeats.

    Raises:
        Unavailable: this host has no Hopper GPU.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable(
            "No GPU of compute capability 9.0 was found. The engine's kernels are for Hopper. Run "
            "it on an H100 or H200, or use `step3rt generate` on this host"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    weights = load_gpu_weights(Checkpoint.open(model), device)
    blocks_each = -(-(num_context_tokens + NUM_STEPS + 1) // BLOCK_SIZE_TOKENS)
    options = GpuDecoderOptions(
        num_blocks=num_sequences * blocks_each,
        max_model_len=blocks_each * BLOCK_SIZE_TOKENS,
        max_tokens=num_sequences,
    )
    decoder = GpuDecoder(weights, options)
    tokens = _tokens(num_sequences, num_context_tokens, blocks_each)
    decoder.decode(tokens, NUM_STEPS)
    steps_ms = []
    for _ in range(NUM_REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        decoder.decode(tokens, NUM_STEPS).cpu()
        steps_ms.append((time.perf_counter() - started) * 1e3 / NUM_STEPS)
    step_ms = statistics.median(steps_ms)
    return {
        "model": model.name,
        "sequences": num_sequences,
        "context": num_context_tokens,
        "kv_dtype": "fp8",
        "weight_dtype": "fp8",
        "scheduler_in_loop": False,
        "steps": NUM_STEPS,
        "step_ms": round(step_ms, 3),
        "tokens_per_s": round(num_sequences / step_ms * 1e3),
        "machine": f"one {torch.cuda.get_device_name(device)}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _tokens(num_sequences: int, num_context_tokens: int, blocks_each: int) -> StepTokens:
    table = torch.randperm(num_sequences * blocks_each, dtype=torch.int32)
    table = table.view(num_sequences, blocks_each)
    position = num_context_tokens - 1
    positions = torch.full((num_sequences,), position, dtype=torch.int32)
    block = table[:, position // BLOCK_SIZE_TOKENS]
    return StepTokens(
        token_ids=torch.arange(num_sequences, dtype=torch.int32),
        positions=positions,
        slots=block * BLOCK_SIZE_TOKENS + position % BLOCK_SIZE_TOKENS,
        num_context_tokens=positions + 1,
        block_table=table,
    )
