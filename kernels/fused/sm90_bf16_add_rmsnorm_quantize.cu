// Residual add, RMS normalisation of the hidden state, and quantisation to e4m3 in 1x128 groups.
//
//   params.residual      bf16[T, 7168]
//   params.partial_sums  bf16[n, T, 7168]  added in fp32 in order, rounded to bf16, then added to
//                                          the residual; n = 0: nothing is added
//   params.weight        bf16[7168]        older than the previous kernel
//   params.residual_out  bf16[T, 7168]     the sum; may be the residual itself; null: not stored
//   params.normed        bf16[T, 7168]     null: not stored
//   params.quantized     e4m3[T, 7168], f32[T, 56]; null: not stored
//
// Tile            one token a CTA, 16 values a thread
// Threads         448, 2 CTAs per SM at least: 256 tokens are resident at once
// Shared memory   56 bytes
// Roofline        14,336 bytes times (2 + n + 0.5) per token and 14,336 more for `normed`: at 256
//                 tokens and n = 1 12.8 MB, 3 us from HBM; the inputs are in L2 in a decode step
// Reference       step3rt.ops.rmsnorm_quantize.reference_add_rmsnorm_quantize

#include "fused/partial_sums.cuh"
#include "fused/rmsnorm.cuh"

#ifndef STEP3RT_NORM_THREADS
#define STEP3RT_NORM_THREADS 448
#endif
#ifndef STEP3RT_NORM_CTAS
#define STEP3RT_NORM_CTAS 2
#endif
#ifndef STEP3RT_NORM_SINGLE
#define STEP3RT_NORM_SINGLE 0
#endif

constexpr int kHidden = 7168;
// The build for exactly one partial sum needs a third fewer registers, so that CTAs of the next
// kernel fit beside this one's.
constexpr bool kIsSingle = STEP3RT_NORM_SINGLE;
constexpr int kNormThreads = STEP3RT_NORM_THREADS;
using Tile = RowTile<kHidden, kNormThreads>;

struct AddNormParams {
  const uint16_t* residual;
  const uint16_t* partial_sums;
  const uint16_t* weight;
  uint16_t* residual_out;
  uint16_t* normed;
  QuantizedRows quantized;
  int num_partial_sums;
  int num_tokens;
  float eps;
};

__device__ __forceinline__ uint32_t add_one(uint32_t residual, uint32_t part) {
  return cvt_bf16x2(bf16_low_to_float(residual) + bf16_low_to_float(part),
                    bf16_high_to_float(residual) + bf16_high_to_float(part));
}

// All in flight before one is used.
template <int kCount>
__device__ __forceinline__ void add_tiles(const uint16_t* source, int64_t stride,
                                          Totals<Tile>& totals) {
  Tile tiles[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) tiles[i].load(source + i * stride);
#pragma unroll
  for (int i = 0; i < kCount; ++i) totals.add(tiles[i]);
}

__device__ __forceinline__ void add_partial_sums(const AddNormParams& params, int64_t row,
                                                 Tile& tile) {
  const int64_t stride = static_cast<int64_t>(params.num_tokens) * kHidden;
  const uint16_t* source = params.partial_sums + row;
  if constexpr (kIsSingle) {
    Tile part;
    part.load(source);
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      tile.packed[i].x = add_one(tile.packed[i].x, part.packed[i].x);
      tile.packed[i].y = add_one(tile.packed[i].y, part.packed[i].y);
      tile.packed[i].z = add_one(tile.packed[i].z, part.packed[i].z);
      tile.packed[i].w = add_one(tile.packed[i].w, part.packed[i].w);
    }
    return;
  }
  Totals<Tile> totals;
  int left = params.num_partial_sums;
  for (; left > 3; left -= 2, source += 2 * stride) add_tiles<2>(source, stride, totals);
  if (left == 3) {
    add_tiles<3>(source, stride, totals);
  } else if (left == 2) {
    add_tiles<2>(source, stride, totals);
  } else {
    add_tiles<1>(source, stride, totals);
  }
  totals.add_to(tile);
}

extern "C" __global__ void __launch_bounds__(kNormThreads, STEP3RT_NORM_CTAS)
    sm90_bf16_add_rmsnorm_quantize(const __grid_constant__ AddNormParams params) {
  const int token = blockIdx.x;
  const int64_t row = static_cast<int64_t>(token) * kHidden;
  Tile weight;
  weight.load(params.weight);
  griddepcontrol_launch_dependents();  // before the wait: the next kernel's weights are on their way
  griddepcontrol_wait();
  Tile tile;
  tile.load(params.residual + row);
  if (params.num_partial_sums > 0) add_partial_sums(params, row, tile);
  if (params.residual_out != nullptr) tile.store(params.residual_out + row);
  tile.normalize(weight, params.eps);
  if (params.normed != nullptr) tile.store(params.normed + row);
  if (params.quantized.values != nullptr) tile.quantize(params.quantized, token);
}
