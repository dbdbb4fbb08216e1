// Which tiles of a grouped GEMM a cluster computes, in which order: groups' sizes are only known on the
// device. Reads nothing but the group table.
#pragma once

#include "common/types.cuh"
#include "moe/moe_layout.cuh"

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
