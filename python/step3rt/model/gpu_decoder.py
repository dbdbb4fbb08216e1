"""Decodes a whole model on one Hopper GPU: a CUDA graph per batch bucket, no host between layers.

Owns the device buffers and the order of launches; it schedules nothing and frees no KV blocks. The
same program runs on the CPU, by the references behind the launchers: that is how CI tests it.

A step takes T tokens of any sequences, several of one sequence too: K and V of all of them are
appended before any is attended to, and each attends to as many tokens as it says. So a prompt is
computed by the same launches as a decode.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from step3rt.errors import InvalidArgument
from step3rt.model.gpu_layer import LayerBuffers, LayerRunner
from step3rt.model.gpu_weights import GpuWeights
from step3rt.ops.graph import StepGraph
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape
from step3rt.ops.linear import linear_bf16
from step3rt.ops.mfa_decode import MfaBatch
from step3rt.ops.mfa_schedule import (
    BLOCK_SIZE_TOKENS,
    HEAD_DIM,
    MAX_SEQUENCES,
    allocate_schedule,
    mfa_schedule,
)
from step3rt.ops.rotary import rotary_tables

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
"""Batch sizes with a graph of their own; a step runs in the smallest that holds its tokens."""

MAX_DECODE_STEPS = 1024
"""Tokens of a sequence that one call of `decode` can give."""

UNUSED_SLOT = -1


@dataclass(frozen=True, slots=True)
class GpuDecoderOptions:
    """Sizes of a decoder.

    `num_blocks` KV blocks of 64 tokens; `max_model_len` tokens of a sequence; `max_tokens` of a
    step; `is_fp8_kv` stores K and V in e4m3, half of what bf16 takes.
    """

    num_blocks: int
    max_model_len: int
    max_tokens: int = 256
    is_fp8_kv: bool = True

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


@dataclass(frozen=True, slots=True)
class StepTokens:
    """T tokens of one step, on the host or the device.

    `token_ids` i32[T]. `positions` i32[T]. `slots` i32[T]: KV block * 64 + offset, or -1 for a
    token that is not kept. `num_context_tokens` i32[T]: what each attends to, itself included.
    `block_table` i32[T, B]: of each token's sequence; B at most that of the decoder.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    num_context_tokens: torch.Tensor
    block_table: torch.Tensor

    def rows(self, start: int, end: int) -> "StepTokens":
        """Returns some of the tokens, views of the same memory."""
        return StepTokens(*(getattr(self, field.name)[start:end] for field in fields(self)))

    @classmethod
    def concatenate(cls, steps: Sequence["StepTokens"]) -> "StepTokens":
        """Joins tokens whose block tables are equally wide."""
        return cls(
            *(torch.cat([getattr(step, field.name) for step in steps]) for field in fields(cls))
        )


class GpuDecoder:
    """A model, its KV cache, and one captured graph per bucket that was used."""

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
        self._table = _rotation_table(weights, options.max_model_len)
        self._schedule = allocate_schedule(device)
        self._buffers = LayerBuffers.allocate(weights, options.max_tokens)
        self._runners = [
            LayerRunner(self.config, layer, kv, is_fp8_kv=options.is_fp8_kv)
            for layer, kv in zip(weights.layers, self._kv, strict=True)
        ]
        max_blocks = -(-options.max_model_len // BLOCK_SIZE_TOKENS)
        self._inputs = _allocate_inputs(options.max_tokens, max_blocks, device)
        self._logits = torch.empty(
            options.max_tokens, self.config.vocab_size, dtype=torch.bfloat16, device=device
        )
        self._history = torch.zeros(
            MAX_DECODE_STEPS, options.max_tokens, dtype=torch.int32, device=device
        )
        self._num_decoded = torch.zeros(1, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, bool], StepGraph] = {}

    def step(self, tokens: StepTokens) -> torch.Tensor:
        """Computes a step; K and V of its tokens are in the cache afterwards.

        Returns:
            bf16[T, V] logits, a view that the next step overwrites.

        Raises:
            InvalidArgument: the step has more tokens, or longer block tables, than the decoder.
        """
        num_tokens = tokens.token_ids.shape[0]
        self._check(tokens)
        bucket = self._bucket(num_tokens)
        graph = self._graph(bucket, is_decode=False)
        self._fill(tokens, bucket)
        graph.replay()
        return self._logits[:num_tokens]

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
        graph = self._graph(bucket, is_decode=True)
        self._fill(tokens, bucket)
        self._num_decoded.zero_()
        for _ in range(num_steps):
            graph.replay()
        return self._history[:num_steps, :num_tokens].clone()

    @torch.inference_mode()
    def launch(self, num_tokens: int) -> None:
        """Launches a step of the tokens in the inputs' first rows on the current stream."""
        inputs = self._inputs.rows(0, num_tokens)
        buffers = self._buffers.rows(num_tokens)
        mfa_schedule(inputs.num_context_tokens, self._schedule)
        batch = MfaBatch(inputs.block_table, inputs.num_context_tokens, self._schedule)
        torch.index_select(
            self._weights.embed_tokens, 0, inputs.token_ids.long(), out=buffers.residual
        )
        norms = [layer.input_norm for layer in self._weights.layers] + [self._weights.final_norm]
        buffers.norm_only(norms[0], self.config.rms_norm_eps)
        for runner, next_norm in zip(self._runners, norms[1:], strict=True):
            runner.launch(buffers, batch, (inputs.positions, inputs.slots, self._table), next_norm)
        linear_bf16(buffers.normed, self._weights.lm_head, self._logits[:num_tokens])

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

    def _graph(self, bucket: int, *, is_decode: bool) -> StepGraph:
        graph = self._graphs.get((bucket, is_decode))
        if graph is None:
            launch = self.launch_decode if is_decode else self.launch
            # The call before the capture touches no sequence's K and V.
            self._inputs.slots.fill_(UNUSED_SLOT)
            self._inputs.num_context_tokens.zero_()
            graph = StepGraph.capture(self.device, functools.partial(launch, bucket))
            self._graphs[bucket, is_decode] = graph
        return graph

    def _fill(self, tokens: StepTokens, bucket: int) -> None:
        num_tokens, width = tokens.block_table.shape
        inputs = self._inputs
        for name in ("token_ids", "positions", "slots", "num_context_tokens"):
            getattr(inputs, name)[:num_tokens].copy_(getattr(tokens, name), non_blocking=True)
        inputs.block_table[:num_tokens, :width].copy_(tokens.block_table, non_blocking=True)
        # Rows that only fill the bucket attend to nothing and are kept nowhere.
        inputs.token_ids[num_tokens:bucket].zero_()
        inputs.positions[num_tokens:bucket].zero_()
        inputs.slots[num_tokens:bucket].fill_(UNUSED_SLOT)
        inputs.num_context_tokens[num_tokens:bucket].zero_()

    def _bucket(self, num_tokens: int) -> int:
        fitting = (bucket for bucket in BUCKETS if bucket >= num_tokens)
        return min(next(fitting), self.options.max_tokens)

    def _check(self, tokens: StepTokens) -> None:
        num_tokens, width = tokens.block_table.shape
        max_tokens, max_width = self._inputs.block_table.shape
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


def _rotation_table(weights: GpuWeights, num_positions: int) -> torch.Tensor:
    """f32[P, 256] for `ops.rope_append`; what narrow heads leave empty does not turn."""
    config = weights.config
    cos, sin = rotary_tables(torch.arange(num_positions), config.head_dim, config.rope_theta)
    padding = (0, HEAD_DIM // 2 - config.head_dim // 2)
    cos = torch.nn.functional.pad(cos, padding, value=1.0)
    sin = torch.nn.functional.pad(sin, padding)
    return torch.cat([cos, sin], dim=1).float().to(weights.embed_tokens.device)


def _allocate_inputs(max_tokens: int, max_blocks: int, device: torch.device) -> StepTokens:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return StepTokens(
        token_ids=zeros(max_tokens),
        positions=zeros(max_tokens),
        slots=zeros(max_tokens),
        num_context_tokens=zeros(max_tokens),
        block_table=zeros(max_tokens, max_blocks),
    )
