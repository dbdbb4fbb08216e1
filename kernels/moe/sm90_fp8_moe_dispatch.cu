// Sorts the tokens of a MoE layer by expert: group table, place of every copy, and the copies.
//
//   topk_ids    i32[T, C]           expert ids; those outside the local range are left out
//   hidden      e4m3[T, H]          H a multiple of 128
//   scales      f32[T, H/128]
//   groups      i32[G, 2]           first row (a multiple of 64) and rows of each local expert, in
//                                   the order of ids; then, if present, the shared expert: all T
//   token_rows  i32[T, C + 1]       row of each copy, -1: not local; last column: the shared's
//   rows        e4m3[H/128, R, 128] copies, one k block after another; 16-byte chunk c of row r
//                                   lies at c ^ r % 8, as wgmma's 128-byte swizzle has it
//   row_scales  f32[H/128, R]
//   weights     e4m3[G, 2I, H]      of gate-up, packed; read by nobody here, prefetched to L2
//   Rows of an expert are in the order of (token, column). Padding is left as it is.
//
// Tile            a CTA copies a contiguous range of tokens. Each counts all ids on its own: that
//                 is shorter than waiting for one CTA that does
// Threads         512
// Shared memory   under 2 KiB, static
// Roofline        latency; HBM: T * H bytes read, up to (C + 1) * T * H written to L2
// Reference       step3rt.ops.moe_fp8_reference.reference_dispatch

#include "common/ptx.cuh"
#include "common/tma.cuh"
#include "common/types.cuh"

constexpr int kThreads = 512;
constexpr int kMaxGroups = 64;
constexpr int kGroupAlignment = 64;
constexpr int kBlockK = 128;
constexpr int kChunkBytes = 16;
constexpr int kChunks = kBlockK / kChunkBytes;
constexpr int kMaxColumns = 8;

struct MoeDispatchParams {
  const int* topk_ids;
  const uint8_t* hidden;
  const float* scales;
  int* groups;
  int* token_rows;
  uint8_t* rows;
  float* row_scales;
  int num_tokens;
  int num_columns;  // C, at most 8
  int first_expert;
  int num_experts;  // local
  int has_shared;
  int num_k_blocks;
  int row_capacity;
  int num_weight_tiles;  // of gate-up, all groups
  int weight_tile_bytes;
  int prefetch_bytes;      // of each of the first tiles
  const uint8_t* weights;  // of gate-up
};

// Dispatch leaves HBM idle: it brings what the first CTAs of gate-up read first to L2. Which tiles
// these are is a guess, right when every expert has rows, and 128 at most.
__device__ __forceinline__ void prefetch_weights(const MoeDispatchParams& params) {
  if (threadIdx.x != 0) return;
  for (int tile = blockIdx.x; tile < params.num_weight_tiles; tile += gridDim.x) {
    cp_async_bulk_prefetch_l2(
        params.weights + static_cast<int64_t>(tile) * params.weight_tile_bytes,
        params.prefetch_bytes);
  }
}

// Counts of ids, of all tokens and of those before this CTA's.
struct Counts {
  int total[kMaxGroups];
  int before[kMaxGroups];
};

__device__ __forceinline__ int load_expert(const MoeDispatchParams& params, int index, int end) {
  if (index >= end) return -1;
  const int expert = ld_global_cg(params.topk_ids + index) - params.first_expert;
  return expert >= 0 && expert < params.num_experts ? expert : -1;
}

__device__ __forceinline__ void count_ids(const MoeDispatchParams& params, int first,
                                          Counts& counts) {
  const int num_ids = params.num_tokens * params.num_columns;
  const int lane = threadIdx.x % kWarpThreads;
  for (int base = threadIdx.x - lane; base < num_ids; base += kThreads) {
    const int expert = load_expert(params, base + lane, num_ids);
    const uint32_t peers = __match_any_sync(kFullWarp, expert);
    const uint32_t early = __ballot_sync(kFullWarp, base + lane < first) & peers;
    if (expert >= 0 && lane == __ffs(peers) - 1) {
      atomicAdd(&counts.total[expert], __popc(peers));
      if (early != 0) atomicAdd(&counts.before[expert], __popc(early));
    }
  }
}

// Turns totals into first rows, and writes the group table from CTA 0. One warp.
__device__ __forceinline__ void place_groups(const MoeDispatchParams& params, Counts& counts) {
  const int lane = threadIdx.x;
  const int num_groups = params.num_experts + params.has_shared;
  int base = 0;
#pragma unroll
  for (int part = 0; part < kMaxGroups / kWarpThreads; ++part) {
    const int group = part * kWarpThreads + lane;
    int num_rows = 0;
    if (group < params.num_experts) num_rows = counts.total[group];
    if (group == params.num_experts && params.has_shared) num_rows = params.num_tokens;
    const int padded = (num_rows + kGroupAlignment - 1) / kGroupAlignment * kGroupAlignment;
    int end = padded;
#pragma unroll
    for (int step = 1; step < kWarpThreads; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, end, step);
      if (lane >= step) end += other;
    }
    const int first_row = base + end - padded;
    base += __shfl_sync(kFullWarp, end, kWarpThreads - 1);
    if (group < num_groups) {
      counts.total[group] = first_row;
      if (blockIdx.x == 0) {
        params.groups[2 * group] = first_row;
        params.groups[2 * group + 1] = num_rows;
      }
    }
  }
}

// Rows of one token's copies, by one warp: its ids in order, so that equal experts count up.
__device__ __forceinline__ void place_token(const MoeDispatchParams& params, int token,
                                            Counts& counts, int* rows) {
  const int lane = threadIdx.x;
  const int expert =
      lane < params.num_columns
          ? load_expert(params, token * params.num_columns + lane, (token + 1) * params.num_columns)
          : -1;
  const uint32_t peers = __match_any_sync(kFullWarp, expert);
  const int rank = __popc(peers & ((1u << lane) - 1));
  int row = -1;
  if (expert >= 0) row = counts.total[expert] + counts.before[expert] + rank;
  __syncwarp();
  if (expert >= 0 && rank == 0) counts.before[expert] += __popc(peers);
  if (lane == params.num_columns && params.has_shared) {
    row = counts.total[params.num_experts] + token;
  }
  if (lane <= params.num_columns) {
    rows[lane] = row;
    params.token_rows[token * (params.num_columns + 1) + lane] = row;
  }
  __syncwarp();
}

__device__ __forceinline__ int4 load_chunk(const MoeDispatchParams& params, int token, int chunk) {
  const int num_chunks = params.num_k_blocks * kChunks;
  const int4* hidden = reinterpret_cast<const int4*>(params.hidden);
  if (chunk >= num_chunks) return make_int4(0, 0, 0, 0);
  return ld_global_cg(hidden + static_cast<int64_t>(token) * num_chunks + chunk);
}

// `value` is this thread's first chunk, loaded before.
__device__ __forceinline__ void copy_token(const MoeDispatchParams& params, int token,
                                           const int* rows, int4 value) {
  const int num_chunks = params.num_k_blocks * kChunks;
  const int64_t capacity = params.row_capacity;
  for (int i = threadIdx.x; i < num_chunks; i += kThreads) {
    if (i >= kThreads) value = load_chunk(params, token, i);
    for (int c = 0; c <= params.num_columns; ++c) {
      const int row = rows[c];
      if (row < 0) continue;
      int4* target =
          reinterpret_cast<int4*>(params.rows) + (i / kChunks * capacity + row) * kChunks;
      target[(i % kChunks) ^ (row % kChunks)] = value;
    }
  }
  for (int k = threadIdx.x; k < params.num_k_blocks; k += kThreads) {
    const float value =
        ld_global_cg(params.scales + static_cast<int64_t>(token) * params.num_k_blocks + k);
    for (int c = 0; c <= params.num_columns; ++c) {
      if (rows[c] >= 0) params.row_scales[k * capacity + rows[c]] = value;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    sm90_fp8_moe_dispatch(const __grid_constant__ MoeDispatchParams params) {
  __shared__ Counts counts;
  __shared__ int rows[2][kMaxColumns + 1];
  if (threadIdx.x < kMaxGroups) {
    counts.total[threadIdx.x] = 0;
    counts.before[threadIdx.x] = 0;
  }
  __syncthreads();
  if (params.prefetch_bytes > 0) prefetch_weights(params);
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int64_t num_tokens = params.num_tokens;
  const int first = static_cast<int>(num_tokens * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(num_tokens * (blockIdx.x + 1) / gridDim.x);
  int4 value = load_chunk(params, first, threadIdx.x);  // in flight while ids are counted
  if (params.num_experts > 0) count_ids(params, first * params.num_columns, counts);
  __syncthreads();
  if (threadIdx.x < kWarpThreads) place_groups(params, counts);
  __syncthreads();
  for (int token = first; token < end; ++token) {
    int* token_rows = rows[token % 2];  // two, so that one barrier per token suffices
    if (threadIdx.x < kWarpThreads) place_token(params, token, counts, token_rows);
    __syncthreads();
    copy_token(params, token, token_rows, value);
    if (token + 1 < end) value = load_chunk(params, token + 1, threadIdx.x);
  }
}
