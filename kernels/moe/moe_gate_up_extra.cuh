// Gate and up's rows past the first 64 or 128 of a tile, up to 16: their outputs and how they are stored,
// by one CTA, or by two that share their weights and so the outputs.
#pragma once

#include "common/barrier.cuh"
#include "common/cluster.cuh"
#include "common/ptx.cuh"
#include "moe/moe_gate_up_layout.cuh"

// ---- all weights in one CTA ------------------------------------------------------------------------

// Leaves the rows' outputs in extra[0]. Output 16w + 2g + h of the consumer's 64 is register
// 4j + 2h + c of warp w, lane 4g + t; the row is 8j + 2t + c.
__device__ __forceinline__ void activate_extra(Shared& shared, float (&extra)[2][kExtraRegs]) {
  const int thread = tid_x() - kWarpgroupThreads;  // of all consumers
  const int lane = thread % kWarpThreads;
#pragma unroll
  for (int i = 0; i < kExtraRegs; ++i) extra[0][i] = swiglu(extra[0][i], extra[1][i]);
#pragma unroll
  for (int i = 0; i < kExtraRegs / 2; ++i) {
    const int at = i / 2 * 4 + i % 2;
    float amax = fmaxf(fabsf(extra[0][at]), fabsf(extra[0][at + 2]));
#pragma unroll
    for (int step = 4; step < kWarpThreads; step *= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, step));
    }
    if (lane < 4) shared.extra_amax[thread / kWarpThreads][i / 2 * 8 + 2 * lane + i % 2] = amax;
  }
}

// `first`: of the rows in the tile; `block`: first row of the tile in the outputs' k block.
__device__ __forceinline__ void store_extra(const Shared& shared, const MoeGemmParams& params,
                                            const MoeTile& tile, int first, int64_t block,
                                            const float (&extra)[2][kExtraRegs]) {
  const int thread = tid_x() - kWarpgroupThreads;
  const int lane = thread % kWarpThreads;
#pragma unroll
  for (int i = 0; i < kExtraRegs / 2; ++i) {
    const int row = i / 2 * 8 + 2 * (lane % 4) + i % 2;
    if (first + row < tile.num_rows) {
      float amax = 0.0f;
#pragma unroll
      for (int w = 0; w < kConsumers * kWarpgroupWarps; ++w) {
        amax = fmaxf(amax, shared.extra_amax[w][row]);
      }
      const float2 scale = quantization_scale(amax);
      const int at = i / 2 * 4 + i % 2;
      if (thread < 4) params.out_scales[block + first + row] = scale.x;
      uint8_t* out = params.out + (block + first + row) * kBlockK;
      *reinterpret_cast<uint16_t*>(out + 16 * (thread / kWarpThreads ^ (row % kRowGroup)) +
                                   lane / 4 * 2) =
          cvt_e4m3x2(extra[0][at] * scale.y, extra[0][at + 2] * scale.y);
    }
  }
}

// ---- half of the weights in each of two CTAs ---------------------------------------------------------

// The extra rows of a pair of tiles: each CTA has 64 outputs of them, consumer 0 the gate's part and
// consumer 1 the up's. Leaves the outputs in consumer 0's registers, in activate_extra's order, and
// tells both CTAs the largest of each warp's.
__device__ __forceinline__ void activate_split(Shared& shared, int rank, int consumer,
                                               float (&extra)[kExtraRegs]) {
  const int thread = tid_x() % kWarpgroupThreads;
  const int warp = thread / kWarpThreads;
  const int lane = thread % kWarpThreads;
  if (consumer == 1) {
#pragma unroll
    for (int i = 0; i < kExtraRegs; ++i) shared.extra_up[i][thread] = extra[i];
  }
  bar_sync<kBarrierConsumers, kConsumerThreads>();
  if (consumer == 1) return;
#pragma unroll
  for (int i = 0; i < kExtraRegs; ++i) extra[i] = swiglu(extra[i], shared.extra_up[i][thread]);
  float amax[4];  // of rows 8j + 2t + c, 2j + c of them
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = i / 2 * 4 + i % 2;
    amax[i] = fmaxf(fabsf(extra[at]), fabsf(extra[at + 2]));
#pragma unroll
    for (int step = 4; step < kWarpThreads; step *= 2) {
      amax[i] = fmaxf(amax[i], __shfl_xor_sync(kFullWarp, amax[i], step));
    }
  }
  if (thread == 0) mbarrier_arrive_expect_tx(&shared.split_full, sizeof(shared.split_amax));
  if (lane < 4) {
    const uint32_t slot = shared_address(&shared.split_amax[rank * kWarpgroupWarps + warp][lane]);
    const uint32_t barrier = shared_address(&shared.split_full);
#pragma unroll
    for (int cta = 0; cta < kClusterCtas; ++cta) {
      st_async(mapa_shared_cluster(slot, cta), make_float4(amax[0], amax[1], amax[2], amax[3]),
               mapa_shared_cluster(barrier, cta));
    }
  }
}

// Consumer 0 stores what activate_split left.
__device__ __forceinline__ void store_split(Shared& shared, const MoeGemmParams& params,
                                            const MoeTile& tile, const float (&extra)[kExtraRegs]) {
  const int thread = tid_x() % kWarpgroupThreads;
  const int lane = thread % kWarpThreads;
  float amax[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int w = 0; w < kClusterCtas * kWarpgroupWarps; ++w) {
    const float4 part = shared.split_amax[w][lane % 4];
    amax[0] = fmaxf(amax[0], part.x);
    amax[1] = fmaxf(amax[1], part.y);
    amax[2] = fmaxf(amax[2], part.z);
    amax[3] = fmaxf(amax[3], part.w);
  }
  const int64_t block = static_cast<int64_t>(tile.n) * params.row_capacity + tile.first_extra_row();
  const int chunk = tile.rank * kWarpgroupWarps + thread / kWarpThreads;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2 * 8 + 2 * (lane % 4) + i % 2;
    if (kTileRows + row < tile.num_rows) {
      const float2 scale = quantization_scale(amax[i]);
      const int at = i / 2 * 4 + i % 2;
      if (tile.rank == 0 && thread < 4) params.out_scales[block + row] = scale.x;
      uint8_t* out = params.out + (block + row) * kBlockK;
      *reinterpret_cast<uint16_t*>(out + 16 * (chunk ^ (row % kRowGroup)) + lane / 4 * 2) =
          cvt_e4m3x2(extra[at] * scale.y, extra[at + 2] * scale.y);
    }
  }
}
