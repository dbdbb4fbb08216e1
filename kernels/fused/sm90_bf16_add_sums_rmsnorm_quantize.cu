// Residual add of what FFN ranks sent back, RMS normalisation, and quantisation in 1x128 groups.
//
//   params.residual      bf16[B, 7168]
//   params.sums          bf16[F, T, 7168]  slots that the ranks' GPUs have written; B <= T, F <= 32
//   params.present       u32[T]            bit f of row r: sums[f, r] is of this layer and is added
//   params.weight        bf16[7168]        older than the previous kernel
//   params.residual_out  bf16[B, 7168]     the sum; may be the residual itself; null: not stored
//   params.normed        bf16[B, 7168]     null: not stored
//   params.quantized     e4m3[B, 7168], f32[B, 56]; null: not stored
//   The sums that are present are added in fp32 in rank order, rounded to bf16, then added to the
//   residual. A row of the batch's padding has none and keeps its residual.
//
// Tile            one token a CTA, 16 values a thread, three sums in flight
// Threads         448, 2 CTAs per SM at least: 256 tokens are resident at once
// Shared memory   56 bytes
// Registers       68, 0 spills
// Roofline        14,336 bytes times (2 + sums of the row + 0.5) per token, 14,336 more for `normed`:
//                 at 256 tokens and 2 sums a row 20 MB, from L2: predicted 4.5 us, with the launch
// Reference       step3rt.ops.sums_rmsnorm_quantize.reference_add_sums_rmsnorm_quantize
//
// The slots are read through L2 only: what L1 holds of them is of the layer before.

#include "fused/partial_sums.cuh"
#include "fused/rmsnorm.cuh"

constexpr int kHidden = 7168;
constexpr int kThreads = 448;
constexpr int kSumsInFlight = 3;  // a fourth does not fit the registers; few rows have more
using Tile = RowTile<kHidden, kThreads>;

struct AddSumsParams {
  const uint16_t* residual;
  const uint16_t* sums;
  const int* present;
  const uint16_t* weight;
  uint16_t* residual_out;
  uint16_t* normed;
  QuantizedRows quantized;
  int num_ranks;
  int row_capacity;  // T
  float eps;
};

__device__ __forceinline__ void add_present(const AddSumsParams& params, int token, Tile& tile) {
  const uint32_t all = params.num_ranks < 32 ? (1u << params.num_ranks) - 1 : kFullWarp;
  uint32_t left = static_cast<uint32_t>(ld_global_cg(params.present + token)) & all;
  Totals<Tile> totals;
  while (left != 0) {
    Tile parts[kSumsInFlight] = {};
#pragma unroll
    for (int i = 0; i < kSumsInFlight; ++i) {
      if (left == 0) break;
      const int64_t rank = __ffs(left) - 1;
      left &= left - 1;
      parts[i].load_cg(params.sums + (rank * params.row_capacity + token) * kHidden);
    }
#pragma unroll
    for (int i = 0; i < kSumsInFlight; ++i) totals.add(parts[i]);
  }
  totals.add_to(tile);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    sm90_bf16_add_sums_rmsnorm_quantize(const __grid_constant__ AddSumsParams params) {
  const int token = blockIdx.x;
  const int64_t row = static_cast<int64_t>(token) * kHidden;
  Tile weight;
  weight.load(params.weight);
  griddepcontrol_launch_dependents();  // before the wait: the next kernel's weights are on their way
  griddepcontrol_wait();
  Tile tile;
  tile.load(params.residual + row);
  add_present(params, token, tile);
  if (params.residual_out != nullptr) tile.store(params.residual_out + row);
  tile.normalize(weight, params.eps);
  if (params.normed != nullptr) tile.store(params.normed + row);
  if (params.quantized.values != nullptr) tile.quantize(params.quantized, token);
}
