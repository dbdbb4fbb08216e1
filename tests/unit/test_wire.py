import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step3rt.errors import Internal
from step3rt.instance.wire import A2fLayout, F2aLayout, FrameError, slot_tensor
from step3rt.model.placement import place

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def slot_of(num_bytes: int) -> torch.Tensor:
    """A slot's memory, as mappings of the fabric are: bytes at a page boundary."""
    return slot_tensor(memoryview(mmap.mmap(-1, num_bytes)))


@given(
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.integers(1, 9),
    hidden_size=st.sampled_from([1, 48, 128, 200]),
    top_k=st.integers(0, 4),
    seed=st.integers(0, 100),
)
def test_frame_to_ffn_round_trips(
    dtype: torch.dtype, num_tokens: int, hidden_size: int, top_k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    topk_ids = torch.randint(0, 9, (num_tokens, top_k), generator=generator).int()
    topk_weights = torch.rand(num_tokens, top_k, generator=generator)
    layout = A2fLayout(9, hidden_size, top_k + 1, dtype)
    slot = slot_of(layout.slot_bytes)
    for placement in place(topk_ids, topk_weights, num_experts=9, top_k=top_k, ep_size=2):
        num_rows = placement.rows.shape[0]
        if num_rows == 0:
            continue
        layout.write(slot, hidden, placement)
        frame = layout.read(slot, num_rows, layout.payload_bytes(num_rows))
        rows = hidden[placement.rows]
        if dtype == torch.float8_e4m3fn:
            assert torch.allclose(frame.hidden, rows, rtol=2**-4, atol=2e-3)
        else:
            assert torch.equal(frame.hidden, rows.to(dtype))
        assert torch.equal(frame.expert_ids, placement.expert_ids)
        assert torch.equal(frame.expert_weights, placement.expert_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frame_to_attention_round_trips_without_a_copy(dtype: torch.dtype) -> None:
    layout = F2aLayout(5, 48, dtype)
    slot = slot_of(layout.slot_bytes)
    partial_sums = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    layout.write(slot, partial_sums)
    view = layout.read(slot, 3, layout.payload_bytes(3))
    assert torch.equal(view, partial_sums.to(dtype))
    assert view.data_ptr() == slot.data_ptr()


@given(
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.integers(1, 100),
    hidden_size=st.integers(1, 300),
    num_columns=st.integers(1, 9),
)
def test_sections_are_aligned_disjoint_and_end_with_the_payload(
    dtype: torch.dtype, num_tokens: int, hidden_size: int, num_columns: int
) -> None:
    layout = A2fLayout(100, hidden_size, num_columns, dtype)
    slot = slot_of(layout.slot_bytes)
    sections = layout._sections(slot, num_tokens)
    end = 0
    for section in sections:
        begin = section.data_ptr() - slot.data_ptr()
        if section.numel():
            assert begin % 64 == 0
            assert begin >= end
            end = begin + section.numel() * section.element_size()
    assert end == layout.payload_bytes(num_tokens) <= layout.slot_bytes


@pytest.mark.parametrize(
    ("num_tokens", "payload_bytes"),
    [(0, 0), (6, 10**6), (2**31, 1), (3, 0), (3, 10**9), (-1, 64)],
)
def test_frame_of_impossible_size_is_refused(num_tokens: int, payload_bytes: int) -> None:
    a2f, f2a = A2fLayout(5, 48, 3, torch.float32), F2aLayout(5, 48, torch.float32)
    with pytest.raises(FrameError, match=f"A frame of {num_tokens} tokens"):
        a2f.read(slot_of(a2f.slot_bytes), num_tokens, payload_bytes)
    with pytest.raises(FrameError):
        f2a.read(slot_of(f2a.slot_bytes), num_tokens, payload_bytes)
    assert issubclass(FrameError, Internal)


def test_ids_that_a_peer_changes_after_they_were_read_do_not_change() -> None:
    layout = A2fLayout(1, 8, 2, torch.float32)
    slot = slot_of(layout.slot_bytes)
    (placement,) = place(
        torch.tensor([[3]], dtype=torch.int32),
        torch.ones(1, 1),
        num_experts=4,
        top_k=1,
        ep_size=1,
    )
    layout.write(slot, torch.ones(1, 8), placement)
    frame = layout.read(slot, 1, layout.payload_bytes(1))
    slot.fill_(0xFF)
    assert frame.expert_ids.tolist() == [[3, 4]]


def test_read_only_memory_can_be_read() -> None:
    layout = F2aLayout(1, 4, torch.float32)
    memory = memoryview(bytes(range(16)))
    assert memory.readonly
    view = layout.read(slot_tensor(memory), 1, 16)
    assert view.view(torch.uint8).tolist() == [list(range(16))]
