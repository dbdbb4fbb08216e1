// Linear layer in FP8 at decode sizes: out = x w^T, both block-scaled, fp32 sums.
//
//   x        e4m3[M, K]             any M >= 1; K a multiple of 128
//   x_scale  f32[M, K/128]          of 1x128 groups
//   w        e4m3[N, K]             N a multiple of 128 and of the tile
//   w_scale  f32[N/128, K/128]      of 128x128 blocks
//   out      bf16[M, N]             sum over k of x x_scale * w w_scale
//
// Tile            TILE_M tokens x TILE_N outputs; K is cut into SPLIT parts. A cluster holds the parts
//                 of CAST tiles of neighbouring outputs, which share x, times SHARE of neighbouring
//                 tokens, which share w. See linear_layout.cuh for these choices
// Threads         1 or 2 math warpgroups (up to 240 registers), a producer warpgroup (24 or 32): one
//                 warp copies, three bring scales
// Shared memory   STAGES x (128 B x (TILE_M + TILE_N) + scales), barriers; up to 227 KiB
// Roofline        HBM: N K bytes of weights, up to about 160 tokens; beyond it the tensor cores
// Accuracy        The FP8 tensor core truncates its accumulator: 128 of K go into their own, which
//                 is scaled and added to the sum in fp32
// Reference       step3rt.ops.linear_fp8.reference_linear_fp8
//
// The weight stream starts before the previous kernel has ended. Tiles are chosen so that all CTAs
// read the same share of the weights. The parts of K are added by the CTAs of one cluster through
// distributed shared memory, in the order of their ranks: no workspace, no counters, the same bits
// in every launch.

#include "common/barrier.cuh"
#include "common/cluster.cuh"
#include "common/ptx.cuh"
#include "common/tma.cuh"
#include "gemm/linear_layout.cuh"
#include "gemm/linear_producer.cuh"
#include "gemm/linear_products.cuh"
#include "gemm/linear_ring.cuh"

// Writes 16 columns (two 8-column groups, this thread's pairs a and b) of one row. Lanes exchange
// with their neighbour so that a row gets its 32 bytes in one store.
__device__ __forceinline__ void store(const LinearParams& params, const Work& work, int tile_row,
                                      int pair, float4 v) {
  const int lane = threadIdx.x % kWarpThreads;
  const bool is_odd = lane % 2 != 0;
  const uint32_t a = cvt_bf16x2(v.x, v.y);
  const uint32_t b = cvt_bf16x2(v.z, v.w);
  const uint32_t other = __shfl_xor_sync(kFullWarp, is_odd ? a : b, 1);
  const int column = work.first_output + 16 * pair + (is_odd ? 8 : 0) + lane % 4 / 2 * 4;
  const int t = work.first_token + tile_row;
  if (t < params.num_tokens) {
    *reinterpret_cast<uint2*>(params.out + static_cast<int64_t>(t) * params.num_outputs + column) =
        is_odd ? make_uint2(other, b) : make_uint2(a, other);
  }
}

// Every CTA sends its part of each unit to the CTA that owns it and adds up its own units, in the
// order of K.
__device__ __forceinline__ void reduce(Shared& shared, const MathRing& ring,
                                       const LinearParams& params,
                                       const float (&sum)[kRowBlocks][kRegs]) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const Work& work = ring.work;
  barrier_cluster_arrive_relaxed();  // all rings have run dry
  barrier_cluster_wait();
  const uint32_t parts = shared_address(&shared.parts.unit[work.split][0][thread]);
  const uint32_t summed = shared_address(&shared.summed);
#pragma unroll
  for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int i = 8 * p + 2 * h;
        const int unit = ((ring.group * kRowBlocks + b) * 2 + h) * kPairs + p;
        const int rank = Work::rank(unit % kSplit, work.cast, work.share);
        st_async(mapa_shared_cluster(parts + unit / kSplit * kUnitBytes, rank),
                 make_float4(sum[b][i], sum[b][i + 1], sum[b][i + 4], sum[b][i + 5]),
                 mapa_shared_cluster(summed, rank));
      }
    }
  }
  mbarrier_wait(&shared.summed, 0);
  __syncwarp();
  const int thread_row = thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
#pragma unroll 4
  for (int i = ring.group; i < kUnitsPerCta; i += kMathGroups) {
    const int unit = i * kSplit + work.split;
    if (kUnits % kSplit != 0 && unit >= kUnits) break;
    float4 total = shared.parts.unit[0][i][thread];
#pragma unroll
    for (int s = 1; s < kSplit; ++s) {
      const float4 part = shared.parts.unit[s][i][thread];
      total.x += part.x;
      total.y += part.y;
      total.z += part.z;
      total.w += part.w;
    }
    const int rows = unit / kPairs;  // row block and half
    store(params, work, rows / 2 * kMmaRows + rows % 2 * 8 + thread_row, unit % kPairs, total);
  }
}

__device__ __forceinline__ void compute(Shared& shared, const LinearParams& params,
                                        const Work& work) {
  const int group = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int row =
      group * kRowBlocks * kMmaRows + thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
  float sum[kRowBlocks][kRegs];
#pragma unroll
  for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < kRegs; ++i) sum[b][i] = 0.0f;
  }

  MathRing ring = {shared, work, group, row, RingCursor<kStages>(), work.num_blocks};
  run_products(ring, sum);

  if constexpr (kSplit > 1) {
    reduce(shared, ring, params, sum);
  } else {
    if constexpr (kPeers > 1) barrier_cluster_arrive_relaxed();  // what is copied here has arrived
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          const int i = 8 * p + 2 * h;
          store(params, work, row + b * kMmaRows + h * 8, p,
                make_float4(sum[b][i], sum[b][i + 1], sum[b][i + 4], sum[b][i + 5]));
        }
      }
    }
    if constexpr (kPeers > 1) barrier_cluster_wait();
  }
}

extern "C" __global__ void __cluster_dims__(kClusterCtas, 1, 1)
    __launch_bounds__(kThreads, kCtasPerSm)
        sm90_fp8_linear(const __grid_constant__ TensorMap x_map,
                        const __grid_constant__ TensorMap w_map,
                        const __grid_constant__ LinearParams params) {
  extern __shared__ uint8_t shared_base[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_base);
  if (shared_address(shared_base) % alignof(Shared) != 0) __trap();
  const Work work = load_work(params);
  const int warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);
  const Producer producer = {shared, &x_map, &w_map, work,
                             params.num_tiles_m == 1 ? kEvictFirst : kEvictNormal};
  const bool is_producer = threadIdx.x == kMathThreads;

  if (is_producer) {
    prefetch_tensormap(&w_map);
    prefetch_tensormap(&x_map);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&shared.full[i], 1 + kWarpArrivals);  // the copying thread, a scale warp
      mbarrier_init(&shared.empty[i], (kWarpArrivals + kPeers - 1) * kMathWarps);
    }
    mbarrier_init(&shared.summed, 1);
    fence_mbarrier_init();
    const int num_units = (kUnits - work.split + kSplit - 1) / kSplit;
    mbarrier_arrive_expect_tx(&shared.summed, kSplit * num_units * kUnitBytes);
    if (kShare == 1) producer.start();
  }
  __syncwarp();
  if constexpr (kClusterCtas > 1) {
    barrier_cluster_arrive_relaxed();  // nobody copies to others before all barriers are set up
    barrier_cluster_wait();
  }
  if (kShare > 1 && is_producer) producer.start();
  __syncthreads();

  if (warpgroup == kMathGroups) {
    setmaxnreg_dec<kProducerRegs>();
    const int warp = __shfl_sync(kFullWarp, threadIdx.x % kWarpgroupThreads / kWarpThreads, 0);
    if (warp > 0) {
      produce_scales(shared, params, work, warp - 1);
    } else if (is_producer) {
      producer.run();
    }
    __syncwarp();
    if constexpr (kClusterCtas > 1) {
      barrier_cluster_arrive_relaxed();
      barrier_cluster_wait();
    }
  } else {
    setmaxnreg_inc<kMathRegs>();
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();  // after the wait: then the grid before is done, too
    compute(shared, params, work);
  }
}
