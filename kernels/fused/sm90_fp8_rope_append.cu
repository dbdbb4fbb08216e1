// Rotary embedding of queries and keys, quantisation to e4m3, and the append to a paged FP8 cache.
//
//   params           as in sm90_bf16_rope_append
//   q_out            e4m3[T, N, 256]       rotated, divided by q_scale
//   q_scale          f32[T, N]             largest magnitude of the head over 448, positive
//   kv_cache         u8[B, 32768]          blocks in the layout of fp8_kv_block.cuh
//   k_inverse_scale  f32                   K and V are multiplied by these, then saturate at 448
//   v_inverse_scale  f32
//
// Tile            32 heads of a token a CTA, 4 heads a warp
// Threads         256, 4 CTAs per SM
// Shared memory   none
// Roofline        48 KiB moved per token at 64 heads: at 256 tokens 3 us from HBM; latency below.
//                 V is transposed in the cache: 256 single-byte stores, one sector each
// Reference       step3rt.ops.rope_append.reference_rope
// Only q, kv and the cache may be of the previous kernel: the rest is read before its end.

#include "attention/fp8_kv_block.cuh"
#include "fused/rope.cuh"

constexpr float kLargestE4m3 = 448.0f;
constexpr float kSmallestAmax = 1e-12f;  // a head of zeros still gets a positive scale

__device__ __forceinline__ uint32_t quantize(const float (&values)[kRopeDims], float factor) {
  return cvt_e4m3x4(values[0] * factor, values[1] * factor, values[2] * factor, values[3] * factor);
}

__device__ __forceinline__ float head_amax(const RopeLane& lane) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kRopeDims; ++i) {
    amax = fmaxf(amax, fmaxf(fabsf(lane.low[i]), fabsf(lane.high[i])));
  }
#pragma unroll
  for (int step = 1; step < kWarpThreads; step *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, step));
  }
  return amax;
}

__device__ __forceinline__ void append_key(uint8_t* block, int token_in_block, const RopeLane& lane,
                                           float factor) {
  const int dim = rope_lane_dim();
  *reinterpret_cast<uint32_t*>(block + fp8_key_offset(token_in_block, dim)) =
      quantize(lane.low, factor);
  *reinterpret_cast<uint32_t*>(block + fp8_key_offset(token_in_block, kRopeHalf + dim)) =
      quantize(lane.high, factor);
}

__device__ __forceinline__ void append_value(uint8_t* block, int token_in_block,
                                             const RopeLane& lane, float factor) {
  const int dim = rope_lane_dim();
  const uint32_t low = quantize(lane.low, factor);
  const uint32_t high = quantize(lane.high, factor);
#pragma unroll
  for (int i = 0; i < kRopeDims; ++i) {
    block[fp8_value_offset(token_in_block, dim + i)] = static_cast<uint8_t>(low >> 8 * i);
    block[fp8_value_offset(token_in_block, kRopeHalf + dim + i)] =
        static_cast<uint8_t>(high >> 8 * i);
  }
}

extern "C" __global__ void __launch_bounds__(kRopeThreads, kRopeCtasPerSm)
    sm90_fp8_rope_append(const __grid_constant__ RopeParams params, uint8_t* q_out, float* q_scale,
                         uint8_t* kv_cache, float k_inverse_scale, float v_inverse_scale) {
  const RopeTask task = rope_task(params);
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const RopeLoads loads = rope_load_all(params, task);
  if (task.appends()) {
    uint8_t* block = kv_cache + static_cast<int64_t>(task.slot / kFp8BlockTokens) * kFp8BlockBytes;
    const RopeLane lane = rope_kv(loads, task);
    const int token_in_block = task.slot % kFp8BlockTokens;
    if (task.kv_half == 0) {
      append_key(block, token_in_block, lane, k_inverse_scale);
    } else {
      append_value(block, token_in_block, lane, v_inverse_scale);
    }
  }
  const int64_t first_row = static_cast<int64_t>(task.token) * params.num_heads;
  rope_queries(params, task, loads, [&](int head, const RopeLane& lane) {
    const float amax = fmaxf(head_amax(lane), kSmallestAmax);
    const float factor = kLargestE4m3 / amax;
    uint8_t* out = q_out + (first_row + head) * kRopeHeadDim + rope_lane_dim();
    *reinterpret_cast<uint32_t*>(out) = quantize(lane.low, factor);
    *reinterpret_cast<uint32_t*>(out + kRopeHalf) = quantize(lane.high, factor);
    if (threadIdx.x % kWarpThreads == 0) q_scale[first_row + head] = amax / kLargestE4m3;
  });
}
