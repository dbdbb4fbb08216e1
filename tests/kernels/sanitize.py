"""Small decode launches for compute-sanitizer: splits, tails, empty rows, padded heads."""

import torch

from tests.kernels.mfa_inputs import make_bf16_case, make_fp8_case, relative_error


def main() -> None:
    torch.manual_seed(0)
    for num_ctas, num_heads, seq_lens in (
        (3, 64, [700, 0, 65, 64, 900]),
        (4, 5, [1500, 1]),
    ):
        bf16 = make_bf16_case(seq_lens, num_heads=num_heads, num_ctas=num_ctas)
        assert relative_error(bf16.run(), bf16.reference()) < 1e-2
        fp8 = make_fp8_case(seq_lens, num_heads=num_heads, num_ctas=num_ctas)
        assert relative_error(fp8.run(), fp8.reference()) < 5e-2
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
