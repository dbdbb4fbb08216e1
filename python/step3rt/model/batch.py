"""Owns the tensors that describe one step's tokens; knows nothing of requests or sampling."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from step3rt.model.config import Step3Config
from step3rt.ops.rotary import rotary_tables


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence, whose earlier tokens are in the KV cache.

    block_ids is the sequence's whole block table, reaching at least to the last of the tokens.
    logit_offsets names the tokens whose next-token logits are wanted, as offsets in the chunk.
    """

    token_ids: Sequence[int]
    first_position: int
    block_ids: Sequence[int]
    logit_offsets: Sequence[int]


@dataclass(frozen=True, slots=True)
class ChunkGroup:
    """Chunks of equal length and similar context, attended to in one call.

    rows: i64[S, Q], of the batch. block_table: i64[S, M]. num_context_tokens: i64[S].
    """

    rows: torch.Tensor
    block_table: torch.Tensor
    num_context_tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of one step and lane.

    token_ids: i64[T]. slot_mapping: i64[T]. cos, sin: float[T, D/2]. groups partition the rows.
    logit_rows: i64[R].
    """

    token_ids: torch.Tensor
    slot_mapping: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    groups: tuple[ChunkGroup, ...]
    logit_rows: torch.Tensor

    @classmethod
    def build(
        cls,
        chunks: Sequence[Chunk],
        config: Step3Config,
        block_size_tokens: int,
        dtype: torch.dtype,
    ) -> "Batch":
        """Lays the chunks out one after the other; `dtype` is the compute dtype."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        groups: dict[tuple[int, int], list[tuple[int, Chunk]]] = {}
        for chunk in chunks:
            first_row, length = len(token_ids), len(chunk.token_ids)
            end = chunk.first_position + length
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.first_position, end))
            for position in range(chunk.first_position, end):
                block, offset = divmod(position, block_size_tokens)
                slots.append(chunk.block_ids[block] * block_size_tokens + offset)
            logit_rows.extend(first_row + offset for offset in chunk.logit_offsets)
            # Within a power of two of context blocks: padding never more than doubles the work.
            num_blocks = -(-end // block_size_tokens)
            groups.setdefault((length, num_blocks.bit_length()), []).append((first_row, chunk))
        cos, sin = rotary_tables(torch.tensor(positions), config.head_dim, config.rope_theta)
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            token_ids=torch.tensor(token_ids),
            slot_mapping=torch.tensor(slots),
            cos=cos.to(wide),
            sin=sin.to(wide),
            groups=tuple(
                _group(members, length, block_size_tokens)
                for (length, _), members in groups.items()
            ),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        )


def _group(members: list[tuple[int, Chunk]], length: int, block_size_tokens: int) -> ChunkGroup:
    ends = [chunk.first_position + length for _, chunk in members]
    counts = [-(-end // block_size_tokens) for end in ends]
    width = max(counts)
    # What pads a row is any valid block: attention ignores what lies past the context.
    table = [
        [*chunk.block_ids[:count], *[chunk.block_ids[0]] * (width - count)]
        for (_, chunk), count in zip(members, counts, strict=True)
    ]
    first_rows = torch.tensor([first_row for first_row, _ in members])
    return ChunkGroup(
        rows=first_rows[:, None] + torch.arange(length),
        block_table=torch.tensor(table),
        num_context_tokens=torch.tensor(ends),
    )
