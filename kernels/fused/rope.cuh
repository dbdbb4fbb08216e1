// What the BF16 and FP8 RoPE + KV append kernels share: who owns which elements, and the rotation.
// Never touches the cache: its format is the kernel's.
//
// A CTA takes up to 32 heads of one token, a warp up to 4 whole heads: lane l owns dims 4l..4l+3 and
// their partners 128+4l..128+4l+3 (half-split pairing: dim j turns with dim j + 128). Everything is
// loaded before anything is stored: the kernel is two round trips to memory and no more.
#pragma once

#include "common/ptx.cuh"
#include "common/types.cuh"

constexpr int kRopeHeadDim = 256;
constexpr int kRopeHalf = kRopeHeadDim / 2;
constexpr int kRopeThreads = 256;
constexpr int kRopeWarps = kRopeThreads / kWarpThreads;
constexpr int kRopeDims = 4;  // consecutive dims of a lane, in each half
constexpr int kRopeHeadsPerWarp = 4;
constexpr int kRopeHeadsPerCta = kRopeWarps * kRopeHeadsPerWarp;
constexpr int kRopeCtasPerSm = 4;  // all of 256 tokens at 64 heads are resident at once

struct RopeParams {
  const uint16_t* q;     // bf16[T, num_heads, 256]
  const uint16_t* kv;    // bf16[T, 512], rows kv_stride apart: K then V of the token
  const int* positions;  // i32[T]
  const int* slots;      // i32[T]: KV block * 64 + offset in the block, -1: do not append
  const float* cos_sin;  // f32[max positions, 256]: cosines of the 128 angles, then sines
  int num_heads;
  int kv_stride;
};

// The lane's elements of a head, as loaded.
struct RopePacked {
  uint2 low;
  uint2 high;
};

struct RopeLane {
  float low[kRopeDims];   // dims 4l + i
  float high[kRopeDims];  // dims 128 + 4l + i
};

// What one warp does. `first_head` of its heads, which are kRopeWarps apart.
struct RopeTask {
  int token;
  int first_head;
  int slot;           // -1: nothing to append
  int kv_half;        // 0: append K, 1: append V, otherwise neither
  bool is_last_part;  // of the token's CTAs
  RopeLane angles;    // cosines, sines

  __device__ __forceinline__ bool appends() const { return kv_half < 2 && slot >= 0; }
};

__device__ __forceinline__ int rope_lane_dim() { return threadIdx.x % kWarpThreads * kRopeDims; }

// Reads positions, slots and angles, all older than the previous kernel: before its end.
__device__ __forceinline__ RopeTask rope_task(const RopeParams& params) {
  const int ctas_per_token = (params.num_heads + kRopeHeadsPerCta - 1) / kRopeHeadsPerCta;
  const int warp = threadIdx.x / kWarpThreads;
  const int part = blockIdx.x % ctas_per_token;
  RopeTask task;
  task.token = blockIdx.x / ctas_per_token;
  task.first_head = part * kRopeHeadsPerCta + warp;
  task.slot = params.slots[task.token];
  task.kv_half = part * kRopeWarps + warp;
  task.is_last_part = part == ctas_per_token - 1;
  const float* row =
      params.cos_sin + static_cast<int64_t>(params.positions[task.token]) * kRopeHeadDim;
  const float4 cosines = *reinterpret_cast<const float4*>(row + rope_lane_dim());
  const float4 sines = *reinterpret_cast<const float4*>(row + kRopeHalf + rope_lane_dim());
  task.angles = {{cosines.x, cosines.y, cosines.z, cosines.w},
                 {sines.x, sines.y, sines.z, sines.w}};
  return task;
}

__device__ __forceinline__ RopePacked rope_load(const uint16_t* head) {
  return {*reinterpret_cast<const uint2*>(head + rope_lane_dim()),
          *reinterpret_cast<const uint2*>(head + kRopeHalf + rope_lane_dim())};
}

__device__ __forceinline__ void rope_load_queries(const RopeParams& params, const RopeTask& task,
                                                  RopePacked (&heads)[kRopeHeadsPerWarp]) {
  const uint16_t* queries =
      params.q + static_cast<int64_t>(task.token) * params.num_heads * kRopeHeadDim;
#pragma unroll
  for (int i = 0; i < kRopeHeadsPerWarp; ++i) {
    const int head = task.first_head + i * kRopeWarps;
    if (head < params.num_heads) heads[i] = rope_load(queries + head * kRopeHeadDim);
  }
}

// K (0) or V (1) of the task's token.
__device__ __forceinline__ const uint16_t* rope_kv_row(const RopeParams& params,
                                                       const RopeTask& task, int half) {
  return params.kv + static_cast<int64_t>(task.token) * params.kv_stride + half * kRopeHeadDim;
}

__device__ __forceinline__ void rope_unpack(uint2 packed, float (&values)[kRopeDims]) {
  values[0] = bf16_low_to_float(packed.x);
  values[1] = bf16_high_to_float(packed.x);
  values[2] = bf16_low_to_float(packed.y);
  values[3] = bf16_high_to_float(packed.y);
}

__device__ __forceinline__ RopeLane rope_unpack(const RopePacked& packed) {
  RopeLane lane;
  rope_unpack(packed.low, lane.low);
  rope_unpack(packed.high, lane.high);
  return lane;
}

__device__ __forceinline__ RopeLane rope_rotate(const RopePacked& packed, const RopeLane& angles) {
  const RopeLane lane = rope_unpack(packed);
  RopeLane turned;
#pragma unroll
  for (int i = 0; i < kRopeDims; ++i) {
    turned.low[i] = lane.low[i] * angles.low[i] - lane.high[i] * angles.high[i];
    turned.high[i] = lane.high[i] * angles.low[i] + lane.low[i] * angles.high[i];
  }
  return turned;
}

__device__ __forceinline__ uint2 rope_pack_bf16(const float (&values)[kRopeDims]) {
  return make_uint2(cvt_bf16x2(values[0], values[1]), cvt_bf16x2(values[2], values[3]));
}

__device__ __forceinline__ void rope_store_bf16(uint16_t* head, const RopeLane& lane) {
  *reinterpret_cast<uint2*>(head + rope_lane_dim()) = rope_pack_bf16(lane.low);
  *reinterpret_cast<uint2*>(head + kRopeHalf + rope_lane_dim()) = rope_pack_bf16(lane.high);
}
