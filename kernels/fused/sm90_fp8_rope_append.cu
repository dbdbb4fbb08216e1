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
//                 V is transposed in the cache: 256 single-byte stores, one sector each, by all
//                 warps of the token's last CTA, so that no warp issues more than one of them
// Reference       step3rt.ops.rope_append.reference_rope
// Only q, kv and the cache may be of the previous kernel: the rest is read before its end.

#include "attention/fp8_kv_block.cuh"
#include "fused/rope.cuh"

constexpr float kLargestE4m3 = 448.0f;
constexpr float kSmallestAmax = 1e-12f;  // a head of zeros still gets a positive scale
static_assert(kRopeThreads == kRopeHeadDim, "a thread of the last CTA has one dim of V");

__device__ __forceinline__ uint32_t quantize(const float (&values)[kRopeDims], float factor) {
  return cvt_e4m3x4(values[0] * factor, values[1] * factor, values[2] * factor, values[3] * factor);
}

// The head's largest magnitude. Positive floats are ordered as their bits, which one instruction
// compares over the warp; NaN is above all.
__device__ __forceinline__ float head_amax(const RopeLane& lane) {
  uint32_t amax = __float_as_uint(kSmallestAmax);
#pragma unroll
  for (int i = 0; i < kRopeDims; ++i) {
    amax = max(amax, __float_as_uint(fabsf(lane.low[i])));
    amax = max(amax, __float_as_uint(fabsf(lane.high[i])));
  }
  return __uint_as_float(__reduce_max_sync(kFullWarp, amax));
}

__device__ __forceinline__ void append_key(uint8_t* block, int token_in_block, const RopeLane& lane,
                                           float factor) {
  const int dim = rope_lane_dim();
  *reinterpret_cast<uint32_t*>(block + fp8_key_offset(token_in_block, dim)) =
      quantize(lane.low, factor);
  *reinterpret_cast<uint32_t*>(block + fp8_key_offset(token_in_block, kRopeHalf + dim)) =
      quantize(lane.high, factor);
}

extern "C" __global__ void __launch_bounds__(kRopeThreads, kRopeCtasPerSm)
    sm90_fp8_rope_append(const __grid_constant__ RopeParams params, uint8_t* q_out, float* q_scale,
                         uint8_t* kv_cache, float k_inverse_scale, float v_inverse_scale) {
  const RopeTask task = rope_task(params);
  const bool appends_key = task.slot >= 0 && task.kv_half == 0;
  const bool appends_value = task.slot >= 0 && task.is_last_part;
  griddepcontrol_launch_dependents();  // before the wait: decode's first blocks are on their way
  griddepcontrol_wait();
  RopePacked queries[kRopeHeadsPerWarp];
  rope_load_queries(params, task, queries);
  RopePacked key;
  uint32_t value;
  if (appends_key) key = rope_load(rope_kv_row(params, task, 0));
  if (appends_value) value = rope_kv_row(params, task, 1)[threadIdx.x];

  const int64_t first_row = static_cast<int64_t>(task.token) * params.num_heads;
#pragma unroll
  for (int i = 0; i < kRopeHeadsPerWarp; ++i) {
    const int head = task.first_head + i * kRopeWarps;
    // Only the stores depend on there being such a head: without branches the heads overlap.
    const RopeLane turned = rope_rotate(queries[i], task.angles);
    const float amax = head_amax(turned);
    const float factor = kLargestE4m3 * rcp_approx(amax);
    const uint32_t low = quantize(turned.low, factor);
    const uint32_t high = quantize(turned.high, factor);
    if (head < params.num_heads) {
      uint8_t* out = q_out + (first_row + head) * kRopeHeadDim + rope_lane_dim();
      *reinterpret_cast<uint32_t*>(out) = low;
      *reinterpret_cast<uint32_t*>(out + kRopeHalf) = high;
      if (threadIdx.x % kWarpThreads == 0) {
        q_scale[first_row + head] = amax * (1.0f / kLargestE4m3);
      }
    }
  }

  uint8_t* block = kv_cache + static_cast<int64_t>(task.slot / kFp8BlockTokens) * kFp8BlockBytes;
  const int token_in_block = task.slot % kFp8BlockTokens;
  if (appends_key) {
    append_key(block, token_in_block, rope_rotate(key, task.angles), k_inverse_scale);
  }
  if (appends_value) {
    block[fp8_value_offset(token_in_block, threadIdx.x)] =
        static_cast<uint8_t>(cvt_e4m3x2(bf16_low_to_float(value) * v_inverse_scale, 0.0f));
  }
}
