"""What attention's launchers compute on the CPU, against float64 from other code."""

import pytest
import torch

from step3rt.ops.kv_cache import (
    bf16_cache_shape,
    fp8_cache_shape,
    pack_fp8_blocks,
    unpack_fp8_blocks,
)
from step3rt.ops.mfa_decode import mfa_decode_bf16, mfa_decode_fp8
from step3rt.ops.mfa_schedule import (
    BLOCK_SIZE_TOKENS,
    HEAD_DIM,
    allocate_schedule,
    mfa_schedule,
    reference_mfa_schedule,
)
from step3rt.ops.rmsnorm_quantize import QuantizedRows
from step3rt.ops.rope_append import (
    RopeTokens,
    reference_rope,
    rope_append_bf16,
    rope_append_fp8,
    rotation_table,
)
from tests.kernels.mfa_inputs import (
    SOFTMAX_SCALE,
    make_batch,
    make_bf16_case,
    make_fp8_case,
    quantizes_its_output,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
THETA = 500_000.0
NUM_BLOCKS = 9
BATCHES = {
    "one token": [1],
    "block boundaries": [63, 64, 65, 127, 128, 129, 1, 2],
    "empty rows between": [0, 100, 0, 0, 700, 0],
    "all rows empty": [0, 0],
}
# As of the kernels: output rounding and BF16 weights, and e4m3 weights.
BF16_BOUND, FP8_BOUND = 5e-3, 3e-2


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("num_ctas", [1, 5, 132])
def test_the_schedule_is_written_as_the_kernel_writes_it(num_ctas: int) -> None:
    schedule = allocate_schedule(CPU, num_ctas)
    for lengths in ([1], [0, 5000, 64, 0, 777], [4096] * 130):
        mfa_schedule(torch.tensor(lengths, dtype=torch.int32), schedule)
        rows = [tuple(row) for row in schedule.rows.tolist()]
        assert rows == reference_mfa_schedule(lengths, num_ctas)
    assert allocate_schedule(CPU).num_ctas >= 1


@pytest.mark.parametrize("num_heads", [4, 64])
@pytest.mark.parametrize("seq_lens", BATCHES.values(), ids=BATCHES.keys())
def test_decode_agrees_with_float64_and_reads_no_unused_slot(
    seq_lens: list[int], num_heads: int
) -> None:
    bf16 = make_bf16_case(seq_lens, num_heads, device=CPU)
    assert relative_error(bf16.run(), bf16.reference()) < BF16_BOUND
    fp8 = make_fp8_case(seq_lens, num_heads, device=CPU)
    assert relative_error(fp8.run(), fp8.reference()) < FP8_BOUND


@pytest.mark.parametrize("num_heads", [1, 4, 64])
@pytest.mark.parametrize("seq_lens", BATCHES.values(), ids=BATCHES.keys())
def test_decode_quantises_what_it_would_have_rounded_to_bf16(
    seq_lens: list[int], num_heads: int
) -> None:
    assert quantizes_its_output(make_bf16_case(seq_lens, num_heads, device=CPU))
    assert quantizes_its_output(make_fp8_case(seq_lens, num_heads, device=CPU))


def test_weights_are_rounded_where_the_kernels_round_them() -> None:
    """Two tokens of weights 1 and w, V of 0 and 1: what comes out is the rounded w over 1 + w."""
    batch, num_blocks = make_batch([2], device=CPU)
    block = int(batch.block_table[0, 0])
    q = torch.zeros(1, 1, HEAD_DIM)
    q[..., 0] = 1.0
    dense = torch.zeros(bf16_cache_shape(num_blocks))
    dense[block, 0, 1, 0] = -1.75
    dense[block, 1, 1] = 1.0
    out = torch.empty(1, 1, HEAD_DIM, dtype=torch.bfloat16)
    weight = torch.tensor(-1.75).double().exp()

    mfa_decode_bf16(q.bfloat16(), dense.bfloat16(), batch, out, 1.0)
    assert torch.equal(out[0, 0, 0], (weight.bfloat16().double() / (1 + weight)).bfloat16())
    cache = pack_fp8_blocks(dense.to(torch.float8_e4m3fn))
    mfa_decode_fp8(q.to(torch.float8_e4m3fn), torch.ones(1, 1), cache, batch, out, 1.0)
    rounded = (weight * 256).to(torch.float8_e4m3fn).double() / 256
    assert torch.equal(out[0, 0, 0], (rounded / (1 + weight)).bfloat16())
    assert abs(float(rounded - weight)) > 1e-3  # the rounding shows


def test_a_sequence_does_not_depend_on_its_batch_mates() -> None:
    for case in (make_bf16_case([300, 70, 1], device=CPU), make_fp8_case([300, 70, 1], device=CPU)):
        together = case.run()
        schedule = case.batch.schedule
        case.batch = type(case.batch)(
            case.batch.block_table[1:2], case.batch.seq_lens[1:2], schedule
        )
        case.q = case.q[1:2]
        if hasattr(case, "q_scale"):
            case.q_scale = case.q_scale[1:2]
        assert torch.equal(case.run()[0], together[1])


def test_decode_refuses_what_the_kernels_do_not_take() -> None:
    case = make_bf16_case([100, 200], device=CPU)
    out = torch.empty_like(case.q)
    with pytest.raises(ValueError, match=r"`q` has shape \[2, 64, 128\]"):
        mfa_decode_bf16(case.q[..., :128].contiguous(), case.cache, case.batch, out, SOFTMAX_SCALE)
    with pytest.raises(ValueError, match="softmax_scale is 0"):
        mfa_decode_bf16(case.q, case.cache, case.batch, out, 0.0)
    rows = QuantizedRows.empty(2, 63 * HEAD_DIM, CPU)
    with pytest.raises(ValueError, match=r"`values` has shape \[2, 16128\]"):
        mfa_decode_bf16(case.q, case.cache, case.batch, rows, SOFTMAX_SCALE)


def make_tokens(num_tokens: int, num_heads: int) -> RopeTokens:
    """Tokens at random positions and distinct slots, every fifth not appended; K|V is a slice."""
    fused = torch.randn(num_tokens, 256 + 2 * HEAD_DIM).clamp(-4.4, 4.4).bfloat16()
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE_TOKENS)[:num_tokens].int()
    slots[4::5] = -1
    return RopeTokens(
        q=torch.randn(num_tokens, num_heads, HEAD_DIM).bfloat16(),
        kv=fused[:, 256:],
        positions=torch.randint(0, 4096, (num_tokens,)).int(),
        slots=slots,
    )


def appended_kv(tokens: RopeTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """f64[n, 2, 256] of the appended tokens, and block and offset of each."""
    rows = [row for row, slot in enumerate(tokens.slots.tolist()) if slot >= 0]
    k, v = tokens.kv[rows].split(HEAD_DIM, dim=1)
    slots = tokens.slots[rows].long()
    want = torch.stack([reference_rope(k, tokens.positions[rows], THETA), v.double()], dim=1)
    return want, slots // BLOCK_SIZE_TOKENS, slots % BLOCK_SIZE_TOKENS


@pytest.mark.parametrize(("num_tokens", "num_heads"), [(1, 64), (57, 4)])
def test_bf16_rope_agrees_and_appends_to_its_slots_alone(num_tokens: int, num_heads: int) -> None:
    tokens, table = make_tokens(num_tokens, num_heads), rotation_table(4096, THETA, CPU)
    cache = torch.full(bf16_cache_shape(NUM_BLOCKS), 7.0, dtype=torch.bfloat16)
    want = reference_rope(tokens.q, tokens.positions, THETA)
    rope_append_bf16(tokens, table, tokens.q, cache)  # in place, as the decoder calls it
    assert relative_error(tokens.q, want) < 3e-3
    kv, block, offset = appended_kv(tokens)
    assert relative_error(cache[block, :, offset], kv) < 3e-3
    cache[block, :, offset] = 7.0
    assert bool((cache == 7.0).all())


@pytest.mark.parametrize(("num_tokens", "num_heads"), [(1, 64), (57, 4)])
def test_fp8_rope_rounds_once_and_appends_to_its_slots_alone(
    num_tokens: int, num_heads: int
) -> None:
    tokens, table = make_tokens(num_tokens, num_heads), rotation_table(4096, THETA, CPU)
    kv_scale = (0.02, 0.01)
    cache = torch.full(fp8_cache_shape(NUM_BLOCKS), 0x11, dtype=torch.uint8)
    out = torch.empty(tokens.q.shape, dtype=torch.float8_e4m3fn)
    scales = torch.full(tokens.q.shape[:2], float("nan"))
    rope_append_fp8(tokens, table, (out, scales), cache, kv_scale)
    want = reference_rope(tokens.q, tokens.positions, THETA)
    unit = want.abs().amax(-1, keepdim=True) / 448
    torch.testing.assert_close(scales.double(), unit[..., 0], rtol=1e-5, atol=0)
    assert_rounded_once(out.double() * scales[..., None].double(), want, unit)

    kv, block, offset = appended_kv(tokens)
    dense = unpack_fp8_blocks(cache)
    units = torch.tensor(kv_scale, dtype=torch.float64)[:, None]
    assert_rounded_once(dense[block, :, offset].double() * units, kv, units)
    raw = dense.view(torch.uint8)
    raw[block, :, offset] = 0x11
    assert bool((raw == 0x11).all())


def assert_rounded_once(got: torch.Tensor, want: torch.Tensor, unit: torch.Tensor) -> None:
    """Within half a step of e4m3: 2^-4 of the value, or 2^-10 units; and fp32's own error."""
    bound = torch.maximum(want.abs() * 2**-4, unit * 2**-10) * (1 + 1e-4) + unit * 448 * 2**-22
    assert bool(((got - want).abs() <= bound).all())


def test_zero_heads_keep_a_positive_scale_and_large_values_saturate() -> None:
    tokens, table = make_tokens(2, 2), rotation_table(4096, THETA, CPU)
    tokens.q.zero_()
    tokens.kv[:, HEAD_DIM:] = 1e4
    tokens.slots.copy_(torch.tensor([0, 70]))
    cache = torch.zeros(fp8_cache_shape(NUM_BLOCKS), dtype=torch.uint8)
    out = torch.empty(tokens.q.shape, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(tokens.q.shape[:2])
    rope_append_fp8(tokens, table, (out, scales), cache)
    assert bool((scales > 0).all())
    assert bool((out.float() == 0).all())
    values = unpack_fp8_blocks(cache)[:, 1].float()
    assert bool((values[0, 0] == 448).all())
    assert bool((values[1, 6] == 448).all())


def test_rope_refuses_what_the_kernels_do_not_take() -> None:
    tokens, table = make_tokens(3, 4), rotation_table(4096, THETA, CPU)
    cache = torch.zeros(bf16_cache_shape(1), dtype=torch.bfloat16)
    fused = torch.zeros(3, 2000, dtype=torch.bfloat16)
    shifted = RopeTokens(tokens.q, fused[:, 3 : 3 + 512], tokens.positions, tokens.slots)
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        rope_append_bf16(shifted, table, tokens.q, cache)
    with pytest.raises(ValueError, match="0 tokens of 4 heads"):
        rope_append_bf16(make_tokens(0, 4), table, tokens.q, cache)
