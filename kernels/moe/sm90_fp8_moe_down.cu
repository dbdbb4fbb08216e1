// Down projection of the experts of a MoE layer: one row of sums per token and expert.
//
//   groups         i32[G, 2]            first row and number of rows of each expert, see dispatch
//   weights        e4m3[G, H, I]        packed by pack_down: tiles of 192 rows, the last shorter
//   weight_scales  f32[G, H/128, I/128]
//   rows           e4m3[I/128, R, 128]  written by gate-up, swizzled, one k block after another
//   row_scales     f32[I/128, R]
//   out            bf16[S, R, H]        slice s holds the sum over the s-th part of I
//   H, I multiples of 128; rows past a group's end are not written.
//
// Tile            192 weights x up to 128 rows in steps of 16; a consumer has 64 weights. Weights
//                 are the tall side of a product, so that few rows cost little
// Threads         512: producer warpgroup (32 registers), three consumers (160); one CTA per SM, in
//                 clusters of 2 that share weights (two row blocks) or rows (two weight tiles)
// Shared memory   208,896 B: ring of 5 x (24 KiB weights, 16 KiB rows, scales), barriers
// Roofline        HBM up to about 160 rows an expert: 36.7 MB of weights each
// Accuracy        The tensor core sums 4 steps of 32; every 128 values are added in fp32
// Reference       step3rt.ops.moe_fp8.reference_expert
// The weights stream in while gate-up still runs; only the rows wait for it.

#include "moe/moe_gemm.cuh"

constexpr int kConsumers = 3;
constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
constexpr int kProducerRegs = 32;  // 32 * 128 + 160 * 384 = 65,536, all registers
constexpr int kConsumerRegs = 160;
constexpr int kBlockWeights = 64;   // the tall side of one product
constexpr int kRowStep = 16;        // rows, its narrow side, come in multiples of this
constexpr int kScaleWeights = 128;  // weights of one scale
constexpr int kProducers = 2;  // of weights and of rows; consumers load their scales themselves

using Shared = MoeShared<kConsumers * kBlockWeights, 5, kConsumers, kProducers, 0>;
static_assert(sizeof(Shared) == 208896, "the launcher asks for this many bytes");

template <int kRegs>
__device__ __forceinline__ void accumulate(Shared& shared, const MoeGemmParams& params,
                                           const MoeTile& tile, int consumer, int column,
                                           MoeCursor<Shared::kStages>& cursor,
                                           float (&acc)[kRegs]) {
  const int scale_row =
      (tile.group * params.num_weight_rows + column) / kScaleWeights;  // of all groups
  const float* scales = params.weight_scales + scale_row * params.num_k_blocks + tile.k_begin;
  int num_left = tile.k_end - tile.k_begin;  // counted down: k and its end would be two registers
  float next_scale = num_left > 0 ? *scales : 0.0f;
#pragma unroll
  for (int i = 0; i < kRegs; ++i) acc[i] = 0.0f;
  float product[kRegs];
  for (; num_left > 0; --num_left) {
    const float scale = next_scale;
    if (num_left > 1) next_scale = *++scales;
    moe_acquire(shared, cursor);
    moe_multiply(shared.weights[cursor.stage()] + consumer * kBlockWeights * kBlockK,
                 shared.rows[cursor.stage()], product);
    wgmma_wait_group<0>(product);
    moe_promote(product, shared.row_scales[cursor.stage()], scale, acc);
    moe_release(shared, cursor);
    cursor.advance();
  }
}

// Register 4j + 2h + c is column 16w + 2g + h of the consumer's 64 (warp w, lane 4g + t), and row
// 8j + 2t + c.
template <int kRegs>
__device__ __forceinline__ void finish(const MoeGemmParams& params, const MoeTile& tile, int column,
                                       const float (&acc)[kRegs]) {
  const int thread = tid_x() % kWarpgroupThreads;
  const int lane = thread % kWarpThreads;
  const int64_t first_row = static_cast<int64_t>(tile.slice) * params.row_capacity + tile.first_row;
  const int64_t row_step = 16ll * params.num_weight_rows;  // bytes of 8 rows
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int row = 2 * (lane % 4) + c;  // and every eighth after it
    uint8_t* out = params.out + 2 * ((first_row + row) * params.num_weight_rows + column +
                                     thread / kWarpThreads * 16 + lane / 4 * 2);
#pragma unroll
    for (int j = 0; j < kRegs / 4; ++j) {
      if (8 * j < tile.num_rows - row) {
        *reinterpret_cast<uint32_t*>(out) = cvt_bf16x2(acc[4 * j + c], acc[4 * j + c + 2]);
      }
      out += row_step;
    }
  }
}

// Rounds the rows up to a multiple of 16: each number of steps is a code path of its own.
template <int kRows = kRowStep>
__device__ __forceinline__ void compute(Shared& shared, const MoeGemmParams& params,
                                        const MoeTile& tile, int consumer, int column,
                                        MoeCursor<Shared::kStages>& cursor) {
  if constexpr (kRows < kTileRows) {
    if (tile.num_rows > kRows) {
      compute<kRows + kRowStep>(shared, params, tile, consumer, column, cursor);
      return;
    }
  }
  float acc[kRows / 2];
  accumulate(shared, params, tile, consumer, column, cursor, acc);
  finish(params, tile, column, acc);
}

extern "C" __global__ void __cluster_dims__(kClusterCtas, 1, 1) __launch_bounds__(kThreads, 1)
    sm90_fp8_moe_down(const __grid_constant__ MoeGemmParams params) {
  extern __shared__ uint8_t shared_base[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_base);
  if (shared_address(shared_base) % alignof(Shared) != 0) __trap();
  const int rank = cluster_ctarank();
  moe_set_up<false>(shared, params);
  const int warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

  if (warpgroup == 0) {
    setmaxnreg_dec<kProducerRegs>();
    if (threadIdx.x == 0) moe_produce_weights(shared, params, rank);
    if (threadIdx.x == kWarpThreads) {
      griddepcontrol_wait();  // for gate-up
      griddepcontrol_launch_dependents();
      moe_produce_rows(shared, params, rank);
    }
  } else {
    setmaxnreg_inc<kConsumerRegs>();
    const int consumer = warpgroup - 1;
    MoeWalk<Shared, true> walk;
    MoeTile tile;
    MoeCursor<Shared::kStages> cursor;
    while (walk.next(shared, params, rank, tile)) {
      const int column = tile.n * Shared::kTileWeights + consumer * kBlockWeights;
      if (!tile.is_real || column >= params.num_weight_rows) {
        moe_skip(shared, tile, cursor);
        continue;
      }
      compute(shared, params, tile, consumer, column, cursor);
    }
  }
  barrier_cluster_relaxed();  // the neighbour may still copy to this CTA or arrive at its barriers
}
