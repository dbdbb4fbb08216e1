// Rotary embedding of queries and keys, and the append of K and V to a paged BF16 cache.
//
//   params.q         bf16[T, N, 256]       queries of T tokens; T * ceil(N / 32) CTAs
//   params.kv        bf16[T, 512]          rows kv_stride apart: K then V, one shared head
//   params.positions i32[T]                rows of cos_sin
//   params.slots     i32[T]                KV block * 64 + offset, -1: the token is not appended
//   params.cos_sin   f32[P, 256]           cosines, then sines, of the 128 angles
//   q_out            bf16[T, N, 256]       rotated; may be q itself
//   kv_cache         bf16[B, 2, 64, 256]
//
// Tile            32 heads of a token a CTA, 4 heads a warp
// Threads         256, 4 CTAs per SM
// Shared memory   none
// Roofline        64 KiB moved per token at 64 heads: at 256 tokens 4 us from HBM; latency below
// Reference       step3rt.ops.rope_append.reference_rope
// Only q, kv and the cache may be of the previous kernel: the rest is read before its end.

#include "fused/rope.cuh"

constexpr int kBlockTokens = 64;

extern "C" __global__ void __launch_bounds__(kRopeThreads, kRopeCtasPerSm)
    sm90_bf16_rope_append(const __grid_constant__ RopeParams params, uint16_t* q_out,
                          uint16_t* kv_cache) {
  const RopeTask task = rope_task(params);
  griddepcontrol_launch_dependents();  // before the wait: decode's first blocks are on their way
  griddepcontrol_wait();
  RopePacked queries[kRopeHeadsPerWarp];
  rope_load_queries(params, task, queries);
  RopePacked kv;
  if (task.appends()) kv = rope_load(rope_kv_row(params, task, task.kv_half));
  if (task.appends()) {
    const int64_t half = static_cast<int64_t>(task.slot / kBlockTokens) * 2 + task.kv_half;
    const int64_t row = half * kBlockTokens + task.slot % kBlockTokens;
    // K turned, V as it is.
    rope_store_bf16(kv_cache + row * kRopeHeadDim,
                    task.kv_half == 0 ? rope_rotate(kv, task.angles) : rope_unpack(kv));
  }
  uint16_t* out = q_out + static_cast<int64_t>(task.token) * params.num_heads * kRopeHeadDim;
#pragma unroll
  for (int i = 0; i < kRopeHeadsPerWarp; ++i) {
    const int head = task.first_head + i * kRopeWarps;
    if (head < params.num_heads) {
      rope_store_bf16(out + head * kRopeHeadDim, rope_rotate(queries[i], task.angles));
    }
  }
}
