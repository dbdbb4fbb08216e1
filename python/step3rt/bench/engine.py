"""Times prefill and decoding on one GPU: steps as CUDA graphs, sampling greedily, no scheduler.

`step3rt bench engine` prints what it measures; figures of a served model need a server.
"""

import datetime
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from step3rt.errors import Unavailable
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.config import Step3Config
from step3rt.model.gpu_decoder import GpuDecoder, GpuDecoderOptions
from step3rt.model.gpu_weights import GpuWeights, load_gpu_weights
from step3rt.model.prompt_steps import Prompt
from step3rt.model.random_weights import random_gpu_weights
from step3rt.model.step_tokens import StepTokens
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS

NUM_STEPS = 64
NUM_REPEATS = 5

MAX_PREFILL_TOKENS = 65_536
"""Of all prompts whose prefill is measured, unless one alone is longer."""
NUM_PREFILL_REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What is computed.

    Attributes:
        num_sequences: Decoded together, in one bucket.
        num_context_tokens: Of each sequence at the start: its prompt.
        prefill_tokens: Of a step of prefill, at most.
        num_steps: Tokens that are decoded of each sequence.
    """

    num_sequences: int
    num_context_tokens: int
    prefill_tokens: int = 1024
    num_steps: int = NUM_STEPS

    @property
    def blocks_each(self) -> int:
        """KV blocks of a sequence."""
        return -(-(self.num_context_tokens + self.num_steps + 1) // BLOCK_SIZE_TOKENS)


def measure(model: Path, load: EngineLoad, *, has_random_weights: bool = False) -> dict[str, Any]:
    """Computes prompts, then decodes tokens of every sequence.

    Args:
        model: A checkpoint's directory; of one with random weights only config.json is read.
        load: What is computed.
        has_random_weights: Makes weights up.

    Returns:
        Milliseconds and tokens per second, of prefill and of decoding, medians over repeats.

    Raises:
        Unavailable: this host has no Hopper GPU.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable(
            "No GPU of compute capability 9.0 was found. The engine's kernels are for Hopper. Run "
            "it on an H100 or H200, or use `step3rt generate` on this host"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if has_random_weights:
        weights = random_gpu_weights(Step3Config.from_directory(model), device)
    else:
        weights = load_gpu_weights(Checkpoint.open(model), device)
    return {
        "model": model.name,
        "random_weights": has_random_weights,
        **measure_weights(weights, load),
        "machine": f"one {torch.cuda.get_device_name(device)}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def measure_weights(weights: GpuWeights, load: EngineLoad) -> dict[str, Any]:
    """What `measure` says of a load, on any device that the decoder runs on."""
    options = GpuDecoderOptions(
        num_blocks=load.num_sequences * load.blocks_each,
        max_model_len=load.blocks_each * BLOCK_SIZE_TOKENS,
        max_tokens=load.num_sequences,
        max_prefill_tokens=load.prefill_tokens,
    )
    decoder = GpuDecoder(weights, options)
    table = torch.randperm(options.num_blocks, dtype=torch.int32)
    table = table.view(load.num_sequences, load.blocks_each)
    prompts = _prompts(load, table, decoder.config.vocab_size)
    prefill_ms = _median_ms(lambda: decoder.prefill(prompts), NUM_PREFILL_REPEATS)
    tokens = _last_tokens(load, table)
    step_ms = _median_ms(lambda: decoder.decode(tokens, load.num_steps), NUM_REPEATS)
    step_ms /= load.num_steps
    num_prompt_tokens = len(prompts) * load.num_context_tokens
    return {
        "sequences": load.num_sequences,
        "context": load.num_context_tokens,
        "kv_dtype": "fp8",
        "weight_dtype": "fp8",
        "scheduler_in_loop": False,
        "prefill_prompts": len(prompts),
        "prefill_step_tokens": load.prefill_tokens,
        "prefill_ms": round(prefill_ms, 3),
        "prefill_tokens_per_s": round(num_prompt_tokens / prefill_ms * 1e3),
        "steps": load.num_steps,
        "step_ms": round(step_ms, 3),
        "tokens_per_s": round(load.num_sequences / step_ms * 1e3),
    }


def _median_ms(compute: Callable[[], torch.Tensor], num_repeats: int) -> float:
    """The first call, which captures graphs, is not counted; results are awaited on the host."""
    compute().cpu()
    times_ms = []
    for _ in range(num_repeats):
        started = time.perf_counter()
        compute().cpu()
        times_ms.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times_ms)


def _prompts(load: EngineLoad, table: torch.Tensor, vocab_size: int) -> list[Prompt]:
    """Random prompts of the first sequences; the others decode from a context of zeros."""
    length = load.num_context_tokens
    count = max(1, min(load.num_sequences, MAX_PREFILL_TOKENS // length))
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, vocab_size, (count, length), generator=generator).tolist()
    return [
        Prompt(ids, blocks) for ids, blocks in zip(token_ids, table[:count].tolist(), strict=True)
    ]


def _last_tokens(load: EngineLoad, table: torch.Tensor) -> StepTokens:
    position = load.num_context_tokens - 1
    positions = torch.full((load.num_sequences,), position, dtype=torch.int32)
    block = table[:, position // BLOCK_SIZE_TOKENS]
    return StepTokens(
        token_ids=torch.arange(load.num_sequences, dtype=torch.int32),
        positions=positions,
        slots=block * BLOCK_SIZE_TOKENS + position % BLOCK_SIZE_TOKENS,
        num_context_tokens=positions + 1,
        block_table=table,
    )
