// How sm90_fp8_linear cuts a product: the launcher's choice, the shared memory, and what each CTA of
// the grid computes. Copies and multiplies nothing.
#pragma once

#include "common/cluster.cuh"
#include "common/types.cuh"

// The launcher's choice; these defaults fit every shape.
#ifndef STEP3RT_TILE_M
#define STEP3RT_TILE_M 128
#define STEP3RT_TILE_N 128
#define STEP3RT_SPLIT 1
#define STEP3RT_CAST 1
#define STEP3RT_SHARE 1
#define STEP3RT_STAGES 6
#define STEP3RT_CTAS_PER_SM 1
#define STEP3RT_CHUNK 4
#endif

constexpr int kTileM = STEP3RT_TILE_M;
constexpr int kTileN = STEP3RT_TILE_N;
constexpr int kSplit = STEP3RT_SPLIT;    // CTAs that share a tile, each with its part of K
constexpr int kCast = STEP3RT_CAST;      // CTAs that share a part of x, for tiles side by side
constexpr int kShare = STEP3RT_SHARE;    // CTAs that share a part of w, for tiles of other tokens
constexpr int kStages = STEP3RT_STAGES;  // of the ring
constexpr int kClusterCtas = kSplit * kCast * kShare;
constexpr int kPeers = kCast + kShare - 1;  // CTAs that copy to a CTA's ring, itself among them

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
constexpr int kProducerRegs = STEP3RT_CTAS_PER_SM == 1 ? 24 : 32;
constexpr int kFreeRegs = (kEntryRegs + (kEntryRegs - kProducerRegs) / kMathGroups) / 8 * 8;
constexpr int kMathRegs = kFreeRegs < 240 ? kFreeRegs : 240;
constexpr int kRegs = kMmaRows * kTileN / kWarpgroupThreads;  // accumulators per row block
constexpr int kPairs = kTileN / 16;                           // of 8-column groups
constexpr bool kMayStraddle = kBlockN % kTileN != 0;          // a tile may lie in two scale blocks
constexpr int kScaleBlocks = kMayStraddle ? 2 : 1;
constexpr int kScaleWarps = 3;         // of the producer's warpgroup, behind the copying warp
constexpr int kChunk = STEP3RT_CHUNK;  // blocks of K that a warpgroup multiplies without a pause

static_assert(kTileM % (kCast * 8) == 0 && kTileM <= 256, "a CTA casts whole swizzle groups of x");
static_assert(kTileN % 16 == 0, "outputs are stored in pairs of column groups");
static_assert(kTileN - (kTileN & -kTileN) <= kBlockN, "a tile lies in two scale blocks at most");
static_assert(kTileN % (kShare * 8) == 0, "a CTA shares whole swizzle groups of w");
static_assert(kClusterCtas <= 8, "the portable cluster size");
// Scale warps take blocks in turns, so one may see phases of a barrier that are three apart, where a
// parity tells only neighbours apart. Enough stages make it safe: before block i a warp has awaited the
// release of block i - kScaleWarps - kStages, so that of block i - 2 kStages is over.
static_assert(kStages >= kScaleWarps, "a scale warp may be a phase ahead");

// A tile is summed in units of (row block, row half, pair of column groups): 32 rows x 16 columns.
// Unit u belongs to the CTA of rank u % kSplit, which receives that unit from all of them.
constexpr int kUnits = kTileM / kMmaRows * 2 * kPairs;
constexpr int kUnitsPerCta = (kUnits + kSplit - 1) / kSplit;
constexpr int kUnitBytes = kWarpgroupThreads * sizeof(float4);
struct Parts {
  float4 unit[kSplit][kUnitsPerCta][kWarpgroupThreads];
};

struct Ring {
  uint8_t x[kStages][kTileM * kBlockK];
  uint8_t w[kStages][kTileN * kBlockK];
};

// Shared memory, from a 1,024-byte aligned base (the period of the 128-byte swizzle).
struct alignas(1024) Shared {
  union {
    Ring ring;
    Parts parts;  // when the rings of all CTAs have run dry
  };
  float scale[kStages][kScaleBlocks][kTileM];  // x_scale * w_scale
  uint64_t full[kStages];                      // completes when x, w and the scales are there
  uint64_t empty[kStages];  // completes when the math warps of all CTAs that get copies are done
  uint64_t summed;          // completes when all parts of this CTA's units are there
};
static_assert(kSplit == 1 || sizeof(Parts) <= sizeof(Ring), "the parts need the room");

struct LinearParams {
  const float* x_scale;
  const float* w_scale;
  uint16_t* out;
  int num_tokens;
  int num_outputs;
  int num_blocks;   // K / 128
  int num_tiles_m;  // a multiple of kShare
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
  int share;  // rank among the CTAs that share w

  // In the cluster.
  __device__ __forceinline__ static int rank(int split, int cast, int share) {
    return (split * kCast + cast) * kShare + share;
  }
  // A bit for each CTA that shares x with this one.
  __device__ __forceinline__ uint16_t cast_ctas() const {
    uint32_t ctas = 0;
#pragma unroll
    for (int c = 0; c < kCast; ++c) ctas |= 1u << rank(split, c, share);
    return static_cast<uint16_t>(ctas);
  }
  // A bit for each CTA that shares w with this one.
  __device__ __forceinline__ uint16_t share_ctas() const {
    return static_cast<uint16_t>(((1u << kShare) - 1) << rank(split, cast, 0));
  }

  // Columns of the tile that lie in its first scale block; the others lie in the second.
  __device__ __forceinline__ int first_scale_columns() const {
    return kBlockN - first_output % kBlockN;
  }
};

__device__ __forceinline__ Work load_work(const LinearParams& params) {
  const int rank = cluster_ctarank();
  const int cluster = blockIdx.x / kClusterCtas;
  const int num_groups_m = params.num_tiles_m / kShare;
  Work work;
  work.split = rank / (kCast * kShare);
  work.cast = rank / kShare % kCast;
  work.share = rank % kShare;
  work.first_token = (cluster % num_groups_m * kShare + work.share) * kTileM;
  work.first_output = (cluster / num_groups_m * kCast + work.cast) * kTileN;
  work.first_block = params.num_blocks * work.split / kSplit;
  work.num_blocks = params.num_blocks * (work.split + 1) / kSplit - work.first_block;
  return work;
}
