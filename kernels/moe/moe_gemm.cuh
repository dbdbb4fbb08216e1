// What the two grouped GEMMs of a MoE layer share: set-up, the ring's producers and the products of a
// stage. Knows nothing of what becomes of the sums: SwiGLU and stores are the kernels'.
#pragma once

#include "common/barrier.cuh"
#include "common/cluster.cuh"
#include "common/ptx.cuh"
#include "common/tma.cuh"
#include "common/types.cuh"
#include "common/wgmma.cuh"
#include "common/wgmma_e4m3.cuh"
#include "moe/moe_layout.cuh"
#include "moe/moe_walk.cuh"

// ---- set-up ------------------------------------------------------------------------------------

// Barriers, and the group table, after the previous kernel if that is the one that writes it.
template <bool kWaits, class Shared>
__device__ __forceinline__ void moe_set_up(Shared& shared, const MoeGemmParams& params) {
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      mbarrier_init(&shared.full[i], Shared::kProducers);
      mbarrier_init(&shared.empty[i],
                    kWarpArrivals * kClusterCtas * Shared::kConsumers * kWarpgroupWarps);
    }
    fence_mbarrier_init();
  }
  if (kWaits) griddepcontrol_wait();
  if (thread < params.num_groups) {
    const int2 group = make_int2(ld_global_cg(params.groups + 2 * thread),
                                 ld_global_cg(params.groups + 2 * thread + 1));
    shared.groups[thread] = group;
    if (thread == 0) shared.first_half = moe_first_half<Shared>(params, group.y);
  }
  __syncthreads();
  barrier_cluster_relaxed();  // the neighbour's barriers exist from here on
}

// ---- producers ---------------------------------------------------------------------------------

// Both CTAs are done with the stage: a copy may go to either. One barrier for both, because a parity
// tells only neighbouring phases apart. Its next phase needs this CTA's consumers, and they need all
// producer threads, so none of these can be a phase behind. A barrier for the neighbour's consumers
// alone would need just the thread whose copies they share: with the other one late, both CTAs hang.
template <class Shared>
__device__ __forceinline__ void moe_wait_empty(Shared& shared,
                                               const MoeCursor<Shared::kStages>& cursor) {
  mbarrier_wait(&shared.empty[cursor.stage()], cursor.parity() ^ 1);
}

template <class Shared>
__device__ __forceinline__ void moe_produce_weights(Shared& shared, const MoeGemmParams& params,
                                                    int rank) {
  MoeWalk<Shared, false> walk;
  MoeTile tile;
  MoeCursor<Shared::kStages> cursor;
  const int64_t row_bytes = static_cast<int64_t>(params.num_k_blocks) * kBlockK;
  while (walk.next(shared, params, rank, tile)) {
    const int first = tile.n * Shared::kTileWeights;
    const int tile_bytes =
        tile.is_real ? min(Shared::kTileWeights, params.num_weight_rows - first) * kBlockK : 0;
    const uint8_t* source =
        params.weights +
        (static_cast<int64_t>(tile.group) * params.num_weight_rows + first) * row_bytes +
        static_cast<int64_t>(tile.k_begin) * tile_bytes;
    for (int k = tile.k_begin; k < tile.k_end; ++k) {
      uint64_t* full = &shared.full[cursor.stage()];
      uint8_t* destination = shared.weights[cursor.stage()];
      moe_wait_empty(shared, cursor);
      mbarrier_arrive_expect_tx(full, tile_bytes);
      if (tile.shares_weights) {
        const int half = tile_bytes / 2;
        cp_async_bulk_multicast(destination + rank * half, source + rank * half, half, full, 3,
                                kEvictFirst);
      } else if (tile.is_real) {
        cp_async_bulk(destination, source, tile_bytes, full, kEvictFirst);
      }
      source += tile_bytes;
      cursor.advance();
    }
  }
}

template <class Shared>
__device__ __forceinline__ void moe_produce_rows(Shared& shared, const MoeGemmParams& params,
                                                 int rank) {
  MoeWalk<Shared, false> walk;
  MoeTile tile;
  MoeCursor<Shared::kStages> cursor;
  while (walk.next(shared, params, rank, tile)) {
    // Whole swizzle periods: what is past num_rows belongs to the padding of the group.
    const int num_periods = (tile.num_rows + kRowGroup - 1) / kRowGroup;
    const int scale_bytes = num_periods * kRowGroup * 4;
    int first = 0;
    int count = num_periods * kRowGroup;
    const int num_extra = tile.splits_extra ? count - kTileRows : 0;
    count -= num_extra;
    if (!tile.shares_weights) {
      count /= 2;  // of however few: see moe_release
      first = rank * count;
    }
    const int to_extra = tile.first_extra_row() - tile.first_row;
    int64_t at = static_cast<int64_t>(tile.k_begin) * params.row_capacity + tile.first_row;
    for (int k = tile.k_begin; k < tile.k_end; ++k) {
      uint64_t* full = &shared.full[cursor.stage()];
      uint8_t* destination = shared.rows[cursor.stage()] + first * kBlockK;
      const uint8_t* source = params.rows + (at + first) * kBlockK;
      moe_wait_empty(shared, cursor);
      mbarrier_arrive_expect_tx(full, num_periods * kRowGroup * kBlockK + scale_bytes);
      if (tile.shares_weights) {
        cp_async_bulk(destination, source, count * kBlockK, full, kEvictLast);
      } else {
        cp_async_bulk_multicast(destination, source, count * kBlockK, full, 3, kEvictLast);
      }
      cp_async_bulk(shared.row_scales[cursor.stage()], params.row_scales + at,
                    scale_bytes - num_extra * 4, full, kEvictLast);
      if (num_extra > 0) {
        cp_async_bulk(shared.rows[cursor.stage()] + kTileRows * kBlockK,
                      params.rows + (at + to_extra) * kBlockK, num_extra * kBlockK, full,
                      kEvictLast);
        cp_async_bulk(shared.row_scales[cursor.stage()] + kTileRows,
                      params.row_scales + at + to_extra, num_extra * 4, full, kEvictLast);
      }
      at += params.row_capacity;
      cursor.advance();
    }
  }
}

// The scales of weights come with their stage, by a warp of its own, which loads those of 32 stages at
// once: one after the other they would take as long as the weights. The tile's two rows of them start
// at `ScaleRows::first` and `step` later. Consumers have no registers to load them ahead.
template <class ScaleRows, class Shared>
__device__ __forceinline__ void moe_produce_weight_scales(Shared& shared,
                                                          const MoeGemmParams& params, int rank) {
  MoeWalk<Shared, false> walk;
  MoeTile tile;
  MoeCursor<Shared::kStages> cursor;
  const int lane = threadIdx.x % kWarpThreads;
  while (walk.next(shared, params, rank, tile)) {
    const ScaleRows rows(params, tile);
    const float* source = params.weight_scales + rows.first;
    float2 scales = make_float2(0.0f, 0.0f);  // of the stage `lane` after the last load
    for (int k = tile.k_begin; k < tile.k_end; ++k) {
      const int at = (k - tile.k_begin) % kWarpThreads;
      if (at == 0 && tile.is_real && k + lane < tile.k_end) {
        scales = make_float2(source[k + lane], source[rows.step + k + lane]);
      }
      const float2 of_stage =
          make_float2(__shfl_sync(kFullWarp, scales.x, at), __shfl_sync(kFullWarp, scales.y, at));
      moe_wait_empty(shared, cursor);
      if (lane == 0) {
        shared.weight_scales[cursor.stage()] = of_stage;
        mbarrier_arrive(&shared.full[cursor.stage()]);
      }
      __syncwarp();
      cursor.advance();
    }
  }
}

// ---- consumers ---------------------------------------------------------------------------------

// Waits for a stage. The lanes leave together: none may fall a phase behind.
template <class Shared>
__device__ __forceinline__ void moe_acquire(Shared& shared,
                                            const MoeCursor<Shared::kStages>& cursor) {
  mbarrier_wait(&shared.full[cursor.stage()], cursor.parity());
  __syncwarp();
}

// Gives the stage back to the producers of both CTAs, which write to it. Every warp arrives at both:
// a warp's own wait only proves that its own rows have been read.
//
// No arrival can come a phase early, in whatever order those of a warp, here and there, land. A
// consumer arrives for the next use of the stage after its CTA's full barrier has completed for that
// use. That takes bytes of both CTAs, as each copies half of what they share; and a producer copies
// once its own empty barrier has completed for this use. So both have, at which time nobody owes them
// an arrival. Were all shared rows one CTA's to copy, that CTA could go on alone and be counted, at
// the other's barrier, in the place of a warp whose arrival there is still on its way.
//
// Built for racecheck, every lane arrives at the neighbour's barrier, too: the neighbour's copies land
// in this CTA as well, on rows that all lanes have read by ldmatrix, and the tool would order only one
// lane's reads before them.
template <class Shared>
__device__ __forceinline__ void moe_release(Shared& shared,
                                            const MoeCursor<Shared::kStages>& cursor) {
  const int rank = cluster_ctarank();  // read again: consumers have no register for it
  __syncwarp();
  const bool arrives = kWarpArrivals > 1 || threadIdx.x % kWarpThreads == 0;
  if (arrives) mbarrier_arrive(&shared.empty[cursor.stage()]);
  if (arrives) mbarrier_arrive_relaxed_cluster(&shared.empty[cursor.stage()], 1 - rank);
}

// A consumer without work of its own in this tile keeps the ring turning.
template <class Shared>
__device__ __forceinline__ void moe_skip(Shared& shared, const MoeTile& tile,
                                         MoeCursor<Shared::kStages>& cursor) {
  for (int k = tile.k_begin; k < tile.k_end; ++k) {
    moe_acquire(shared, cursor);
    moe_release(shared, cursor);
    cursor.advance();
  }
}

// product = a * b^T over the 128 values of a stage: 64 rows of a, as many of b as `product` has
// room for.
template <int kRegs>
__device__ __forceinline__ void moe_multiply(const uint8_t* a, const uint8_t* b,
                                             float (&product)[kRegs]) {
  constexpr int kGroupBytes = kRowGroup * kBlockK;
  // Broadcast, so that the compiler knows that the descriptors are the same in all lanes.
  const uint32_t a_address = __shfl_sync(kFullWarp, shared_address(a), 0);
  const uint32_t b_address = __shfl_sync(kFullWarp, shared_address(b), 0);
  const uint64_t a_matrix = matrix_descriptor(a_address, 16, kGroupBytes, Swizzle::k128B);
  const uint64_t b_matrix = matrix_descriptor(b_address, 16, kGroupBytes, Swizzle::k128B);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma_e4m3_ss(product, advance_descriptor(a_matrix, step * kStepBytes),
                  advance_descriptor(b_matrix, step * kStepBytes), step > 0);
  }
  wgmma_commit_group();
}

// acc += product * weight_scale * scale of each row, where rows are the columns of the product:
// register 4j + 2h + c is of row 8j + 2t + c (lane 4g + t).
template <int kRegs>
__device__ __forceinline__ void moe_promote(const float (&product)[kRegs], const float* row_scales,
                                            float weight_scale, float (&acc)[kRegs]) {
  const float2* pairs = reinterpret_cast<const float2*>(row_scales) + tid_x() % 4;
#pragma unroll
  for (int j = 0; j < kRegs / 4; ++j) {
    const float2 scale = pairs[4 * j];
    const float factors[2] = {scale.x * weight_scale, scale.y * weight_scale};
#pragma unroll
    for (int i = 4 * j; i < 4 * j + 4; ++i) {
      acc[i] = fmaf(product[i], factors[i % 2], acc[i]);
    }
  }
}
