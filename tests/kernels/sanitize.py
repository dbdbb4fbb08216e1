"""Small launches of every kernel for compute-sanitizer: splits, tails, empty and odd sizes.

Run as a module, with the names of cases for those only. `--every-lane-arrives` is for racecheck:
docs/kernels.md says what it proves.
"""

import argparse
from collections.abc import Sequence

import torch

from step3rt.ops import compile as compiler
from step3rt.ops.afd_link import AfdShape, AttentionSlots, FfnSlots, StopWord
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape
from step3rt.ops.linear_fp8 import linear_fp8, reference_linear_fp8
from step3rt.ops.linear_fp8_variant import LinearVariant
from step3rt.ops.mfa_prefill import (
    PrefillBatch,
    PrefillChunk,
    mfa_prefill_bf16,
    mfa_prefill_fp8,
    prefill_items,
    reference_mfa_prefill,
)
from step3rt.ops.moe_fp8 import allocate_moe_workspace
from step3rt.ops.moe_push import moe_fp8_push
from step3rt.ops.quantize import quantize_groups
from step3rt.ops.quantize_groups import quantize_groups_fp8
from step3rt.ops.rmsnorm_quantize import (
    HIDDEN_SIZE,
    QUERY_RANK,
    NormOutputs,
    QuantizedRows,
    add_rmsnorm_quantize,
    rmsnorm_quantize,
)
from step3rt.ops.rope_append import (
    RopeTokens,
    rope_append_bf16,
    rope_append_fp8,
    rotation_table,
)
from step3rt.ops.router_topk import MAX_EXPERTS, TOP_K, route_topk
from step3rt.ops.sample import DeviceSamplingRow
from step3rt.ops.sums_rmsnorm_quantize import add_sums_rmsnorm_quantize
from tests.kernels.mfa_inputs import (
    DEVICE,
    SOFTMAX_SCALE,
    make_bf16_case,
    make_fp8_case,
    quantizes_its_output,
    relative_error,
)
from tests.kernels.moe_inputs import make_case, make_experts
from tests.kernels.sample_inputs import make_logits, reference_tokens, run


def decode() -> None:
    for num_ctas, num_heads, seq_lens in (
        (3, 64, [700, 0, 65, 64, 900]),
        (4, 5, [1500, 1]),
    ):
        bf16 = make_bf16_case(seq_lens, num_heads=num_heads, num_ctas=num_ctas)
        assert relative_error(bf16.run(), bf16.reference()) < 1e-2
        fp8 = make_fp8_case(seq_lens, num_heads=num_heads, num_ctas=num_ctas)
        assert relative_error(fp8.run(), fp8.reference()) < 5e-2
        assert quantizes_its_output(bf16)
        assert quantizes_its_output(fp8)


def prefill() -> None:
    """Chunks of four sequences: pairs, odd ends, tails of blocks, more items than CTAs.

    The references run on the CPU: thousands of small launches would each be watched, too.
    """
    parts = [(60, 9), (0, 64), (129, 1), (0, 301)]
    lengths = [first + length for first, length in parts]
    chunks, num_rows = [], 0
    for sequence, (first, length) in enumerate(parts):
        chunks.append(PrefillChunk(num_rows, length, first, sequence))
        num_rows += length
    items = prefill_items(chunks).to(DEVICE)
    count = torch.tensor([len(items)], dtype=torch.int32, device=DEVICE)
    q = torch.randn(num_rows, 7, 256, device=DEVICE)
    out = torch.full(q.shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)

    bf16 = make_bf16_case(lengths)
    table = bf16.batch.block_table
    batch = PrefillBatch(items, count, table)
    mfa_prefill_bf16(q.bfloat16(), bf16.cache, batch, out, SOFTMAX_SCALE)
    rows, cache = q.bfloat16().cpu(), bf16.cache.cpu()
    want = reference_mfa_prefill(rows, cache, chunks, table.cpu(), SOFTMAX_SCALE)
    assert relative_error(out.cpu(), want) < 1e-2

    fp8 = make_fp8_case(lengths)
    table = fp8.batch.block_table
    batch = PrefillBatch(items, count, table)
    q_scale = q.abs().amax(dim=-1) / 448
    values = (q / q_scale[..., None]).to(torch.float8_e4m3fn)
    mfa_prefill_fp8(values, q_scale, fp8.cache, batch, out, SOFTMAX_SCALE, fp8.kv_scale)
    kv = fp8.dense.float() * torch.tensor(fp8.kv_scale, device=DEVICE)[:, None, None]
    wide = values.float() * q_scale[..., None]
    want = reference_mfa_prefill(wide.cpu(), kv.cpu(), chunks, table.cpu(), SOFTMAX_SCALE)
    assert relative_error(out.cpu(), want) < 5e-2


def append() -> None:
    tokens = RopeTokens(
        q=torch.randn(3, 40, 256, device=DEVICE).bfloat16(),
        kv=torch.randn(3, 512, device=DEVICE).bfloat16(),
        positions=torch.tensor([0, 63, 9], dtype=torch.int32, device=DEVICE),
        slots=torch.tensor([127, -1, 0], dtype=torch.int32, device=DEVICE),
    )
    table = rotation_table(64, 5e5, DEVICE)
    cache = torch.zeros(bf16_cache_shape(2), dtype=torch.bfloat16, device=DEVICE)
    rope_append_bf16(tokens, table, tokens.q, cache)
    out = torch.empty(3, 40, 256, dtype=torch.float8_e4m3fn, device=DEVICE)
    scales = torch.empty(3, 40, device=DEVICE)
    packed = torch.zeros(fp8_cache_shape(2), dtype=torch.uint8, device=DEVICE)
    rope_append_fp8(tokens, table, (out, scales), packed)


def linear() -> None:
    x, x_scale = quantize_groups(torch.randn(70, 1024, device=DEVICE))
    weight = torch.randn(640, 1024, device=DEVICE).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(5, 8, device=DEVICE) + 0.5
    want = reference_linear_fp8(x, x_scale, weight, weight_scale)
    for variant in (
        LinearVariant(128, 128, split=1, cast=1, stages=6),
        LinearVariant(64, 80, split=2, cast=4, stages=3, ctas_per_sm=2),
        LinearVariant(256, 80, split=4, cast=2, stages=4),
    ):
        out = torch.full((70, 640), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        linear_fp8(x, x_scale, weight, weight_scale, out, variant)
        assert relative_error(out, want) < 1e-2


def moe() -> None:
    for num_ctas, num_slices, sizes in (
        (2, 1, (384, 384)),
        (8, 2, (384, 384)),
        (4, 1, (1024, 384)),
    ):
        # Groups of 140 (128 and a remainder), 79, 61 and 264 rows (shared weights; with 8 blocks of
        # K two CTAs split the remainder); odd numbers of weight tiles.
        ids = torch.tensor([[0, 1]] * 79 + [[0, 2]] * 61 + [[9, 9]] * 124, dtype=torch.int32)
        case = make_case(ids, 4, 3, sizes, num_ctas=num_ctas, num_slices=num_slices)
        assert relative_error(case.run(), case.reference()) < 1e-2
    # A dense FFN whose only round comes in halves of 64 and 36 rows.
    none = torch.zeros(100, 0, dtype=torch.int32)
    case = make_case(none, 1, 0, (512, 512), num_ctas=8)
    assert relative_error(case.run(), case.reference()) < 1e-2


def norms() -> None:
    residual = torch.randn(3, HIDDEN_SIZE, device=DEVICE).bfloat16()
    partial_sums = torch.randn(3, 3, HIDDEN_SIZE, device=DEVICE).bfloat16()
    rows = QuantizedRows.empty(3, HIDDEN_SIZE, DEVICE)
    out = NormOutputs(residual, torch.empty_like(residual), rows)
    add_rmsnorm_quantize(residual, partial_sums, residual[0].clone(), out, 1e-5)
    latent = residual[:, 512 : 512 + QUERY_RANK]
    latent_rows = QuantizedRows.empty(3, QUERY_RANK, DEVICE)
    rmsnorm_quantize(latent, residual[0, :QUERY_RANK].clone(), latent_rows, 1e-5)
    quantize_groups_fp8(residual, rows)


def route() -> None:
    hidden = torch.randn(19, HIDDEN_SIZE, device=DEVICE).bfloat16()
    gate = torch.randn(MAX_EXPERTS, HIDDEN_SIZE, device=DEVICE).bfloat16()
    ids = torch.empty(19, TOP_K, dtype=torch.int32, device=DEVICE)
    route_topk(hidden, gate, (ids, torch.empty(19, TOP_K, device=DEVICE)), is_normalised=True)


def choose() -> None:
    rows = [
        DeviceSamplingRow(num_top=5),
        DeviceSamplingRow(temperature=1.0),
        DeviceSamplingRow(temperature=1.0, top_k=7, top_p=0.5),
        DeviceSamplingRow(presence=1.0, generated={3: 1, 2999: 2}, masked_token_ids=(5,)),
    ]
    for dtype in (torch.bfloat16, torch.float32):
        logits = make_logits(4, 3001, dtype)
        logits[2].fill_(1.0)
        assert run(logits, rows).token_ids.tolist() == reference_tokens(logits, rows)
        run(logits, [DeviceSamplingRow()] * 4)


def links() -> None:
    """A layer there and back, all launches in one stream of one process."""
    shape = AfdShape(1, 1, 1, 5, HIDDEN_SIZE, 3)
    stop = StopWord(DEVICE)
    experts = make_experts(4, 4, (HIDDEN_SIZE, 128))[0]
    workspace = allocate_moe_workspace(experts, shape.num_rows, shape.num_columns, num_ctas=4)
    residual = torch.randn(5, HIDDEN_SIZE, device=DEVICE).bfloat16()
    rows = QuantizedRows(*quantize_groups(residual))
    ids = torch.tensor([[0, 1, 2]] * 5, dtype=torch.int32, device=DEVICE)
    topk = (ids, torch.rand(5, 3, device=DEVICE))
    count = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    with (
        AttentionSlots(shape, 0, DEVICE, stop) as source,
        FfnSlots(shape, 0, DEVICE, stop) as rank,
    ):
        rank.connect(0, source.handle, epoch=1)
        source.connect(0, rank.handle, epoch=1)
        for is_first in (True, False):
            source.send(0, rows, topk, count, 3, is_first_layer=is_first)
            rank.wait(0, is_first_layer=is_first)
            moe_fp8_push(experts, workspace, rank, 0)
            source.wait(0, is_first_layer=is_first)
            out = NormOutputs(residual, torch.empty_like(residual), rows)
            sums, present = source.sums(0), source.present(0)
            add_sums_rmsnorm_quantize(residual, sums, present, residual[0].clone(), out, 1e-5)
        torch.cuda.synchronize()
        assert source.errors()[0].is_ok
        assert rank.errors()[0].is_ok


CASES = {
    case.__name__: case
    for case in (decode, prefill, append, linear, moe, norms, route, choose, links)
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.kernels.sanitize")
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--every-lane-arrives", action="store_true", help="for racecheck")
    parsed = parser.parse_args(arguments)
    unknown = [name for name in parsed.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return parsed


def main() -> None:
    arguments = parse_arguments()
    if arguments.every_lane_arrives:
        compiler.FIXED_OPTIONS += ("-DSTEP3RT_EVERY_LANE_ARRIVES",)
    for name in arguments.cases or CASES:
        torch.manual_seed(0)
        CASES[name]()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
