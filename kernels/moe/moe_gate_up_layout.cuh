// Shared memory and constants of sm90_fp8_moe_gate_up, its weights' scales, and SwiGLU.
#pragma once

#include "common/ptx.cuh"
#include "moe/moe_layout.cuh"
#include "moe/moe_tall_rows.cuh"
#include "moe/moe_walk.cuh"

constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
constexpr int kProducerRegs = 40;  // 40 * 128 + 232 * 256 = 64,512 of 65,536 registers
constexpr int kConsumerRegs = 232;
constexpr int kProducers = 3;  // of weights, of rows and of the scales of weights
constexpr int kBarrierConsumers = 1;

constexpr int kTileOutputs = 128;
constexpr int kTileWeights = 2 * kTileOutputs;
constexpr int kConsumerWeights = 128;  // 64 of gate, then 64 of up
constexpr int kBlockRows = 64;         // the tall side of one product
constexpr int kProductRegs = kBlockRows * kConsumerWeights / kWarpgroupThreads;  // 64 per thread
constexpr int kExtraRows = 16;  // the narrow side of products of 64 weights
static_assert(kExtraRegs == 64 * kExtraRows / kWarpgroupThreads, "8 per thread");
constexpr float kE4m3Max = 448.0f;
constexpr float kLog2E = 1.4426950408889634f;

using Ring = MoeShared<kTileWeights, 4, kConsumers, kProducers, kExtraRows>;

struct Shared : Ring {
  // Of each consumer warp; a product leaves no registers for them.
  MoeWalk<Ring, true> walks[kConsumers * kWarpgroupWarps];
  MoeTile tiles[kConsumers * kWarpgroupWarps];
  float amax[kConsumers][kTileRows];
  float extra_amax[kConsumers * kWarpgroupWarps][kExtraRows];
  float extra_up[kExtraRegs][kWarpgroupThreads];
  float4 split_amax[kClusterCtas * kWarpgroupWarps][4];
  uint32_t split_parity;  // of the next tile that splits its extra rows
  uint64_t split_full;    // completes when split_amax has come from both CTAs
};
static_assert(sizeof(Shared) == 215040, "the launcher asks for this many bytes");

// A tile is one block of 128 gate weights and one of up: quarters 0 and 2 are gate's, 1 and 3 up's.
struct ScaleRows {
  int first;
  int step;

  __device__ __forceinline__ ScaleRows(const MoeGemmParams& params, const MoeTile& tile) {
    const int num_tiles = params.num_weight_rows / kTileWeights;
    first = (2 * tile.group * num_tiles + tile.n) * params.num_k_blocks;
    step = num_tiles * params.num_k_blocks;
  }

  static __device__ __forceinline__ float of(int quarter, float2 scales, const MoeTile& tile) {
    return quarter % 2 == 0 ? scales.x : scales.y;
  }
};

__device__ __forceinline__ float swiglu(float gate, float up) {
  return __fdividef(gate, 1.0f + ex2_approx(-gate * kLog2E)) * up;
}

// Scale of 128 values and its inverse, from their largest magnitude. Below 2^-100 it is that of
// 2^-100, as in fused/quantize.cuh: the inverse of a smaller one is infinite, and 0 times it NaN.
__device__ __forceinline__ float2 quantization_scale(float amax) {
  const float bounded = fmaxf(amax, 0x1p-100f);
  return amax > 0.0f ? make_float2(bounded / kE4m3Max, kE4m3Max / bounded)
                     : make_float2(1.0f, 1.0f);
}
