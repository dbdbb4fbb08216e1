"""Decodes a whole model on one Hopper GPU: a CUDA graph per batch bucket, no host between layers.

Owns the device buffers and the order of launches; it schedules nothing and frees no KV blocks. The
same program runs on the CPU, by the references behind the launchers: that is how CI tests it.

A step takes T tokens of any sequences, several of one sequence too: K and V of all of them are
appended before any is attended to, and each attends to as many tokens as it says. Which rows are
chunks for the prefill kernel, the caller may say; the decode kernel computes any row. `prefill`
takes whole prompts, with a graph of its own kind: no decode kernel, logits of last tokens only.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
import torch

from step3rt.errors import InvalidArgument
from step3rt.model.gpu_layer import AttentionWork, LayerBuffers, LayerRunner
from step3rt.model.gpu_weights import GpuWeights
from step3rt.model.prompt_steps import MAX_ENDS, Prompt, PromptStep, prompt_steps
from step3rt.model.step_tokens import UNUSED_SLOT, StepTokens
from step3rt.ops.graph import StepGraph
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape
from step3rt.ops.linear import linear_bf16
from step3rt.ops.mfa_decode import MfaBatch
from step3rt.ops.mfa_prefill import PrefillBatch, PrefillChunk, prefill_items
from step3rt.ops.mfa_prefill_choice import is_for_prefill, prefill_ctas_of
from step3rt.ops.mfa_schedule import (
    BLOCK_SIZE_TOKENS,
    HEAD_DIM,
    MAX_SEQUENCES,
    allocate_schedule,
    mfa_schedule,
)
from step3rt.ops.moe_fp8 import MAX_TOKENS
from step3rt.ops.rotary import rotary_tables

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
"""Batch sizes with a graph of their own; a step runs in the smallest that holds its tokens."""

PREFILL_BUCKETS = (*BUCKETS, 1536, MAX_TOKENS)
"""Of steps without decode rows, whose number the schedule of decode does not bound."""

MAX_DECODE_STEPS = 1024
"""Tokens of a sequence that one call of `decode` can give."""


@dataclass(frozen=True, slots=True)
class GpuDecoderOptions:
    """Sizes of a decoder.

    `num_blocks` KV blocks of 64 tokens; `max_model_len` tokens of a sequence; `max_tokens` of a
    step; `is_fp8_kv` stores K and V in e4m3, half of what bf16 takes; `max_prefill_tokens` of a
    step of `GpuDecoder.prefill`.
    """

    num_blocks: int
    max_model_len: int
    max_tokens: int = 256
    is_fp8_kv: bool = True
    max_prefill_tokens: int = 1024

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            InvalidArgument: one cannot be used.
        """
        if not 1 <= self.max_tokens <= MAX_SEQUENCES:
            raise InvalidArgument(
                f"max_tokens={self.max_tokens} cannot be used. A step has 1 to {MAX_SEQUENCES} "
                "tokens. Split larger steps"
            )
        if not 1 <= self.max_prefill_tokens <= MAX_TOKENS:
            raise InvalidArgument(
                f"max_prefill_tokens={self.max_prefill_tokens} cannot be used. The experts take 1 "
                f"to {MAX_TOKENS} tokens at a time. Prefill in smaller steps"
            )

    @property
    def max_rows(self) -> int:
        """Rows of the largest step of any kind."""
        return max(self.max_tokens, self.max_prefill_tokens)


class _Kind(Enum):
    """What a graph computes."""

    STEP = auto()
    """Rows of the decode kernel, all logits."""
    MIXED = auto()
    """The same with chunks of the prefill kernel."""
    DECODE = auto()
    """As `STEP`; the inputs become those of the next one."""
    PREFILL = auto()
    """Chunks of the prefill kernel alone, logits of some rows."""


class GpuDecoder:
    """A model, its KV cache, and a captured graph per bucket and kind of step that was used."""

    def __init__(self, weights: GpuWeights, options: GpuDecoderOptions) -> None:
        """Allocates buffers and the cache, which is zero."""
        self.config = weights.config
        self.options = options
        self._weights = weights
        device = weights.embed_tokens.device
        self.device = device
        shape, dtype = bf16_cache_shape(options.num_blocks), torch.bfloat16
        if options.is_fp8_kv:
            shape, dtype = fp8_cache_shape(options.num_blocks), torch.uint8
        self._kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in weights.layers]
        self._table = rotation_table_of(weights, options.max_model_len)
        self._schedule = allocate_schedule(device)
        self._buffers = LayerBuffers.allocate(weights, options.max_rows)
        self._prefill_ctas = prefill_ctas_of(device)
        self._runners = [
            LayerRunner(self.config, layer, kv, is_fp8_kv=options.is_fp8_kv)
            for layer, kv in zip(weights.layers, self._kv, strict=True)
        ]
        max_blocks = -(-options.max_model_len // BLOCK_SIZE_TOKENS)
        self._inputs = StepTokens.allocate(options.max_rows, max_blocks, device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._prefill = PrefillBatch(
            items=zeros(options.max_rows, 4),
            num_items=zeros(1),
            block_table=self._inputs.block_table,
        )
        self._end_rows = zeros(MAX_ENDS)
        self._ends = zeros(MAX_ENDS, self.config.hidden_size, dtype=torch.bfloat16)
        num_logits = max(options.max_tokens, MAX_ENDS)
        self._padded_logits = zeros(num_logits, weights.lm_head.shape[0], dtype=torch.bfloat16)
        self._logits = self._padded_logits[:, : self.config.vocab_size]
        self._history = torch.zeros(
            MAX_DECODE_STEPS, options.max_tokens, dtype=torch.int32, device=device
        )
        self._num_decoded = torch.zeros(1, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, _Kind], StepGraph] = {}

    def step(self, tokens: StepTokens, chunks: Sequence[PrefillChunk] = ()) -> torch.Tensor:
        """Computes a step; K and V of its tokens are in the cache afterwards.

        Args:
            tokens: Rows of any sequences.
            chunks: Those of them that the prefill kernel takes, whatever their
                `num_context_tokens`; of a chunk, `sequence` is one of its rows.

        Returns:
            bf16[T, V] logits, a view that the next step overwrites.

        Raises:
            InvalidArgument: the step has more tokens, or longer block tables, than the decoder.
        """
        num_tokens = tokens.token_ids.shape[0]
        self._check(tokens)
        bucket = self._bucket(num_tokens)
        graph = self._graph(bucket, _Kind.MIXED if chunks else _Kind.STEP)
        self._fill(tokens, bucket)
        if chunks:
            self._fill_items(chunks)
            for chunk in chunks:
                self._inputs.num_context_tokens[chunk.row : chunk.row + chunk.num_tokens] = 0
        graph.replay()
        return self._logits[:num_tokens]

    def prefill(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Computes whole prompts in steps of up to `max_prefill_tokens` rows.

        Steps whose chunks do not fill the prefill kernel, as `ops.mfa_prefill_choice` tells, run as
        those of `step` do.

        Args:
            prompts: P prompts, with blocks of their own but for computed ones.

        Returns:
            bf16[P, V] logits of their last tokens.

        Raises:
            InvalidArgument: a prompt has no token to compute, or does not fit blocks or decoder.
        """
        for prompt in prompts:
            if len(prompt.block_ids) > self._inputs.block_table.shape[1]:
                raise InvalidArgument(
                    f"A prompt has {len(prompt.block_ids)} KV blocks. The decoder was made for "
                    f"sequences of {self._inputs.block_table.shape[1]}. Make it with a larger "
                    "`max_model_len`"
                )
        shape = (len(prompts), self.config.vocab_size)
        logits = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        for step in prompt_steps(prompts, self.options.max_prefill_tokens):
            ends = self._prefill_step(step)
            if step.end_prompts:
                logits[step.end_prompts] = ends
        return logits

    def _prefill_step(self, step: PromptStep) -> torch.Tensor:
        """Returns bf16[E, V]: of the rows in which prompts end."""
        firsts = np.array([chunk.first_position for chunk in step.chunks])
        lengths = np.array([chunk.num_tokens for chunk in step.chunks])
        is_chosen = is_for_prefill(firsts, lengths, self._prefill_ctas)
        num_tokens = step.num_tokens
        if not is_chosen.all() and num_tokens <= self.options.max_tokens:
            chosen = [step.chunks[index] for index in np.flatnonzero(is_chosen)]
            chunks = [replace(chunk, sequence=chunk.row) for chunk in chosen]
            return self.step(StepTokens.of_prompts(step), chunks)[step.end_rows]
        fitting = (bucket for bucket in PREFILL_BUCKETS if bucket >= num_tokens)
        bucket = min(next(fitting), self.options.max_prefill_tokens)
        graph = self._graph(bucket, _Kind.PREFILL)
        tokens = replace(StepTokens.of_prompts(step), block_table=step.block_tables)
        self._fill(tokens, bucket)
        self._fill_items(step.chunks)
        num_ends = len(step.end_rows)
        end_rows = torch.zeros(MAX_ENDS, dtype=torch.int32)
        end_rows[:num_ends] = torch.tensor(step.end_rows, dtype=torch.int32)
        self._end_rows.copy_(end_rows, non_blocking=True)
        graph.replay()
        return self._logits[:num_ends]

    def decode(self, tokens: StepTokens, num_steps: int) -> torch.Tensor:
        """Decodes T sequences greedily, one graph launch a step; the host only launches.

        Args:
            tokens: Each sequence's last known token; `block_table` reaches to its last new one.
            num_steps: Tokens to generate for each, at most `MAX_DECODE_STEPS`.

        Returns:
            i32[num_steps, T] token ids, on the device.

        Raises:
            InvalidArgument: it does not fit the decoder.
        """
        num_tokens = tokens.token_ids.shape[0]
        self._check(tokens)
        if not 1 <= num_steps <= MAX_DECODE_STEPS:
            raise InvalidArgument(
                f"num_steps={num_steps} cannot be decoded at once. The device keeps up to "
                f"{MAX_DECODE_STEPS} tokens of a sequence. Decode in parts"
            )
        bucket = self._bucket(num_tokens)
        graph = self._graph(bucket, _Kind.DECODE)
        self._fill(tokens, bucket)
        self._num_decoded.zero_()
        for _ in range(num_steps):
            graph.replay()
        return self._history[:num_steps, :num_tokens].clone()

    @torch.inference_mode()
    def launch(self, num_tokens: int, *, has_chunks: bool = False) -> None:
        """Launches a step of the tokens in the inputs' first rows on the current stream."""
        inputs = self._inputs.rows(0, num_tokens)
        mfa_schedule(inputs.num_context_tokens, self._schedule)
        batch = MfaBatch(inputs.block_table, inputs.num_context_tokens, self._schedule)
        work = AttentionWork(batch, self._prefill if has_chunks else None)
        buffers = self._launch_layers(num_tokens, work)
        linear_bf16(buffers.normed, self._weights.lm_head, self._padded_logits[:num_tokens])

    @torch.inference_mode()
    def launch_prefill(self, num_tokens: int) -> None:
        """Launches a step of chunks alone; logits are those of `MAX_ENDS` rows."""
        buffers = self._launch_layers(num_tokens, AttentionWork(None, self._prefill))
        torch.index_select(buffers.normed, 0, self._end_rows, out=self._ends)
        linear_bf16(self._ends, self._weights.lm_head, self._padded_logits[:MAX_ENDS])

    def _launch_layers(self, num_tokens: int, work: AttentionWork) -> LayerBuffers:
        inputs = self._inputs.rows(0, num_tokens)
        buffers = self._buffers.rows(num_tokens)
        torch.index_select(
            self._weights.embed_tokens, 0, inputs.token_ids.long(), out=buffers.residual
        )
        norms = [layer.input_norm for layer in self._weights.layers] + [self._weights.final_norm]
        reads = [runner.reads_normed for runner in self._runners] + [True]  # the head reads bf16
        buffers.norm_only(norms[0], self.config.rms_norm_eps, fills_normed=reads[0])
        places = (inputs.positions, inputs.slots, self._table)
        for index, runner in enumerate(self._runners, start=1):
            runner.launch(buffers, work, places, norms[index], fills_normed=reads[index])
        return buffers

    @torch.inference_mode()
    def launch_decode(self, num_tokens: int) -> None:
        """Launches a step whose inputs become those of the next one: the most likely tokens."""
        self.launch(num_tokens)
        inputs = self._inputs.rows(0, num_tokens)
        inputs.token_ids.copy_(self._logits[:num_tokens].argmax(dim=1))
        self._history[:, :num_tokens].index_copy_(
            0, self._num_decoded, inputs.token_ids[None].contiguous()
        )
        self._num_decoded.add_(1)
        is_used = inputs.num_context_tokens > 0
        inputs.positions.add_(is_used)
        inputs.num_context_tokens.add_(is_used)
        places = inputs.positions.long()
        # Past its last block a sequence is kept nowhere; it has its last token by then.
        last = inputs.block_table.shape[1] - 1
        blocks = inputs.block_table.gather(
            1, (places // BLOCK_SIZE_TOKENS).clamp(max=last)[:, None]
        )
        slots = blocks[:, 0] * BLOCK_SIZE_TOKENS + inputs.positions % BLOCK_SIZE_TOKENS
        inputs.slots.copy_(slots.where(is_used, UNUSED_SLOT))

    def _graph(self, bucket: int, kind: _Kind) -> StepGraph:
        graph = self._graphs.get((bucket, kind))
        if graph is None:
            launches: dict[_Kind, Callable[[int], None]] = {
                _Kind.STEP: self.launch,
                _Kind.MIXED: functools.partial(self.launch, has_chunks=True),
                _Kind.DECODE: self.launch_decode,
                _Kind.PREFILL: self.launch_prefill,
            }
            # The call before the capture touches no sequence's K and V, and none of the rows that
            # only a step of more tokens has.
            self._inputs.slots.fill_(UNUSED_SLOT)
            self._inputs.num_context_tokens.zero_()
            self._prefill.num_items.zero_()
            self._end_rows.zero_()
            graph = StepGraph.capture(self.device, functools.partial(launches[kind], bucket))
            self._graphs[bucket, kind] = graph
        return graph

    def _fill(self, tokens: StepTokens, bucket: int) -> None:
        num_tokens = tokens.token_ids.shape[0]
        num_tables, width = tokens.block_table.shape
        inputs = self._inputs
        for name in ("token_ids", "positions", "slots", "num_context_tokens"):
            getattr(inputs, name)[:num_tokens].copy_(getattr(tokens, name), non_blocking=True)
        inputs.block_table[:num_tables, :width].copy_(tokens.block_table, non_blocking=True)
        # Rows that only fill the bucket attend to nothing and are kept nowhere.
        inputs.token_ids[num_tokens:bucket].zero_()
        inputs.positions[num_tokens:bucket].zero_()
        inputs.slots[num_tokens:bucket].fill_(UNUSED_SLOT)
        inputs.num_context_tokens[num_tokens:bucket].zero_()

    def _fill_items(self, chunks: Sequence[PrefillChunk]) -> None:
        items = prefill_items(chunks)
        self._prefill.items[: len(items)].copy_(items, non_blocking=True)
        self._prefill.num_items.fill_(len(items))

    def _bucket(self, num_tokens: int) -> int:
        fitting = (bucket for bucket in BUCKETS if bucket >= num_tokens)
        return min(next(fitting), self.options.max_tokens)

    def _check(self, tokens: StepTokens) -> None:
        num_tokens, width = tokens.block_table.shape
        max_tokens, max_width = self.options.max_tokens, self._inputs.block_table.shape[1]
        if not 1 <= num_tokens <= max_tokens or width > max_width:
            raise InvalidArgument(
                f"A step of {num_tokens} tokens with {width} KV blocks each does not fit. The "
                f"decoder was made for up to {max_tokens} tokens with {max_width} blocks. Split "
                "the step, or make the decoder with larger `max_tokens` and `max_model_len`"
            )


def steps_of_prompt(
    token_ids: list[int], block_ids: list[int], max_tokens: int
) -> list[StepTokens]:
    """Cuts one sequence, from its start, into steps of up to `max_tokens` tokens.

    Args:
        token_ids: The sequence's.
        block_ids: Its KV blocks, enough for all tokens.
        max_tokens: Of a step.
    """
    steps = []
    for first in range(0, len(token_ids), max_tokens):
        chunk = token_ids[first : first + max_tokens]
        positions = torch.arange(first, first + len(chunk), dtype=torch.int32)
        blocks = torch.tensor(block_ids, dtype=torch.int32)
        steps.append(
            StepTokens(
                token_ids=torch.tensor(chunk, dtype=torch.int32),
                positions=positions,
                slots=blocks[positions // BLOCK_SIZE_TOKENS] * BLOCK_SIZE_TOKENS
                + positions % BLOCK_SIZE_TOKENS,
                num_context_tokens=positions + 1,
                block_table=blocks.expand(len(chunk), -1),
            )
        )
    return steps


def rotation_table_of(weights: GpuWeights, num_positions: int) -> torch.Tensor:
    """f32[P, 256] for `ops.rope_append`; what narrow heads leave empty does not turn."""
    config = weights.config
    cos, sin = rotary_tables(torch.arange(num_positions), config.head_dim, config.rope_theta)
    padding = (0, HEAD_DIM // 2 - config.head_dim // 2)
    cos = torch.nn.functional.pad(cos, padding, value=1.0)
    sin = torch.nn.functional.pad(sin, padding)
    return torch.cat([cos, sin], dim=1).float().to(weights.embed_tokens.device)
