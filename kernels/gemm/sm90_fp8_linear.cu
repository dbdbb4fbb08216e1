// Linear layer in FP8 at decode sizes: out = x w^T, both block-scaled, fp32 sums.
//
//   x        e4m3[M, K]             any M >= 1; K a multiple of 128
//   x_scale  f32[M, K/128]          of 1x128 groups
//   w        e4m3[N, K]             N a multiple of 128 and of the tile
//   w_scale  f32[N/128, K/128]      of 128x128 blocks
//   out      bf16[M, N]             sum over k of x x_scale * w w_scale
//
// Tile            TILE_M tokens x TILE_N outputs; K is cut into SPLIT parts. A cluster holds the parts
//                 of CAST neighbouring output tiles. See linear_layout.cuh for these choices
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
#include "common/wgmma.cuh"
#include "common/wgmma_e4m3.cuh"
#include "gemm/linear_layout.cuh"

// ---- producer ------------------------------------------------------------------------------

struct Producer {
  Shared& shared;
  const TensorMap* x_map;
  const TensorMap* w_map;
  const Work& work;
  uint64_t w_policy;

  __device__ __forceinline__ void load_w(int stage, int i) const {
    uint64_t* full = &shared.full[stage];
    mbarrier_arrive_expect_tx(full, (kTileM + kTileN) * kBlockK);
    cp_async_bulk_tensor_2d(shared.ring.w[stage], w_map, full, (work.first_block + i) * kBlockK,
                            work.first_output, w_policy);
  }

  // This CTA's share of the rows, for all CTAs of the cast.
  __device__ __forceinline__ void load_x(int stage, int i) const {
    constexpr int kRows = kTileM / kCast;
    uint64_t* full = &shared.full[stage];
    uint8_t* destination = shared.ring.x[stage] + work.cast * kRows * kBlockK;
    const int column = (work.first_block + i) * kBlockK;
    const int row = work.first_token + work.cast * kRows;
    if constexpr (kCast == 1) {
      cp_async_bulk_tensor_2d(destination, x_map, full, column, row, kEvictLast);
    } else {
      const uint16_t ctas = ((1 << kCast) - 1) << (work.split * kCast);
      cp_async_bulk_tensor_2d_multicast(destination, x_map, full, column, row, ctas, kEvictLast);
    }
  }

  // Weights that need no wait: the first pass through the ring.
  __device__ __forceinline__ void start() const {
    for (int i = 0; i < kStages && i < work.num_blocks; ++i) load_w(i, i);
  }

  __device__ __forceinline__ void run() const {
    griddepcontrol_wait();
    for (int i = 0; i < kStages && i < work.num_blocks; ++i) load_x(i, i);
    RingCursor<kStages> cursor;
    for (int i = kStages; i < work.num_blocks; ++i) {
      mbarrier_wait(&shared.empty[cursor.stage], cursor.parity);
      load_w(cursor.stage, i);
      load_x(cursor.stage, i);
      cursor.advance();
    }
  }
};

// One of the warps that bring the scales of every third block of K, several blocks ahead.
__device__ __forceinline__ void produce_scales(Shared& shared, const LinearParams& params,
                                               const Work& work, int warp) {
  constexpr int kRows = 4;  // of a lane at a time: this warpgroup has few registers
  const int lane = threadIdx.x % kWarpThreads;
  const float* w_scale = params.w_scale + work.first_output / kBlockN * params.num_blocks;
  const bool straddles = kMayStraddle && work.first_scale_columns() < kTileN;
  griddepcontrol_wait();
  for (int i = warp; i < work.num_blocks; i += kScaleWarps) {
    const int block = work.first_block + i;
    const int stage = i % kStages;
    float w[kScaleBlocks];
    w[0] = w_scale[block];
    if constexpr (kMayStraddle) w[1] = straddles ? w_scale[params.num_blocks + block] : 0.0f;
#pragma unroll 1
    for (int row = lane; row < kTileM; row += kRows * kWarpThreads) {
      float x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // Rows past the last token get that one's scale: their sums are not stored.
        const int t = min(work.first_token + row + r * kWarpThreads, params.num_tokens - 1);
        x[r] = ld_global_cg(params.x_scale + t * params.num_blocks + block);
      }
      if (i >= kStages) mbarrier_wait(&shared.empty[stage], (i / kStages - 1) & 1);
      __syncwarp();
#pragma unroll
      for (int s = 0; s < kScaleBlocks; ++s) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (kTileM % (kRows * kWarpThreads) == 0 || row + r * kWarpThreads < kTileM) {
            shared.scale[stage][s][row + r * kWarpThreads] = x[r] * w[s];
          }
        }
      }
    }
    __syncwarp();
    if (kWarpArrivals > 1 || lane == 0) mbarrier_arrive(&shared.full[stage]);
  }
}

// ---- math ----------------------------------------------------------------------------------

// Of one block of K: for the two rows of this thread, the first and the second scale block.
struct Scales {
  float first[2];
  float second[2];
};

struct MathThread {
  const LinearParams& params;
  const Work& work;
  int row;  // first of this thread, within the tile: row block 0, row half 0

  __device__ __forceinline__ Scales load_scales(const Shared& shared, int stage, int b) const {
    Scales scales;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + b * kMmaRows + 8 * h;
      scales.first[h] = shared.scale[stage][0][r];
      scales.second[h] = kMayStraddle ? shared.scale[stage][kScaleBlocks - 1][r] : 0.0f;
    }
    return scales;
  }

  // sum += product * scales
  __device__ __forceinline__ void promote(const float (&product)[kRegs], const Scales& scales,
                                          float (&sum)[kRegs]) const {
    const int columns = work.first_scale_columns();
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const bool is_second = kMayStraddle && 16 * p >= columns;
#pragma unroll
      for (int i = 8 * p; i < 8 * p + 8; ++i) {
        const int h = i / 2 % 2;
        sum[i] = fmaf(product[i], is_second ? scales.second[h] : scales.first[h], sum[i]);
      }
    }
  }

  // Writes 16 columns (two 8-column groups, this thread's pairs a and b) of one row. Lanes exchange
  // with their neighbour so that a row gets its 32 bytes in one store.
  __device__ __forceinline__ void store(int tile_row, int pair, float4 v) const {
    const int lane = threadIdx.x % kWarpThreads;
    const bool is_odd = lane % 2 != 0;
    const uint32_t a = cvt_bf16x2(v.x, v.y);
    const uint32_t b = cvt_bf16x2(v.z, v.w);
    const uint32_t other = __shfl_xor_sync(kFullWarp, is_odd ? a : b, 1);
    const int column = work.first_output + 16 * pair + (is_odd ? 8 : 0) + lane % 4 / 2 * 4;
    const int t = work.first_token + tile_row;
    if (t < params.num_tokens) {
      *reinterpret_cast<uint2*>(params.out + static_cast<int64_t>(t) * params.num_outputs +
                                column) = is_odd ? make_uint2(other, b) : make_uint2(a, other);
    }
  }
};

__device__ __forceinline__ void multiply(const Shared& shared, int stage, int row_block,
                                         float (&product)[kRegs]) {
  const uint64_t x =
      matrix_descriptor(shared_address(shared.ring.x[stage]) + row_block * kMmaRows * kBlockK, 16,
                        kRowGroupBytes, Swizzle::k128B);
  const uint64_t w =
      matrix_descriptor(shared_address(shared.ring.w[stage]), 16, kRowGroupBytes, Swizzle::k128B);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma_e4m3_ss(product, advance_descriptor(x, step * kStepBytes),
                  advance_descriptor(w, step * kStepBytes), step > 0);
  }
  wgmma_commit_group();
}

__device__ __forceinline__ void acquire(uint64_t* barrier, uint32_t parity) {
  mbarrier_wait(barrier, parity);
  __syncwarp();
}

// One arrival per warp at every CTA that casts into this stage. Those of the last pass through the
// ring have nobody waiting, and their CTA may be gone: `is_awaited` is false.
__device__ __forceinline__ void release(uint64_t* barrier, const Work& work, bool is_awaited) {
  __syncwarp();
  const int lane = threadIdx.x % kWarpThreads;
  if (!is_awaited) return;
  if constexpr (kCast == 1) {
    if (kWarpArrivals > 1 || lane == 0) mbarrier_arrive(barrier);
  } else {
    if (kWarpArrivals > 1) mbarrier_arrive(barrier);
    if (lane == work.cast) {
      if (kWarpArrivals == 1) mbarrier_arrive(barrier);
    } else if (lane < kCast) {
      mbarrier_arrive_relaxed_cluster(barrier, work.split * kCast + lane);
    }
  }
}

// The consuming side of the ring.
struct MathRing {
  Shared& shared;
  const Work& work;
  RingCursor<kStages> cursor;
  int remaining;

  __device__ __forceinline__ void release_stage() {
    release(&shared.empty[cursor.stage], work, remaining > kStages);
    cursor.advance();
    --remaining;
  }
};

// The products of `kBlocks` blocks of K, a unit per block and row block, in order.
template <int kBlocks>
struct Chunk {
  const MathThread& math;
  MathRing& ring;
  int group;
  float (&sum)[kRowBlocks][kRegs];
  RingCursor<kStages> ahead;

  static constexpr int kCount = kBlocks * kRowBlocks;

  __device__ __forceinline__ void issue(int unit, float (&product)[kRegs]) {
    const int b = unit % kRowBlocks;
    if (b == 0) acquire(&ring.shared.full[ahead.stage], ahead.parity);
    multiply(ring.shared, ahead.stage, group * kRowBlocks + b, product);
    if (b == kRowBlocks - 1) ahead.advance();
  }

  // Waits until all but `kPending` products are there and adds the oldest to the sum.
  template <int kPending>
  __device__ __forceinline__ void finish(int unit, float (&product)[kRegs]) {
    const int b = unit % kRowBlocks;
    const Scales scales = math.load_scales(ring.shared, ring.cursor.stage, b);
    wgmma_wait_group<kPending>(product);
    if (b == kRowBlocks - 1) ring.release_stage();
    math.promote(product, scales, sum[b]);
  }

  // One product after the other: the other warpgroup multiplies while this one scales.
  __device__ __forceinline__ void run_singly() {
    float product[kRegs];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      issue(u, product);
      finish<0>(u, product);
    }
  }

  // Products are issued one ahead of the one that is scaled. Nothing is in flight at the end, which
  // is all that the compiler can follow in a loop.
  __device__ __forceinline__ void run_ahead() {
    float even[kRegs];
    float odd[kRegs];
    issue(0, even);
#pragma unroll
    for (int u = 0; u < kCount; u += 2) {
      if (u + 1 == kCount) {
        finish<0>(u, even);
        break;
      }
      issue(u + 1, odd);
      finish<1>(u, even);
      if (u + 2 < kCount) {
        issue(u + 2, even);
        finish<1>(u + 1, odd);
      } else {
        finish<0>(u + 1, odd);
      }
    }
  }
};

template <int kBlocks>
__device__ __forceinline__ void run_chunk(const MathThread& math, MathRing& ring, int group,
                                          float (&sum)[kRowBlocks][kRegs]) {
  Chunk<kBlocks> chunk = {math, ring, group, sum, ring.cursor};
  if constexpr (kChunk == 0) {
    chunk.run_singly();
  } else {
    chunk.run_ahead();
  }
}

// Every CTA sends its part of each unit to the CTA that owns it and adds up its own units, in the
// order of K.
__device__ __forceinline__ void reduce(Shared& shared, const MathThread& math, int group,
                                       const float (&sum)[kRowBlocks][kRegs]) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const Work& work = math.work;
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
        const int unit = ((group * kRowBlocks + b) * 2 + h) * kPairs + p;
        const int rank = unit % kSplit * kCast + work.cast;
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
  for (int i = group; i < kUnitsPerCta; i += kMathGroups) {
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
    math.store(rows / 2 * kMmaRows + rows % 2 * 8 + thread_row, unit % kPairs, total);
  }
}

__device__ __forceinline__ void compute(Shared& shared, const LinearParams& params,
                                        const Work& work) {
  const int group = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);
  const int thread = threadIdx.x % kWarpgroupThreads;
  const MathThread math = {
      params, work,
      group * kRowBlocks * kMmaRows + thread / kWarpThreads * 16 + thread % kWarpThreads / 4};
  float sum[kRowBlocks][kRegs];
#pragma unroll
  for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < kRegs; ++i) sum[b][i] = 0.0f;
  }

  MathRing ring = {shared, work, RingCursor<kStages>(), work.num_blocks};
  constexpr int kBlocks = kChunk == 0 ? 1 : kChunk;
  // The warpgroups drain at different times, so that the tensor cores always have work.
  if (kBlocks > 1 && group == 1 && ring.remaining > kBlocks / 2) {
    run_chunk<(kBlocks + 1) / 2>(math, ring, group, sum);
  }
  while (ring.remaining >= kBlocks) run_chunk<kBlocks>(math, ring, group, sum);
  if (kBlocks > 2) {
    while (ring.remaining >= 2) run_chunk<2>(math, ring, group, sum);
  }
  if (kBlocks > 1 && ring.remaining > 0) run_chunk<1>(math, ring, group, sum);

  if constexpr (kSplit > 1) {
    reduce(shared, math, group, sum);
  } else {
    if constexpr (kCast > 1) barrier_cluster_arrive_relaxed();  // what is cast here has arrived
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          const int i = 8 * p + 2 * h;
          math.store(math.row + b * kMmaRows + h * 8, p,
                     make_float4(sum[b][i], sum[b][i + 1], sum[b][i + 4], sum[b][i + 5]));
        }
      }
    }
    if constexpr (kCast > 1) barrier_cluster_wait();
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
      mbarrier_init(&shared.empty[i], (kWarpArrivals + kCast - 1) * kMathWarps);
    }
    mbarrier_init(&shared.summed, 1);
    fence_mbarrier_init();
    const int num_units = (kUnits - work.split + kSplit - 1) / kSplit;
    mbarrier_arrive_expect_tx(&shared.summed, kSplit * num_units * kUnitBytes);
    producer.start();
  }
  __syncwarp();
  if constexpr (kClusterCtas > 1) {
    barrier_cluster_arrive_relaxed();  // nobody casts before all barriers are set up
    barrier_cluster_wait();
  }
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
