// The products of a large tile, one of a pair of row blocks or with rows past 128: a consumer has 64
// rows and all weights of the tile.
// Its rows go to registers once per stage; then every value in shared memory is read by one product
// for each consumer, where two operands in shared memory would read the rows over and over. Bandwidth
// of shared memory, copies included, is what such tiles wait for.
// Knows nothing of what becomes of the sums.
#pragma once

#include "moe/moe_gemm.cuh"

constexpr int kQuarterWeights = 64;  // the wide side of one product
constexpr int kTallRows = 64;        // of one consumer
constexpr int kQuarterRegs = kTallRows * kQuarterWeights / kWarpgroupThreads;  // 32 per thread
constexpr int kExtraRegs = 8;  // per thread, of 64 weights and 16 rows more

// The consumer's 64 of a stage's rows as wgmma's A: 4 steps of 32 bytes.
__device__ __forceinline__ void moe_load_rows(uint32_t rows, uint32_t (&a)[kSteps][4]) {
  const int thread = tid_x() - kWarpgroupThreads;  // of all consumers
  const int lane = thread % kWarpThreads;
  // Lane l points at row l % 16 of its warp's, at the step's first 16 bytes or its second.
  const int row = thread / kWarpThreads * 16 + lane % 16;
  const uint32_t address = rows + row * kBlockK + 16 * (lane / 16 ^ lane % kRowGroup);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) ldmatrix_x4(address ^ step * kStepBytes, a[step]);
}

// product = the consumer's rows times 64 weights.
__device__ __forceinline__ void moe_multiply_quarter(const uint32_t (&a)[kSteps][4],
                                                     uint64_t weights,
                                                     float (&product)[kQuarterRegs]) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma_m64n64k32_e4m3_rs(product, a[step], advance_descriptor(weights, step * kStepBytes),
                            step > 0);
  }
  wgmma_commit_group();
}

// acc += product * weight * scale of each of the two rows. Register 4j + 2r + c is of row r.
__device__ __forceinline__ void moe_fold(const float (&product)[kQuarterRegs],
                                         const float (&scale)[2], float weight,
                                         float (&acc)[kQuarterRegs]) {
  const float factors[2] = {scale[0] * weight, scale[1] * weight};
#pragma unroll
  for (int i = 0; i < kQuarterRegs; ++i) acc[i] = fmaf(product[i], factors[i / 2 % 2], acc[i]);
}

// acc[q] = the consumer's 64 rows times the tile's weights 64q ... 64q + 63. Register 4j + 2r + c is
// row 16w + g + 8r (warp w, lane 4g + t) and weight 8j + 2t + c.
// `ScaleRows::of(quarter, scales, tile)`: which of the stage's two scales of weights a quarter has.
//
// extra = up to 16 rows that follow the tile's 128, times 64 weights each: with kExtras 2 those of
// quarters 2 * consumer and the next, with 1 that of quarter 2 * rank + consumer. Register 4j + 2h + c
// is weight 16w + g + 8h and row 8j + 2t + c.
//
// One product is under way while the one before it is scaled and added; with kExtras 2 registers do
// not suffice for that.
template <class ScaleRows, int kQuarters, int kExtras, class Shared>
__device__ __forceinline__ void moe_accumulate_tall(
    Shared& shared, const MoeTile& tile, int consumer, MoeCursor<Shared::kStages>& cursor,
    float (&acc)[kQuarters][kQuarterRegs], float (&extra)[kExtras > 0 ? kExtras : 1][kExtraRegs]) {
  constexpr int kQuarterBytes = kQuarterWeights * kBlockK;
  constexpr int kBuffers = kExtras == 2 ? 1 : 2;
  constexpr int kLast = kQuarters - 1;
#pragma unroll
  for (int i = 0; i < kQuarters * kQuarterRegs; ++i) {
    acc[i / kQuarterRegs][i % kQuarterRegs] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kExtras * kExtraRegs; ++i) extra[i / kExtraRegs][i % kExtraRegs] = 0.0f;
  float product[kBuffers][kQuarterRegs];
  for (int num_left = tile.k_end - tile.k_begin; num_left > 0; --num_left) {
    moe_acquire(shared, cursor);
    const uint8_t* stage = shared.weights[cursor.stage()];
    float extra_product[kExtras > 0 ? kExtras : 1][kExtraRegs];
#pragma unroll
    for (int e = 0; e < kExtras; ++e) {  // first, while there are registers
      const int quarter = kExtras == 2 ? 2 * consumer + e : 2 * cluster_ctarank() + consumer;
      moe_multiply(stage + quarter * kQuarterBytes,
                   shared.rows[cursor.stage()] + kTileRows * kBlockK, extra_product[e]);
    }
    uint32_t a[kSteps][4];
    moe_load_rows(shared_address(shared.rows[cursor.stage()]), a);
    const int thread = tid_x() - kWarpgroupThreads;  // of all consumers
    const float* row_scales =
        shared.row_scales[cursor.stage()] + thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
    const float scale[2] = {row_scales[0], row_scales[8]};
    const float2 weight = shared.weight_scales[cursor.stage()];
    // Broadcast, as in moe_multiply.
    const uint32_t address = __shfl_sync(kFullWarp, shared_address(stage), 0);
    const uint64_t weights = matrix_descriptor(address, 16, kRowGroup * kBlockK, Swizzle::k128B);
    moe_multiply_quarter(a, weights, product[0]);
#pragma unroll
    for (int e = 0; e < kExtras; ++e) {
      wgmma_wait_group<1>(extra_product[e]);
      const int quarter = kExtras == 2 ? e : consumer;  // even: gate, odd: up
      moe_promote(extra_product[e], shared.row_scales[cursor.stage()] + kTileRows,
                  ScaleRows::of(quarter, weight, tile), extra[e]);
    }
#pragma unroll
    for (int q = 1; q < kQuarters; ++q) {
      const uint64_t quarter = advance_descriptor(weights, q * kQuarterBytes);
      if (kBuffers == 2) moe_multiply_quarter(a, quarter, product[q % kBuffers]);
      wgmma_wait_group<kBuffers - 1>(product[(q - 1) % kBuffers]);
      moe_fold(product[(q - 1) % kBuffers], scale, ScaleRows::of(q - 1, weight, tile), acc[q - 1]);
      if (kBuffers == 1) moe_multiply_quarter(a, quarter, product[0]);
    }
    wgmma_wait_group<0>(product[kLast % kBuffers]);
    moe_fold(product[kLast % kBuffers], scale, ScaleRows::of(kLast, weight, tile), acc[kLast]);
    moe_release(shared, cursor);
    cursor.advance();
  }
}
