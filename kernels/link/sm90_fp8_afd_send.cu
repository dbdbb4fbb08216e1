// Sends a layer's rows to the FFN ranks that compute them, and publishes a frame to each rank.
//
//   params.lane          AfdLane[1]       see afd.cuh
//   params.hidden        e4m3[B, H]       H a multiple of 128
//   params.scales        f32[B, H / 128]
//   params.topk_ids      i32[B, K]        of all ranks' experts; null in a dense layer
//   params.topk_weights  f32[B, K]
//   params.num_rows      i32[1]           on the device: rows that are sent, at most B
//   params.present       u32[B]           written: bit f of row r is set if rank f computes the row
//
//   At rank f, per row: hidden and scales if it computes the row; always C = K + 1 ids, counted
//   from its first expert, [E * f / F, E * (f + 1) / F), and weights. The last column is the number of
//   its routed experts, with weight 1, in rows r with r % F == f, whose home it is. -1 and 0 elsewhere.
//
// Tile            4 rows of a CTA in flight: a row is read once and stored to each of its ranks
// Threads         512 in each of 1..32 CTAs
// Shared memory   544 bytes
// Registers       78, 0 spills
// Roofline        NVLink: 7,392 bytes per row and rank at 387 GB/s. 128 rows to 1.7 of 2 ranks: 4.2 us,
//                 predicted 7 us with loads, last arrival and flag; few rows: 3 us
// Reference       step3rt.ops.afd_reference.AttentionHostLane.send
//
// Which ranks a row goes to is one ballot of a warp, with a lane per rank.

#include "link/afd.cuh"

constexpr int kThreads = 512;
constexpr int kRows = 4;
constexpr int kMaxColumns = 8;
constexpr int kGroupSize = 128;

struct AfdSendParams {
  AfdLane* lane;
  const uint8_t* hidden;
  const float* scales;
  const int* topk_ids;
  const float* topk_weights;
  const int* num_rows;
  int* present;
  int row_capacity;  // B
  int hidden_size;
  int top_k;
  int num_experts;  // 0 in a dense layer
  int is_first_layer;
};

struct SendShared {
  uint8_t* hidden[kMaxPeers];
  float* scales[kMaxPeers];
  uint32_t masks[2][kRows];  // two, so that one barrier per turn suffices
};

// What one lane of a warp, rank `rank`, computes of a row.
struct LocalRow {
  int ids[kMaxColumns];
  float weights[kMaxColumns];

  // True if there is anything.
  __device__ __forceinline__ bool load(const AfdSendParams& params, int row, int rank,
                                       int num_ranks) {
    const int first = params.num_experts * rank / num_ranks;
    const int end = params.num_experts * (rank + 1) / num_ranks;
    const bool is_home = row % num_ranks == rank;
    bool is_here = is_home;
#pragma unroll
    for (int c = 0; c < kMaxColumns; ++c) {
      ids[c] = c == params.top_k && is_home ? end - first : -1;
      weights[c] = c == params.top_k && is_home ? 1.0f : 0.0f;
      if (c < params.top_k && params.num_experts > 0) {
        const int expert = ld_global_cg(params.topk_ids + row * params.top_k + c);
        const float weight = ld_global_cg(params.topk_weights + row * params.top_k + c);
        if (expert >= first && expert < end) {
          ids[c] = expert - first;
          weights[c] = weight;
          is_here = true;
        }
      }
    }
    return is_here;
  }

  __device__ __forceinline__ void store(const AfdPeer& peer, int row, int num_columns) const {
    int* to_ids = reinterpret_cast<int*>(peer.slots[2]) + row * num_columns;
    float* to_weights = reinterpret_cast<float*>(peer.slots[3]) + row * num_columns;
    if (num_columns == 4) {
      *reinterpret_cast<int4*>(to_ids) = make_int4(ids[0], ids[1], ids[2], ids[3]);
      *reinterpret_cast<float4*>(to_weights) =
          make_float4(weights[0], weights[1], weights[2], weights[3]);
      return;
    }
#pragma unroll
    for (int c = 0; c < kMaxColumns; ++c) {
      if (c < num_columns) {
        to_ids[c] = ids[c];
        to_weights[c] = weights[c];
      }
    }
  }
};

// One warp: the ids of one row to all ranks, and which of them need the row itself.
__device__ __forceinline__ uint32_t send_ids(const AfdSendParams& params, int row) {
  const int rank = threadIdx.x % kWarpThreads;
  const int num_ranks = params.lane->num_peers;
  bool is_here = false;
  if (rank < num_ranks) {
    LocalRow local;
    is_here = local.load(params, row, rank, num_ranks);
    local.store(params.lane->peers[rank], row, params.top_k + 1);
  }
  const uint32_t mask = __ballot_sync(kFullWarp, is_here);
  if (rank == 0) params.present[row] = static_cast<int>(mask);
  return mask;
}

// What a thread has of `kRows` rows: a unit of 16 bytes of each, and perhaps a scale of each. Scales
// belong to the last threads, which have no part of a row of 7168.
struct RowParts {
  int4 units[kRows];
  float scales[kRows];

  __device__ __forceinline__ void load_units(const AfdSendParams& params, int first, int end,
                                             int unit) {
    const int num_units = params.hidden_size / sizeof(int4);
    const int4* hidden = reinterpret_cast<const int4*>(params.hidden) + unit;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = first + i * gridDim.x;
      if (row < end && unit < num_units) units[i] = ld_global_cg(hidden + row * num_units);
    }
  }

  __device__ __forceinline__ void load_scales(const AfdSendParams& params, int first, int end) {
    const int num_scales = params.hidden_size / kGroupSize, place = kThreads - 1 - threadIdx.x;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * gridDim.x;
      if (row < end && place < num_scales) {
        scales[i] = ld_global_cg(params.scales + row * num_scales + place);
      }
    }
  }

  __device__ __forceinline__ void store_units(const AfdSendParams& params, uint8_t* slot,
                                              const uint32_t (&masks)[kRows], int first, int rank,
                                              int unit) const {
    const int num_units = params.hidden_size / sizeof(int4);
    int4* to = reinterpret_cast<int4*>(slot) + unit;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = first + i * gridDim.x;
      if ((masks[i] >> rank & 1) != 0 && unit < num_units) to[row * num_units] = units[i];
    }
  }

  __device__ __forceinline__ void store_scales(const AfdSendParams& params, float* slot,
                                               const uint32_t (&masks)[kRows], int first,
                                               int rank) const {
    const int num_scales = params.hidden_size / kGroupSize, place = kThreads - 1 - threadIdx.x;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * gridDim.x;
      if ((masks[i] >> rank & 1) != 0 && place < num_scales) {
        slot[row * num_scales + place] = scales[i];
      }
    }
  }
};

__device__ __forceinline__ void send_rows(const AfdSendParams& params, SendShared& shared,
                                          int num_rows) {
  const int warp = threadIdx.x / kWarpThreads;
  const int num_ranks = params.lane->num_peers;
  const int num_units = params.hidden_size / sizeof(int4);
  int turn = 0;
  for (int first = blockIdx.x; first < num_rows; first += kRows * gridDim.x, turn ^= 1) {
    RowParts parts;
    parts.load_units(params, first, num_rows, threadIdx.x);
    parts.load_scales(params, first, num_rows);
    if (warp < kRows) {
      const int row = first + warp * gridDim.x;
      const uint32_t mask = row < num_rows ? send_ids(params, row) : 0;
      if (threadIdx.x % kWarpThreads == 0) shared.masks[turn][warp] = mask;
    }
    __syncthreads();
    uint32_t masks[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) masks[i] = shared.masks[turn][i];
    for (int rank = 0; rank < num_ranks; ++rank) {
      parts.store_units(params, shared.hidden[rank], masks, first, rank, threadIdx.x);
      parts.store_scales(params, shared.scales[rank], masks, first, rank);
    }
    for (int unit = threadIdx.x + kThreads; unit < num_units; unit += kThreads) {  // H > 8192
      parts.load_units(params, first, num_rows, unit);
      for (int rank = 0; rank < num_ranks; ++rank) {
        parts.store_units(params, shared.hidden[rank], masks, first, rank, unit);
      }
    }
  }
  for (int row = num_rows + blockIdx.x * kThreads + threadIdx.x; row < params.row_capacity;
       row += kThreads * gridDim.x) {
    params.present[row] = 0;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sm90_fp8_afd_send(const __grid_constant__ AfdSendParams params) {
  __shared__ SendShared shared;
  AfdLane* lane = params.lane;
  const int num_ranks = lane->num_peers;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  bool is_linked = true;
  if (threadIdx.x < num_ranks) {
    const AfdPeer& peer = lane->peers[threadIdx.x];
    shared.hidden[threadIdx.x] = peer.slots[0];
    shared.scales[threadIdx.x] = reinterpret_cast<float*>(peer.slots[1]);
    is_linked = peer.epoch_bits != 0;
  }
  const bool has_failed = load_error(lane) != kLinkOk;
  const bool is_complete = __syncthreads_and(is_linked);
  const int num_rows = ld_global_cg(params.num_rows);
  const bool fits = num_rows >= 0 && num_rows <= params.row_capacity;
  if (has_failed || !is_complete || !fits) {
    if (!has_failed && blockIdx.x == 0 && threadIdx.x == 0) {
      fail_lane(lane, is_complete ? kLinkWrongLength : kLinkNotLinked);
    }
    return;
  }
  const uint64_t frame = load_long(&lane->frames);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (AfdTraceRow* row = trace_row(lane, frame)) row->send_begin = globaltimer();
  }
  send_rows(params, shared, num_rows);
  if (!is_last_to_arrive(lane)) return;
  const int rank = threadIdx.x;
  if (rank < num_ranks) {
    AfdPeer& peer = lane->peers[rank];
    const uint64_t sequence = load_progress(&peer).sent + 1;
    const uint64_t mask = params.is_first_layer ? 1ull << lane->index : 0;
    // Of a first layer rank 0 learns who asks; the others, from the wait, who was admitted.
    if (rank == 0 || !params.is_first_layer) {
      st_release_sys(peer.peer_flag, {peer.epoch_bits | sequence,
                                      mask << kMaskShift | static_cast<uint64_t>(num_rows)});
    }
    peer.sent = sequence;
    peer.num_rows = num_rows;
  }
  if (rank == 0) {
    if (AfdTraceRow* row = trace_row(lane, frame)) row->send_end = globaltimer();
  }
}
