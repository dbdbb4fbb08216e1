// The products of a math warpgroup of sm90_fp8_linear, both operands in shared memory.
#pragma once

#include "common/wgmma.cuh"
#include "common/wgmma_e4m3.cuh"
#include "gemm/linear_layout.cuh"
#include "gemm/linear_ring.cuh"

__device__ __forceinline__ void multiply(const Shared& shared, int stage, int row_block,
                                         float (&product)[kRegs]) {
  const uint64_t x =
      matrix_descriptor(shared_address(shared.ring.x[stage]) + row_block * kMmaRows * kBlockK, 16,
                        kRowGroupBytes, Swizzle::k128B);
  const uint64_t w =
      matrix_descriptor(shared_address(shared.ring.w[stage]), 16, kRowGroupBytes, Swizzle::k128B);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma_e4m3_ss(product, advance_descriptor(x, step * kStepBytes),
                  advance_descriptor(w, step * kStepBytes), step > 0);
  }
  wgmma_commit_group();
}

// sum += product * scales
__device__ __forceinline__ void promote(const Work& work, const float (&product)[kRegs],
                                        const Scales& scales, float (&sum)[kRegs]) {
  const int columns = work.first_scale_columns();
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const bool is_second = kMayStraddle && 16 * p >= columns;
#pragma unroll
    for (int i = 8 * p; i < 8 * p + 8; ++i) {
      const int h = i / 2 % 2;
      sum[i] = fmaf(product[i], is_second ? scales.second[h] : scales.first[h], sum[i]);
    }
  }
}

// The products of `kBlocks` blocks of K, a unit per block and row block, in order.
template <int kBlocks>
struct Chunk {
  MathRing& ring;
  float (&sum)[kRowBlocks][kRegs];
  RingCursor<kStages> ahead;

  static constexpr int kCount = kBlocks * kRowBlocks;

  __device__ __forceinline__ void issue(int unit, float (&product)[kRegs]) {
    const int b = unit % kRowBlocks;
    if (b == 0) acquire(&ring.shared.full[ahead.stage], ahead.parity);
    multiply(ring.shared, ahead.stage, ring.group * kRowBlocks + b, product);
    if (b == kRowBlocks - 1) ahead.advance();
  }

  // Waits until all but `kPending` products are there and adds the oldest to the sum.
  template <int kPending>
  __device__ __forceinline__ void finish(int unit, float (&product)[kRegs]) {
    const int b = unit % kRowBlocks;
    const Scales scales = load_scales(ring.shared, ring.cursor.stage, ring.row + b * kMmaRows);
    wgmma_wait_group<kPending>(product);
    if (b == kRowBlocks - 1) ring.release_stage();
    promote(ring.work, product, scales, sum[b]);
  }

  // One product after the other: the other warpgroup multiplies while this one scales.
  __device__ __forceinline__ void run_singly() {
    float product[kRegs];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      issue(u, product);
      finish<0>(u, product);
    }
  }

  // Products are issued one ahead of the one that is scaled. Nothing is in flight at the end, which
  // is all that the compiler can follow in a loop.
  __device__ __forceinline__ void run_ahead() {
    float even[kRegs];
    float odd[kRegs];
    issue(0, even);
#pragma unroll
    for (int u = 0; u < kCount; u += 2) {
      if (u + 1 == kCount) {
        finish<0>(u, even);
        break;
      }
      issue(u + 1, odd);
      finish<1>(u, even);
      if (u + 2 < kCount) {
        issue(u + 2, even);
        finish<1>(u + 1, odd);
      } else {
        finish<0>(u + 1, odd);
      }
    }
  }
};

template <int kBlocks>
__device__ __forceinline__ void run_chunk(MathRing& ring, float (&sum)[kRowBlocks][kRegs]) {
  Chunk<kBlocks> chunk = {ring, sum, ring.cursor};
  if constexpr (kChunk == 0) {
    chunk.run_singly();
  } else {
    chunk.run_ahead();
  }
}

// All blocks of K of this CTA.
__device__ __forceinline__ void run_products(MathRing& ring, float (&sum)[kRowBlocks][kRegs]) {
  constexpr int kBlocks = kChunk == 0 ? 1 : kChunk;
  // The warpgroups drain at different times, so that the tensor cores always have work.
  if (kBlocks > 1 && ring.group == 1 && ring.remaining > kBlocks / 2) {
    run_chunk<(kBlocks + 1) / 2>(ring, sum);
  }
  while (ring.remaining >= kBlocks) run_chunk<kBlocks>(ring, sum);
  if (kBlocks > 2) {
    while (ring.remaining >= 2) run_chunk<2>(ring, sum);
  }
  if (kBlocks > 1 && ring.remaining > 0) run_chunk<1>(ring, sum);
}
