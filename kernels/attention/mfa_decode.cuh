// What the BF16 and FP8 decode kernels share: shared-memory layout, producer warps, online softmax.
// Knows nothing of the KV format: the kernels issue the copies and the matrix products. What
// follows the last block of a part is in mfa_epilogue.cuh.
#pragma once

#include "attention/mfa_work.cuh"
#include "common/barrier.cuh"
#include "common/ptx.cuh"
#include "common/tma.cuh"
#include "common/types.cuh"
#include "fused/quantize.cuh"

constexpr int kHeads = 64;  // rows of one wgmma; fewer query heads are padded by the TMA unit
constexpr int kHeadDim = 256;
constexpr int kThreads = 3 * kWarpgroupThreads;  // producer, consumer 0, consumer 1
constexpr int kConsumerThreads = 2 * kWarpgroupThreads;
constexpr int kConsumerWarps = kConsumerThreads / kWarpThreads;
constexpr int kOutputRegs = kHeads * kHeadDim / kWarpgroupThreads;     // 128 per thread
constexpr int kScoreRegs = kHeads * kBlockTokens / kWarpgroupThreads;  // 32 per thread
constexpr int kProducerRegs = 24;  // 24 * 128 + 240 * 256 = 64,512 of 65,536 registers
constexpr int kConsumerRegs = 240;
constexpr int kMergeRegs = 32;  // accumulators exchanged per warpgroup and round
constexpr int kBarrierConsumers = 1;

// Shared memory, from a 1,024-byte aligned base (the period of the 128-byte swizzle):
//   query or merge | ring of consumer 0 | ring of consumer 1 | stats | barriers
// Block i of the CTA goes to consumer i % 2, as K, then V, in that consumer's own ring. Two rings,
// not one, because a consumer has to see every phase of the barriers that it waits for: copies land
// out of order, and a parity that is two phases behind looks like the one that is awaited.
// The merge at the end of a sequence reuses the query's memory: the next query waits for it.
template <int kQueryBytes_, int kBufferBytes_, int kStages_>
struct MfaShared {
  static constexpr int kQueryBytes = kQueryBytes_;
  static constexpr int kBufferBytes = kBufferBytes_;
  static constexpr int kStages = kStages_;  // of each consumer

  union alignas(1024) {
    uint8_t query[kQueryBytes];
    float4 merge[2][kMergeRegs / 4][kWarpgroupThreads];
  };
  uint8_t ring[2][kStages][kBufferBytes];
  float2 stats[2][kHeads];     // {maximum, sum} of each row, per consumer
  uint64_t full[2][kStages];   // completes when a copy has landed
  uint64_t empty[2][kStages];  // completes when the four warps of the consumer are done
  uint64_t query_full;
  uint64_t query_empty;
  uint64_t consumer_step[2];  // the 128 threads of one consumer meet
  int is_last_arrival;
};

struct MfaParams {
  const MfaWork* schedule;  // [num_ctas]
  const int* seq_lens;      // i32[S]
  const int* block_table;   // i32[S, block_table_stride]
  int block_table_stride;
  int num_heads;             // <= 64
  float softmax_scale_log2;  // softmax scale (and K scale) times log2(e)
  float output_scale;        // V scale; undoes the scale of P
  uint16_t* out;             // bf16[S, num_heads, 256]; null in a build that quantises
  QuantizedRows quantized;   // e4m3[S, num_heads * 256], f32[S, num_heads * 2]; null otherwise
  float* partial_out;        // f32[2 * num_ctas, 64, 256]
  float2* partial_stats;     // f32[2 * num_ctas, 64, 2]: {maximum, sum}
  int* arrivals;             // i32[num_ctas], zero between launches
};

template <class Shared>
__device__ __forceinline__ void mfa_init_barriers(Shared& shared) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * Shared::kStages; ++i) {
      mbarrier_init(&shared.full[0][i], 1);
      mbarrier_init(&shared.empty[0][i], kWarpgroupThreads / kWarpThreads);
    }
    mbarrier_init(&shared.query_full, 1);
    mbarrier_init(&shared.query_empty, kConsumerWarps);
    mbarrier_init(&shared.consumer_step[0], kWarpgroupThreads);
    mbarrier_init(&shared.consumer_step[1], kWarpgroupThreads);
    fence_mbarrier_init();
  }
  __syncthreads();
}

// ---- producer ------------------------------------------------------------------------------

// Whether this CTA's first row may be one token further in the sequence of the row before it. Rows of
// other sequences that look so cost a prefetch; of the rows after the first, all blocks come late.
__device__ __forceinline__ bool mfa_continues_chunk(const MfaRange& range, const int* seq_lens) {
  const int first = range.first_sequence;
  if (first == 0 || !range.contains(first)) return false;
  return ld_global_cg(seq_lens + first) == ld_global_cg(seq_lens + first - 1) + 1;
}

// Streams K and V of every block of every part through the ring. Runs ahead into the next sequence
// while the consumers still finish this one, so that the memory stream has no gap in between.
// `load(block, is_v, destination, barrier)` issues the copy of one buffer.
//
// Only lane 0 waits and copies: lanes that poll a barrier on their own may fall a phase behind.
// Of all KV blocks, the previous kernel of the stream may write only the last one of a sequence
// (the new token); everything before it is fetched while that kernel still runs. Only a row that
// continues a chunk has other tokens of this step before its own, perhaps in an earlier block.
template <class Shared, class Load>
__device__ __forceinline__ void mfa_produce_kv(Shared& shared, const MfaParams& params,
                                               const MfaRange& range, Load load) {
  const int lane = threadIdx.x % kWarpThreads;
  bool has_waited = mfa_continues_chunk(range, params.seq_lens);
  if (has_waited) griddepcontrol_wait();
  int consumer = 0;
  RingCursor<Shared::kStages> cursor;  // of both rings: they take turns
  for (int sequence = range.first_sequence; range.contains(sequence); ++sequence) {
    const int* table =
        params.block_table + static_cast<int64_t>(sequence) * params.block_table_stride;
    // Bounded by the row, not by the sequence, so that the load need not wait for the length.
    const auto load_ids = [&](int first) {
      const bool is_in_row = first + lane < params.block_table_stride;
      return is_in_row ? ld_global_cg(table + first + lane) : 0;
    };
    int lane_block = load_ids(range.first_block_of(sequence));
    const MfaPart part = mfa_part(range, params.seq_lens, sequence);
    const int last_block = (part.num_tokens - 1) / kBlockTokens;
    for (int b = part.block_begin; b < part.block_end; ++b) {
      const int chunk_index = (b - part.block_begin) % kWarpThreads;
      if (chunk_index == 0 && b > part.block_begin) lane_block = load_ids(b);
      const int block = __shfl_sync(kFullWarp, lane_block, chunk_index);
      if (!has_waited && b == last_block) {
        griddepcontrol_wait();
        has_waited = true;
      }
      RingCursor<Shared::kStages> at = cursor;
#pragma unroll
      for (int is_v = 0; is_v < 2; ++is_v) {
        if (lane == 0) {
          uint64_t* full = &shared.full[consumer][at.stage];
          mbarrier_wait(&shared.empty[consumer][at.stage], at.parity ^ 1);
          mbarrier_arrive_expect_tx(full, Shared::kBufferBytes);
          load(block, is_v, shared.ring[consumer][at.stage], full);
        }
        at.advance();
      }
      if (consumer == 1) cursor = at;
      consumer ^= 1;
    }
  }
}

// Loads the queries of each part; a warp of its own, so that waiting for the query buffer never
// holds back the KV stream.
template <class Shared, class Load>
__device__ __forceinline__ void mfa_produce_query(Shared& shared, const MfaRange& range,
                                                  Load load) {
  if (threadIdx.x % kWarpThreads != 0) return;
  griddepcontrol_wait();
  uint32_t parity = 0;
  for (int sequence = range.first_sequence; range.contains(sequence); ++sequence) {
    mbarrier_wait(&shared.query_empty, parity ^ 1);
    mbarrier_arrive_expect_tx(&shared.query_full, Shared::kQueryBytes);
    load(sequence, shared.query, &shared.query_full);
    parity ^= 1;
  }
}

// Waits for a copy. The lanes leave together: none may fall a phase behind.
__device__ __forceinline__ void mfa_acquire(uint64_t* barrier, uint32_t parity) {
  mbarrier_wait(barrier, parity);
  __syncwarp();
}

// One arrival per warp: a warp's own wait only proves that its own rows have been read.
__device__ __forceinline__ void mfa_release(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % kWarpThreads == 0) mbarrier_arrive(barrier);
}

// ---- online softmax ------------------------------------------------------------------------

// State of one consumer thread: its two rows, lane/4 and lane/4 + 8 of its warp's 16.
struct MfaRows {
  float maximum[2];  // of the scaled scores, in log2 units; the same in the 4 lanes of a row
  float sum[2];      // of this lane's share of the weights
};

// Turns scores into weights 2^(score * scale - maximum + log2_weight_scale), in place, and updates
// the running maximum and sum. Returns the factors that rescale what was accumulated before.
// Tokens at `num_valid` and beyond get weight 0. scale > 0.
__device__ __forceinline__ void mfa_softmax(float (&scores)[kScoreRegs], MfaRows& rows,
                                            const float (&scale)[2], float log2_weight_scale,
                                            int num_valid, float (&rescale)[2]) {
  if (num_valid < kBlockTokens) {
    const int first_column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < kScoreRegs; ++i) {
      const int column = 8 * (i / 4) + first_column + i % 2;
      if (column >= num_valid) scores[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = scores[2 * r];
#pragma unroll
    for (int i = 0; i < kScoreRegs; i += 4) {
      top = fmaxf(top, fmaxf(scores[i + 2 * r], scores[i + 2 * r + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
    const float maximum = fmaxf(rows.maximum[r], top * scale[r]);
    rescale[r] = ex2_approx(rows.maximum[r] - maximum);
    rows.maximum[r] = maximum;
    const float offset = log2_weight_scale - maximum;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kScoreRegs; i += 4) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = scores[i + 2 * r + c];
        score = ex2_approx(fmaf(score, scale[r], offset));
        sum += score;
      }
    }
    rows.sum[r] = fmaf(rows.sum[r], rescale[r], sum);
  }
}
