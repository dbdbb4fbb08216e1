// What the two grouped GEMMs of a MoE layer share: the tile walk over groups whose sizes are only
// known on the device, the shared-memory ring, its producer threads and the products of a stage.
// Knows nothing of what becomes of the sums: SwiGLU and stores are the kernels'.
#pragma once

#include "common/barrier.cuh"
#include "common/cluster.cuh"
#include "common/ptx.cuh"
#include "common/tma.cuh"
#include "common/types.cuh"
#include "common/wgmma.cuh"
#include "common/wgmma_e4m3.cuh"

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

// ---- tiles -----------------------------------------------------------------------------------

// One tile of this CTA. Its cluster neighbour works on the other half of the same item: either the
// same weights for the next 128 rows (of half an item, 64), or the next weights for the same rows.
// What both need is fetched once, each CTA copying its half to both.
struct MoeTile {
  int rank;  // of this CTA
  int group;
  int first_row;
  int num_rows;  // 1...kMaxRows
  int n;         // tile of weights
  int slice;
  int k_begin;
  int k_end;
  bool shares_weights;  // else it shares rows
  bool splits_extra;    // rows past 128 are the same in both CTAs; each takes half of the weights
  bool is_real;         // false: only helps to fetch the neighbour's rows

  // Of the rows past 128, if they are split: they follow the second CTA's block.
  __device__ __forceinline__ int first_extra_row() const {
    return first_row + (rank == 0 ? 2 : 1) * kTileRows;
  }
};

// How a group's rows are cut into blocks of 128. A remainder of up to `kExtraRows` is no block of its
// own: it would read all weights again.
template <int kExtraRows>
struct MoeBlocks {
  int count;
  int last_rows;  // of the last one

  __device__ __forceinline__ explicit MoeBlocks(int num_rows) {
    count = (num_rows + kTileRows - 1 - kExtraRows) / kTileRows;
    if (num_rows > 0 && count == 0) count = 1;
    last_rows = num_rows - (count - 1) * kTileRows;
  }
};

// The last round of a single group, as a dense FFN is, may have few items, and each is as long as
// those of a full round. Where twice as many still fit the clusters, they are cut into halves: one
// weight tile and 128 rows, 64 of them for each CTA.
template <class Shared>
__device__ __forceinline__ int moe_first_half(const MoeGemmParams& params, int num_rows) {
  constexpr int kNever = 0x7fffffff;
  const MoeBlocks<Shared::kExtraRows> blocks(num_rows);
  if (params.num_groups != 1 || num_rows == 0 || blocks.last_rows <= kLongRows) return kNever;
  const int num_tiles = (params.num_weight_rows + Shared::kTileWeights - 1) / Shared::kTileWeights;
  const int num_clusters = gridDim.x / kClusterCtas;
  const bool is_odd = blocks.count % 2 != 0;
  if (is_odd && num_tiles % 2 != 0) return kNever;  // half of the last item would share nothing
  const int num_odd = is_odd ? num_tiles / 2 : 0;
  const int num_items = (num_tiles * (blocks.count / 2) + num_odd) * params.num_slices;
  const int num_last = num_items % num_clusters;
  return 2 * num_last <= num_clusters ? num_items - num_last : kNever;
}

// Walks the items of this cluster. Classes of items one after another, the longest items first:
//   0: two row blocks of 128 and one weight tile    (they share the weights)
//   1: the last block of an odd number of blocks, of more than 64 rows, and two weight tiles
//   2: the same with up to 64 rows                  (they share the rows)
// Within a class group by group, and neighbouring items read the same weights, or the next ones.
// Clusters take items forwards and backwards in turns, so that who got a long one last gets a short
// one next. Nothing is read but the group table.
template <class Shared, bool kWholeWarp>
struct MoeWalk {
  int round = 0;
  int place = 0;       // item class << 16 | group: one register, as consumers have none to spare
  int first_item = 0;  // of this class and group

  __device__ __forceinline__ bool next(const Shared& shared, const MoeGemmParams& params, int rank,
                                       MoeTile& tile) {
    const int num_tiles =
        (params.num_weight_rows + Shared::kTileWeights - 1) / Shared::kTileWeights;
    const int num_clusters = gridDim.x / kClusterCtas;
    const int cluster = blockIdx.x / kClusterCtas;
    int item = round * num_clusters + (round % 2 == 0 ? cluster : num_clusters - 1 - cluster);
    ++round;
    int half = -1;
    int first_half = shared.first_half;
    if (kWholeWarp) first_half = __shfl_sync(kFullWarp, first_half, 0);
    if (item >= first_half) {
      half = (item - first_half) % 2;
      item = first_half + (item - first_half) / 2;
    }
    int num_rows;
    int num_blocks;
    int num_block_pairs;
    int last_rows;
    int group;
    int item_class;
    for (;;) {
      group = place & 0xffff;
      item_class = place >> 16;
      num_rows = shared.groups[group].y;
      if (kWholeWarp) num_rows = __shfl_sync(kFullWarp, num_rows, 0);
      const MoeBlocks<Shared::kExtraRows> blocks(num_rows);
      num_blocks = blocks.count;
      last_rows = blocks.last_rows;
      num_block_pairs = num_blocks / 2;
      const bool is_odd = num_blocks % 2 != 0;
      int num_items = num_tiles * num_block_pairs;
      if (item_class > 0) {
        const bool is_long = last_rows > kLongRows;
        num_items = is_odd && is_long == (item_class == 1) ? (num_tiles + 1) / 2 : 0;
      }
      num_items *= params.num_slices;
      if (item < first_item + num_items) break;
      first_item += num_items;
      if (++group == params.num_groups) {
        group = 0;
        if (++item_class == 3) return false;
      }
      place = item_class << 16 | group;
    }
    int index = item - first_item;
    tile.slice = index % params.num_slices;
    index /= params.num_slices;
    tile.shares_weights = item_class == 0;
    int block = num_blocks - 1;
    const int part = half < 0 ? rank : half;
    if (tile.shares_weights) {
      tile.n = index / num_block_pairs;
      block = 2 * (index - tile.n * num_block_pairs) + part;
    } else {
      tile.n = 2 * index + part;
    }
    tile.is_real = tile.n < num_tiles;
    tile.rank = rank;
    tile.group = group;
    tile.first_row = shared.groups[group].x + block * kTileRows;
    tile.num_rows = block < num_blocks - 1 ? kTileRows : last_rows;
    tile.splits_extra = false;
    if (half >= 0) {
      tile.shares_weights = true;
      tile.first_row += rank * kLongRows;
      tile.num_rows = rank == 0 ? kLongRows : tile.num_rows - kLongRows;
    } else if (Shared::kExtraRows > 0) {
      // Of the last pair of an even number of blocks.
      tile.splits_extra = tile.shares_weights && (block | 1) == num_blocks - 1 &&
                          last_rows > kTileRows && params.num_k_blocks >= kMinSplitBlocks;
      if (tile.splits_extra) tile.num_rows = last_rows;
    }
    tile.k_begin = tile.slice * params.num_k_blocks / params.num_slices;
    tile.k_end = (tile.slice + 1) * params.num_k_blocks / params.num_slices;
    return true;
  }
};

// ---- set-up ------------------------------------------------------------------------------------

// Barriers, and the group table, after the previous kernel if that is the one that writes it.
template <bool kWaits, class Shared>
__device__ __forceinline__ void moe_set_up(Shared& shared, const MoeGemmParams& params) {
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      mbarrier_init(&shared.full[i], Shared::kProducers);
      mbarrier_init(&shared.empty[i],
                    kWarpArrivals * kClusterCtas * Shared::kConsumers * kWarpgroupWarps);
    }
    fence_mbarrier_init();
  }
  if (kWaits) griddepcontrol_wait();
  if (thread < params.num_groups) {
    const int2 group = make_int2(ld_global_cg(params.groups + 2 * thread),
                                 ld_global_cg(params.groups + 2 * thread + 1));
    shared.groups[thread] = group;
    if (thread == 0) shared.first_half = moe_first_half<Shared>(params, group.y);
  }
  __syncthreads();
  barrier_cluster_relaxed();  // the neighbour's barriers exist from here on
}

// ---- producers ---------------------------------------------------------------------------------

// Both CTAs are done with the stage: a copy may go to either. One barrier for both, because a parity
// tells only neighbouring phases apart. Its next phase needs this CTA's consumers, and they need all
// producer threads, so none of these can be a phase behind. A barrier for the neighbour's consumers
// alone would need just the thread whose copies they share: with the other one late, both CTAs hang.
template <class Shared>
__device__ __forceinline__ void moe_wait_empty(Shared& shared,
                                               const MoeCursor<Shared::kStages>& cursor) {
  mbarrier_wait(&shared.empty[cursor.stage()], cursor.parity() ^ 1);
}

template <class Shared>
__device__ __forceinline__ void moe_produce_weights(Shared& shared, const MoeGemmParams& params,
                                                    int rank) {
  MoeWalk<Shared, false> walk;
  MoeTile tile;
  MoeCursor<Shared::kStages> cursor;
  const int64_t row_bytes = static_cast<int64_t>(params.num_k_blocks) * kBlockK;
  while (walk.next(shared, params, rank, tile)) {
    const int first = tile.n * Shared::kTileWeights;
    const int tile_bytes =
        tile.is_real ? min(Shared::kTileWeights, params.num_weight_rows - first) * kBlockK : 0;
    const uint8_t* source =
        params.weights +
        (static_cast<int64_t>(tile.group) * params.num_weight_rows + first) * row_bytes +
        static_cast<int64_t>(tile.k_begin) * tile_bytes;
    for (int k = tile.k_begin; k < tile.k_end; ++k) {
      uint64_t* full = &shared.full[cursor.stage()];
      uint8_t* destination = shared.weights[cursor.stage()];
      moe_wait_empty(shared, cursor);
      mbarrier_arrive_expect_tx(full, tile_bytes);
      if (tile.shares_weights) {
        const int half = tile_bytes / 2;
        cp_async_bulk_multicast(destination + rank * half, source + rank * half, half, full, 3,
                                kEvictFirst);
      } else if (tile.is_real) {
        cp_async_bulk(destination, source, tile_bytes, full, kEvictFirst);
      }
      source += tile_bytes;
      cursor.advance();
    }
  }
}

template <class Shared>
__device__ __forceinline__ void moe_produce_rows(Shared& shared, const MoeGemmParams& params,
                                                 int rank) {
  MoeWalk<Shared, false> walk;
  MoeTile tile;
  MoeCursor<Shared::kStages> cursor;
  while (walk.next(shared, params, rank, tile)) {
    // Whole swizzle periods: what is past num_rows belongs to the padding of the group.
    const int num_periods = (tile.num_rows + kRowGroup - 1) / kRowGroup;
    const int scale_bytes = num_periods * kRowGroup * 4;
    int first = 0;
    int count = num_periods * kRowGroup;
    const int num_extra = tile.splits_extra ? count - kTileRows : 0;
    count -= num_extra;
    if (!tile.shares_weights) {
      count /= 2;  // of however few: see moe_release
      first = rank * count;
    }
    const int to_extra = tile.first_extra_row() - tile.first_row;
    int64_t at = static_cast<int64_t>(tile.k_begin) * params.row_capacity + tile.first_row;
    for (int k = tile.k_begin; k < tile.k_end; ++k) {
      uint64_t* full = &shared.full[cursor.stage()];
      uint8_t* destination = shared.rows[cursor.stage()] + first * kBlockK;
      const uint8_t* source = params.rows + (at + first) * kBlockK;
      moe_wait_empty(shared, cursor);
      mbarrier_arrive_expect_tx(full, num_periods * kRowGroup * kBlockK + scale_bytes);
      if (tile.shares_weights) {
        cp_async_bulk(destination, source, count * kBlockK, full, kEvictLast);
      } else {
        cp_async_bulk_multicast(destination, source, count * kBlockK, full, 3, kEvictLast);
      }
      cp_async_bulk(shared.row_scales[cursor.stage()], params.row_scales + at,
                    scale_bytes - num_extra * 4, full, kEvictLast);
      if (num_extra > 0) {
        cp_async_bulk(shared.rows[cursor.stage()] + kTileRows * kBlockK,
                      params.rows + (at + to_extra) * kBlockK, num_extra * kBlockK, full,
                      kEvictLast);
        cp_async_bulk(shared.row_scales[cursor.stage()] + kTileRows,
                      params.row_scales + at + to_extra, num_extra * 4, full, kEvictLast);
      }
      at += params.row_capacity;
      cursor.advance();
    }
  }
}

// The scales of weights come with their stage, by a warp of its own, which loads those of 32 stages at
// once: one after the other they would take as long as the weights. The tile's two rows of them start
// at `ScaleRows::first` and `step` later. Consumers have no registers to load them ahead.
template <class ScaleRows, class Shared>
__device__ __forceinline__ void moe_produce_weight_scales(Shared& shared,
                                                          const MoeGemmParams& params, int rank) {
  MoeWalk<Shared, false> walk;
  MoeTile tile;
  MoeCursor<Shared::kStages> cursor;
  const int lane = threadIdx.x % kWarpThreads;
  while (walk.next(shared, params, rank, tile)) {
    const ScaleRows rows(params, tile);
    const float* source = params.weight_scales + rows.first;
    float2 scales = make_float2(0.0f, 0.0f);  // of the stage `lane` after the last load
    for (int k = tile.k_begin; k < tile.k_end; ++k) {
      const int at = (k - tile.k_begin) % kWarpThreads;
      if (at == 0 && tile.is_real && k + lane < tile.k_end) {
        scales = make_float2(source[k + lane], source[rows.step + k + lane]);
      }
      const float2 of_stage =
          make_float2(__shfl_sync(kFullWarp, scales.x, at), __shfl_sync(kFullWarp, scales.y, at));
      moe_wait_empty(shared, cursor);
      if (lane == 0) {
        shared.weight_scales[cursor.stage()] = of_stage;
        mbarrier_arrive(&shared.full[cursor.stage()]);
      }
      __syncwarp();
      cursor.advance();
    }
  }
}

// ---- consumers ---------------------------------------------------------------------------------

// Waits for a stage. The lanes leave together: none may fall a phase behind.
template <class Shared>
__device__ __forceinline__ void moe_acquire(Shared& shared,
                                            const MoeCursor<Shared::kStages>& cursor) {
  mbarrier_wait(&shared.full[cursor.stage()], cursor.parity());
  __syncwarp();
}

// Gives the stage back to the producers of both CTAs, which write to it. Every warp arrives at both:
// a warp's own wait only proves that its own rows have been read.
//
// No arrival can come a phase early, in whatever order those of a warp, here and there, land. A
// consumer arrives for the next use of the stage after its CTA's full barrier has completed for that
// use. That takes bytes of both CTAs, as each copies half of what they share; and a producer copies
// once its own empty barrier has completed for this use. So both have, at which time nobody owes them
// an arrival. Were all shared rows one CTA's to copy, that CTA could go on alone and be counted, at
// the other's barrier, in the place of a warp whose arrival there is still on its way.
//
// Built for racecheck, every lane arrives at the neighbour's barrier, too: the neighbour's copies land
// in this CTA as well, on rows that all lanes have read by ldmatrix, and the tool would order only one
// lane's reads before them.
template <class Shared>
__device__ __forceinline__ void moe_release(Shared& shared,
                                            const MoeCursor<Shared::kStages>& cursor) {
  const int rank = cluster_ctarank();  // read again: consumers have no register for it
  __syncwarp();
  const bool arrives = kWarpArrivals > 1 || threadIdx.x % kWarpThreads == 0;
  if (arrives) mbarrier_arrive(&shared.empty[cursor.stage()]);
  if (arrives) mbarrier_arrive_relaxed_cluster(&shared.empty[cursor.stage()], 1 - rank);
}

// A consumer without work of its own in this tile keeps the ring turning.
template <class Shared>
__device__ __forceinline__ void moe_skip(Shared& shared, const MoeTile& tile,
                                         MoeCursor<Shared::kStages>& cursor) {
  for (int k = tile.k_begin; k < tile.k_end; ++k) {
    moe_acquire(shared, cursor);
    moe_release(shared, cursor);
    cursor.advance();
  }
}

// product = a * b^T over the 128 values of a stage: 64 rows of a, as many of b as `product` has
// room for.
template <int kRegs>
__device__ __forceinline__ void moe_multiply(const uint8_t* a, const uint8_t* b,
                                             float (&product)[kRegs]) {
  constexpr int kGroupBytes = kRowGroup * kBlockK;
  // Broadcast, so that the compiler knows that the descriptors are the same in all lanes.
  const uint32_t a_address = __shfl_sync(kFullWarp, shared_address(a), 0);
  const uint32_t b_address = __shfl_sync(kFullWarp, shared_address(b), 0);
  const uint64_t a_matrix = matrix_descriptor(a_address, 16, kGroupBytes, Swizzle::k128B);
  const uint64_t b_matrix = matrix_descriptor(b_address, 16, kGroupBytes, Swizzle::k128B);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma_e4m3_ss(product, advance_descriptor(a_matrix, step * kStepBytes),
                  advance_descriptor(b_matrix, step * kStepBytes), step > 0);
  }
  wgmma_commit_group();
}

// acc += product * weight_scale * scale of each row, where rows are the columns of the product:
// register 4j + 2h + c is of row 8j + 2t + c (lane 4g + t).
template <int kRegs>
__device__ __forceinline__ void moe_promote(const float (&product)[kRegs], const float* row_scales,
                                            float weight_scale, float (&acc)[kRegs]) {
  const float2* pairs = reinterpret_cast<const float2*>(row_scales) + tid_x() % 4;
#pragma unroll
  for (int j = 0; j < kRegs / 4; ++j) {
    const float2 scale = pairs[4 * j];
    const float factors[2] = {scale.x * weight_scale, scale.y * weight_scale};
#pragma unroll
    for (int i = 4 * j; i < 4 * j + 4; ++i) {
      acc[i] = fmaf(product[i], factors[i % 2], acc[i]);
    }
  }
}
