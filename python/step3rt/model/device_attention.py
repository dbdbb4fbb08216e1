"""The attention side of the device pipeline: one lane's steps, without a host between layers.

Owns device buffers, graphs and the order of launches; which sequence is where, and what a step
computes, its caller decides. A step of one lane, all on the lane's stream:

    copy inputs | graph of the bucket                                          | sampler | copy back
                | embed -> 61 x (attention -> send -> wait -> add, norm) -> head |

A bucket has a graph for steps without chunks of prompts, and a second one, with the prefill kernel
behind the decode kernel, for steps with them. How many chunks there are, and of which rows, the
kernel reads from device memory.

The sampler is launched behind the graph, not inside: its kernel depends on what requests ask for,
and a graph of every combination would be many. The host launches a step while the one before runs,
so that no time passes between the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from step3rt.errors import InvalidArgument
from step3rt.model.device_inputs import HostStep, StepInputs, StepResults
from step3rt.model.gpu_decoder import rotation_table_of
from step3rt.model.gpu_layer import AttentionWork, LayerBuffers, LayerRunner
from step3rt.model.gpu_weights import GpuWeights
from step3rt.model.graph_shapes import GraphShape, graph_shapes
from step3rt.ops.afd_link import AttentionSlots
from step3rt.ops.blas import blas_sms
from step3rt.ops.graph import StepGraph
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape
from step3rt.ops.launch import num_sms
from step3rt.ops.linear import linear_bf16
from step3rt.ops.mfa_decode import MfaBatch
from step3rt.ops.mfa_prefill import PrefillBatch
from step3rt.ops.mfa_prefill_choice import prefill_ctas_of
from step3rt.ops.mfa_schedule import (
    BLOCK_SIZE_TOKENS,
    MAX_SEQUENCES,
    allocate_schedule,
    mfa_schedule,
)
from step3rt.ops.sample import MAX_TOP, Samples, SamplingBatch, sample_on_device
from step3rt.ops.sampling import score_tokens
from step3rt.ops.stream import Event, Stream

MAX_SCORED_ROWS = 64
"""Rows of logits that are scored at a time: in float32 they take 33 MB at Step-3's vocabulary."""

SMS_PER_WAITING_LANE = 1
"""A wait holds a part of one SM, where a CTA that takes all registers finds no room: it would begin
when the others have ended, and take as long again."""

_RANDOM_BLOCKS = 4096
"""KV blocks that are filled at a time, to bound what is drawn."""


@dataclass(frozen=True, slots=True)
class DevicePoolOptions:
    """Sizes of an attention instance's device memory.

    `num_blocks` KV blocks of 64 tokens; `max_model_len` tokens of a sequence; `max_tokens` rows of
    a lane's step, which is also the number of sequences that a lane holds; `is_fp8_kv` stores K and
    V in e4m3. `prefill_ctas` is what `ops.mfa_prefill_choice` goes by; None: that of the device.
    """

    num_blocks: int
    max_model_len: int
    max_tokens: int
    is_fp8_kv: bool = True
    prefill_ctas: int | None = None

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            InvalidArgument: one cannot be used.
        """
        if not 1 <= self.max_tokens <= MAX_SEQUENCES:
            raise InvalidArgument(
                f"max_tokens={self.max_tokens} cannot be used. A lane's step has 1 to "
                f"{MAX_SEQUENCES} tokens. Set max_tokens_per_micro_batch accordingly"
            )

    @property
    def max_blocks(self) -> int:
        """KV blocks of the longest sequence."""
        return -(-self.max_model_len // BLOCK_SIZE_TOKENS)


class DevicePool:
    """What all lanes of an attention instance share: weights, K and V, the rotation table."""

    def __init__(self, weights: GpuWeights, options: DevicePoolOptions) -> None:
        """Allocates the KV cache, which is zero."""
        self.weights = weights
        self.config = weights.config
        self.options = options
        self.device = weights.embed_tokens.device
        shape, dtype = bf16_cache_shape(options.num_blocks), torch.bfloat16
        if options.is_fp8_kv:
            shape, dtype = fp8_cache_shape(options.num_blocks), torch.uint8
        self.kv = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in weights.layers]
        self.rotation = rotation_table_of(weights, options.max_model_len)
        self.prefill_ctas = options.prefill_ctas or prefill_ctas_of(self.device)
        self.runners = [
            LayerRunner(self.config, layer, kv, is_fp8_kv=options.is_fp8_kv)
            for layer, kv in zip(weights.layers, self.kv, strict=True)
        ]
        norms = [layer.input_norm for layer in weights.layers] + [weights.final_norm]
        self.first_norm, self.next_norms = norms[0], norms[1:]

    def fill_randomly(self, seed: int = 0) -> None:
        """Overwrites all KV blocks with values of unit variance, as normed K and V have about."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for layer in self.kv:
            for blocks in torch.split(layer, _RANDOM_BLOCKS):
                shape, dtype = blocks.shape, torch.bfloat16
                values = torch.randn(shape, dtype=dtype, device=self.device, generator=generator)
                blocks.copy_(
                    values.to(torch.float8_e4m3fn).view(torch.uint8)
                    if self.options.is_fp8_kv
                    else values
                )


@dataclass(frozen=True, slots=True)
class StepOrder:
    """What one launch computes, besides the inputs that its `HostStep` holds.

    The first `num_samples` of the logit rows sample; the others predict `scored_token_ids`, each of
    which is scored beside the `num_top` most likely tokens. `table_changes` i32[2, N]: new entries
    of the block tables, their places (sequence slot * max_blocks + index) and KV blocks.
    `edits` u8[E, 16]: `ops.sample`'s, None if no row has one. `has_prefill`: whether the prefill
    kernel has work.
    """

    num_rows: int
    num_samples: int
    scored_token_ids: Sequence[int]
    num_top: int
    table_changes: torch.Tensor | None
    edits: torch.Tensor | None
    is_greedy: bool
    has_logprobs: bool
    has_prefill: bool = False


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Scores of prompt tokens, on the host once the step is done.

    `logprobs` f32[P]; `top_ids` i32[P, N] and `top_logprobs` f32[P, N], most likely first.
    """

    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


class AttentionLane:
    """One lane of an attention instance: its stream, buffers and graphs."""

    def __init__(
        self, pool: DevicePool, slots: AttentionSlots, lane: int, num_ctas: int | None = None
    ) -> None:
        """Allocates buffers and captures a graph per bucket; the slots are not connected yet.

        Their stop word is set: nothing waits, and errors are to be reset afterwards.
        `num_ctas`: SMs that attention and the head may fill; by default all but those of waiting
        lanes.
        """
        self._pool = pool
        self._slots = slots
        self._lane = lane
        options, device = pool.options, pool.device
        max_tokens, vocab_size = options.max_tokens, pool.config.vocab_size

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._inputs_buffer = zeros(StepInputs.buffer_bytes(max_tokens), dtype=torch.uint8)
        self._inputs = StepInputs.view(self._inputs_buffer, max_tokens)
        self._results_buffer = zeros(
            StepResults.buffer_bytes(max_tokens, MAX_TOP), dtype=torch.uint8
        )
        self._results = StepResults.view(self._results_buffer, max_tokens, MAX_TOP)
        # By sequence slot, kept from step to step.
        self._tables = zeros(max_tokens, options.max_blocks)
        self._last_token_ids = zeros(max_tokens)
        self._row_tables = zeros(max_tokens, options.max_blocks)
        self._buffers = LayerBuffers.allocate(pool.weights, max_tokens)
        # Kernels of a CTA per SM leave out those that other lanes wait on.
        if num_ctas is None:
            left = num_sms(device) - SMS_PER_WAITING_LANE * (slots.shape.num_lanes - 1)
            num_ctas = max(1, left)
        self._schedule = allocate_schedule(device, num_ctas)
        self._final = zeros(max_tokens, pool.config.hidden_size, dtype=torch.bfloat16)
        padded_size = pool.weights.lm_head.shape[0]
        self._padded_logits = zeros(max_tokens, padded_size, dtype=torch.bfloat16)
        self._logits = self._padded_logits[:, :vocab_size]
        self._no_edits = zeros(1, 16, dtype=torch.uint8)
        self._stream = Stream(device)
        slots.run_on(self._stream)
        # Rows that are all unused: what a capture computes is kept nowhere.
        self._inputs.kv_slots.fill_(-1)
        with blas_sms(device, num_ctas):
            self._graphs = {
                shape: StepGraph.capture(device, partial(self._launch, shape), self._stream)
                for shape in graph_shapes(max_tokens, pool.prefill_ctas)
            }
        self._warm_up()

    def new_host_step(self) -> HostStep:
        """Allocates what the host fills; as many are in use as steps are in flight."""
        pool = self._pool
        return HostStep(pool.options.max_tokens, MAX_TOP, pool.device, pool.prefill_ctas)

    def launch(self, host: HostStep, order: StepOrder) -> tuple[Event, PromptScores | None]:
        """Queues a step and returns at once.

        `host` belongs to the step until the event is done; then it has the results. The event is a
        timed one.
        """
        num_logits = order.num_samples + len(order.scored_token_ids)
        shape = GraphShape.of_step(
            order.num_rows, num_logits, self._pool.options.max_tokens, has_prefill=order.has_prefill
        )
        host.pad(order.num_rows, shape.num_rows)
        host.logit_rows[num_logits : shape.num_rows] = 0
        step = _QueuedStep(host, order)
        if self._pool.device.type == "cuda":
            step.pin()
        self._stream.run(lambda: self._copy_in(step))
        self._graphs[shape].replay()
        self._stream.run(lambda: self._finish(step))
        return self._stream.record(is_timed=True), step.scores

    def close(self) -> None:
        """Ends the lane's stream; nothing may be parked in it."""
        self._stream.close()

    def _warm_up(self) -> None:
        """Runs what is launched beside the graphs once.

        To load a kernel may take a device that is idle, and soon a lane may be waiting on it.
        """
        host = self.new_host_step()
        host.pad(0, 1)
        host.edit_offsets[:2] = 0
        for is_greedy in (True, False):
            order = StepOrder(
                num_rows=1,
                num_samples=1,
                scored_token_ids=() if is_greedy else (0,),
                num_top=1,
                table_changes=torch.zeros(2, 1, dtype=torch.int32),
                edits=None if is_greedy else torch.zeros(1, 16, dtype=torch.uint8),
                is_greedy=is_greedy,
                has_logprobs=not is_greedy,
            )
            event, _ = self.launch(host, order)
            event.wait()

    @torch.inference_mode()
    def _copy_in(self, step: "_QueuedStep") -> None:
        device = self._pool.device
        num_bytes = len(self._inputs_buffer)
        if not step.order.has_prefill:
            num_bytes = StepInputs.row_bytes(self._pool.options.max_tokens)
        host_buffer = step.host.inputs_buffer[:num_bytes]
        self._inputs_buffer[:num_bytes].copy_(host_buffer, non_blocking=True)
        if step.table_changes is not None:
            places, blocks = step.table_changes.to(device, non_blocking=True)
            self._tables.view(-1).index_copy_(0, places.long(), blocks)
        if step.edits is not None:
            # Before the graph: the sampler reads them before the kernel ahead of it has ended.
            step.edits = step.edits.to(device, non_blocking=True)

    @torch.inference_mode()
    def _launch(self, shape: GraphShape) -> None:
        bucket = shape.num_rows
        pool, slots, lane, inputs = self._pool, self._slots, self._lane, self._inputs
        config = pool.config
        buffers = self._buffers.rows(bucket)
        sequence_slots = inputs.sequence_slots[:bucket]
        contexts = inputs.num_context_tokens[:bucket]
        row_tables = self._row_tables[:bucket]
        torch.index_select(self._tables, 0, sequence_slots, out=row_tables)
        mfa_schedule(contexts, self._schedule)
        work = AttentionWork(MfaBatch(row_tables, contexts, self._schedule))
        if shape.has_prefill:
            items = (inputs.prefill_items, inputs.num_prefill_items)
            prefill = PrefillBatch(*items, self._tables, self._schedule.num_ctas)
            work = replace(work, prefill=prefill)
        places = (inputs.positions[:bucket], inputs.kv_slots[:bucket], pool.rotation)
        token_ids = inputs.token_ids[:bucket]
        token_ids = torch.where(
            token_ids < 0, self._last_token_ids.index_select(0, sequence_slots), token_ids
        )
        torch.index_select(pool.weights.embed_tokens, 0, token_ids, out=buffers.residual)
        reads = [runner.reads_normed for runner in pool.runners] + [True]  # the head reads bf16
        buffers.norm_only(pool.first_norm, config.rms_norm_eps, fills_normed=reads[0])
        for index, layer in enumerate(config.layers):
            pool.runners[index].launch_attention(buffers, work, places)
            slots.send(
                lane,
                buffers.hidden,
                buffers.topk if layer.is_moe else None,
                inputs.num_rows,
                config.num_experts if layer.is_moe else 0,
                is_first_layer=index == 0,
            )
            slots.wait(lane, is_first_layer=index == 0)
            sums = (slots.sums(lane), slots.present(lane))
            norm = (pool.next_norms[index], config.rms_norm_eps)
            buffers.add_sums_and_norm(*sums, *norm, fills_normed=reads[index + 1])
        final, logits = self._final[: shape.num_logits], self._padded_logits[: shape.num_logits]
        torch.index_select(buffers.normed, 0, inputs.logit_rows[: shape.num_logits], out=final)
        linear_bf16(final, pool.weights.lm_head, logits)

    @torch.inference_mode()
    def _finish(self, step: "_QueuedStep") -> None:
        order = step.order
        if order.num_samples:
            self._sample(order, self._no_edits if step.edits is None else step.edits)
        if step.scores is not None:
            self._score(order, step.scores, step.scored_token_ids)
        max_tokens = self._pool.options.max_tokens
        num_bytes = StepResults.buffer_bytes(max_tokens, MAX_TOP)
        if not order.has_logprobs:
            num_bytes = StepResults.token_bytes(max_tokens, MAX_TOP)
        results = step.host.results_buffer[:num_bytes]
        results.copy_(self._results_buffer[:num_bytes], non_blocking=True)

    def _sample(self, order: StepOrder, edits: torch.Tensor) -> None:
        rows, results = slice(0, order.num_samples), self._results
        samples = Samples(
            results.token_ids[rows],
            results.is_corrupt[rows],
            results.logprobs[rows],
            results.top_ids[rows],
            results.top_logprobs[rows],
        )
        batch = SamplingBatch(
            rows=self._inputs.sampling_rows[rows],
            edit_offsets=self._inputs.edit_offsets[: order.num_samples + 1],
            edits=edits,
            num_top=MAX_TOP if order.has_logprobs else 0,
            is_greedy=order.is_greedy,
        )
        sample_on_device(self._logits[rows], batch, samples)
        slots = self._inputs.sequence_slots.index_select(0, self._inputs.logit_rows[rows])
        self._last_token_ids.index_copy_(0, slots.long(), samples.token_ids)

    def _score(self, order: StepOrder, scores: PromptScores, token_ids: torch.Tensor) -> None:
        token_ids = token_ids.to(self._pool.device, non_blocking=True)
        logits = self._logits[order.num_samples :][: len(token_ids)]
        for start in range(0, len(token_ids), MAX_SCORED_ROWS):
            part = slice(start, start + MAX_SCORED_ROWS)
            found = score_tokens(logits[part].float(), token_ids[part], order.num_top)
            for name, values in zip(("logprobs", "top_ids", "top_logprobs"), found, strict=True):
                getattr(scores, name)[part].copy_(values, non_blocking=True)


class _QueuedStep:
    """A launched step: tensors that live until its last launch, and where scores go."""

    def __init__(self, host: HostStep, order: StepOrder) -> None:
        self.host = host
        self.order = order
        self.table_changes = order.table_changes
        self.edits = order.edits
        self.scored_token_ids = torch.tensor(order.scored_token_ids, dtype=torch.int64)
        self.scores: PromptScores | None = None
        num_rows = len(order.scored_token_ids)
        if num_rows:
            self.scores = PromptScores(
                torch.zeros(num_rows),
                torch.zeros(num_rows, order.num_top, dtype=torch.int32),
                torch.zeros(num_rows, order.num_top),
            )

    def pin(self) -> None:
        """Pins what is copied: a copy of other memory would wait for the stream."""
        if self.table_changes is not None:
            self.table_changes = self.table_changes.pin_memory()
        if self.edits is not None:
            self.edits = self.edits.pin_memory()
        if self.scores is not None:
            self.scored_token_ids = self.scored_token_ids.pin_memory()
            names = ("logprobs", "top_ids", "top_logprobs")
            self.scores = PromptScores(*(getattr(self.scores, name).pin_memory() for name in names))
