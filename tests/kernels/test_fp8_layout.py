import numpy as np
import torch

from step3rt.ops.kv_cache import fp8_block_offsets, pack_fp8_blocks, unpack_fp8_blocks

TOKENS, DIMS = 64, 256


def swizzle(address: np.ndarray, span_bytes: int) -> np.ndarray:
    """The hardware's address permutation: 16-byte chunks, xor with the next address bits."""
    chunks = span_bytes // 16
    return address ^ ((address // 128 % chunks) * 16)


def read_k_major(buffer: np.ndarray, rows: int, row_bytes: int, column: int) -> np.ndarray:
    """What wgmma reads as a [rows, 32] operand at byte `column` of rows `row_bytes` apart."""
    row = np.arange(rows)[:, None]
    return buffer[swizzle(row * row_bytes + column + np.arange(32)[None, :], row_bytes)]


def random_block() -> tuple[np.ndarray, np.ndarray]:
    dense = torch.arange(2 * TOKENS * DIMS).remainder(251).to(torch.uint8)
    dense = dense[torch.randperm(dense.numel(), generator=torch.Generator().manual_seed(1))]
    dense = dense.reshape(1, 2, TOKENS, DIMS)
    return dense[0].numpy(), pack_fp8_blocks(dense.view(torch.float8_e4m3fn))[0].numpy()


def test_the_layout_uses_every_byte_once_and_unpacks_to_what_was_packed() -> None:
    offsets = fp8_block_offsets(torch.device("cpu")).flatten()
    assert torch.equal(offsets.sort().values, torch.arange(2 * TOKENS * DIMS))
    dense = torch.randint(0, 256, (3, 2, TOKENS, DIMS), dtype=torch.uint8)
    packed = pack_fp8_blocks(dense.view(torch.float8_e4m3fn))
    assert torch.equal(unpack_fp8_blocks(packed).view(torch.uint8), dense)


def test_keys_are_stored_as_the_score_product_reads_them() -> None:
    dense, block = random_block()
    for step in range(DIMS // 32):
        half = block[step // 4 * 8192 :][:8192]
        operand = read_k_major(half, TOKENS, 128, step % 4 * 32)
        np.testing.assert_array_equal(operand, dense[0][:, 32 * step : 32 * step + 32])


def test_values_are_stored_in_the_order_in_which_a_thread_holds_its_weights() -> None:
    dense, block = random_block()
    weights = np.arange(64 * TOKENS, dtype=np.int64).reshape(64, TOKENS)  # P[head, token]
    total = np.zeros((64, DIMS), dtype=np.int64)
    for step in range(TOKENS // 32):
        a = np.zeros((64, 32), dtype=np.int64)  # the A operand, rebuilt from thread registers
        for thread in range(128):
            warp, g, t = thread // 32, thread % 32 // 4, thread % 4
            accumulator = [
                weights[16 * warp + g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2]
                for i in range(32)
            ]
            for register in range(4):
                first = 16 * step + 8 * (register // 2) + 2 * (register % 2)
                packed = [accumulator[first + i] for i in (0, 1, 4, 5)]
                row = 16 * warp + g + 8 * (register % 2)
                column = 16 * (register // 2) + 4 * t
                a[row, column : column + 4] = packed
        b = read_k_major(block[16384:], DIMS, 64, 32 * step)  # [dim, position]
        total += a @ b.astype(np.int64).T
    np.testing.assert_array_equal(total, weights @ dense[1].astype(np.int64))
