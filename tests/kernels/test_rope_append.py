import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from step3rt.ops.kv_cache import (  # noqa: E402
    bf16_cache_shape,
    fp8_cache_shape,
    unpack_fp8_blocks,
)
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS, HEAD_DIM  # noqa: E402
from step3rt.ops.rope_append import (  # noqa: E402
    RopeTokens,
    reference_rope,
    rope_append_bf16,
    rope_append_fp8,
    rotation_table,
)
from tests.kernels.mfa_inputs import DEVICE, relative_error  # noqa: E402

THETA = 500_000.0
NUM_BLOCKS = 40
NUM_POSITIONS = 65536


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    return rotation_table(NUM_POSITIONS, THETA, DEVICE)


def make_tokens(num_tokens: int, num_heads: int) -> RopeTokens:
    """Tokens at random positions and distinct slots, every fifth not appended; K|V is a slice."""
    fused = torch.randn(num_tokens, 2048 + 2 * HEAD_DIM, device=DEVICE).bfloat16()
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE_TOKENS, device=DEVICE)[:num_tokens].int()
    slots[4::5] = -1
    return RopeTokens(
        q=torch.randn(num_tokens, num_heads, HEAD_DIM, device=DEVICE).bfloat16(),
        kv=fused[:, 2048:],
        positions=torch.randint(0, NUM_POSITIONS, (num_tokens,), device=DEVICE).int(),
        slots=slots,
    )


def split_slots(tokens: RopeTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Appended tokens, and block and offset of each."""
    appended = (tokens.slots >= 0).nonzero().flatten()
    slots = tokens.slots[appended].long()
    return appended, slots // BLOCK_SIZE_TOKENS, slots % BLOCK_SIZE_TOKENS


def reference_kv(tokens: RopeTokens) -> torch.Tensor:
    """f64[T, 2, 256]: rotated K, and V."""
    k, v = tokens.kv.split(HEAD_DIM, dim=1)
    return torch.stack([reference_rope(k, tokens.positions, THETA), v.double()], dim=1)


@pytest.mark.parametrize(("num_tokens", "num_heads"), [(1, 64), (257, 64), (33, 4), (7, 41)])
def test_bf16_rope_agrees_and_appends_to_its_slots_alone(
    num_tokens: int, num_heads: int, table: torch.Tensor
) -> None:
    tokens = make_tokens(num_tokens, num_heads)
    cache = torch.full(bf16_cache_shape(NUM_BLOCKS), 7.0, dtype=torch.bfloat16, device=DEVICE)
    out = torch.full_like(tokens.q, float("nan"))
    rope_append_bf16(tokens, table, out, cache)
    assert relative_error(out, reference_rope(tokens.q, tokens.positions, THETA)) < 3e-3

    appended, block, offset = split_slots(tokens)
    written = cache[block, :, offset]
    assert relative_error(written, reference_kv(tokens)[appended]) < 3e-3
    cache[block, :, offset] = 7.0
    assert bool((cache == 7.0).all())


@pytest.mark.parametrize(("num_tokens", "num_heads"), [(1, 64), (257, 64), (33, 4), (7, 41)])
def test_fp8_rope_rounds_once_and_appends_to_its_slots_alone(
    num_tokens: int, num_heads: int, table: torch.Tensor
) -> None:
    tokens = make_tokens(num_tokens, num_heads)
    tokens.kv.clamp_(-4.4, 4.4)  # below 448 units; saturation has its own test
    kv_scale = (0.02, 0.01)
    cache = torch.full(fp8_cache_shape(NUM_BLOCKS), 0x11, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(tokens.q.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    out.view(torch.uint8).fill_(0x7F)
    scales = torch.full(tokens.q.shape[:2], float("nan"), device=DEVICE)
    rope_append_fp8(tokens, table, (out, scales), cache, kv_scale)

    want = reference_rope(tokens.q, tokens.positions, THETA)
    torch.testing.assert_close(scales.double(), want.abs().amax(-1) / 448, rtol=1e-5, atol=0)
    step = want.abs().amax(-1, keepdim=True) / 448
    assert_rounded_once(out.double() * scales[..., None].double(), want, step)

    appended, block, offset = split_slots(tokens)
    dense = unpack_fp8_blocks(cache)
    units = torch.tensor(kv_scale, device=DEVICE, dtype=torch.float64)[:, None]
    written = dense[block, :, offset].double() * units
    assert_rounded_once(written, reference_kv(tokens)[appended], units)
    raw = dense.view(torch.uint8)
    raw[block, :, offset] = 0x11
    assert bool((raw == 0x11).all())


def assert_rounded_once(got: torch.Tensor, want: torch.Tensor, unit: torch.Tensor) -> None:
    """Within half a step of e4m3: 2^-4 of the value, or 2^-10 units when subnormal.

    Besides, the fp32 rotation has an error of its own, which can be on the wrong side of the middle
    between two steps: 2^-22 of the head's largest value, 448 units, is more than it.
    """
    bound = torch.maximum(want.abs() * 2**-4, unit * 2**-10) * (1 + 1e-4) + unit * 448 * 2**-22
    assert bool(((got - want).abs() <= bound).all())


def test_zero_heads_keep_a_positive_scale_and_large_values_saturate(table: torch.Tensor) -> None:
    tokens = make_tokens(2, 2)
    tokens.q.zero_()
    tokens.kv[:, HEAD_DIM:] = 1e4
    tokens.slots.copy_(torch.tensor([0, 70]))
    cache = torch.zeros(fp8_cache_shape(NUM_BLOCKS), dtype=torch.uint8, device=DEVICE)
    out = torch.empty(tokens.q.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    scales = torch.zeros(tokens.q.shape[:2], device=DEVICE)
    rope_append_fp8(tokens, table, (out, scales), cache)
    assert bool((scales > 0).all())
    assert bool((out.float() == 0).all())
    values = unpack_fp8_blocks(cache)[:, 1].float()
    assert bool((values[0, 0] == 448).all())
    assert bool((values[1, 6] == 448).all())


def test_a_kv_slice_that_is_not_aligned_is_refused(table: torch.Tensor) -> None:
    tokens = make_tokens(3, 4)
    cache = torch.zeros(bf16_cache_shape(NUM_BLOCKS), dtype=torch.bfloat16, device=DEVICE)
    fused = torch.zeros(3, 2000, dtype=torch.bfloat16, device=DEVICE)
    shifted = RopeTokens(tokens.q, fused[:, 3 : 3 + 512], tokens.positions, tokens.slots)
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        rope_append_bf16(shifted, table, tokens.q, cache)


def test_a_batch_without_tokens_is_refused(table: torch.Tensor) -> None:
    tokens = make_tokens(0, 4)
    cache = torch.zeros(bf16_cache_shape(1), dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="0 tokens of 4 heads"):
        rope_append_bf16(tokens, table, tokens.q, cache)
