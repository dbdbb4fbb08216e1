// RMS normalisation of the low-rank query and its quantisation to e4m3 in 1x128 groups.
//
//   latent         bf16[T, 2048]    rows latent_stride apart: a slice of the fused projection
//   weight         bf16[2048]       inter_norm; older than the previous kernel
//   quantized      e4m3[T, 2048], f32[T, 16]
//
// Tile            one token a CTA, 8 values a thread
// Threads         256
// Shared memory   32 bytes
// Roofline        6 KiB per token: at 256 tokens 0.4 us from HBM; latency below
// Reference       step3rt.ops.rmsnorm_quantize.reference_add_rmsnorm_quantize

#include "fused/rmsnorm.cuh"

#ifndef STEP3RT_NORM_THREADS
#define STEP3RT_NORM_THREADS 256
#endif

constexpr int kQueryRank = 2048;
constexpr int kNormThreads = STEP3RT_NORM_THREADS;
using Tile = RowTile<kQueryRank, kNormThreads>;

extern "C" __global__ void __launch_bounds__(kNormThreads, 4)
    sm90_bf16_rmsnorm_quantize(const uint16_t* latent, int64_t latent_stride,
                               const uint16_t* weight, const __grid_constant__ QuantizedRows out,
                               float eps) {
  Tile weights;
  weights.load(weight);
  griddepcontrol_launch_dependents();  // before the wait: the next kernel's weights are on their way
  griddepcontrol_wait();
  Tile tile;
  tile.load(latent + blockIdx.x * latent_stride);
  tile.normalize(weights, eps);
  tile.quantize(out, blockIdx.x);
}
