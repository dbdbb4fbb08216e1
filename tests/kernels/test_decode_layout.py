"""Replays how the decode kernels' epilogue moves quantised bytes between the lanes of a row."""

import numpy as np

HEADS, GROUP = 64, 128
PAIRS = 16  # of columns, that a thread has of each of its two rows


def transpose_in_quad(words: np.ndarray) -> np.ndarray:
    """[..., 4 lanes, 4 words]: word i of lane t becomes word t of lane i, by two exchanges."""
    words = words.copy()
    lane = np.arange(4)
    for step in (1, 2):
        is_upper = (lane & step).astype(bool)
        for low in (i for i in range(4) if not i & step):
            high = low + step
            sent = np.where(is_upper, words[..., low], words[..., high])
            received = sent[..., lane ^ step]
            words[..., low] = np.where(is_upper, received, words[..., low])
            words[..., high] = np.where(is_upper, words[..., high], received)
    return words


def test_four_lanes_transpose_their_words() -> None:
    words = np.arange(2 * 16).reshape(2, 4, 4)
    np.testing.assert_array_equal(transpose_in_quad(words), words.swapaxes(1, 2))


def test_every_byte_of_a_group_is_stored_at_its_column() -> None:
    rows = np.arange(HEADS * GROUP, dtype=np.uint32).reshape(HEADS, GROUP) % 251
    out = np.full((HEADS, GROUP), 255, dtype=np.uint32)
    for warp in range(4):
        for g in range(8):
            for r in range(2):
                head = 16 * warp + g + 8 * r
                for first in (0, 8):  # pairs, that is 64 columns a round
                    out[head, 8 * first : 8 * first + 64] = store_round(rows[head], first)
    np.testing.assert_array_equal(out, rows)


def store_round(row: np.ndarray, first: int) -> np.ndarray:
    """The 64 bytes that the lanes of a row store after pairs [first, first + 8)."""
    words = np.zeros((4, 4), dtype=np.uint32)
    for lane in range(4):
        for i in range(4):
            columns = [8 * pair + 2 * lane + c for pair in pair_of(first, i) for c in range(2)]
            words[lane, i] = sum(int(row[column]) << (8 * n) for n, column in enumerate(columns))
    words = transpose_in_quad(words)
    low, high = words & 0xFFFF, words >> 16  # __byte_perm with 0x5410 and 0x7632
    stored = [
        low[:, 0] | low[:, 1] << 16,
        low[:, 2] | low[:, 3] << 16,
        high[:, 0] | high[:, 1] << 16,
        high[:, 2] | high[:, 3] << 16,
    ]
    return np.stack(stored, axis=1).astype("<u4").view(np.uint8).reshape(64).astype(np.uint32)


def pair_of(first: int, word: int) -> tuple[int, int]:
    assert first + 2 * word + 1 < PAIRS
    return first + 2 * word, first + 2 * word + 1
