// What the BF16 and FP8 prefill kernels share: work items, shared memory, producer warps, epilogue.
// Knows nothing of the KV format: the kernels issue the copies and the matrix products.
//
// With one K and one V head, the 64 query heads of one token fill the rows of a wgmma. A work item
// is two tokens that follow each other in a prompt: consumer w takes the w-th, both read every
// block of K and V from the one ring, and each masks by its own position. Nothing is merged.
#pragma once

#include "attention/mfa_decode.cuh"

constexpr int kItemTokens = 2;

// One row of the list of work. `num_tokens` is 2, or 1 at a chunk's odd end: then consumer 1 goes
// through the motions with a query that does not count.
struct alignas(16) PrefillItem {
  int row;         // of q and out, of the first token
  int num_tokens;  // 1 or 2
  int num_seen;    // tokens that the first one attends to, itself included; the second one more
  int sequence;    // row of the block table

  __device__ __forceinline__ int num_blocks() const {
    return (num_seen + num_tokens - 1 + kBlockTokens - 1) / kBlockTokens;
  }
};

struct PrefillParams {
  const PrefillItem* items;
  const int* num_items;    // i32[1]
  const int* block_table;  // i32[S, block_table_stride]
  int block_table_stride;
  int num_heads;             // <= 64
  float softmax_scale_log2;  // softmax scale (and K scale) times log2(e)
  float output_scale;        // V scale; undoes the scale of P
  uint16_t* out;             // bf16[T, num_heads, 256]
};

// Shared memory, from a 1,024-byte aligned base: both tokens' queries | ring of K, V, K, V … |
// barriers. A buffer is free again when the warps of both consumers have read it.
template <int kQueryBytes_, int kBufferBytes_, int kStages_>
struct PrefillShared {
  static constexpr int kQueryBytes = kQueryBytes_;
  static constexpr int kBufferBytes = kBufferBytes_;
  static constexpr int kStages = kStages_;

  alignas(1024) uint8_t query[kItemTokens][kQueryBytes];
  uint8_t ring[kStages][kBufferBytes];
  uint64_t full[kStages];   // completes when a copy has landed
  uint64_t empty[kStages];  // completes when all warps of both consumers are done
  uint64_t query_full[kItemTokens];
  uint64_t query_empty[kItemTokens];
};

template <class Shared>
__device__ __forceinline__ void prefill_init_barriers(Shared& shared) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kItemTokens; ++i) {
      mbarrier_init(&shared.query_full[i], 1);
      mbarrier_init(&shared.query_empty[i], kWarpgroupThreads / kWarpThreads);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
}

// Items are sorted by falling cost and dealt in turns, every other one backwards: who gets the
// dearest of a turn gets the cheapest of the next, which keeps the CTAs even.
template <class Body>
__device__ __forceinline__ void for_each_item(const PrefillParams& params, Body body) {
  const int num_items = ld_global_cg(params.num_items);
  const int num_ctas = gridDim.x;
  int place = blockIdx.x;
  for (int turn = 0; turn < num_items; turn += num_ctas, place = num_ctas - 1 - place) {
    if (turn + place >= num_items) break;  // only in the last turn
    const int4 words = ld_global_cg(reinterpret_cast<const int4*>(params.items + turn + place));
    body(PrefillItem{words.x, words.y, words.z, words.w});
  }
}

// Streams K and V of every block of every item through the ring, ahead into the next item.
// `load(block, is_v, destination, barrier)` issues the copy of one buffer. Only lane 0 waits and
// copies: lanes that poll a barrier on their own may fall a phase behind.
template <class Shared, class Load>
__device__ __forceinline__ void prefill_produce_kv(Shared& shared, const PrefillParams& params,
                                                   Load load) {
  const int lane = threadIdx.x % kWarpThreads;
  RingCursor<Shared::kStages> cursor;
  for_each_item(params, [&](const PrefillItem& item) {
    const int* table =
        params.block_table + static_cast<int64_t>(item.sequence) * params.block_table_stride;
    const int num_blocks = item.num_blocks();
    int lane_block = 0;
    for (int b = 0; b < num_blocks; ++b) {
      const int index = b % kWarpThreads;
      if (index == 0) lane_block = b + lane < num_blocks ? ld_global_cg(table + b + lane) : 0;
      const int block = __shfl_sync(kFullWarp, lane_block, index);
#pragma unroll
      for (int is_v = 0; is_v < 2; ++is_v) {
        if (lane == 0) {
          uint64_t* full = &shared.full[cursor.stage];
          mbarrier_wait(&shared.empty[cursor.stage], cursor.parity ^ 1);
          mbarrier_arrive_expect_tx(full, Shared::kBufferBytes);
          load(block, is_v, shared.ring[cursor.stage], full);
        }
        cursor.advance();
      }
    }
  });
}

// Loads the queries of every item; a warp of its own, so that waiting for a query buffer never holds
// back the KV stream. Past the last row, and for a second token that is not there, what arrives does
// not count.
template <class Shared, class Load>
__device__ __forceinline__ void prefill_produce_query(Shared& shared, const PrefillParams& params,
                                                      Load load) {
  if (threadIdx.x % kWarpThreads != 0) return;
  uint32_t parity = 0;
  for_each_item(params, [&](const PrefillItem& item) {
#pragma unroll
    for (int i = 0; i < kItemTokens; ++i) {
      mbarrier_wait(&shared.query_empty[i], parity ^ 1);
      mbarrier_arrive_expect_tx(&shared.query_full[i], Shared::kQueryBytes);
      load(item.row + i, shared.query[i], &shared.query_full[i]);
    }
    parity ^= 1;
  });
}

// Normalises one token's accumulators and writes them out.
__device__ __forceinline__ void prefill_store(const PrefillParams& params, int row, MfaRows& rows,
                                              const float (&acc)[kOutputRegs]) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int lane = thread % kWarpThreads;
  const int head = thread / kWarpThreads * 16 + lane / 4;
  uint16_t* out = params.out + static_cast<int64_t>(row) * params.num_heads * kHeadDim;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.sum[r] += __shfl_xor_sync(kFullWarp, rows.sum[r], 1);
    rows.sum[r] += __shfl_xor_sync(kFullWarp, rows.sum[r], 2);
    const float inverse = __fdividef(params.output_scale, rows.sum[r]);  // it sees itself: not 0
    if (head + 8 * r < params.num_heads) {
      uint16_t* target = out + (head + 8 * r) * kHeadDim + 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < kOutputRegs; i += 4) {  // register 4j holds column 8j
        *reinterpret_cast<uint32_t*>(target + 2 * i) =
            cvt_bf16x2(acc[i + 2 * r] * inverse, acc[i + 2 * r + 1] * inverse);
      }
    }
  }
}
