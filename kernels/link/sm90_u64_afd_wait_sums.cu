// Waits until every FFN rank has answered the frame that was sent last.
//
//   lane            AfdLane[1]   see afd.cuh
//   is_first_layer  int          whether that frame began a step
//
// Threads         32 in one CTA; thread f waits for rank f
// Shared memory   none
// Registers       30, 0 spills
// Roofline        latency: a load from L2 that hits after one NVLink trip, about 1.3 us; predicted 2.2 us
//                 with the launch once the last flag is there, and 3 us more in a step's first layer
// Reference       step3rt.ops.afd_reference.AttentionHostLane.wait
//
// In a step's first layer, if there are several ranks, it first waits for rank 0 to say who takes part
// and publishes the frame to the other ranks: the rows are there already. What the ranks wrote is visible to
// every kernel after this one. It never hangs and never traps: see afd.cuh.

#include "link/afd.cuh"

struct Awaited {
  LinkError error;
  uint64_t payload;
};

// One thread waits for a flag to say `expected`.
__device__ __forceinline__ Awaited await_flag(const Word128* flag, uint64_t expected,
                                              const AfdLane* lane, uint64_t start) {
  while (true) {
    for (int spin = 0; spin < kSpinsBetweenChecks; ++spin) {
      const Word128 word = ld_acquire_sys(flag);
      if (word.low == expected) return {kLinkOk, word.high};
      if (word.low > expected) return {kLinkWrongSequence, 0};
    }
    if (ld_relaxed_sys(lane->stop) != 0) return {kLinkStopped, 0};
    if (globaltimer() - start > lane->wait_limit_ns) return {kLinkTimedOut, 0};
  }
}

// The whole warp: thread 0 learns whom rank 0 admitted, the threads of the other ranks tell them.
__device__ __forceinline__ LinkError publish_admission(AfdLane* lane, const AfdPeer& peer,
                                                       uint64_t sent, uint64_t start) {
  const int rank = threadIdx.x;
  Awaited admission = {kLinkOk, 0};
  if (rank == 0) admission = await_flag(lane->admission, peer.epoch_bits | sent, lane, start);
  __syncwarp();
  const int error = __shfl_sync(kFullWarp, static_cast<int>(admission.error), 0);
  const uint64_t mask = __shfl_sync(kFullWarp, admission.payload, 0);
  if (error == kLinkOk && rank > 0 && rank < lane->num_peers) {
    st_release_sys(peer.peer_flag,
                   {peer.epoch_bits | sent, mask << kMaskShift | load_word(&peer.num_rows)});
  }
  return admission.error;
}

extern "C" __global__ void __launch_bounds__(kWarpThreads)
    sm90_u64_afd_wait_sums(AfdLane* lane, int is_first_layer) {
  const int rank = threadIdx.x;
  const int num_ranks = lane->num_peers;
  AfdPeer& peer = lane->peers[rank];
  griddepcontrol_wait();
  if (load_error(lane) == kLinkOk) {
    const uint64_t start = globaltimer();
    const LinkProgress progress = load_progress(&peer);
    LinkError error = kLinkOk;
    if (is_first_layer && num_ranks > 1) {
      error = publish_admission(lane, peer, progress.sent, start);
    }
    if (__ballot_sync(kFullWarp, error != kLinkOk) == 0 && rank < num_ranks) {
      const uint64_t expected = peer.epoch_bits | (progress.received + 1);
      const Awaited reply = await_flag(peer.flag, expected, lane, start);
      error = reply.error;
      if (error == kLinkOk && reply.payload != load_word(&peer.num_rows)) error = kLinkWrongLength;
    }
    __syncwarp();
    const uint32_t failed = __ballot_sync(kFullWarp, error != kLinkOk);
    if (failed == 0) {
      if (rank < num_ranks) peer.received = progress.received + 1;
      const uint64_t frame = load_long(&lane->frames);
      if (rank == 0) {
        if (AfdTraceRow* row = trace_row(lane, frame)) {
          row->wait_begin = start;
          row->wait_end = globaltimer();
          row->participants = 1ull << lane->index;
          row->num_rows = load_word(&peer.num_rows);
        }
        lane->frames = frame + 1;
      }
    } else {
      if (error != kLinkOk && error != kLinkStopped) lose_peer(lane, rank, error);
      if (rank == __ffs(failed) - 1) fail_lane(lane, error);
    }
  }
  __syncwarp();
  griddepcontrol_launch_dependents();
}
