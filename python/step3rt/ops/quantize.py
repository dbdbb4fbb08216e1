"""FP8 e4m3: 128x128 blocks of weights, 1x128 groups of activations, plain casts of K and V."""

import functools

import torch

# Largest finite e4m3 value.
E4M3_MAX = 448.0
# Width of an activation group, as in the published FP8 checkpoint (`activation_scheme: dynamic`).
GROUP_SIZE = 128


def num_groups(width: int) -> int:
    """Number of 1x128 groups that cover a row of `width` values; the last may be ragged."""
    return -(-width // GROUP_SIZE)


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises each row in groups of 128 values with one scale each, amax / 448.

    Args:
        x: float[T, H].

    Returns:
        e4m3[T, H] and scales f32[T, ceil(H / 128)]; value = e4m3 * scale. A group of zeros has
        scale 1; a group with a value that is not finite comes back as NaN.
    """
    groups = _split_groups(x.float())
    amax = groups.abs().amax(dim=-1)
    scales = torch.where(amax == 0, 1.0, amax / E4M3_MAX)
    # Clamped because x / (amax / 448) may round to just above 448.
    scaled = (groups / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    values = scaled.flatten(-2)[:, : x.shape[1]].to(torch.float8_e4m3fn)
    return values, scales


def dequantize_groups(
    values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Inverse of `quantize_groups`.

    Args:
        values: e4m3[T, H].
        scales: f32[T, ceil(H / 128)].
        dtype: of the result.

    Returns:
        dtype[T, H].
    """
    groups = _split_groups(widen(values, torch.float32)) * scales[..., None]
    return groups.flatten(-2)[:, : values.shape[1]].to(dtype)


def dequantize_blocks(
    values: torch.Tensor,
    scale_inv: torch.Tensor,
    block_size: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiplies each block of a weight with its scale, in float32 at least.

    Args:
        values: e4m3[N, K].
        scale_inv: float[ceil(N / block rows), ceil(K / block columns)]; the last blocks may be
            ragged.
        block_size: rows and columns of a block.
        dtype: of the result.

    Returns:
        dtype[N, K].
    """
    rows, columns = values.shape
    wide = torch.promote_types(dtype, torch.float32)
    scales = scale_inv.to(wide)
    if rows % block_size[0] == 0 and columns % block_size[1] == 0:
        blocks = widen(values, wide).view(-1, block_size[0], scales.shape[1], block_size[1])
        return (blocks * scales[:, None, :, None]).view(rows, columns).to(dtype)
    scales = scales.repeat_interleave(block_size[0], dim=0)[:rows]
    scales = scales.repeat_interleave(block_size[1], dim=1)[:, :columns]
    return (widen(values, wide) * scales).to(dtype)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Casts to e4m3 with scale 1, saturating at ±448; NaN stays NaN."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _split_groups(x: torch.Tensor) -> torch.Tensor:
    """[T, H] -> [T, ceil(H / 128), 128], the last group filled up with zeros."""
    num_tokens, width = x.shape
    filled = torch.nn.functional.pad(x, (0, -width % GROUP_SIZE))
    return filled.view(num_tokens, num_groups(width), GROUP_SIZE)


def widen(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the same numbers in a wider dtype; on the CPU faster than torch's conversion."""
    if values.device.type != "cpu" or values.dtype != torch.float8_e4m3fn:
        return values.to(dtype)
    codes = values.contiguous().view(torch.uint8).flatten().int()
    return _e4m3_numbers(dtype).index_select(0, codes).view(values.shape)


@functools.cache
def _e4m3_numbers(dtype: torch.dtype) -> torch.Tensor:
    """What each of the 256 codes stands for."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
