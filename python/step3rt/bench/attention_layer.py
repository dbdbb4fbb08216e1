"""Times the attention side of one layer, everything between two FFNs, at Step-3's own sizes.

From the sum of the FFN's results to the quantised input of the next FFN and its router's choice:
residual, norm and quantise; q, k and v; norm of the low-rank query; wq; rotary embedding, append;
decode attention, which quantises its output; o_proj; residual, norm and quantise; router.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from step3rt.bench.graph_timing import Row, measure_us
from step3rt.model.config import Step3Config
from step3rt.model.gpu_layer import AttentionWork, LayerBuffers, LayerRunner
from step3rt.model.gpu_weights import Fp8Matrix
from step3rt.model.random_weights import random_gpu_weights
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape
from step3rt.ops.mfa_decode import MfaBatch
from step3rt.ops.mfa_schedule import (
    BLOCK_SIZE_TOKENS,
    HEAD_DIM,
    allocate_schedule,
    mfa_schedule,
)
from step3rt.ops.rope_append import rotation_table

SHAPES = (("fp8", 128, 4096), ("fp8", 256, 4096), ("bf16", 64, 8192), ("bf16", 64, 32768))
"""Format of K and V, sequences, tokens of each; the last two are of table 9 of Step-3's paper."""

LAUNCHES_PER_CACHE = 8
NUM_CACHES = 2  # 268 MB and more each: what one launch leaves in L2 is gone before it is used again
ONE_MOE_LAYER = {
    "model_type": "step3_text",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 1,
    "num_attention_heads": 64,
    "num_attention_groups": 1,
    "head_dim": 256,
    "share_q_dim": 2048,
    "moe_layers_enum": "0",
    "moe_num_experts": 48,
    "moe_top_k": 3,
    "moe_intermediate_size": 128,  # experts are not run
    "share_expert_dim": 128,
    "vocab_size": 128,
    "max_seq_len": 65536,
}


def attention_layer_rows() -> Iterator[Row]:
    """Yields a row per shape, `SEQUENCESxTOKENS`; bytes are those of weights and of K and V.

    Weights and the rows that they are multiplied with are FP8 in all of them.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    config = Step3Config.from_json(ONE_MOE_LAYER, Path("config.json"))
    weights = random_gpu_weights(config, device)
    layer = weights.layers[0]
    for kv_format, num_sequences, num_tokens in SHAPES:
        is_fp8_kv = kv_format == "fp8"
        blocks_each = -(-num_tokens // BLOCK_SIZE_TOKENS)
        num_blocks = num_sequences * blocks_each
        order = torch.randperm(num_blocks, dtype=torch.int32, device=device)
        seq_lens = torch.full((num_sequences,), num_tokens, dtype=torch.int32, device=device)
        schedule = allocate_schedule(device)
        mfa_schedule(seq_lens, schedule)
        batch = MfaBatch(order.view(num_sequences, blocks_each), seq_lens, schedule)
        work = AttentionWork(batch)
        positions = seq_lens - 1
        last_block = batch.block_table[:, -1]
        slots = last_block * BLOCK_SIZE_TOKENS + positions % BLOCK_SIZE_TOKENS
        places = (positions, slots.int(), rotation_table(num_tokens, config.rope_theta, device))
        buffers = LayerBuffers.allocate(weights, num_sequences)
        buffers.residual.normal_()
        buffers.partial_sums.normal_()
        runners = []
        for _ in range(NUM_CACHES):
            shape = fp8_cache_shape(num_blocks) if is_fp8_kv else bf16_cache_shape(num_blocks)
            cache = torch.randn(shape, device=device, dtype=torch.bfloat16)
            if is_fp8_kv:
                cache = cache.to(torch.float8_e4m3fn).view(torch.uint8)
            runners.append(LayerRunner(config, layer, cache, is_fp8_kv=is_fp8_kv))

        def launch(
            runner: LayerRunner,
            buffers: LayerBuffers = buffers,
            work: AttentionWork = work,
            places: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = places,
        ) -> None:
            runner.launch_next_norm(buffers, layer.input_norm, fills_normed=runner.reads_normed)
            runner.launch_attention(buffers, work, places)

        launches = [partial(launch, runner) for runner in runners]
        us = measure_us(launches * LAUNCHES_PER_CACHE)
        matrices = (layer.qkv, layer.wq, layer.o_proj)
        num_bytes = sum(m.values.numel() for m in matrices if isinstance(m, Fp8Matrix))
        kv_values = 2 * num_sequences * num_tokens * HEAD_DIM
        kv_bytes = kv_values * (1 if is_fp8_kv else 2)
        products = 2.0 * num_bytes * num_sequences + 2.0 * kv_values * config.num_heads
        yield Row(
            f"attention_layer_{kv_format}",
            f"{num_sequences}x{num_tokens}",
            round(us, 1),
            round((num_bytes + kv_bytes) / us / 1e3),
            products / us / 1e6,
        )
