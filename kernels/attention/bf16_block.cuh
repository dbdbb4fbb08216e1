// One block of a paged BF16 KV cache under one warpgroup: scores, weighted values, unused slots.
// Knows nothing of sequences, rings or schedules.
#pragma once

#include "attention/mfa_decode.cuh"
#include "common/wgmma.cuh"

constexpr int kElementBytes = 2;
constexpr int kSliceBytes = 128;                             // one swizzle-wide column slice
constexpr int kSliceElements = kSliceBytes / kElementBytes;  // 64
constexpr int kSlices = kHeadDim / kSliceElements;           // 4
constexpr int kSliceTileBytes = kBlockTokens * kSliceBytes;  // 64 rows: 8 KiB
constexpr int kBufferBytes = kSlices * kSliceTileBytes;      // one K or V block: 32 KiB
constexpr int kRowGroupBytes = 8 * kSliceBytes;              // 8 rows: the swizzle period
constexpr int kScoreSteps = kHeadDim / 16;                   // wgmma K is 16
constexpr int kValueSteps = kBlockTokens / 16;

// Every 32 KiB tile (Q, K, V) is four slices of [64 rows][128 B], each in the 128-byte swizzle.
__device__ __forceinline__ void compute_scores(const uint8_t* query, const uint8_t* keys,
                                               float (&scores)[kScoreRegs]) {
  const uint64_t q = matrix_descriptor(shared_address(query), 16, kRowGroupBytes, Swizzle::k128B);
  const uint64_t k = matrix_descriptor(shared_address(keys), 16, kRowGroupBytes, Swizzle::k128B);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kScoreSteps; ++step) {
    const uint32_t offset = step / 4 * kSliceTileBytes + step % 4 * 32;
    wgmma_m64n64k16_bf16_ss(scores, advance_descriptor(q, offset), advance_descriptor(k, offset),
                            step > 0);
  }
  wgmma_commit_group();
}

// acc += weights * V. V is read MN-major: `leading` steps over slices, `stride` over 8 tokens.
__device__ __forceinline__ void accumulate_values(const float (&weights)[kScoreRegs],
                                                  const uint8_t* values,
                                                  float (&acc)[kOutputRegs]) {
  uint32_t a[kValueSteps][4];
#pragma unroll
  for (int step = 0; step < kValueSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[step][i] = cvt_bf16x2(weights[8 * step + 2 * i], weights[8 * step + 2 * i + 1]);
    }
  }
  const uint64_t v =
      matrix_descriptor(shared_address(values), kSliceTileBytes, kRowGroupBytes, Swizzle::k128B);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kValueSteps; ++step) {
    wgmma_m64n256k16_bf16_rs(acc, a[step], advance_descriptor(v, step * 2 * kRowGroupBytes), true);
  }
  wgmma_commit_group();
}

// Weight 0 does not silence a NaN in an unused slot of the cache, so those V rows become 0, once all
// threads of the warpgroup have met. Rows
// keep their place under the swizzle: it only permutes 16-byte chunks inside a row.
__device__ __forceinline__ void zero_unused_values(uint8_t* values, int num_valid) {
  constexpr int kChunksPerRow = kSliceBytes / 16;
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int chunk = thread % kChunksPerRow;
  for (int i = thread / kChunksPerRow; i < kSlices * kBlockTokens;
       i += kWarpgroupThreads / kChunksPerRow) {
    if (i % kBlockTokens >= num_valid) {
      *reinterpret_cast<uint4*>(values + i * kSliceBytes + chunk * 16) = make_uint4(0, 0, 0, 0);
    }
  }
  fence_proxy_async_shared();
}
