// Linear layer in FP8 at decode sizes: out = x w^T, both block-scaled, fp32 sums.
//
//   x        e4m3[M, K]             any M >= 1; K a multiple of 128
//   x_scale  f32[M, K/128]          of 1x128 groups
//   w        e4m3[N, K]             N a multiple of 128 and of the tile
//   w_scale  f32[N/128, K/128]      of 128x128 blocks
//   out      bf16[M, N]             sum over k of x x_scale * w w_scale
//
// Tile            STEP3RT_TILE_M tokens x STEP3RT_TILE_N outputs; K is cut into STEP3RT_SPLIT equal
//                 parts. A cluster holds the parts of STEP3RT_CAST neighbouring output tiles
// Threads         math warpgroups (STEP3RT_TILE_M / 64, two at most), then one producer warp
// Shared memory   STEP3RT_STAGES x 128 B x (TILE_M + TILE_N), barriers
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
#include "common/types.cuh"
#include "common/wgmma.cuh"
#include "common/wgmma_e4m3.cuh"

// The launcher's choice; these defaults fit every shape.
#ifndef STEP3RT_TILE_M
#define STEP3RT_TILE_M 128
#define STEP3RT_TILE_N 128
#define STEP3RT_SPLIT 1
#define STEP3RT_CAST 1
#define STEP3RT_STAGES 6
#define STEP3RT_CTAS_PER_SM 1
#define STEP3RT_OVERLAP 1
#define STEP3RT_PREFETCH 0
#endif

constexpr int kTileM = STEP3RT_TILE_M;
constexpr int kTileN = STEP3RT_TILE_N;
constexpr int kSplit = STEP3RT_SPLIT;    // CTAs that share a tile, each with its part of K
constexpr int kCast = STEP3RT_CAST;      // CTAs that share a part of x, for tiles side by side
constexpr int kStages = STEP3RT_STAGES;  // of the ring
constexpr int kClusterCtas = kSplit * kCast;

constexpr int kBlockK = 128;  // bytes and elements: the scales' granularity and the swizzle's width
constexpr int kBlockN = 128;  // rows of one weight scale
constexpr int kStepBytes = 32;  // wgmma K
constexpr int kSteps = kBlockK / kStepBytes;
constexpr int kRowGroupBytes = 8 * kBlockK;
constexpr int kMmaRows = 64;
constexpr int kMathGroups = kTileM / kMmaRows < 2 ? 1 : 2;
constexpr int kRowBlocks = kTileM / kMmaRows / kMathGroups;  // of each math warpgroup
constexpr int kMathThreads = kMathGroups * kWarpgroupThreads;
constexpr int kMathWarps = kMathThreads / kWarpThreads;
constexpr int kThreads = kMathThreads + kWarpgroupThreads;
// A single math warpgroup has enough registers with two CTAs on an SM, and 255 at entry would be more
// than setmaxnreg can name.
constexpr int kCtasPerSm = kMathGroups == 1 && STEP3RT_CTAS_PER_SM < 2 ? 2 : STEP3RT_CTAS_PER_SM;
// Registers per thread that the launch bounds leave, then moved from the producer to the math.
constexpr int kEntryRegs = 65536 / (kThreads * kCtasPerSm) / 8 * 8;
constexpr int kProducerRegs = 24;
constexpr int kFreeRegs = (kEntryRegs + (kEntryRegs - kProducerRegs) / kMathGroups) / 8 * 8;
constexpr int kMathRegs = kFreeRegs < 240 ? kFreeRegs : 240;
constexpr int kRegs = kMmaRows * kTileN / kWarpgroupThreads;  // accumulators per row block
constexpr int kPairs = kTileN / 16;                           // of 8-column groups
constexpr int kBarrierMath = 1;
constexpr bool kMayStraddle = kBlockN % kTileN != 0;  // a tile may lie in two scale blocks
constexpr bool kOverlap = STEP3RT_OVERLAP != 0;
constexpr int kPrefetch =
    STEP3RT_PREFETCH;  // blocks of K that follow the ring's first pass into L2

static_assert(kTileM % (kCast * 8) == 0 && kTileM <= 256, "a CTA casts whole swizzle groups of x");
static_assert(kTileN % 16 == 0 && kTileN <= 256, "outputs are stored in pairs of column groups");
static_assert(kClusterCtas <= 8, "the portable cluster size");

// Parts of a sum in the layout of the registers; unit = (row block, row half, pair of column
// groups) of 32 rows x 16 columns.
constexpr int kUnits = kTileM / kMmaRows * 2 * kPairs;
struct PartialTile {
  float4 unit[kUnits][kWarpgroupThreads];
};

struct Ring {
  uint8_t x[kStages][kTileM * kBlockK];
  uint8_t w[kStages][kTileN * kBlockK];
};

// Shared memory, from a 1,024-byte aligned base (the period of the 128-byte swizzle).
struct alignas(1024) Shared {
  union {
    Ring ring;
    PartialTile partial;  // when the ring has run dry
  };
  uint64_t full[kStages];   // completes when x and w have landed
  uint64_t empty[kStages];  // completes when the math warps of all CTAs of the cast are done
};
static_assert(kSplit == 1 || sizeof(PartialTile) <= sizeof(Ring), "partial sums need the room");

struct LinearParams {
  const float* x_scale;
  const float* w_scale;
  uint16_t* out;
  int num_tokens;
  int num_outputs;
  int num_blocks;  // K / 128
  int num_tiles_m;
};

// What this CTA computes. Clusters of the same weights are neighbours, so that these are read from
// L2 by all but one of them.
struct Work {
  int first_token;
  int first_output;
  int first_block;  // of K
  int num_blocks;
  int split;  // rank among the CTAs of the same tile
  int cast;   // rank among the CTAs that share x
};

__device__ __forceinline__ Work load_work(const LinearParams& params) {
  const int rank = cluster_ctarank();
  const int cluster = blockIdx.x / kClusterCtas;
  Work work;
  work.split = rank / kCast;
  work.cast = rank % kCast;
  work.first_token = cluster % params.num_tiles_m * kTileM;
  work.first_output = (cluster / params.num_tiles_m * kCast + work.cast) * kTileN;
  work.num_blocks = params.num_blocks / kSplit;
  work.first_block = work.split * work.num_blocks;
  return work;
}

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
    for (int i = kStages; i < kStages + kPrefetch && i < work.num_blocks; ++i) {
      cp_async_bulk_prefetch_tensor_2d(w_map, (work.first_block + i) * kBlockK, work.first_output,
                                       w_policy);
    }
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

// ---- math ----------------------------------------------------------------------------------

// Scales of one 128 of K for the rows and columns of this thread.
struct Scales {
  float x[kRowBlocks][2];
  float w[2];  // of the tile's first and second scale block
};

struct MathThread {
  const LinearParams& params;
  const Work& work;
  int row;      // first of this thread, within the tile: row block 0, row half 0
  int columns;  // of the tile that lie in its first scale block

  __device__ __forceinline__ int token(int row_block, int half) const {
    return work.first_token + row + row_block * kMmaRows + half * 8;
  }

  // x_scale may be younger than what L1 holds; rows past the last token read that one's.
  __device__ __forceinline__ Scales load_scales(int i) const {
    const int block = work.first_block + min(i, work.num_blocks - 1);
    Scales scales;
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int t = min(token(b, h), params.num_tokens - 1);
        scales.x[b][h] = ld_global_cg(params.x_scale + t * params.num_blocks + block);
      }
    }
    const int first = work.first_output / kBlockN;
    scales.w[0] = params.w_scale[first * params.num_blocks + block];
    scales.w[1] = scales.w[0];
    if (kMayStraddle && columns < kTileN) {
      scales.w[1] = params.w_scale[(first + 1) * params.num_blocks + block];
    }
    return scales;
  }

  // sum += product * scales
  __device__ __forceinline__ void promote(const float (&product)[kRegs], const float (&x)[2],
                                          const float (&w)[2], float (&sum)[kRegs]) const {
    const float first[2] = {x[0] * w[0], x[1] * w[0]};
    const float second[2] = {x[0] * w[1], x[1] * w[1]};
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const bool is_second = kMayStraddle && 16 * p >= columns;
#pragma unroll
      for (int i = 8 * p; i < 8 * p + 8; ++i) {
        const int h = i / 2 % 2;
        sum[i] = fmaf(product[i], is_second ? second[h] : first[h], sum[i]);
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
    if (lane == 0) mbarrier_arrive(barrier);
  } else {
    if (lane < kCast) mbarrier_arrive_cluster(barrier, work.split * kCast + lane);
  }
}

// The parts of a tile's sum are added in the order of K, each unit by one of the CTAs.
__device__ __forceinline__ void reduce(Shared& shared, const MathThread& math, int group,
                                       const float (&sum)[kRowBlocks][kRegs]) {
  constexpr int kTurn = kSplit * kMathGroups;
  constexpr int kTurns = (kUnits + kTurn - 1) / kTurn;
  const int thread = threadIdx.x % kWarpgroupThreads;
  bar_sync<kBarrierMath, kMathThreads>();  // the other warpgroup is done with the ring
#pragma unroll
  for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int i = 8 * p + 2 * h;
        shared.partial.unit[((group * kRowBlocks + b) * 2 + h) * kPairs + p][thread] =
            make_float4(sum[b][i], sum[b][i + 1], sum[b][i + 4], sum[b][i + 5]);
      }
    }
  }
  barrier_cluster_arrive();
  barrier_cluster_wait();
  const int thread_row = thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
#pragma unroll 2
  for (int turn = 0; turn < kTurns; ++turn) {
    const int unit = (turn * kMathGroups + group) * kSplit + math.work.split;
    if (kUnits % kTurn != 0 && unit >= kUnits) break;
    const uint32_t address = shared_address(&shared.partial.unit[unit][thread]);
    float4 part[kSplit];
#pragma unroll
    for (int s = 0; s < kSplit; ++s) {
      part[s] = ld_shared_cluster(mapa_shared_cluster(address, s * kCast + math.work.cast));
    }
    float4 total = part[0];
#pragma unroll
    for (int s = 1; s < kSplit; ++s) {
      total.x += part[s].x;
      total.y += part[s].y;
      total.z += part[s].z;
      total.w += part[s].w;
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
      group * kRowBlocks * kMmaRows + thread / kWarpThreads * 16 + thread % kWarpThreads / 4,
      kBlockN - work.first_output % kBlockN};
  float sum[kRowBlocks][kRegs];
#pragma unroll
  for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < kRegs; ++i) sum[b][i] = 0.0f;
  }

  Scales next = math.load_scales(0);
  RingCursor<kStages> cursor;
  if constexpr (kOverlap) {
    // Two products at a time: the second is multiplied while the first is scaled.
    int i = 0;
    for (; i + 1 < work.num_blocks; i += 2) {
      const Scales first = next;
      const Scales second = math.load_scales(i + 1);
      next = math.load_scales(i + 2);
      float even[kRegs];
      float odd[kRegs];
      uint64_t* const even_empty = &shared.empty[cursor.stage];
      acquire(&shared.full[cursor.stage], cursor.parity);
      multiply(shared, cursor.stage, group, even);
      cursor.advance();
      acquire(&shared.full[cursor.stage], cursor.parity);
      multiply(shared, cursor.stage, group, odd);
      wgmma_wait_group<1>(even);
      release(even_empty, work, i + kStages < work.num_blocks);
      math.promote(even, first.x[0], first.w, sum[0]);
      wgmma_wait_group<0>(odd);
      release(&shared.empty[cursor.stage], work, i + 1 + kStages < work.num_blocks);
      math.promote(odd, second.x[0], second.w, sum[0]);
      cursor.advance();
    }
    if (i < work.num_blocks) {
      float last[kRegs];
      acquire(&shared.full[cursor.stage], cursor.parity);
      multiply(shared, cursor.stage, group, last);
      wgmma_wait_group<0>(last);
      math.promote(last, next.x[0], next.w, sum[0]);
    }
  } else {
    for (int i = 0; i < work.num_blocks; ++i) {
      const Scales now = next;
      next = math.load_scales(i + 1);
      acquire(&shared.full[cursor.stage], cursor.parity);
      float product[kRegs];
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
        multiply(shared, cursor.stage, group * kRowBlocks + b, product);
        wgmma_wait_group<0>(product);
        if (b == kRowBlocks - 1) {
          release(&shared.empty[cursor.stage], work, i + kStages < work.num_blocks);
        }
        math.promote(product, now.x[b], now.w, sum[b]);
      }
      cursor.advance();
    }
  }

  if constexpr (kSplit > 1) {
    reduce(shared, math, group, sum);
  } else {
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
  }
}

// The other CTAs of the cluster may still read from this one, or cast into it.
__device__ __forceinline__ void leave() {
  if constexpr (kClusterCtas > 1) {
    barrier_cluster_arrive();
    barrier_cluster_wait();
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
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kCast * kMathWarps);
    }
    fence_mbarrier_init();
    producer.start();
  }
  __syncwarp();
  if constexpr (kClusterCtas > 1) {
    barrier_cluster_arrive();  // nobody casts before all barriers are set up
    barrier_cluster_wait();
  } else {
    __syncthreads();
  }

  if (warpgroup == kMathGroups) {
    setmaxnreg_dec<kProducerRegs>();
    if (is_producer) producer.run();
    __syncwarp();
    if constexpr (kSplit > 1) {  // the math warps meet twice
      barrier_cluster_arrive();
      barrier_cluster_wait();
    }
    leave();
  } else {
    setmaxnreg_inc<kMathRegs>();
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();  // after the wait: then the grid before is done, too
    compute(shared, params, work);
    leave();
  }
}
