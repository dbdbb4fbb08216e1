// Sums of several bf16 rows in fp32, one row by one CTA, and their addition to a residual.
// Never decides which rows: whoever loads a tile adds it.
#pragma once

#include "common/ptx.cuh"
#include "common/types.cuh"
#include "fused/quantize.cuh"

// The residual plus the totals rounded to bf16, as the model adds its two bf16 tensors.
__device__ __forceinline__ uint32_t add_pair(uint32_t residual, float low, float high) {
  const uint32_t total = cvt_bf16x2(low, high);
  return cvt_bf16x2(bf16_low_to_float(residual) + bf16_low_to_float(total),
                    bf16_high_to_float(residual) + bf16_high_to_float(total));
}

template <typename Tile>
struct Totals {
  float values[Tile::kVectors][kVectorWidth] = {};

  __device__ __forceinline__ void add(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      const uint32_t pairs[] = {tile.packed[i].x, tile.packed[i].y, tile.packed[i].z,
                                tile.packed[i].w};
#pragma unroll
      for (int j = 0; j < kVectorWidth; j += 2) {
        values[i][j] += bf16_low_to_float(pairs[j / 2]);
        values[i][j + 1] += bf16_high_to_float(pairs[j / 2]);
      }
    }
  }

  __device__ __forceinline__ void add_to(Tile& residual) const {
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      const float (&total)[kVectorWidth] = values[i];
      residual.packed[i].x = add_pair(residual.packed[i].x, total[0], total[1]);
      residual.packed[i].y = add_pair(residual.packed[i].y, total[2], total[3]);
      residual.packed[i].z = add_pair(residual.packed[i].z, total[4], total[5]);
      residual.packed[i].w = add_pair(residual.packed[i].w, total[6], total[7]);
    }
  }
};
