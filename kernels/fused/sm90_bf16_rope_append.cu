// Rotary embedding of queries and keys, and the append of K and V to a paged BF16 cache.
//
//   params.q         bf16[T, N, 256]       queries of T tokens
//   params.kv        bf16[T, 512]          rows kv_stride apart: K then V, one shared head
//   params.positions i32[T]                rows of cos_sin
//   params.slots     i32[T]                KV block * 64 + offset, -1: the token is not appended
//   params.cos_sin   f32[P, 256]           cosines, then sines, of the 128 angles
//   q_out            bf16[T, N, 256]       rotated; may be q itself
//   kv_cache         bf16[B, 2, 64, 256]
//
// Tile            one token a CTA, one head a warp at a time
// Threads         256
// Shared memory   none
// Roofline        HBM and L2: 65 KiB read and written per token at 64 heads; 256 tokens 4 us
// Reference       step3rt.ops.rope_append.reference_rope

#include "fused/rope.cuh"

constexpr int kBlockTokens = 64;

extern "C" __global__ void __launch_bounds__(kRopeThreads)
    sm90_bf16_rope_append(const __grid_constant__ RopeParams params, uint16_t* q_out,
                          uint16_t* kv_cache) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int token = blockIdx.x;
  const int warp = threadIdx.x / kWarpThreads;
  const RopeLane angles = rope_load_angles(params, token);
  const int slot = params.slots[token];
  if (warp < 2 && slot >= 0) {  // warp 0 appends K, warp 1 V
    RopeLane lane =
        rope_load(params.kv + static_cast<int64_t>(token) * params.kv_stride + warp * kRopeHeadDim);
    if (warp == 0) rope_rotate(lane, angles);
    const int64_t half = static_cast<int64_t>(slot / kBlockTokens) * 2 + warp;
    rope_store_bf16(kv_cache + (half * kBlockTokens + slot % kBlockTokens) * kRopeHeadDim, lane);
  }
  uint16_t* out = q_out + static_cast<int64_t>(token) * params.num_heads * kRopeHeadDim;
  rope_queries(params, token, angles, [&](int head, const RopeLane& lane) {
    rope_store_bf16(out + head * kRopeHeadDim, lane);
  });
}
