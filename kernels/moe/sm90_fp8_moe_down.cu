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
// Tile            192 weights x up to 128 rows. Of pairs of blocks of rows a consumer has 64 rows, and
//                 all weights. Of a single block it has all rows, in steps of 16, and 64 of the weights
//                 are the tall side of a product, so that few rows cost little; consumer 0 has two
//                 parts of 64, consumer 1 the third
// Threads         384: producer warpgroup (40 registers), two consumers (232); one CTA per SM, in
//                 clusters of 2 that share weights (two row blocks) or rows (two weight tiles)
// Shared memory   208,896 B: ring of 5 x (24 KiB weights, 16 KiB rows, scales), barriers
// Roofline        HBM up to about 160 rows an expert: 36.7 MB of weights each
// Accuracy        The tensor core sums 4 steps of 32; every 128 values are added in fp32
// Reference       step3rt.ops.moe_fp8.reference_expert
// The weights stream in while gate-up still runs; only the rows wait for it.

#include "moe/moe_gemm.cuh"
#include "moe/moe_tall_rows.cuh"

constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
constexpr int kProducerRegs = 40;  // 40 * 128 + 232 * 256 = 64,512 of 65,536 registers
constexpr int kConsumerRegs = 232;
constexpr int kParts = 3;           // of 64 weights, of a tile
constexpr int kRowStep = 16;        // rows as the narrow side come in multiples of this
constexpr int kScaleWeights = 128;  // weights of one scale
constexpr int kTogetherRegs = 96;   // per thread, of products that are under way together

using Shared = MoeShared<kParts * kQuarterWeights, 5, kConsumers, 0>;
static_assert(sizeof(Shared) == 208896, "the launcher asks for this many bytes");

// A tile's three parts lie in two blocks of 128 weights, the first two in the same if the tile begins
// with a block, else the last two.
struct ScaleRows {
  int first;
  int step;

  __device__ __forceinline__ ScaleRows(const MoeGemmParams& params, const MoeTile& tile) {
    const int block = tile.n * Shared::kTileWeights / kScaleWeights;
    const int num_blocks = params.num_weight_rows / kScaleWeights;
    first = (tile.group * num_blocks + block) * params.num_k_blocks;
    step = block + 1 < num_blocks ? params.num_k_blocks : 0;
  }

  static __device__ __forceinline__ float of(int part, float2 scales, const MoeTile& tile) {
    if (part == 1) return tile.n % 2 == 0 ? scales.x : scales.y;
    return part == 0 ? scales.x : scales.y;
  }
};
static_assert(Shared::kTileWeights % kScaleWeights == kScaleWeights / 2, "see ScaleRows");

// ---- tiles of more than 64 rows that share weights -----------------------------------------------

// Register 4j + 2r + c of a part is row 16w + g + 8r and place 8j + 2t + c (warp w, lane 4g + t), where
// pack_down has put output 16 (j / 2) + 4t + 2c + j % 2: four in a row for each lane.
__device__ __forceinline__ void compute_tall(Shared& shared, const MoeGemmParams& params,
                                             const MoeTile& tile, int consumer,
                                             MoeCursor<Shared::kStages>& cursor) {
  float acc[kParts][kQuarterRegs];
  float none[1][kExtraRegs];
  moe_accumulate_tall<ScaleRows, kParts, 0>(shared, tile, consumer, cursor, acc, none);
  const int thread = tid_x() - kWarpgroupThreads;  // of all consumers
  const int lane = thread % kWarpThreads;
  const int64_t first_row = static_cast<int64_t>(tile.slice) * params.row_capacity + tile.first_row;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = thread / kWarpThreads * 16 + lane / 4 + 8 * r;
    if (row >= tile.num_rows) continue;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int column = tile.n * Shared::kTileWeights + part * kQuarterWeights;
      if (column >= params.num_weight_rows) continue;
      uint8_t* out =
          params.out + 2 * ((first_row + row) * params.num_weight_rows + column + lane % 4 * 4);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int i = 8 * w + 2 * r;
        *reinterpret_cast<uint2*>(out + 32 * w) =
            make_uint2(cvt_bf16x2(acc[part][i], acc[part][i + 4]),
                       cvt_bf16x2(acc[part][i + 1], acc[part][i + 5]));
      }
    }
  }
}

// ---- others --------------------------------------------------------------------------------------

// acc[p] = parts `consumer` and, with kNumParts 2, the last one, times the rows. The two products are
// under way together where registers suffice for both, else one after the other.
template <int kNumParts, int kRegs>
__device__ __forceinline__ void accumulate(Shared& shared, const MoeTile& tile, int consumer,
                                           MoeCursor<Shared::kStages>& cursor,
                                           float (&acc)[kNumParts][kRegs]) {
  constexpr int kPartBytes = kQuarterWeights * kBlockK;
  constexpr int kBuffers = kNumParts * kRegs <= kTogetherRegs ? kNumParts : 1;
  float product[kBuffers][kRegs];
#pragma unroll
  for (int i = 0; i < kNumParts * kRegs; ++i) acc[i / kRegs][i % kRegs] = 0.0f;
  for (int num_left = tile.k_end - tile.k_begin; num_left > 0; --num_left) {
    moe_acquire(shared, cursor);
    const uint8_t* weights = shared.weights[cursor.stage()];
#pragma unroll
    for (int p = 0; p < kBuffers; ++p) {
      moe_multiply(weights + (p == 0 ? consumer : kParts - 1) * kPartBytes,
                   shared.rows[cursor.stage()], product[p]);
    }
    const float2 weight = shared.weight_scales[cursor.stage()];
    wgmma_wait_group<kBuffers - 1>(product[0]);
    moe_promote(product[0], shared.row_scales[cursor.stage()],
                ScaleRows::of(consumer, weight, tile), acc[0]);
    if (kNumParts == 2) {
      float (&last)[kRegs] = product[kBuffers - 1];
      if (kBuffers == 1) {
        moe_multiply(weights + (kParts - 1) * kPartBytes, shared.rows[cursor.stage()], last);
      }
      wgmma_wait_group<0>(last);
      moe_promote(last, shared.row_scales[cursor.stage()], ScaleRows::of(kParts - 1, weight, tile),
                  acc[kNumParts - 1]);
    }
    moe_release(shared, cursor);
    cursor.advance();
  }
}

// Register 4j + 2h + c is column 16w + 2g + h of the part's 64 (warp w, lane 4g + t), and row
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
template <int kNumParts, int kRows = kRowStep>
__device__ __forceinline__ void compute(Shared& shared, const MoeGemmParams& params,
                                        const MoeTile& tile, int consumer,
                                        MoeCursor<Shared::kStages>& cursor) {
  if constexpr (kRows < kTileRows) {
    if (tile.num_rows > kRows) {
      compute<kNumParts, kRows + kRowStep>(shared, params, tile, consumer, cursor);
      return;
    }
  }
  float acc[kNumParts][kRows / 2];
  accumulate(shared, tile, consumer, cursor, acc);
  const int first = tile.n * Shared::kTileWeights;
#pragma unroll
  for (int p = 0; p < kNumParts; ++p) {
    const int column = first + (p == 0 ? consumer : kParts - 1) * kQuarterWeights;
    if (column < params.num_weight_rows) finish(params, tile, column, acc[p]);
  }
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
    if (threadIdx.x / kWarpThreads == 2) {
      moe_produce_weight_scales<ScaleRows>(shared, params, rank);
    }
  } else {
    setmaxnreg_inc<kConsumerRegs>();
    const int consumer = warpgroup - 1;
    MoeWalk<Shared, true> walk;
    MoeTile tile;
    MoeCursor<Shared::kStages> cursor;
    while (walk.next(shared, params, rank, tile)) {
      if (!tile.is_real) {
        moe_skip(shared, tile, cursor);
      } else if (tile.shares_weights && tile.num_rows > kLongRows) {
        compute_tall(shared, params, tile, consumer, cursor);
      } else if (consumer == 0) {
        compute<2>(shared, params, tile, consumer, cursor);
      } else {
        compute<1>(shared, params, tile, consumer, cursor);
      }
    }
  }
  barrier_cluster_relaxed();  // the neighbour may still copy to this CTA or arrive at its barriers
}
