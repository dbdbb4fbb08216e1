// Gate and up projections of the experts of a MoE layer with SwiGLU and re-quantisation fused.
//
//   groups         i32[G, 2]            first row and number of rows of each expert, see dispatch
//   weights        e4m3[G, 2I, H]       packed by pack_gate_up: tiles of 128 gate and 128 up rows
//   weight_scales  f32[G, 2I/128, H/128]  of 128x128 blocks: gate's, then up's
//   rows           e4m3[H/128, R, 128]  swizzled rows of all groups, one k block after another
//   row_scales     f32[H/128, R]
//   out            e4m3[I/128, R, 128]  silu(gate) * up, quantised, as the down projection reads it
//   out_scales     f32[I/128, R]        amax / 448 of the 128 values; 1 where all are 0
//   H, I multiples of 128; rows past a group's end are not written.
//
// Tile            256 weights (128 outputs) x 64 or 128 rows, and up to 16 more: a remainder that
//                 would read all weights again for itself. A consumer has 64 gate and the same 64
//                 up weights, so that a thread holds both factors of its outputs
// Threads         384: producer warpgroup (40 registers), two consumers (232); one CTA per SM, in
//                 clusters of 2 that share weights (two row blocks) or rows (two weight tiles)
// Shared memory   209,920 B: ring of 4 x (32 KiB weights, 18 KiB rows, scales), amax, barriers
// Roofline        HBM up to about 160 rows an expert: 73.4 MB of weights each
// Accuracy        The tensor core sums 4 steps of 32; every 128 values are added in fp32
// Reference       step3rt.ops.moe_fp8.reference_expert

#include "moe/moe_gemm.cuh"

constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
constexpr int kProducerRegs = 40;  // 40 * 128 + 232 * 256 = 64,512 of 65,536 registers
constexpr int kConsumerRegs = 232;
constexpr int kBarrierConsumers = 1;

constexpr int kTileOutputs = 128;
constexpr int kTileWeights = 2 * kTileOutputs;
constexpr int kConsumerWeights = 128;  // 64 of gate, then 64 of up
constexpr int kBlockRows = 64;         // the tall side of one product
constexpr int kProductRegs = kBlockRows * kConsumerWeights / kWarpgroupThreads;  // 64 per thread
constexpr int kExtraRows = 16;  // the narrow side of products of 64 weights
constexpr int kExtraRegs = 64 * kExtraRows / kWarpgroupThreads;  // 8 per thread
constexpr float kE4m3Max = 448.0f;
constexpr float kLog2E = 1.4426950408889634f;

struct Shared : MoeShared<kTileWeights, 4, kConsumers, kExtraRows> {
  float amax[kConsumers][kTileRows];
  float extra_amax[kConsumers * kWarpgroupWarps][kExtraRows];
};
static_assert(sizeof(Shared) == 209920, "the launcher asks for this many bytes");

// Scales of the weights of one consumer, a stage ahead of their use.
struct WeightScales {
  const float* gate;
  const float* up;
  float next[2];

  __device__ __forceinline__ WeightScales(const MoeGemmParams& params, const MoeTile& tile) {
    const int num_tiles = params.num_weight_rows / kTileWeights;
    gate = params.weight_scales + (2 * tile.group * num_tiles + tile.n) * params.num_k_blocks;
    up = gate + num_tiles * params.num_k_blocks;
    next[0] = gate[0];
    next[1] = up[0];
  }

  __device__ __forceinline__ void take(const MoeGemmParams& params, int k, float (&scales)[2]) {
    scales[0] = next[0];
    scales[1] = next[1];
    if (k + 1 < params.num_k_blocks) {
      next[0] = gate[k + 1];
      next[1] = up[k + 1];
    }
  }
};

__device__ __forceinline__ float swiglu(float gate, float up) {
  return __fdividef(gate, 1.0f + ex2_approx(-gate * kLog2E)) * up;
}

// Scale of 128 values and its inverse, from their largest magnitude.
__device__ __forceinline__ float2 quantization_scale(float amax) {
  return amax > 0.0f ? make_float2(amax / kE4m3Max, kE4m3Max / amax) : make_float2(1.0f, 1.0f);
}

// acc[b] = 64-row block b times the consumer's 128 weights. Register 4j + 2r + c is row
// 16w + g + 8r (warp w, lane 4g + t) and weight 8j + 2t + c, gate for j < 8.
// extra[0] and extra[1] = the consumer's 64 gate and 64 up weights times the rows after the blocks:
// register 4j + 2h + c is weight 16w + g + 8h and row 8j + 2t + c.
template <int kBlocks, bool kHasExtra>
__device__ __forceinline__ void accumulate(Shared& shared, const MoeGemmParams& params,
                                           const MoeTile& tile, int consumer,
                                           RingCursor<Shared::kStages>& cursor,
                                           float (&acc)[kBlocks][kProductRegs],
                                           float (&extra)[2][kExtraRegs]) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int row = thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
  WeightScales weight_scales(params, tile);
  float product[kProductRegs];
  for (int k = 0; k < params.num_k_blocks; ++k) {  // never cut into slices
    float weight[2];
    weight_scales.take(params, k, weight);
    moe_acquire(shared, cursor);
    const uint8_t* weights = shared.weights[cursor.stage] + consumer * kConsumerWeights * kBlockK;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      moe_multiply(shared.rows[cursor.stage] + b * kBlockRows * kBlockK, weights, product);
      const float scale[2] = {shared.row_scales[cursor.stage][b * kBlockRows + row],
                              shared.row_scales[cursor.stage][b * kBlockRows + row + 8]};
      wgmma_wait_group<0>(product);
      if (b == kBlocks - 1 && !kHasExtra) moe_release(shared, cursor, tile.rank);
      const float factors[2][2] = {{scale[0] * weight[0], scale[1] * weight[0]},
                                   {scale[0] * weight[1], scale[1] * weight[1]}};
#pragma unroll
      for (int i = 0; i < kProductRegs; ++i) {
        acc[b][i] = fmaf(product[i], factors[i / (kProductRegs / 2)][i / 2 % 2], acc[b][i]);
      }
    }
    if (kHasExtra) {
      const uint8_t* rows = shared.rows[cursor.stage] + kBlocks * kBlockRows * kBlockK;
      const float* row_scales = shared.row_scales[cursor.stage] + kBlocks * kBlockRows;
      float gate[kExtraRegs];
      float up[kExtraRegs];
      moe_multiply(weights, rows, gate);
      moe_multiply(weights + kConsumerWeights / 2 * kBlockK, rows, up);
      wgmma_wait_group<1>(gate);
      moe_promote(gate, row_scales, weight[0], extra[0]);
      wgmma_wait_group<0>(up);
      moe_promote(up, row_scales, weight[1], extra[1]);
      moe_release(shared, cursor, tile.rank);
    }
    cursor.advance();
  }
}

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

template <int kBlocks, bool kHasExtra>
__device__ __forceinline__ void finish(Shared& shared, const MoeGemmParams& params,
                                       const MoeTile& tile, int consumer,
                                       float (&acc)[kBlocks][kProductRegs],
                                       float (&extra)[2][kExtraRegs]) {
  const int thread = tid_x() % kWarpgroupThreads;
  const int lane = thread % kWarpThreads;
  const int row = thread / kWarpThreads * 16 + lane / 4;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    float amax[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kProductRegs / 2; ++i) {
      acc[b][i] = swiglu(acc[b][i], acc[b][i + kProductRegs / 2]);
      amax[i / 2 % 2] = fmaxf(amax[i / 2 % 2], fabsf(acc[b][i]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      amax[r] = fmaxf(amax[r], __shfl_xor_sync(kFullWarp, amax[r], 1));
      amax[r] = fmaxf(amax[r], __shfl_xor_sync(kFullWarp, amax[r], 2));
      if (lane % 4 == 0) shared.amax[consumer][b * kBlockRows + row + 8 * r] = amax[r];
    }
  }
  if (kHasExtra) activate_extra(shared, extra);
  bar_sync<kBarrierConsumers, kConsumerThreads>();
  const int64_t block = static_cast<int64_t>(tile.n) * params.row_capacity + tile.first_row;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = b * kBlockRows + row + 8 * r;
      if (at < tile.num_rows) {
        const float2 scale = quantization_scale(fmaxf(shared.amax[0][at], shared.amax[1][at]));
        if (consumer == 0 && lane % 4 == 0) params.out_scales[block + at] = scale.x;
        uint8_t* out = params.out + (block + at) * kBlockK + lane % 4 * 4;
#pragma unroll
        for (int w = 0; w < 4; ++w) {  // 16 outputs of the row: 4 of each lane
          const int i = 8 * w + 2 * r;
          *reinterpret_cast<uint32_t*>(out + 16 * ((4 * consumer + w) ^ (at % kRowGroup))) =
              cvt_e4m3x4(acc[b][i] * scale.y, acc[b][i + 4] * scale.y, acc[b][i + 1] * scale.y,
                         acc[b][i + 5] * scale.y);
        }
      }
    }
  }
  if (kHasExtra) store_extra(shared, params, tile, kBlocks * kBlockRows, block, extra);
  bar_sync<kBarrierConsumers, kConsumerThreads>();  // amax may be written again
}

template <int kBlocks, bool kHasExtra>
__device__ __forceinline__ void compute(Shared& shared, const MoeGemmParams& params,
                                        const MoeTile& tile, int consumer,
                                        RingCursor<Shared::kStages>& cursor) {
  float acc[kBlocks][kProductRegs];
  float extra[2][kExtraRegs];
#pragma unroll
  for (int i = 0; i < kBlocks * kProductRegs; ++i) acc[i / kProductRegs][i % kProductRegs] = 0.0f;
#pragma unroll
  for (int i = 0; i < 2 * kExtraRegs; ++i) extra[i / kExtraRegs][i % kExtraRegs] = 0.0f;
  accumulate<kBlocks, kHasExtra>(shared, params, tile, consumer, cursor, acc, extra);
  finish<kBlocks, kHasExtra>(shared, params, tile, consumer, acc, extra);
}

extern "C" __global__ void __cluster_dims__(kClusterCtas, 1, 1) __launch_bounds__(kThreads, 1)
    sm90_fp8_moe_gate_up(const __grid_constant__ MoeGemmParams params) {
  extern __shared__ uint8_t shared_base[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_base);
  if (shared_address(shared_base) % alignof(Shared) != 0) __trap();
  const int rank = cluster_ctarank();
  moe_set_up<true>(shared, params);  // waits for dispatch: groups and rows
  griddepcontrol_launch_dependents();
  const int warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

  if (warpgroup == 0) {
    setmaxnreg_dec<kProducerRegs>();
    if (threadIdx.x == 0) moe_produce_weights(shared, params, rank);
    if (threadIdx.x == kWarpThreads) moe_produce_rows(shared, params, rank);
  } else {
    setmaxnreg_inc<kConsumerRegs>();
    const int consumer = warpgroup - 1;
    MoeWalk<Shared, true> walk;
    MoeTile tile;
    RingCursor<Shared::kStages> cursor;
    while (walk.next(shared, params, rank, tile)) {
      if (!tile.is_real) {
        moe_skip(shared, tile, cursor);
        continue;
      }
      if (tile.num_rows > 2 * kBlockRows) {
        compute<2, true>(shared, params, tile, consumer, cursor);
      } else if (tile.num_rows > kBlockRows + kExtraRows) {
        compute<2, false>(shared, params, tile, consumer, cursor);
      } else if (tile.num_rows > kBlockRows) {
        compute<1, true>(shared, params, tile, consumer, cursor);
      } else {
        compute<1, false>(shared, params, tile, consumer, cursor);
      }
    }
  }
  barrier_cluster_relaxed();  // the neighbour may still copy to this CTA or arrive at its barriers
}
