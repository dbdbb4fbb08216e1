// Quantisation of attention's output to e4m3 in 1x128 groups, for the output projection; of steps
// that decode alone computes, the decode kernel does it itself.
//
//   x            bf16[T, K]                K a multiple of 128: groups never cross a row's end
//   out          e4m3[T, K], f32[T, K / 128]
//   num_vectors  T * K / 8
//
// Tile            512 vectors of 8 values, 2 a thread, all loaded before one is used
// Threads         256
// Shared memory   none
// Roofline        3 bytes per value: at 256 tokens of 16,384 12.6 MB, 3 us from HBM; latency below
// Reference       step3rt.ops.quantize.quantize_groups

#include "fused/quantize.cuh"

#ifndef STEP3RT_QUANTIZE_THREADS
#define STEP3RT_QUANTIZE_THREADS 256
#endif
#ifndef STEP3RT_QUANTIZE_VECTORS
#define STEP3RT_QUANTIZE_VECTORS 2
#endif

constexpr int kQuantizeThreads = STEP3RT_QUANTIZE_THREADS;
constexpr int kVectors = STEP3RT_QUANTIZE_VECTORS;

extern "C" __global__ void __launch_bounds__(kQuantizeThreads, 1024 / kQuantizeThreads)
    sm90_bf16_quantize_groups(const uint16_t* x, const __grid_constant__ QuantizedRows out,
                              int64_t num_vectors) {
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * (kQuantizeThreads * kVectors) + threadIdx.x;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const uint4* vectors = reinterpret_cast<const uint4*>(x);
  if ((blockIdx.x + 1ll) * (kQuantizeThreads * kVectors) <= num_vectors) {
    uint4 packed[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) packed[i] = vectors[first + i * kQuantizeThreads];
    store_quantized(out, packed, first, kQuantizeThreads);
    return;
  }
  // The last tile. Whole warps of it take part in the exchange, those of no group with zeros.
  for (int i = 0; i < kVectors; ++i) {
    const int64_t vector = first + i * kQuantizeThreads;
    const bool is_inside = vector < num_vectors;
    const uint4 packed[1] = {is_inside ? vectors[vector] : make_uint4(0, 0, 0, 0)};
    GroupScale groups[1];
    group_scales(packed, groups);
    if (is_inside) {
      reinterpret_cast<uint2*>(out.values)[vector] = quantize_8(packed[0], groups[0]);
      if (threadIdx.x % kGroupLanes == 0) out.scales[vector / kGroupLanes] = groups[0].scale;
    }
  }
}
