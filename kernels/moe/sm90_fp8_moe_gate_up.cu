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
// Tile            256 weights (128 outputs) x 64 or 128 rows, and up to 16 more: a remainder that would
//                 read all weights again for itself. A single block of up to 128 rows is read by both
//                 consumers, each for 64 gate and the same 64 up weights. Of pairs of blocks, and of
//                 more than 128 rows, a consumer has 64 rows, and all weights. So a thread holds both
//                 factors of its outputs
// Threads         384: producer warpgroup (40 registers), two consumers (232); one CTA per SM, in
//                 clusters of 2 that share weights (two row blocks) or rows (two weight tiles)
// Shared memory   215,040 B: ring of 4 x (32 KiB weights, 18 KiB rows, scales), amax, barriers
// Roofline        HBM up to about 160 rows an expert: 73.4 MB of weights each
// Accuracy        The tensor core sums 4 steps of 32; every 128 values are added in fp32
// Reference       step3rt.ops.moe_fp8.reference_expert

#include "moe/moe_gate_up_extra.cuh"
#include "moe/moe_gate_up_layout.cuh"
#include "moe/moe_gemm.cuh"
#include "moe/moe_tall_rows.cuh"

// ---- single blocks of rows: a consumer has all of them, and half of the weights ---------------------

// acc[b] = 64-row block b times the consumer's 128 weights. Register 4j + 2r + c is row 16w + g + 8r
// (warp w, lane 4g + t) and weight 8j + 2t + c, gate for j < 8.
// extra[0] and extra[1] = the consumer's 64 gate and 64 up weights times the rows after the blocks:
// register 4j + 2h + c is weight 16w + g + 8h and row 8j + 2t + c.
template <int kBlocks, bool kHasExtra>
__device__ __forceinline__ void accumulate(Shared& shared, const MoeGemmParams& params,
                                           const MoeTile& tile, int consumer,
                                           MoeCursor<Shared::kStages>& cursor,
                                           float (&acc)[kBlocks][kProductRegs],
                                           float (&extra)[2][kExtraRegs]) {
  float product[kProductRegs];
#pragma unroll
  for (int i = 0; i < kBlocks * kProductRegs; ++i) acc[i / kProductRegs][i % kProductRegs] = 0.0f;
#pragma unroll
  for (int i = 0; i < 2 * kExtraRegs; ++i) extra[i / kExtraRegs][i % kExtraRegs] = 0.0f;
  for (int k = 0; k < params.num_k_blocks; ++k) {  // never cut into slices
    moe_acquire(shared, cursor);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      moe_multiply(shared.rows[cursor.stage()] + b * kBlockRows * kBlockK,
                   shared.weights[cursor.stage()] + consumer * kConsumerWeights * kBlockK, product);
      const int thread = tid_x() % kWarpgroupThreads;
      const float* scales = shared.row_scales[cursor.stage()] + b * kBlockRows +
                            thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
      const float scale[2] = {scales[0], scales[8]};
      const float2 weight = shared.weight_scales[cursor.stage()];
      wgmma_wait_group<0>(product);
      if (b == kBlocks - 1 && !kHasExtra) moe_release(shared, cursor);
      const float factors[2][2] = {{scale[0] * weight.x, scale[1] * weight.x},
                                   {scale[0] * weight.y, scale[1] * weight.y}};
#pragma unroll
      for (int i = 0; i < kProductRegs; ++i) {
        acc[b][i] = fmaf(product[i], factors[i / (kProductRegs / 2)][i / 2 % 2], acc[b][i]);
      }
    }
    if (kHasExtra) {
      const uint8_t* weights =
          shared.weights[cursor.stage()] + consumer * kConsumerWeights * kBlockK;
      const uint8_t* rows = shared.rows[cursor.stage()] + kBlocks * kBlockRows * kBlockK;
      const float* row_scales = shared.row_scales[cursor.stage()] + kBlocks * kBlockRows;
      const float2 weight = shared.weight_scales[cursor.stage()];
      float gate[kExtraRegs];
      float up[kExtraRegs];
      moe_multiply(weights, rows, gate);
      moe_multiply(weights + kConsumerWeights / 2 * kBlockK, rows, up);
      wgmma_wait_group<1>(gate);
      moe_promote(gate, row_scales, weight.x, extra[0]);
      wgmma_wait_group<0>(up);
      moe_promote(up, row_scales, weight.y, extra[1]);
      moe_release(shared, cursor);
    }
    cursor.advance();
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
                                        MoeCursor<Shared::kStages>& cursor) {
  float acc[kBlocks][kProductRegs];
  float extra[2][kExtraRegs];
  accumulate<kBlocks, kHasExtra>(shared, params, tile, consumer, cursor, acc, extra);
  finish<kBlocks, kHasExtra>(shared, params, tile, consumer, acc, extra);
}

// ---- tiles that share weights, or have rows past 128: a consumer has 64 rows, and all weights -------

// acc[0] and acc[1]: gate and up of the first 64 outputs; acc[2] and acc[3]: of the others.
__device__ __forceinline__ void finish_tall(const MoeGemmParams& params, const MoeTile& tile,
                                            int consumer, float (&acc)[4][kQuarterRegs]) {
  const int thread = tid_x() % kWarpgroupThreads;
  const int lane = thread % kWarpThreads;
  const int row = consumer * kTallRows + thread / kWarpThreads * 16 + lane / 4;
  const int num_rows = min(tile.num_rows, kTileRows);
  const int64_t block = static_cast<int64_t>(tile.n) * params.row_capacity + tile.first_row;
  float amax[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kQuarterRegs; ++i) {
      acc[2 * half][i] = swiglu(acc[2 * half][i], acc[2 * half + 1][i]);
      amax[i / 2 % 2] = fmaxf(amax[i / 2 % 2], fabsf(acc[2 * half][i]));
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + 8 * r;
    amax[r] = fmaxf(amax[r], __shfl_xor_sync(kFullWarp, amax[r], 1));
    amax[r] = fmaxf(amax[r], __shfl_xor_sync(kFullWarp, amax[r], 2));
    if (at < num_rows) {
      const float2 scale = quantization_scale(amax[r]);
      if (lane % 4 == 0) params.out_scales[block + at] = scale.x;
      uint8_t* out = params.out + (block + at) * kBlockK + lane % 4 * 4;
#pragma unroll
      for (int chunk = 0; chunk < 8; ++chunk) {  // 16 outputs of the row: 4 of each lane
        const float (&sums)[kQuarterRegs] = acc[chunk / 4 * 2];
        const int i = chunk % 4 * 8 + 2 * r;
        *reinterpret_cast<uint32_t*>(out + 16 * (chunk ^ (at % kRowGroup))) = cvt_e4m3x4(
            sums[i] * scale.y, sums[i + 4] * scale.y, sums[i + 1] * scale.y, sums[i + 5] * scale.y);
      }
    }
  }
}

// kExtras: parts of the extra rows that a consumer has, gate and up in one CTA or one of them in each
// of two.
template <int kExtras>
__device__ __forceinline__ void compute_tall(Shared& shared, const MoeGemmParams& params,
                                             const MoeTile& tile, int consumer,
                                             MoeCursor<Shared::kStages>& cursor) {
  float acc[4][kQuarterRegs];
  float extra[kExtras > 0 ? kExtras : 1][kExtraRegs];
  moe_accumulate_tall<ScaleRows, 4, kExtras>(shared, tile, consumer, cursor, acc, extra);
  finish_tall(params, tile, consumer, acc);
  if constexpr (kExtras == 1) {
    activate_split(shared, tile.rank, consumer, extra[0]);
    // Both consumers wait: extra_up may be written again when it has been read.
    mbarrier_wait(&shared.split_full, shared.split_parity);
    __syncwarp();
    bar_sync<kBarrierConsumers, kConsumerThreads>();
    if (tid_x() == kWarpgroupThreads) shared.split_parity ^= 1;
    if (consumer == 0) store_split(shared, params, tile, extra[0]);
  }
  if constexpr (kExtras == 2) {
    activate_extra(shared, extra);
    bar_sync<kBarrierConsumers, kConsumerThreads>();
    const int64_t block = static_cast<int64_t>(tile.n) * params.row_capacity + tile.first_row;
    store_extra(shared, params, tile, kTileRows, block, extra);
    bar_sync<kBarrierConsumers, kConsumerThreads>();  // extra_amax may be written again
  }
}

// Finds the warp's next tile; its place is in shared memory.
__device__ __forceinline__ bool next_tile(Shared& shared, const MoeGemmParams& params, int warp) {
  MoeWalk<Ring, true> walk = shared.walks[warp];
  MoeTile tile;
  const bool found = walk.next(shared, params, cluster_ctarank(), tile);
  __syncwarp();
  if (tid_x() % kWarpThreads == 0) {
    shared.walks[warp] = walk;
    shared.tiles[warp] = tile;
  }
  __syncwarp();
  return found;
}

extern "C" __global__ void __cluster_dims__(kClusterCtas, 1, 1) __launch_bounds__(kThreads, 1)
    sm90_fp8_moe_gate_up(const __grid_constant__ MoeGemmParams params) {
  extern __shared__ uint8_t shared_base[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_base);
  if (shared_address(shared_base) % alignof(Shared) != 0) __trap();
  const int rank = cluster_ctarank();
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.split_full, 1);
    shared.split_parity = 0;
  }
  moe_set_up<true>(shared, params);  // waits for dispatch: groups and rows
  griddepcontrol_launch_dependents();
  const int warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

  if (warpgroup == 0) {
    setmaxnreg_dec<kProducerRegs>();
    if (threadIdx.x == 0) moe_produce_weights(shared, params, rank);
    if (threadIdx.x == kWarpThreads) moe_produce_rows(shared, params, rank);
    if (threadIdx.x / kWarpThreads == 2) {
      moe_produce_weight_scales<ScaleRows>(shared, params, rank);
    }
  } else {
    setmaxnreg_inc<kConsumerRegs>();
    const int consumer = warpgroup - 1;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpThreads, 0) - kWarpgroupWarps;
    MoeTile& tile = shared.tiles[warp];
    MoeCursor<Shared::kStages> cursor;
    shared.walks[warp] = {};  // by each lane
    while (next_tile(shared, params, warp)) {
      if (!tile.is_real) {
        moe_skip(shared, tile, cursor);
      } else if (tile.splits_extra) {
        compute_tall<1>(shared, params, tile, consumer, cursor);
      } else if (tile.num_rows > kTileRows) {
        compute_tall<2>(shared, params, tile, consumer, cursor);
      } else if (tile.num_rows <= kLongRows) {
        compute<1, false>(shared, params, tile, consumer, cursor);
      } else if (tile.shares_weights) {
        compute_tall<0>(shared, params, tile, consumer, cursor);
      } else if (tile.num_rows <= kLongRows + kExtraRows) {
        compute<1, true>(shared, params, tile, consumer, cursor);
      } else {
        compute<2, false>(shared, params, tile, consumer, cursor);
      }
    }
  }
  barrier_cluster_relaxed();  // the neighbour may still copy to this CTA or arrive at its barriers
}
