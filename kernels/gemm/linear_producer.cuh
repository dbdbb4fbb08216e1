// The producer warpgroup of sm90_fp8_linear: one warp copies x and w through the ring, three bring
// the scales. Multiplies nothing but the two scales of a row and block.
#pragma once

#include "common/barrier.cuh"
#include "common/cluster.cuh"
#include "common/ptx.cuh"
#include "common/tma.cuh"
#include "gemm/linear_layout.cuh"

struct Producer {
  Shared& shared;
  const TensorMap* x_map;
  const TensorMap* w_map;
  const Work& work;
  uint64_t w_policy;

  // A box of a map to a stage of this CTA, or of all `kReceivers` of them whose bits are in `ctas`.
  template <int kReceivers>
  static __device__ __forceinline__ void copy(uint8_t* destination, const TensorMap* map,
                                              uint64_t* full, int column, int row, uint16_t ctas,
                                              uint64_t policy) {
    if constexpr (kReceivers == 1) {
      cp_async_bulk_tensor_2d(destination, map, full, column, row, policy);
    } else {
      cp_async_bulk_tensor_2d_multicast(destination, map, full, column, row, ctas, policy);
    }
  }

  // This CTA's part of the weights, for all CTAs that share them.
  __device__ __forceinline__ void load_w(int stage, int i) const {
    constexpr int kRows = kTileN / kShare;
    uint64_t* full = &shared.full[stage];
    mbarrier_arrive_expect_tx(full, (kTileM + kTileN) * kBlockK);
    copy<kShare>(shared.ring.w[stage] + work.share * kRows * kBlockK, w_map, full,
                 (work.first_block + i) * kBlockK, work.first_output + work.share * kRows,
                 work.share_ctas(), w_policy);
  }

  // This CTA's part of the rows, for all CTAs that share them.
  __device__ __forceinline__ void load_x(int stage, int i) const {
    constexpr int kRows = kTileM / kCast;
    copy<kCast>(shared.ring.x[stage] + work.cast * kRows * kBlockK, x_map, &shared.full[stage],
                (work.first_block + i) * kBlockK, work.first_token + work.cast * kRows,
                work.cast_ctas(), kEvictLast);
  }

  // Weights that need no wait: the first pass through the ring.
  __device__ __forceinline__ void start() const {
    for (int i = 0; i < kStages && i < work.num_blocks; ++i) load_w(i, i);
  }

  __device__ __forceinline__ void run() const {
    griddepcontrol_wait();
    for (int i = 0; i < kStages && i < work.num_blocks; ++i) load_x(i, i);
    RingCursor<kStages> cursor;
    for (int i = kStages; i < work.num_blocks; ++i) {
      mbarrier_wait(&shared.empty[cursor.stage], cursor.parity);
      load_w(cursor.stage, i);
      load_x(cursor.stage, i);
      cursor.advance();
    }
  }
};

// One of the warps that bring the scales of every third block of K, several blocks ahead.
__device__ __forceinline__ void produce_scales(Shared& shared, const LinearParams& params,
                                               const Work& work, int warp) {
  constexpr int kRows = 4;  // of a lane at a time: this warpgroup has few registers
  const int lane = threadIdx.x % kWarpThreads;
  const float* w_scale = params.w_scale + work.first_output / kBlockN * params.num_blocks;
  const bool straddles = kMayStraddle && work.first_scale_columns() < kTileN;
  griddepcontrol_wait();
  for (int i = warp; i < work.num_blocks; i += kScaleWarps) {
    const int block = work.first_block + i;
    const int stage = i % kStages;
    float w[kScaleBlocks];
    w[0] = w_scale[block];
    if constexpr (kMayStraddle) w[1] = straddles ? w_scale[params.num_blocks + block] : 0.0f;
#pragma unroll 1
    for (int row = lane; row < kTileM; row += kRows * kWarpThreads) {
      float x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // Rows past the last token get that one's scale: their sums are not stored.
        const int t = min(work.first_token + row + r * kWarpThreads, params.num_tokens - 1);
        x[r] = ld_global_cg(params.x_scale + t * params.num_blocks + block);
      }
      if (i >= kStages) mbarrier_wait(&shared.empty[stage], (i / kStages - 1) & 1);
      __syncwarp();
#pragma unroll
      for (int s = 0; s < kScaleBlocks; ++s) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (kTileM % (kRows * kWarpThreads) == 0 || row + r * kWarpThreads < kTileM) {
            shared.scale[stage][s][row + r * kWarpThreads] = x[r] * w[s];
          }
        }
      }
    }
    __syncwarp();
    if (kWarpArrivals > 1 || lane == 0) mbarrier_arrive(&shared.full[stage]);
  }
}
