from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS, reference_mfa_schedule

LENGTHS = st.lists(st.integers(0, 65536), min_size=1, max_size=300)


def blocks_of(length: int) -> int:
    return -(-length // BLOCK_SIZE_TOKENS)


def parts_of(row: tuple[int, ...], seq_lens: list[int]) -> list[tuple[int, int, int]]:
    """(sequence, first block, end block) of a CTA, as the kernels walk its row."""
    first, first_block, last, last_block = row[:4]
    parts = []
    for sequence in range(first, last + (1 if last_block > 0 else 0)):
        begin = first_block if sequence == first else 0
        end = last_block if sequence == last else blocks_of(seq_lens[sequence])
        parts.append((sequence, begin, end))
    return parts


@given(LENGTHS, st.integers(1, 256))
def test_every_block_of_every_sequence_is_visited_once_in_order(
    seq_lens: list[int], num_ctas: int
) -> None:
    rows = reference_mfa_schedule(seq_lens, num_ctas)
    assert len(rows) == num_ctas
    visited: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        for sequence, begin, end in parts_of(row, seq_lens):
            visited.setdefault(sequence, []).append((begin, end))
    assert sorted(visited) == list(range(len(seq_lens)))  # empty sequences get their zero row
    for sequence, ranges in visited.items():
        assert ranges[0][0] == 0
        assert ranges[-1][1] == blocks_of(seq_lens[sequence])
        for (_, end), (begin, _) in pairwise(ranges):
            assert end == begin
        assert len(ranges) == 1 or all(begin < end for begin, end in ranges)


@given(LENGTHS, st.integers(1, 256))
def test_all_ctas_of_a_split_sequence_agree_on_who_they_are(
    seq_lens: list[int], num_ctas: int
) -> None:
    owners: dict[int, list[int]] = {}
    claims: dict[int, set[tuple[int, int]]] = {}
    for cta, row in enumerate(reference_mfa_schedule(seq_lens, num_ctas)):
        for sequence, begin, end in parts_of(row, seq_lens):
            owners.setdefault(sequence, []).append(cta)
            if begin > 0:
                claims.setdefault(sequence, set()).add(row[4:6])
            elif end < blocks_of(seq_lens[sequence]):
                claims.setdefault(sequence, set()).add(row[6:8])
    for sequence, ctas in owners.items():
        expected = {(ctas[0], len(ctas))} if len(ctas) > 1 else set()
        assert claims.get(sequence, set()) == expected
        assert ctas == list(range(ctas[0], ctas[0] + len(ctas)))
        assert len(ctas) <= 66  # bounds the work of the combining CTA


@given(LENGTHS, st.integers(1, 256))
def test_no_cta_gets_much_more_than_its_share(seq_lens: list[int], num_ctas: int) -> None:
    rows = reference_mfa_schedule(seq_lens, num_ctas)
    loads = [sum(end - begin + 2 for _, begin, end in parts_of(row, seq_lens)) for row in rows]
    total = sum(blocks_of(length) + 2 for length in seq_lens)
    longest = max(blocks_of(length) for length in seq_lens) + 2
    share = max(total / num_ctas, longest / 64, 6)
    assert max(loads) <= 1.2 * share * 2 + 4 or num_ctas == 1


def test_equal_sequences_that_fill_the_ctas_are_not_split() -> None:
    for num_sequences in (128, 132, 256, 1024):
        for row in reference_mfa_schedule([4096] * num_sequences, 132):
            assert row[1] == 0
            assert row[3] == 0


def test_a_long_sequence_is_split_over_many_ctas() -> None:
    rows = reference_mfa_schedule([65536], 132)
    assert sum(row[:2] != row[2:4] for row in rows) >= 60


def test_equal_sequences_are_split_where_few_ctas_more_would_split_more() -> None:
    for num_sequences, tokens in ((64, 8192), (64, 32768), (192, 4096)):
        for num_ctas in (128, 131, 132):
            rows = reference_mfa_schedule([tokens] * num_sequences, num_ctas)
            assert sum(row[1] > 0 for row in rows) == 64
            assert sum(row[:2] != row[2:4] for row in rows) == 128
