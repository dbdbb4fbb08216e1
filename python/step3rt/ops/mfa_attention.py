"""Multi-matrix factorization attention over paged KV blocks: many query heads, one K/V head."""

import torch

from step3rt.ops.quantize import to_e4m3

# Bounds the scores that are held at a time (8 MiB in float32), and the blocks of K and V (4 MiB for
# 64 tokens of 128 dims in float32). Larger buffers are mapped anew by the allocator each time.
MAX_SCORES = 1 << 21
MAX_BLOCKS = 64


def append_kv(
    kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Writes the K and V of T tokens into their slots, in the cache's dtype.

    A block holds its K rows, then its V rows:

        row of the flat view   block * 2 * bs + offset        K
                               block * 2 * bs + bs + offset   V

    Args:
        kv: [B, 2, bs, D], one layer of the cache, contiguous; e4m3 is written with scale 1.
        k: float[T, D].
        v: float[T, D].
        slot_mapping: i64[T], block * bs + offset, no two equal.
    """
    block_size_tokens, head_dim = kv.shape[2], kv.shape[3]
    rows = slot_mapping + slot_mapping.div(block_size_tokens, rounding_mode="floor").mul(
        block_size_tokens
    )
    flat = kv.view(-1, head_dim)
    if kv.dtype == torch.float8_e4m3fn:
        # Indexed writes know no FP8; the bytes are the same.
        flat = flat.view(torch.uint8)
        k, v = to_e4m3(k).view(torch.uint8), to_e4m3(v).view(torch.uint8)
    flat[rows] = k.to(flat.dtype)
    flat[rows + block_size_tokens] = v.to(flat.dtype)


def paged_mfa_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    num_context_tokens: torch.Tensor,
) -> torch.Tensor:
    """Attends causally from the last Q tokens of each of S sequences to all of its tokens.

    Decode is Q = 1, a prefill chunk is S = 1 in most cases; both are this one function. Scores and
    softmax are computed in the dtype of `q`, float32 at least. What lies in a block beyond a
    sequence's end has no influence, not even a NaN.

    Args:
        q: float[S, Q, N, D], rotated.
        kv: [B, 2, bs, D], one layer of the cache; the Q tokens are in it already.
        block_table: i64[S, M]; entries past a sequence's last block are any valid block.
        num_context_tokens: i64[S], tokens of each sequence up to and including the Q-th query.

    Returns:
        Same shape and dtype as q.
    """
    num_sequences = q.shape[0]
    num_blocks = block_table.shape[1]
    output = torch.empty_like(q)
    # Few sequences at a time, so that their K, V and scores stay in the caches.
    step = max(1, MAX_BLOCKS // num_blocks)
    for first in range(0, num_sequences, step):
        part = slice(first, first + step)
        output[part] = _attend(q[part], kv, block_table[part], num_context_tokens[part])
    return output


def _attend(
    q: torch.Tensor, kv: torch.Tensor, block_table: torch.Tensor, num_context_tokens: torch.Tensor
) -> torch.Tensor:
    num_sequences, num_queries, num_heads, head_dim = q.shape
    num_blocks, block_size_tokens = block_table.shape[1], kv.shape[2]
    num_keys = num_blocks * block_size_tokens
    wide = torch.promote_types(q.dtype, torch.float32)

    gathered = _gather_blocks(kv, block_table.flatten()).to(wide)  # [S * M, 2, bs, D]
    key_positions = torch.arange(num_keys)
    is_outside = key_positions >= num_context_tokens[:, None]  # [S, keys]
    # A weight of 0 times NaN is NaN: the V rows past the end are cleared as well.
    block, offset = is_outside.view(-1, block_size_tokens).nonzero(as_tuple=True)
    gathered[block, 1, offset] = 0.0
    keys, values = gathered[:, 0], gathered[:, 1]  # [S * M, bs, D]

    # Query i of a sequence has position num_context_tokens - Q + i.
    last_visible = num_context_tokens[:, None] - num_queries + torch.arange(num_queries)  # [S, Q]
    is_hidden = key_positions > last_visible[..., None]  # [S, Q, keys]

    queries = q.to(wide) * head_dim**-0.5
    output = torch.empty_like(q)
    step = max(1, MAX_SCORES // (num_sequences * num_heads * num_keys))
    for first in range(0, num_queries, step):
        part = slice(first, first + step)
        # All heads share K, so that queries and heads together are the rows of one product.
        rows = queries[:, part].flatten(1, 2)  # [S, Q * N, D]
        num_rows = rows.shape[1]
        rows = rows[:, None].expand(-1, num_blocks, -1, -1).flatten(0, 1)  # [S * M, Q * N, D]
        scores = torch.bmm(rows, keys.transpose(1, 2))  # [S * M, Q * N, bs]
        scores = scores.view(num_sequences, num_blocks, num_rows, block_size_tokens)
        scores = scores.transpose(1, 2).reshape(num_sequences, -1, num_heads, num_keys)
        scores.masked_fill_(is_hidden[:, part, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        weights = weights.view(num_sequences, num_rows, num_blocks, block_size_tokens)
        weights = weights.transpose(1, 2).flatten(0, 1)  # [S * M, Q * N, bs]
        attended = torch.bmm(weights, values).view(num_sequences, num_blocks, num_rows, head_dim)
        attended = attended.sum(dim=1).view(num_sequences, -1, num_heads, head_dim)
        output[:, part] = attended.to(q.dtype)
    return output


def _gather_blocks(kv: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    if kv.dtype == torch.float8_e4m3fn:
        return kv.view(torch.uint8)[block_ids].view(torch.float8_e4m3fn)
    return kv[block_ids]
