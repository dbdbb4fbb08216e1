// One block of a paged FP8 KV cache under one warpgroup: scores, weighted values, unused slots.
// Knows nothing of sequences, rings or schedules.
#pragma once

#include "attention/fp8_kv_block.cuh"
#include "attention/mfa_decode.cuh"
#include "common/wgmma.cuh"

constexpr int kKeySliceBytes = 128;  // half the head dim
constexpr int kKeySliceTileBytes = kBlockTokens * kKeySliceBytes;
constexpr int kKeyRowGroupBytes = 8 * kKeySliceBytes;
constexpr int kValueRowBytes = kBlockTokens;  // V is transposed: a row is a dim
constexpr int kValueRowGroupBytes = 8 * kValueRowBytes;
constexpr int kStepBytes = 32;  // wgmma K is 32
constexpr int kScoreSteps = kHeadDim / kStepBytes;
constexpr int kValueSteps = kBlockTokens / kStepBytes;
constexpr int kQuarterDims = 64;  // output columns of one product
constexpr int kQuarterRegs = kHeads * kQuarterDims / kWarpgroupThreads;
constexpr int kQuarters = kHeadDim / kQuarterDims;

// e4m3 resolves down to 2^-9 of its unit and reaches 448: weights in [0, 1] are stored times 2^8.
// The row sums carry the same factor, so it cancels.
constexpr float kLog2WeightScale = 8.0f;

static_assert(kBlockTokens == kFp8BlockTokens && kHeadDim == kFp8HeadDim, "block layout");

__device__ __forceinline__ void compute_scores(const uint8_t* query, const uint8_t* keys,
                                               float (&scores)[kScoreRegs]) {
  const uint64_t q =
      matrix_descriptor(shared_address(query), 16, kKeyRowGroupBytes, Swizzle::k128B);
  const uint64_t k = matrix_descriptor(shared_address(keys), 16, kKeyRowGroupBytes, Swizzle::k128B);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kScoreSteps; ++step) {
    const uint32_t offset = step / 4 * kKeySliceTileBytes + step % 4 * kStepBytes;
    wgmma_m64n64k32_e4m3_ss(scores, advance_descriptor(q, offset), advance_descriptor(k, offset),
                            step > 0);
  }
  wgmma_commit_group();
}

// product = weights * V[:, 64 * quarter ...], of one block.
__device__ __forceinline__ void multiply_quarter(const uint32_t (&a)[kValueSteps][4],
                                                 uint64_t values, int quarter,
                                                 float (&product)[kQuarterRegs]) {
  const uint64_t v = advance_descriptor(values, quarter * kQuarterDims * kValueRowBytes);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kValueSteps; ++step) {
    wgmma_m64n64k32_e4m3_rs(product, a[step], advance_descriptor(v, step * kStepBytes), step > 0);
  }
  wgmma_commit_group();
}

template <int kQuarter>
__device__ __forceinline__ void fold_quarter(const float (&product)[kQuarterRegs],
                                             const float (&rescale)[2], float (&acc)[kOutputRegs]) {
#pragma unroll
  for (int i = 0; i < kQuarterRegs; ++i) {
    float& out = acc[kQuarter * kQuarterRegs + i];
    out = fmaf(out, rescale[i / 2 % 2], product[i]);
  }
}

// acc = acc * rescale + weights * V, a quarter of the columns at a time, two in flight.
__device__ __forceinline__ void accumulate_values(const float (&weights)[kScoreRegs],
                                                  const float (&rescale)[2], const uint8_t* values,
                                                  float (&acc)[kOutputRegs]) {
  uint32_t a[kValueSteps][4];
#pragma unroll
  for (int step = 0; step < kValueSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Register i: row half i % 2, score column groups 4 * step + 2 * (i / 2) and the next.
      const int s = 16 * step + 8 * (i / 2) + 2 * (i % 2);
      a[step][i] = cvt_e4m3x4(weights[s], weights[s + 1], weights[s + 4], weights[s + 5]);
    }
  }
  const uint64_t v =
      matrix_descriptor(shared_address(values), 16, kValueRowGroupBytes, Swizzle::k64B);
  float even[kQuarterRegs];
  float odd[kQuarterRegs];
  multiply_quarter(a, v, 0, even);
  multiply_quarter(a, v, 1, odd);
  wgmma_wait_group<1>(even);
  fold_quarter<0>(even, rescale, acc);
  multiply_quarter(a, v, 2, even);
  wgmma_wait_group<1>(odd);
  fold_quarter<1>(odd, rescale, acc);
  multiply_quarter(a, v, 3, odd);
  wgmma_wait_group<1>(even);
  fold_quarter<2>(even, rescale, acc);
  wgmma_wait_group<0>(odd);
  fold_quarter<3>(odd, rescale, acc);
}
static_assert(kQuarters == 4, "accumulate_values is written out for four quarters");

// Weight 0 does not silence a NaN in an unused slot of the cache, so those V bytes become 0, once
// all threads of the warpgroup have met.
__device__ __forceinline__ void zero_unused_values(uint8_t* values, int num_valid) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  for (int dim = thread; dim < kHeadDim; dim += kWarpgroupThreads) {
    for (int chunk = 0; chunk < kValueRowBytes / 16; ++chunk) {
      uint32_t* words = reinterpret_cast<uint32_t*>(values + fp8_value_chunk_offset(chunk, dim));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int token = fp8_value_word_token(chunk, w);  // of byte 0; then + 1, + 8, + 9
        const uint32_t keep =
            (token < num_valid ? 0x000000ffu : 0u) | (token + 1 < num_valid ? 0x0000ff00u : 0u) |
            (token + 8 < num_valid ? 0x00ff0000u : 0u) | (token + 9 < num_valid ? 0xff000000u : 0u);
        words[w] &= keep;
      }
    }
  }
  fence_proxy_async_shared();
}
