import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from step3rt.ops.mfa_decode import mfa_decode_bf16  # noqa: E402
from step3rt.ops.mfa_schedule import mfa_schedule, reference_mfa_schedule  # noqa: E402
from step3rt.ops.quantize_groups import quantize_groups_fp8  # noqa: E402
from tests.kernels.mfa_inputs import (  # noqa: E402
    SOFTMAX_SCALE,
    make_batch,
    make_bf16_case,
    make_fp8_case,
    poisoned_rows,
    quantizes_its_output,
    relative_error,
    same_rows,
)

BF16_BOUND = 5e-3  # output rounding and BF16 weights: 2^-9 each, averaged over tokens
FP8_BOUND = 3e-2  # e4m3 weights: 2^-4 steps, error of a sum of n independent ones over its norm

BATCHES = {
    "one token": [1],
    "block boundaries": [63, 64, 65, 127, 128, 129, 1, 2],
    "empty rows between": [0, 100, 0, 0, 700, 0],
    "all rows empty": [0, 0],
    "longest sequence": [65536],
    "long beside short": [1, 65536, 1, 64, 4096, 8191],
    "long and cold in cache": [4096] * 128,
    "many short sequences per cta": [1 + 7 * i % 130 for i in range(900)],
    "one per cta": [1000 + 7 * i for i in range(132)],
    "full batch": [1 + 37 * i % 900 for i in range(1024)],
}


@pytest.mark.parametrize("seq_lens", BATCHES.values(), ids=BATCHES.keys())
def test_bf16_decode_agrees_with_the_float64_reference(seq_lens: list[int]) -> None:
    case = make_bf16_case(seq_lens)
    assert relative_error(case.run(), case.reference()) < BF16_BOUND


@pytest.mark.parametrize("seq_lens", BATCHES.values(), ids=BATCHES.keys())
def test_fp8_decode_agrees_with_the_float64_reference(seq_lens: list[int]) -> None:
    case = make_fp8_case(seq_lens)
    assert relative_error(case.run(), case.reference()) < FP8_BOUND


@pytest.mark.parametrize("seq_lens", BATCHES.values(), ids=BATCHES.keys())
def test_quantised_output_is_that_of_the_quantise_kernel(seq_lens: list[int]) -> None:
    assert quantizes_its_output(make_bf16_case(seq_lens))
    assert quantizes_its_output(make_fp8_case(seq_lens))


@pytest.mark.parametrize("num_ctas", [1, 2, 7, 64, 132])
def test_quantised_output_is_the_same_in_whole_and_split_sequences(num_ctas: int) -> None:
    seq_lens = [5000, 64, 1, 0, 20000, 777, 4096]
    for num_heads in (1, 9, 64):
        assert quantizes_its_output(make_bf16_case(seq_lens, num_heads, num_ctas))
        assert quantizes_its_output(make_fp8_case(seq_lens, num_heads, num_ctas))


@pytest.mark.parametrize("num_heads", range(1, 65))
def test_quantised_output_of_any_number_of_heads(num_heads: int) -> None:
    assert quantizes_its_output(make_bf16_case([300, 0, 9000, 1], num_heads))
    assert quantizes_its_output(make_fp8_case([300, 0, 9000, 1], num_heads))


@pytest.mark.parametrize("spread", [0.01, 8.0])
def test_quantised_output_of_flat_and_peaked_attention(spread: float) -> None:
    assert quantizes_its_output(make_bf16_case([3000, 130], spread=spread))
    assert quantizes_its_output(make_fp8_case([3000, 130], spread=spread))


@pytest.mark.parametrize("num_ctas", [1, 2, 7, 64, 132])
def test_the_number_of_ctas_does_not_change_the_result(num_ctas: int) -> None:
    seq_lens = [5000, 64, 1, 20000, 777, 4096]
    bf16 = make_bf16_case(seq_lens, num_ctas=num_ctas)
    assert relative_error(bf16.run(), bf16.reference()) < BF16_BOUND
    fp8 = make_fp8_case(seq_lens, num_ctas=num_ctas)
    assert relative_error(fp8.run(), fp8.reference()) < FP8_BOUND


@pytest.mark.parametrize("num_heads", [1, 4, 17, 63])
def test_fewer_heads_are_padded_without_touching_neighbours(num_heads: int) -> None:
    seq_lens = [300, 64, 9000, 1]
    bf16 = make_bf16_case(seq_lens, num_heads=num_heads)
    assert relative_error(bf16.run(), bf16.reference()) < BF16_BOUND
    fp8 = make_fp8_case(seq_lens, num_heads=num_heads)
    assert relative_error(fp8.run(), fp8.reference()) < FP8_BOUND


@pytest.mark.parametrize("spread", [0.01, 8.0])
def test_flat_and_peaked_attention_are_both_accurate(spread: float) -> None:
    bf16 = make_bf16_case([3000, 130], spread=spread)
    assert relative_error(bf16.run(), bf16.reference()) < BF16_BOUND
    fp8 = make_fp8_case([3000, 130], spread=spread)
    assert relative_error(fp8.run(), fp8.reference()) < FP8_BOUND


def test_fp8_accumulation_bias_does_not_grow_to_32k_tokens() -> None:
    # All values near +2: errors of the weights average out, truncation in the sum does not. Inside
    # a block the tensor core truncates 32 products to the resolution of a sum of 32: about 1e-3.
    case = make_fp8_case([32768, 32768], num_ctas=2, spread=0.5, value_mean=2.0)
    bias = (case.run().double() - case.reference()).mean() / case.reference().mean()
    assert abs(float(bias)) < 2e-3


def test_a_launch_repeats_itself_bit_for_bit_and_leaves_no_state() -> None:
    case = make_fp8_case([9000, 20, 4000], num_ctas=64)
    first = case.run()
    for _ in range(20):
        assert torch.equal(case.run(), first)
    assert not case.batch.schedule.arrivals.any()


def test_a_quantising_launch_repeats_itself_bit_for_bit_and_leaves_no_state() -> None:
    case = make_fp8_case([9000, 20, 4000], num_ctas=64)
    want = poisoned_rows(3, 64 * 256, case.q.device)
    quantize_groups_fp8(case.run().flatten(1), want)
    for _ in range(20):
        rows = poisoned_rows(3, 64 * 256, case.q.device)
        case.run_into(rows)
        assert same_rows(rows, want)
    assert not case.batch.schedule.arrivals.any()


def test_decode_and_schedule_replay_in_a_cuda_graph_with_new_lengths() -> None:
    case = make_bf16_case([9000, 20, 4000])
    out = torch.full_like(case.q, float("nan"))
    rows = poisoned_rows(3, 64 * 256, case.q.device)
    assert quantizes_its_output(case)  # loads the kernels: not capturable
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mfa_schedule(case.batch.seq_lens, case.batch.schedule)
        mfa_decode_bf16(case.q, case.cache, case.batch, out, SOFTMAX_SCALE)
        case.run_into(rows)
    for lengths in ([9000, 20, 4000], [8192, 0, 1], [63, 1, 3999]):
        case.batch.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        assert relative_error(out, case.reference()) < BF16_BOUND
        want = poisoned_rows(3, 64 * 256, case.q.device)
        quantize_groups_fp8(out.flatten(1), want)
        assert same_rows(rows, want)


@pytest.mark.parametrize("num_ctas", [1, 13, 132])
def test_device_schedule_equals_its_reference(num_ctas: int) -> None:
    torch.manual_seed(num_ctas)
    for num_sequences in (1, 2, 31, 131, 132, 133, 500, 1024):
        for longest in (1, 100, 5000, 65536):
            seq_lens = torch.randint(0, longest + 1, (num_sequences,)).tolist()
            if num_sequences == 1:
                seq_lens = [longest]
            batch, _ = make_batch(seq_lens, num_ctas) if sum(seq_lens) < 4e6 else (None, 0)
            if batch is not None:
                rows = [tuple(row) for row in batch.schedule.rows.tolist()]
                assert rows == reference_mfa_schedule(seq_lens, num_ctas)


def test_arguments_that_do_not_fit_are_refused() -> None:
    case = make_bf16_case([100, 200])
    out = torch.empty_like(case.q)
    arguments = (case.cache, case.batch)
    with pytest.raises(ValueError, match=r"`q` has shape \[2, 64, 128\]"):
        mfa_decode_bf16(case.q[..., :128].contiguous(), *arguments, out, SOFTMAX_SCALE)
    with pytest.raises(ValueError, match=r"`q` is torch.float32"):
        mfa_decode_bf16(case.q.float(), *arguments, out, SOFTMAX_SCALE)
    with pytest.raises(ValueError, match="takes a contiguous tensor"):
        mfa_decode_bf16(case.q, *arguments, out.transpose(0, 1).contiguous().transpose(0, 1), 1.0)
    with pytest.raises(ValueError, match=r"`out` is on cpu"):
        mfa_decode_bf16(case.q, *arguments, out.cpu(), SOFTMAX_SCALE)
    rows = poisoned_rows(2, 63 * 256, case.q.device)
    with pytest.raises(ValueError, match=r"`values` has shape \[2, 16128\]"):
        mfa_decode_bf16(case.q, *arguments, rows, SOFTMAX_SCALE)
    with pytest.raises(ValueError, match="softmax_scale is 0"):
        mfa_decode_bf16(case.q, *arguments, out, 0.0)
