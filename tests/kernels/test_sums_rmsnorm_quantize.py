"""The residual add of what FFN ranks sent back: torch on a CPU, the kernel on a GPU."""

import pytest
import torch

from step3rt.ops.rmsnorm_quantize import (
    HIDDEN_SIZE,
    NormOutputs,
    QuantizedRows,
    reference_add_rmsnorm_quantize,
)
from step3rt.ops.sums_rmsnorm_quantize import (
    add_sums_rmsnorm_quantize,
    reference_add_sums_rmsnorm_quantize,
)

EPS = 1e-5
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PLACES = [
    pytest.param("cpu", 256),
    pytest.param("cuda", HIDDEN_SIZE, marks=ON_GPU),
    pytest.param("cuda", 256, marks=ON_GPU),
]


class Case:
    """Residual rows and sums in slots of 11 rows; what is not present is NaN."""

    def __init__(self, device: str, width: int, num_tokens: int, num_ranks: int) -> None:
        generator = torch.Generator().manual_seed(num_tokens * 33 + num_ranks)

        def bf16(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).bfloat16().to(device)

        self.residual, self.weight = bf16(num_tokens, width), bf16(width)
        masks = torch.randint(0, 2, (num_ranks, 11), generator=generator, dtype=torch.int32)
        masks[:, 1::5] = 0  # nobody
        masks[:, 2::5] = 1  # everybody
        places = torch.arange(num_ranks, dtype=torch.int32)[:, None]
        self.present = (masks << places).sum(dim=0, dtype=torch.int32).to(device)
        self.sums = bf16(num_ranks, 11, width)
        self.sums[(masks == 0).to(device)] = float("nan")
        self.masks = masks.bool()
        self.out = NormOutputs(
            torch.empty_like(self.residual),
            torch.empty_like(self.residual),
            QuantizedRows.empty(num_tokens, width, self.residual.device),
        )

    def run(self) -> None:
        add_sums_rmsnorm_quantize(
            self.residual, self.sums, self.present, self.weight, self.out, EPS
        )


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 32])
@pytest.mark.parametrize("num_tokens", [1, 6, 11])
@pytest.mark.parametrize(("device", "width"), PLACES)
def test_only_the_sums_that_are_present_are_added(
    device: str, width: int, num_tokens: int, num_ranks: int
) -> None:
    case = Case(device, width, num_tokens, num_ranks)
    case.run()
    for row in range(num_tokens):
        parts = case.sums[case.masks[:, row], row][:, None]
        added, normed, _ = reference_add_rmsnorm_quantize(
            case.residual[row : row + 1], parts, case.weight, EPS
        )
        assert torch.equal(case.out.residual[row : row + 1], added)
        got = case.out.normed[row].float()
        assert float((got - normed[0].float()).norm()) <= 1e-2 * float(normed.float().norm())
    _, _, rows = reference_add_sums_rmsnorm_quantize(
        case.residual, case.sums, case.present, case.weight, EPS
    )
    got_rows, got_scales = case.out.quantized.values.float(), case.out.quantized.scales
    difference = (got_rows * got_scales.repeat_interleave(128, dim=1)) - (
        rows.values.float() * rows.scales.repeat_interleave(128, dim=1)
    )
    assert float(difference.norm()) <= 2e-2 * float(case.out.normed.float().norm())


@pytest.mark.parametrize(("device", "width"), PLACES)
def test_the_residual_may_be_added_to_in_place(device: str, width: int) -> None:
    case = Case(device, width, 5, 3)
    case.run()
    residual = case.residual.clone()
    out = NormOutputs(residual=residual)
    add_sums_rmsnorm_quantize(residual, case.sums, case.present, case.weight, out, EPS)
    assert torch.equal(residual, case.out.residual)


@pytest.mark.parametrize(("device", "width"), PLACES)
def test_arguments_that_do_not_fit_are_refused(device: str, width: int) -> None:
    case = Case(device, width, 5, 3)
    with pytest.raises(ValueError, match="`present` has shape"):
        add_sums_rmsnorm_quantize(
            case.residual, case.sums, case.present[:5], case.weight, case.out, EPS
        )
    with pytest.raises(ValueError, match="`sums` has strides"):
        add_sums_rmsnorm_quantize(
            case.residual, case.sums[:, :6], case.present[:6], case.weight, case.out, EPS
        )
    with pytest.raises(ValueError, match="0 tokens"):
        add_sums_rmsnorm_quantize(
            case.residual[:0], case.sums, case.present, case.weight, NormOutputs(), EPS
        )
    wrong = NormOutputs(normed=torch.empty_like(case.residual[:4]))
    with pytest.raises(ValueError, match="`normed` has shape"):
        add_sums_rmsnorm_quantize(case.residual, case.sums, case.present, case.weight, wrong, EPS)
