// What a math warpgroup of sm90_fp8_linear reads: the stages of the ring and their scales. Computes
// nothing.
#pragma once

#include "common/barrier.cuh"
#include "common/cluster.cuh"
#include "gemm/linear_layout.cuh"

// Of one block of K: for the two rows of this thread, the first and the second scale block.
struct Scales {
  float first[2];
  float second[2];
};

// `row`: this thread's first one in the tile, of its row block.
__device__ __forceinline__ Scales load_scales(const Shared& shared, int stage, int row) {
  Scales scales;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    scales.first[h] = shared.scale[stage][0][row + 8 * h];
    scales.second[h] = kMayStraddle ? shared.scale[stage][kScaleBlocks - 1][row + 8 * h] : 0.0f;
  }
  return scales;
}

__device__ __forceinline__ void acquire(uint64_t* barrier, uint32_t parity) {
  mbarrier_wait(barrier, parity);
  __syncwarp();
}

// One arrival per warp at every CTA whose copies land in this stage. Those of the last pass through the
// ring have nobody waiting, and their CTA may be gone: `is_awaited` is false.
__device__ __forceinline__ void release(uint64_t* barrier, const Work& work, bool is_awaited) {
  __syncwarp();
  const int lane = threadIdx.x % kWarpThreads;
  if (!is_awaited) return;
  if (kWarpArrivals > 1 || lane == 0) mbarrier_arrive(barrier);
  if constexpr (kPeers > 1) {
    // Lane c stands for CTA c of those that share x, lane kCast + s for CTA s of those that share w.
    const bool is_cast = lane < kCast && lane != work.cast;
    const bool is_share = lane >= kCast && lane < kCast + kShare && lane - kCast != work.share;
    if (is_cast || is_share) {
      mbarrier_arrive_relaxed_cluster(barrier,
                                      is_cast ? Work::rank(work.split, lane, work.share)
                                              : Work::rank(work.split, work.cast, lane - kCast));
    }
  }
}

// The consuming side of the ring.
struct MathRing {
  Shared& shared;
  const Work& work;
  int group;  // of the warpgroup that consumes
  int row;    // of the thread, in the tile: its first
  RingCursor<kStages> cursor;
  int remaining;

  __device__ __forceinline__ void release_stage() {
    release(&shared.empty[cursor.stage], work, remaining > kStages);
    cursor.advance();
    --remaining;
  }
};
