import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from step3rt.ops.rmsnorm_quantize import HIDDEN_SIZE  # noqa: E402
from step3rt.ops.router import route  # noqa: E402
from step3rt.ops.router_topk import MAX_EXPERTS, TOP_K, route_topk  # noqa: E402
from tests.kernels.mfa_inputs import DEVICE  # noqa: E402

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def run(hidden: torch.Tensor, gate: torch.Tensor, *, is_normalised: bool = False) -> Routed:
    """Ids, weights and logits, from poisoned outputs."""
    num_tokens = hidden.shape[0]
    ids = torch.full((num_tokens, TOP_K), -7, dtype=torch.int32, device=DEVICE)
    weights = torch.full((num_tokens, TOP_K), float("nan"), device=DEVICE)
    logits = torch.full(
        (num_tokens, gate.shape[0]), float("nan"), dtype=torch.bfloat16, device=DEVICE
    )
    route_topk(hidden, gate, (ids, weights), is_normalised=is_normalised, logits=logits)
    return ids, weights, logits


def random_inputs(num_tokens: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(num_tokens, HIDDEN_SIZE, device=DEVICE)
    gate = torch.randn(MAX_EXPERTS, HIDDEN_SIZE, device=DEVICE) * spread / HIDDEN_SIZE**0.5
    return hidden.bfloat16(), gate.bfloat16()


def assert_routed_as_reference(routed: Routed, *, is_normalised: bool = False) -> None:
    """The choice is exactly that of the reference for the kernel's own logits."""
    ids, weights, logits = (tensor.cpu() for tensor in routed)
    want_ids, want_weights = route(logits.float(), TOP_K, is_normalised=is_normalised)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, rtol=2e-6, atol=1e-38)


@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 255, 256, 257, 2048])
def test_logits_are_rounded_once_and_the_best_experts_follow(
    num_tokens: int, is_normalised: bool
) -> None:
    hidden, gate = random_inputs(num_tokens, spread=3.0)
    routed = run(hidden, gate, is_normalised=is_normalised)
    exact = hidden.double() @ gate.double().T
    # Half a bf16 step, and fp32 sums of terms that may cancel.
    terms = hidden.double().abs() @ gate.double().abs().T
    bound = exact.abs() * 2**-8 + terms * 2**-20
    assert bool(((routed[2].double() - exact).abs() <= bound).all())
    assert_routed_as_reference(routed, is_normalised=is_normalised)


@pytest.mark.parametrize("num_experts", [3, 6, 31, 32, 33, 47])
def test_fewer_experts_are_chosen_among_themselves(num_experts: int) -> None:
    hidden, gate = random_inputs(40, spread=3.0)
    _, _, every_logit = run(hidden, gate)
    routed = run(hidden, gate[:num_experts].contiguous())
    assert torch.equal(routed[2], every_logit[:, :num_experts])
    assert_routed_as_reference(routed)


def test_equal_experts_go_to_the_lower_id() -> None:
    hidden, gate = random_inputs(64)
    gate[:] = gate[7]
    ids, weights, _ = routed = run(hidden, gate)
    assert ids.tolist() == [[0, 1, 2]] * 64
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / MAX_EXPERTS))
    assert_routed_as_reference(routed)
    gate[:40] = random_inputs(1)[1][:40]  # ties across the two halves of a warp's experts
    gate[20] = gate[45]
    gate[30] = gate[46]
    assert_routed_as_reference(run(hidden, gate))


def test_experts_whose_probability_vanishes_go_to_the_lower_id() -> None:
    hidden, gate = random_inputs(16)
    gate.zero_()
    gate[44] = hidden[0] / 8  # logit near 900: all others are exactly 0 after the softmax
    gate[9] = -hidden[0] / 8
    ids, weights, _ = run(hidden[:1], gate)
    assert ids.tolist() == [[44, 0, 1]]
    assert weights.tolist() == [[1.0, 0.0, 0.0]]


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    hidden, gate = random_inputs(300)
    together = run(hidden, gate)
    for token in (0, 17, 255, 299):
        alone = run(hidden[token : token + 1].contiguous(), gate)
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_of_them[token])


def test_a_corrupt_row_gives_nan_weights_and_spoils_no_other() -> None:
    hidden, gate = random_inputs(40)
    clean = run(hidden, gate)
    hidden[11, 5000] = float("nan")
    ids, weights, _ = run(hidden, gate)
    assert bool(weights[11].isnan().all())
    assert bool(((ids >= 0) & (ids < MAX_EXPERTS)).all())
    others = torch.arange(40, device=DEVICE) != 11
    assert torch.equal(weights[others], clean[1][others])
    assert torch.equal(ids[others], clean[0][others])


def test_arguments_that_do_not_fit_are_refused() -> None:
    hidden, gate = random_inputs(2)
    topk = (
        torch.empty(2, TOP_K, dtype=torch.int32, device=DEVICE),
        torch.empty(2, TOP_K, device=DEVICE),
    )
    with pytest.raises(ValueError, match="gate"):
        route_topk(hidden, gate[:2], topk, is_normalised=False)
    with pytest.raises(ValueError, match="0 tokens"):
        route_topk(hidden[:0], gate, topk, is_normalised=False)
