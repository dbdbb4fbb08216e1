"""The experts of an FFN rank between slots: rows in, sums back into the sources' memory."""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch

from step3rt.ops.afd_link import AfdShape, AttentionSlots, FfnSlots, StopWord
from step3rt.ops.afd_slots import first_expert, local_ids
from step3rt.ops.moe_fp8 import Fp8Experts, MoeTokens, allocate_moe_workspace, moe_fp8
from step3rt.ops.moe_push import moe_fp8_push
from step3rt.ops.quantize import quantize_groups
from step3rt.ops.rmsnorm_quantize import QuantizedRows
from tests.kernels.moe_inputs import make_experts, poison

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EPOCHS = itertools.count(1)
NUM_EXPERTS = 9
SIZES = (256, 128)


class Layer:
    """Two sources and two ranks in one process, with the experts of each rank."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(3)
        self.device = device
        self.shape = AfdShape(1, 2, 2, 70, SIZES[0], 3)
        self.stop = StopWord(device)
        limit_ns = 60_000_000_000  # kernels may have to be compiled while a source waits
        self.sources = [
            AttentionSlots(self.shape, a, device, self.stop, limit_ns) for a in range(2)
        ]
        self.ranks = [FfnSlots(self.shape, f, device, self.stop, limit_ns, 0) for f in range(2)]
        for (a, source), (f, rank) in itertools.product(
            enumerate(self.sources), enumerate(self.ranks)
        ):
            epoch = next(EPOCHS)
            rank.connect(a, source.handle, epoch)
            source.connect(f, rank.handle, epoch)

    def experts(self, num_experts: int) -> list[Fp8Experts]:
        """Of each rank: its routed ones, then what it computes as the rows' home."""
        firsts = [first_expert(num_experts, rank, 2) for rank in range(3)]
        counts = [end - first + 1 for first, end in itertools.pairwise(firsts)]
        return [make_experts(count, count, SIZES, 0, self.device)[0] for count in counts]

    def rows(self, num_rows: int) -> tuple[QuantizedRows, tuple[torch.Tensor, torch.Tensor]]:
        hidden = quantize_groups(torch.randn(num_rows, SIZES[0], device=self.device))
        weights, ids = torch.rand(num_rows, NUM_EXPERTS, device=self.device).topk(3, dim=1)
        return QuantizedRows(*hidden), (ids.int(), weights.contiguous())

    def close(self) -> None:
        self.stop.set()
        if self.device.type != "cpu":
            torch.cuda.synchronize()
        for slots in (*self.sources, *self.ranks):
            slots.close()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def layer(request: pytest.FixtureRequest) -> Iterator[Layer]:
    device = torch.device("cpu") if request.param == "cpu" else torch.device("cuda", 0)
    layer = Layer(device)
    yield layer
    layer.close()


def wait_for_sums(source: AttentionSlots) -> None:
    """A first layer's wait, beside the ranks': it passes rank 0's admission on to rank 1."""
    if source.device.type == "cpu":
        source.wait(0, is_first_layer=True)
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        source.wait(0, is_first_layer=True)
    stream.synchronize()


@pytest.mark.parametrize("num_experts", [NUM_EXPERTS, 0])
def test_pushed_sums_are_those_of_the_experts_alone(layer: Layer, num_experts: int) -> None:
    """Bit for bit, for both sources in one step: the experts do not know whose a row is."""
    by_rank = layer.experts(num_experts)
    workspaces = [
        allocate_moe_workspace(experts, layer.shape.num_rows, 4, num_ctas=8) for experts in by_rank
    ]
    # A kernel's first launch may need an idle device to load it, and soon a source waits there.
    for experts, workspace, slots in zip(by_rank, workspaces, layer.ranks, strict=True):
        tokens = slots.tokens(0)
        sums = torch.empty(tokens.hidden.shape, dtype=torch.bfloat16, device=layer.device)
        moe_fp8(tokens, experts, workspace, sums)
        poison(workspace)
    sent = [layer.rows(70), layer.rows(33)]
    counts = [torch.tensor([n], dtype=torch.int32, device=layer.device) for n in (67, 33)]
    for source, (hidden, topk), count in zip(layer.sources, sent, counts, strict=True):
        choices = topk if num_experts else None
        source.send(0, hidden, choices, count, num_experts, is_first_layer=True)
        source.sums(0).fill_(float("nan"))
    if layer.device.type != "cpu":
        torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(wait_for_sums, source) for source in layer.sources]
        for experts, workspace, slots in zip(by_rank, workspaces, layer.ranks, strict=True):
            slots.wait(0, is_first_layer=True)
            moe_fp8_push(experts, workspace, slots, 0)
        for wait in waits:
            wait.result(timeout=60)
    num_absent = 0
    for source, (hidden, topk), count in zip(layer.sources, sent, counts, strict=True):
        assert source.errors()[0].is_ok
        num_rows = int(count)
        ids, weights = local_ids(layer.shape, topk if num_experts else None, num_rows, num_experts)
        for rank, (experts, workspace) in enumerate(zip(by_rank, workspaces, strict=True)):
            tokens = MoeTokens(
                hidden.values[:num_rows],
                hidden.scales[:num_rows],
                ids[rank].to(layer.device),
                weights[rank].to(layer.device),
            )
            want = torch.empty(num_rows, SIZES[0], dtype=torch.bfloat16, device=layer.device)
            moe_fp8(tokens, experts, workspace, want)
            got = source.sums(0)[rank]
            is_here = (ids[rank] >= 0).any(dim=1).to(layer.device)
            assert is_here.any()
            num_absent += int((~is_here).sum())
            assert torch.equal(got[:num_rows][is_here], want[is_here])
            assert bool(got[:num_rows][~is_here].isnan().all())
            assert bool(got[num_rows:].isnan().all())
    assert num_absent > 0


def test_experts_and_workspaces_that_do_not_fit_are_refused(layer: Layer) -> None:
    experts = layer.experts(NUM_EXPERTS)[0]
    workspace = allocate_moe_workspace(experts, 70, 4, num_ctas=8)
    with_shared = dataclasses.replace(experts, num_routed=experts.num_groups - 1)
    with pytest.raises(ValueError, match="own group numbers"):
        moe_fp8_push(with_shared, workspace, layer.ranks[0], 0)
    with pytest.raises(ValueError, match="do not fit a workspace for 70"):
        moe_fp8_push(experts, workspace, layer.ranks[0], 0)
