// What the two grouped GEMMs of a MoE layer share in parameters and shared memory: operands as they
// lie in memory, the ring of stages. Copies and computes nothing.
#pragma once

#include "common/types.cuh"

constexpr int kWarpgroupWarps = kWarpgroupThreads / kWarpThreads;
constexpr int kClusterCtas = 2;
constexpr int kBlockK = 128;    // values, and bytes, of a row in one stage: one scale group
constexpr int kTileRows = 128;  // token rows of a tile, and kExtraRows more in the last of a group
constexpr int kLongRows = 64;   // a tile of more rows counts as long
constexpr int kRowGroup = 8;    // rows of a swizzle period
constexpr int kStepBytes = 32;  // wgmma K is 32
constexpr int kSteps = kBlockK / kStepBytes;
constexpr int kMaxGroups = 64;
// What CTAs of a cluster tell each other once per tile needs no barrier of its own against being
// overwritten, if a tile fills the ring more than once: a CTA that has come to the end of the next
// tile has stages that the other gave back after reading.
constexpr int kMinSplitBlocks = 8;

// Operands as the copy engine finds them. A stage's part of either operand is contiguous and
// already the image that wgmma reads (128-byte rows, 16-byte chunk c of row r at c ^ r % 8):
//   weights     [G][tile of kTileWeights rows][k block][row of the tile][128 B]
//   rows        [k block][row_capacity][128 B]
//   row_scales  [k block][row_capacity]
struct MoeGemmParams {
  const int* groups;  // i32[G, 2]: first row (a multiple of 64), number of rows
  const uint8_t* weights;
  const float* weight_scales;
  const uint8_t* rows;
  const float* row_scales;
  uint8_t* out;
  float* out_scales;
  int num_groups;
  int row_capacity;
  int num_weight_rows;  // per group
  int num_k_blocks;
  int num_slices;  // of K; each writes sums of its own
};

template <int kTileWeights_, int kStages_, int kConsumers_, int kProducers_, int kExtraRows_>
struct MoeShared {
  static constexpr int kConsumers = kConsumers_;  // warpgroups
  static constexpr int kProducers = kProducers_;  // that arrive for a stage
  static constexpr int kTileWeights = kTileWeights_;
  static constexpr int kStages = kStages_;
  static constexpr int kExtraRows = kExtraRows_;
  static constexpr int kMaxRows = kTileRows + kExtraRows;

  alignas(1024) uint8_t weights[kStages][kTileWeights * kBlockK];
  uint8_t rows[kStages][kMaxRows * kBlockK];
  float row_scales[kStages][kMaxRows];
  float2 weight_scales[kStages];
  int2 groups[kMaxGroups];
  int first_half;           // item from which on items come in halves
  uint64_t full[kStages];   // completes when weights, rows and all scales have landed
  uint64_t empty[kStages];  // completes when the consumers of both CTAs are done
};

// As RingCursor, in one register: consumers have none to spare.
template <int kStages>
struct MoeCursor {
  uint32_t state = 0;  // stage, and the parity at bit 8
  __device__ __forceinline__ int stage() const { return state & 0xff; }
  __device__ __forceinline__ uint32_t parity() const { return state >> 8; }
  __device__ __forceinline__ void advance() {
    ++state;
    if ((state & 0xff) == kStages) state = (state ^ 0x100) & 0x100;
  }
};
