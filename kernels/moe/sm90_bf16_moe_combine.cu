// Adds up what the experts of this instance made of each token, in a fixed order.
//
//   expert_out    bf16[S, R, H]   rows of the down projection, in S partial sums; H a multiple of 8
//   token_rows    i32[T, C + 1]   row of each copy, -1: none; see dispatch
//   topk_weights  f32[T, C]       router weights; the last column of token_rows, the shared expert,
//                                 has weight 1
//   out           bf16[T, H]      sum over columns of weight * sum over slices; 0 without any copy
//
// Tile            one token per CTA
// Threads         448
// Shared memory   none
// Roofline        L2, which holds expert_out: (C + 1) * S * T * H * 2 bytes
// Reference       step3rt.ops.moe_fp8.reference_expert
// The router weight is applied here, in fp32, and not by the down projection: it is one number per
// copy, and this kernel reads the copies of a token anyway.

#include "common/ptx.cuh"
#include "common/types.cuh"

constexpr int kThreads = 448;  // twice 16 bytes per thread for H = 7168
constexpr int kMaxColumns = 8;
constexpr int kVector = 8;  // bf16 values of a 16-byte access

struct MoeCombineParams {
  const uint8_t* expert_out;
  const int* token_rows;
  const float* topk_weights;
  uint8_t* out;
  int num_columns;  // C, at most 8
  int num_slices;
  int row_capacity;
  int width;  // H
};

__device__ __forceinline__ void add_scaled(float (&sum)[kVector], int4 packed, float weight) {
  const int words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    sum[2 * w] = fmaf(weight, __int_as_float(words[w] << 16), sum[2 * w]);
    sum[2 * w + 1] = fmaf(weight, __int_as_float(words[w] & 0xffff0000), sum[2 * w + 1]);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    sm90_bf16_moe_combine(const __grid_constant__ MoeCombineParams params) {
  const int token = blockIdx.x;
  const int num_copies = params.num_columns + 1;
  // Older than the previous kernel.
  int rows[kMaxColumns + 1];
  float weights[kMaxColumns + 1];
#pragma unroll
  for (int c = 0; c <= kMaxColumns; ++c) {
    rows[c] = c < num_copies ? ld_global_cg(params.token_rows + token * num_copies + c) : -1;
    weights[c] = c < params.num_columns
                     ? ld_global_cg(params.topk_weights + token * params.num_columns + c)
                     : 1.0f;
  }
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int num_vectors = params.width / kVector;
  const int4* expert_out = reinterpret_cast<const int4*>(params.expert_out);
  int4* out = reinterpret_cast<int4*>(params.out) + static_cast<int64_t>(token) * num_vectors;
#pragma unroll 1
  for (int i = threadIdx.x; i < num_vectors; i += kThreads) {
    float sum[kVector] = {};
#pragma unroll
    for (int c = 0; c <= kMaxColumns; ++c) {
      if (rows[c] < 0) continue;
      for (int slice = 0; slice < params.num_slices; ++slice) {
        const int64_t row = static_cast<int64_t>(slice) * params.row_capacity + rows[c];
        add_scaled(sum, ld_global_cg(expert_out + row * num_vectors + i), weights[c]);
      }
    }
    out[i] = make_int4(cvt_bf16x2(sum[0], sum[1]), cvt_bf16x2(sum[2], sum[3]),
                       cvt_bf16x2(sum[4], sum[5]), cvt_bf16x2(sum[6], sum[7]));
  }
}
