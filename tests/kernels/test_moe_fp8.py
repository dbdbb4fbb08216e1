import dataclasses
import time

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from step3rt.ops.moe_fp8 import (  # noqa: E402
    MoeTokens,
    allocate_moe_workspace,
    moe_fp8,
)
from step3rt.ops.moe_fp8_reference import reference_dispatch  # noqa: E402
from step3rt.ops.moe_layout import unpack_rows  # noqa: E402
from tests.kernels.moe_inputs import (  # noqa: E402
    DEVICE,
    MoeCase,
    make_case,
    poison,
    relative_error,
)


def bound(num_tokens: int) -> float:
    """Relative error to allow for the outputs of so many tokens together.

    BF16 outputs are 2^-9; the rest is SwiGLU values that fall to the other side of a rounding
    boundary of e4m3 than in the reference. A large one is worth up to 2^-3 of itself, so tokens
    differ: of 20,000 simulated ones, with sums exact to 3e-4 and 256 inner values, half are below
    1e-3, 1 % above 2e-2, and the worst has 4.1e-2.
    """
    return 1e-2 + 3.2e-2 * num_tokens**-0.5


def distinct_ids(num_tokens: int, num_columns: int, num_experts: int) -> torch.Tensor:
    """i32[T, C]: ids in 0...num_experts - 1, distinct in a row, some experts liked more."""
    likes = torch.rand(num_tokens, num_experts) * torch.linspace(0.5, 1.0, num_experts)
    return likes.topk(num_columns, dim=1).indices.int()


def only_shared(num_tokens: int) -> torch.Tensor:
    return torch.zeros(num_tokens, 0, dtype=torch.int32)


def check(case: MoeCase) -> None:
    out = case.run()
    assert relative_error(out, case.reference()) < bound(out.shape[0])
    groups, token_rows = reference_dispatch(
        case.tokens.topk_ids,
        case.experts.first_expert,
        case.experts.num_routed,
        has_shared=case.experts.has_shared,
    )
    assert [tuple(group) for group in case.workspace.groups.tolist()] == groups
    written = case.workspace.token_rows[: token_rows.numel()].view_as(token_rows)
    assert torch.equal(written.cpu(), token_rows)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 63, 64, 65, 127, 128, 129, 200, 257, 700])
def test_routed_and_shared_experts_agree_with_the_float64_reference(num_tokens: int) -> None:
    # 3 of 6 experts are at hand: about half of the ids are not.
    check(make_case(distinct_ids(num_tokens, 3, 6), 4, 3, first_expert=2))


# 16 rows more than 64 or 128 are a part of their own of gate and up's tile, 17 are not; down takes
# single blocks in steps of 16.
@pytest.mark.parametrize(
    "rows",
    [1, 64, 65, 80, 81, 96, 97, 112, 113, 128, 129, 144, 145, 192, 256, 272, 273, 513],
)
def test_one_expert_gets_all_tokens_and_the_others_none(rows: int) -> None:
    for expert in (0, 1, 4):
        check(make_case(torch.full((rows, 1), expert, dtype=torch.int32), 5, 5))


# With 8 or more blocks of K the two CTAs of a pair share the rows past 256; of three blocks the
# last has them alone.
@pytest.mark.parametrize("rows", [256, 257, 264, 265, 272, 273, 392, 400, 528])
@pytest.mark.parametrize("num_ctas", [4, 132])
def test_rows_past_a_pair_of_blocks_are_split_between_its_ctas(rows: int, num_ctas: int) -> None:
    ids = torch.full((rows + 300, 1), 1, dtype=torch.int32)
    ids[rows:] = 2
    case = make_case(ids, 4, 4, sizes=(1024, 640), num_ctas=num_ctas)
    check(case)
    first = case.run()
    for _ in range(10):
        poison(case.workspace)
        assert torch.equal(case.run(), first)


# A single block of rows, a pair of blocks, a pair and a remainder: each is read and multiplied in a
# way of its own, which must not show.
@pytest.mark.parametrize("rows", [64, 65, 80, 96, 112, 128, 144, 145, 256, 257, 272])
@pytest.mark.parametrize("num_ctas", [6, 132])
def test_a_row_gets_the_same_bits_in_every_kind_of_tile(rows: int, num_ctas: int) -> None:
    case = make_case(torch.zeros(300, 1), 2, 2, sizes=(1024, 640), num_ctas=num_ctas)
    together = case.run()
    first = MoeTokens(
        *(
            getattr(case.tokens, field.name)[:rows].contiguous()
            for field in dataclasses.fields(MoeTokens)
        )
    )
    out = torch.full_like(together[:rows], float("nan"))
    moe_fp8(first, case.experts, case.workspace, out)
    assert torch.equal(out, together[:rows])


# The last round of items of a single group comes in halves if that fits the clusters.
@pytest.mark.parametrize("num_tokens", [65, 100, 128, 144, 193, 256, 272, 300, 384])
@pytest.mark.parametrize("num_ctas", [6, 10, 132])
def test_the_last_round_of_a_dense_ffn_may_be_halved(num_tokens: int, num_ctas: int) -> None:
    check(make_case(only_shared(num_tokens), 1, 0, sizes=(1024, 1024), num_ctas=num_ctas))


def test_tokens_without_a_local_expert_get_zero() -> None:
    case = make_case(torch.tensor([[9, 8, 7]] * 40, dtype=torch.int32), 4, 4)
    assert bool((case.run() == 0).all())
    mixed = make_case(torch.tensor([[9, 8, -1], [9, 2, 7]], dtype=torch.int32), 4, 4)
    out = mixed.run()
    assert bool((out[0] == 0).all())
    assert relative_error(out, mixed.reference()) < bound(1)


# A single block of rows, a pair, and a remainder, which quantise in places of their own.
@pytest.mark.parametrize("rows", [8, 64, 128, 144, 272])
def test_inner_values_near_zero_do_not_become_nan(rows: int) -> None:
    case = make_case(torch.zeros(rows, 1), 1, 1, sizes=(1024, 640))
    case.experts.gate_up_scale.mul_(1e-22)  # SwiGLU's values are around the least numbers, or 0
    assert bool((case.run() == 0).all())


def test_all_48_experts_and_the_shared_one() -> None:
    check(make_case(distinct_ids(2048, 3, 48), 49, 48, sizes=(256, 128)))


@pytest.mark.parametrize("sizes", [(128, 128), (384, 384), (640, 128), (128, 640)])
@pytest.mark.parametrize("num_ctas", [2, 6, 132])
def test_odd_numbers_of_tiles_and_any_number_of_ctas(sizes: tuple[int, int], num_ctas: int) -> None:
    check(make_case(distinct_ids(150, 2, 4), 4, 3, sizes=sizes, num_ctas=num_ctas))


@pytest.mark.parametrize("num_slices", [1, 2, 3, 7])
@pytest.mark.parametrize("num_tokens", [100, 130])
def test_a_dense_ffn_is_a_shared_expert_alone(num_tokens: int, num_slices: int) -> None:
    check(make_case(only_shared(num_tokens), 1, 0, sizes=(512, 1024), num_slices=num_slices))


@pytest.mark.parametrize("num_tokens", [16, 86, 256])
def test_the_sizes_of_step3(num_tokens: int) -> None:
    check(make_case(distinct_ids(num_tokens, 3, 9), 4, 3, sizes=(7168, 5120)))


def test_the_dense_layers_of_step3() -> None:
    check(make_case(only_shared(100), 1, 0, sizes=(7168, 18432)))


def test_swiglu_is_quantised_in_groups_of_128() -> None:
    case = make_case(only_shared(70), 1, 0, sizes=(256, 384))
    case.run()
    values = unpack_rows(case.workspace.inner)[:70].double()
    scales = case.workspace.inner_scales.T[:70]
    amax = values.view(70, -1, 128).abs().amax(dim=2)
    assert bool((amax == 448).all())  # the largest of each group sits at the end of the range
    assert bool((scales > 0).all())


def test_zero_hidden_states_stay_zero_and_large_ones_finite() -> None:
    case = make_case(distinct_ids(9, 2, 3), 3, 3)
    case.tokens.hidden[0].zero_()
    case.tokens.scales[1] *= 1e4
    out = case.run()
    assert bool((out[0] == 0).all())
    assert bool(out.isfinite().all())


def test_a_launch_repeats_itself_bit_for_bit() -> None:
    case = make_case(distinct_ids(500, 3, 6), 7, 6, sizes=(1024, 512))
    first = case.run()
    for _ in range(20):
        poison(case.workspace)
        assert torch.equal(case.run(), first)


def test_a_token_gets_the_same_bits_whoever_else_is_in_the_batch() -> None:
    case = make_case(distinct_ids(333, 3, 6), 7, 6)
    together = case.run()
    for token in (0, 100, 332):
        alone = MoeTokens(
            *(
                getattr(case.tokens, field.name)[token : token + 1].contiguous()
                for field in dataclasses.fields(MoeTokens)
            )
        )
        out = torch.full_like(together[:1], float("nan"))
        moe_fp8(alone, case.experts, case.workspace, out)
        assert torch.equal(out[0], together[token])


def test_layers_replay_in_a_cuda_graph_with_new_counts() -> None:
    case = make_case(distinct_ids(300, 3, 6), 4, 3)
    outs = [torch.empty(300, 512, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)]
    case.run()  # loads the kernels: not capturable
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outs:  # one workspace for all layers
            moe_fp8(case.tokens, case.experts, case.workspace, out)
    for ids in (distinct_ids(300, 3, 6), torch.full((300, 3), 1), torch.full((300, 3), -1)):
        case.tokens.topk_ids.copy_(ids)
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        reference = case.reference()
        for out in outs:
            assert float((out.double() - reference).norm()) <= bound(300) * float(reference.norm())


def test_layers_at_once_on_one_gpu_end_with_the_bits_of_each_alone() -> None:
    """They take SMs from each other, so that the threads of a cluster run further apart."""
    cases = [
        make_case(distinct_ids(num_tokens, 3, 3), 4, 3, sizes=(7168, 2560), num_ctas=130)
        for num_tokens in (64, 150)
    ]
    firsts = [case.run() for case in cases]
    outs = [torch.empty_like(first) for first in firsts]
    streams = [torch.cuda.Stream() for _ in cases]
    graphs = [torch.cuda.CUDAGraph() for _ in cases]
    for case, out, stream, graph in zip(cases, outs, streams, graphs, strict=True):
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(20):
                moe_fp8(case.tokens, case.experts, case.workspace, out)
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    deadline_s = time.monotonic() + 20
    while not all(stream.query() for stream in streams):
        assert time.monotonic() < deadline_s, "the kernels hang"
        time.sleep(0.01)
    for out, first in zip(outs, firsts, strict=True):
        assert torch.equal(out, first)


def test_no_tokens_are_no_work() -> None:
    case = make_case(distinct_ids(4, 2, 3), 3, 3)
    empty = MoeTokens(
        *(getattr(case.tokens, field.name)[:0] for field in dataclasses.fields(MoeTokens))
    )
    moe_fp8(empty, case.experts, case.workspace, torch.empty(0, 512, device=DEVICE).bfloat16())


def test_arguments_that_do_not_fit_are_refused() -> None:
    case = make_case(distinct_ids(8, 2, 3), 3, 3)
    out = torch.empty(8, 512, dtype=torch.bfloat16, device=DEVICE)
    arguments = (case.tokens, case.experts, case.workspace)
    with pytest.raises(ValueError, match=r"`out` is torch\.float32"):
        moe_fp8(*arguments, out.float())
    with pytest.raises(ValueError, match=r"`out` has shape \[8, 256\]"):
        moe_fp8(*arguments, out[:, :256].contiguous())
    wider = dataclasses.replace(case.tokens, topk_ids=case.tokens.topk_ids.long())
    with pytest.raises(ValueError, match=r"`topk_ids` is torch\.int64"):
        moe_fp8(wider, case.experts, case.workspace, out)
    smaller = allocate_moe_workspace(case.experts, 7, 2)
    with pytest.raises(ValueError, match="8 tokens of 2 ids do not fit a workspace for 7"):
        moe_fp8(case.tokens, case.experts, smaller, out)
