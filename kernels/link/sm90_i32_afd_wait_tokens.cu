// Waits for a layer's rows from the sources of a step, and takes their ids into the lane's own memory.
//
//   params.lane         AfdLane[1]       see afd.cuh
//   params.ids          i32[A, T, C]     written by the sources
//   params.weights      f32[A, T, C]
//   params.own_ids      i32[A * T, C]    written: those of the participants' rows, -1 in all others
//   params.own_weights  f32[A * T, C]    written: 0 in all others
//
// Threads         512 in one CTA; thread a of the first warp waits for source a, then all copy
// Shared memory   128 bytes
// Registers       40, 0 spills
// Roofline        latency: a load from L2 that hits after one NVLink trip, about 1.3 us, then 32 bytes per
//                 row in and out of L2 by one SM: 512 rows predicted 1.5 us, 2048 rows 3 us
// Reference       step3rt.ops.afd_reference.FfnHostLane.wait
//
// Which sources take part is decided in a step's first layer; see afd.cuh. Dependent kernels start
// when it is over, not before: while it waits, a part of one SM is all that it keeps from others.

#include "link/afd.cuh"

constexpr int kThreads = 512;

struct AfdTokensParams {
  AfdLane* lane;
  const int* ids;
  const float* weights;
  int* own_ids;
  float* own_weights;
  int num_columns;  // C
  int is_first_layer;
};

// What thread a of the first warp knows of source a. Whatever a look finds stays in registers until
// the wait is over.
struct Source {
  const Word128* flag;
  uint64_t received;
  uint64_t expected;
  uint32_t epoch;  // 0: not linked, or lost before
  uint32_t num_rows;
  uint32_t mask;
  int error;  // LinkError
  bool has_arrived;

  __device__ __forceinline__ explicit Source(const AfdLane* lane) {
    const AfdPeer* peer = lane->peers + threadIdx.x;
    flag = peer->flag;
    received = load_progress(peer).received;
    expected = peer->epoch_bits | (received + 1);
    epoch = static_cast<uint32_t>(peer->epoch_bits >> kSequenceBits);
    error = static_cast<int>(load_word(&peer->error));
    num_rows = 0;
    mask = 0;
    has_arrived = false;
  }

  __device__ __forceinline__ bool is_active(const AfdLane* lane) const {
    const bool is_linked = epoch != 0 && error == kLinkOk;
    return is_linked && ld_relaxed_sys(lane->active + threadIdx.x) == epoch;
  }

  // Looks once for the next frame.
  __device__ __forceinline__ void look(uint32_t max_tokens, bool is_first_layer) {
    const Word128 word = ld_acquire_sys(flag);
    num_rows = static_cast<uint32_t>(word.high);
    mask = static_cast<uint32_t>(word.high >> kMaskShift);
    const bool begins_step = (mask >> threadIdx.x & 1) != 0;
    const bool is_there = word.low >= expected;
    const bool is_other = word.low > expected || begins_step != is_first_layer;
    const int found = is_other                ? kLinkWrongSequence
                      : num_rows > max_tokens ? kLinkWrongLength
                                              : kLinkOk;
    error = is_there ? found : error;
    has_arrived = is_there && found == kLinkOk;
  }
};

// What ends a wait for a step to begin, seen by all threads of the warp: the host's words, once every
// 64 looks at the flags.
__device__ __forceinline__ bool may_begin(AfdLane* lane) {
  const uint32_t stop = ld_relaxed_sys(lane->stop);
  const uint32_t pause = ld_relaxed_sys(lane->pause);
  if (stop != 0 && threadIdx.x == 0) fail_lane(lane, kLinkStopped);
  return __ballot_sync(kFullWarp, (stop | pause) != 0) == 0;
}

__device__ __forceinline__ uint32_t arrived_sources(const Source& source) {
  return __ballot_sync(kFullWarp, source.has_arrived);
}

// Waits for sources of `candidates`; returns those that came.
__device__ __forceinline__ uint32_t await_all(AfdLane* lane, Source& source, uint32_t candidates,
                                              bool is_first_layer) {
  const uint64_t start = globaltimer();
  uint64_t first = 0;  // when a source had come
  const uint32_t max_tokens = lane->max_tokens;
  bool is_missing = (candidates >> threadIdx.x & 1) != 0 && source.epoch != 0 &&
                    source.error == kLinkOk && !source.has_arrived;
  uint32_t missing = __ballot_sync(kFullWarp, is_missing);
  for (int spin = 1; missing != 0; ++spin) {
    if (is_missing) source.look(max_tokens, is_first_layer);
    is_missing = is_missing && !source.has_arrived && source.error == kLinkOk;
    if (spin % kSpinsBetweenChecks == 0) {
      if (__ballot_sync(kFullWarp, ld_relaxed_sys(lane->stop) != 0) != 0) {
        if (threadIdx.x == 0) fail_lane(lane, kLinkStopped);
        return 0;
      }
      const uint64_t now = globaltimer();
      if (first == 0 && (arrived_sources(source) & candidates) != 0) first = now;
      // While nobody has come, another rank may be waiting for one, and all with it.
      const bool is_late = (first != 0 && now - first > lane->wait_limit_ns) ||
                           now - start > 2 * lane->wait_limit_ns;
      const bool is_lost = !source.is_active(lane);  // the host has given it up
      if (is_missing && is_late && !is_lost) source.error = kLinkTimedOut;
      is_missing = is_missing && !is_late && !is_lost;
    }
    missing = __ballot_sync(kFullWarp, is_missing);
  }
  return arrived_sources(source) & candidates;
}

__device__ __forceinline__ void begin_step(AfdLane* lane, uint32_t admitted) {
  if (threadIdx.x != 0) return;
  lane->previous = load_word(&lane->joined);
  lane->joined = admitted;
  lane->steps = load_long(&lane->steps) + 1;
}

// Waits for a step to begin, until a source has sent and, at rank 0, the join window has ended; returns
// who has sent. Nobody has, if the lane has an idle limit and it is over.
__device__ __forceinline__ uint32_t await_step(AfdLane* lane, Source& source) {
  // Those of the last two steps are expected to come again, and hold the window open.
  const uint32_t recent = load_word(&lane->joined) | load_word(&lane->previous);
  const uint64_t window_ns = lane->index == 0 ? lane->join_window_ns : 0;
  const uint64_t idle_limit_ns = lane->idle_limit_ns, start = globaltimer();
  const uint32_t max_tokens = lane->max_tokens;
  bool is_active = false;
  uint32_t expected = 0, arrived = 0;
  uint64_t window_start = 0;
  for (uint32_t spin = 0;; ++spin) {  // wraps while an idle lane waits for hours
    if (spin % kSpinsBetweenChecks == 0) {
      if (!may_begin(lane)) return 0;
      const bool is_idle = arrived == 0 && idle_limit_ns != 0;
      if (__any_sync(kFullWarp, is_idle && globaltimer() - start > idle_limit_ns)) return 0;
      is_active = source.is_active(lane);
      source.has_arrived = source.has_arrived && is_active;
      expected = __ballot_sync(kFullWarp, is_active) & recent;
    }
    if (is_active && !source.has_arrived) source.look(max_tokens, true);
    is_active = is_active && source.error == kLinkOk;
    __syncwarp();
    arrived = arrived_sources(source);
    const uint64_t now = globaltimer();
    if (arrived != 0 && window_start == 0) window_start = now;
    const bool is_over = (expected & ~arrived) == 0 || now - window_start >= window_ns;
    if (arrived != 0 && __any_sync(kFullWarp, is_over)) return arrived;
  }
}

// Rank 0 admits all that have sent; at the other ranks the first of them says whom it has admitted.
__device__ __forceinline__ uint32_t begin(AfdLane* lane, Source& source) {
  const uint32_t arrived = await_step(lane, source);
  if (arrived == 0) return 0;
  if (lane->index == 0) {
    begin_step(lane, arrived);
    if (source.has_arrived && lane->num_ranks > 1) {
      st_release_sys(lane->peers[threadIdx.x].peer_admission, {source.expected, arrived});
    }
    return arrived;
  }
  const uint32_t told = __shfl_sync(kFullWarp, source.mask, __ffs(arrived) - 1);
  const uint32_t admitted = told & __ballot_sync(kFullWarp, source.is_active(lane));
  begin_step(lane, admitted);
  return await_all(lane, source, admitted, true);
}

// The first warp: who takes part in this layer, and with how many rows.
__device__ __forceinline__ void await_sources(const AfdTokensParams& params,
                                              int (&rows)[kMaxPeers]) {
  AfdLane* lane = params.lane;
  const uint64_t start = globaltimer();
  uint32_t participants = 0;
  Source source(lane);
  const int error_before = source.error;
  if (load_error(lane) == kLinkOk) {
    participants = params.is_first_layer
                       ? begin(lane, source)
                       : await_all(lane, source, load_word(&lane->participants), false);
  }
  const bool takes_part = (participants >> threadIdx.x & 1) != 0;
  rows[threadIdx.x] = takes_part ? source.num_rows : 0;
  if (takes_part) {
    lane->peers[threadIdx.x].received = source.received + 1;
    lane->peers[threadIdx.x].num_rows = source.num_rows;
  }
  if (source.error != error_before) {
    lose_peer(lane, threadIdx.x, static_cast<LinkError>(source.error));
  }
  const uint32_t num_rows = __reduce_add_sync(kFullWarp, takes_part ? source.num_rows : 0u);
  if (threadIdx.x != 0) return;
  lane->participants = participants;
  if (participants == 0) return;
  const uint64_t frame = load_long(&lane->frames);
  lane->frames = frame + 1;
  if (AfdTraceRow* row = trace_row(lane, frame)) {
    row->wait_begin = start;
    row->wait_end = globaltimer();
    row->participants = participants;
    row->num_rows = num_rows;
  }
}

// One row of ids or weights, whole or of four values at once.
template <typename Vector, typename Value>
__device__ __forceinline__ void take_row(const Value* from, Value* to, int row, int num_columns,
                                         bool is_taken, Vector nothing) {
  if (num_columns == sizeof(Vector) / sizeof(Value)) {
    const Vector* vectors = reinterpret_cast<const Vector*>(from);
    reinterpret_cast<Vector*>(to)[row] = is_taken ? ld_global_cg(vectors + row) : nothing;
    return;
  }
  for (int i = row * num_columns; i < (row + 1) * num_columns; ++i) {
    to[i] = is_taken ? ld_global_cg(from + i) : nothing.x;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sm90_i32_afd_wait_tokens(const __grid_constant__ AfdTokensParams params) {
  __shared__ int rows[kMaxPeers];
  griddepcontrol_wait();
  if (threadIdx.x < kWarpThreads) await_sources(params, rows);
  __syncthreads();
  const int max_tokens = params.lane->max_tokens;
  const int num_rows = params.lane->num_peers * max_tokens;
#pragma unroll 4
  for (int row = threadIdx.x; row < num_rows; row += kThreads) {
    const bool is_taken = row % max_tokens < rows[row / max_tokens];
    take_row(params.ids, params.own_ids, row, params.num_columns, is_taken,
             make_int4(-1, -1, -1, -1));
    take_row(params.weights, params.own_weights, row, params.num_columns, is_taken,
             make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }
  griddepcontrol_launch_dependents();
}
