"""Multi-matrix factorization attention over paged KV blocks: many query heads, one K/V head."""

import torch

from step3rt.ops.quantize import to_e4m3

# Bounds the scores that one call holds at a time (64 MiB in float32).
MAX_SCORES = 1 << 24


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
    num_sequences, num_queries, num_heads, head_dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    block_size_tokens = kv.shape[2]
    num_keys = block_table.shape[1] * block_size_tokens

    gathered = _gather_blocks(kv, block_table)  # [S, M, 2, bs, D]
    keys = gathered[:, :, 0].to(wide).reshape(num_sequences, num_keys, head_dim)
    values = gathered[:, :, 1].to(wide).reshape(num_sequences, num_keys, head_dim)
    key_positions = torch.arange(num_keys)
    is_outside = key_positions >= num_context_tokens[:, None]  # [S, keys]
    values = values.masked_fill(is_outside[..., None], 0.0)

    # Query i of a sequence has position num_context_tokens - Q + i.
    last_visible = num_context_tokens[:, None] - num_queries + torch.arange(num_queries)  # [S, Q]
    is_hidden = key_positions > last_visible[..., None]  # [S, Q, keys]

    queries = q.to(wide) * head_dim**-0.5
    output = torch.empty_like(q)
    step = max(1, MAX_SCORES // (num_sequences * num_heads * num_keys))
    for first in range(0, num_queries, step):
        part = slice(first, first + step)
        # All heads share K, so that heads and queries together are the rows of one product.
        rows = queries[:, part].flatten(1, 2)  # [S, Q * N, D]
        scores = torch.matmul(rows, keys.transpose(1, 2))
        scores = scores.view(num_sequences, -1, num_heads, num_keys)  # [S, Q, N, keys]
        scores.masked_fill_(is_hidden[:, part, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1).flatten(1, 2)
        attended = torch.matmul(weights, values)
        output[:, part] = attended.view(num_sequences, -1, num_heads, head_dim).to(q.dtype)
    return output


def _gather_blocks(kv: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    if kv.dtype == torch.float8_e4m3fn:
        return kv.view(torch.uint8)[block_table].view(torch.float8_e4m3fn)
    return kv[block_table]
