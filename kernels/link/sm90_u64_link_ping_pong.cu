// Plays frames to and fro between two GPUs and takes the time of every round. For measuring.
//
//   lane        LinkLane[1]            see link.cuh
//   payload     u8[num_bytes]          this GPU's memory, 16-byte aligned
//   cycles      u64[num_rounds + 3]    written: SM cycles at the start and after every round, then the
//                                      global timer in nanoseconds at the start and at the end
//   seen        u32[1]                 rounds seen by the CTA that watches the flag, starts at 0
//
// Threads         up to 512 in each of 1..128 CTAs, all of them resident at once
// Shared memory   516 bytes
// Roofline        NVLink: 387 GB/s of peer copy one way; a small frame is one trip, about 1.3 us
// Reference       none: it computes nothing
//
// A payload of up to 512 bytes is kept in the SM that pushes it, where a kernel that makes what it
// pushes has it; a longer one is read for every push.
//
// The side with `starts` pushes first. A round is there and back, so half of it is one way: written,
// published, seen. There is no kernel boundary in it; those are measured with graph nodes.

#include "link/link.cuh"

constexpr uint32_t kGivenUp = 0xffffffffu;

// One CTA watches the flag, the others watch that one: many SMs that acquire one line at system scope
// hold up the peer's stores to it (896 KiB by 64 CTAs: 59 us instead of 5).
__device__ __forceinline__ LinkError watch(const LinkLane& lane, uint64_t sequence, uint32_t* seen,
                                           int turn) {
  uint32_t num_bytes;
  const LinkError error = link_wait(lane, lane.epoch_bits | sequence, &num_bytes);
  if (gridDim.x > 1) st_release_gpu(seen, error == kLinkOk ? turn + 1 : kGivenUp);
  return error;
}

__device__ __forceinline__ LinkError follow(const LinkLane& lane, const uint32_t* seen, int turn) {
  const uint64_t start = globaltimer();
  while (true) {
    const uint32_t value = ld_acquire_gpu(seen);
    if (value == kGivenUp) return kLinkStopped;
    if (value == static_cast<uint32_t>(turn + 1)) return kLinkOk;
    if (globaltimer() - start > 2 * lane.wait_limit_ns) return kLinkTimedOut;
  }
}

extern "C" __global__ void __launch_bounds__(512)
    sm90_u64_link_ping_pong(LinkLane* lane, const uint8_t* payload, uint32_t num_bytes,
                            int num_rounds, int starts, uint64_t* cycles, uint32_t* seen) {
  __shared__ uint32_t wait_error;
  __shared__ int4 kept[kWarpThreads];  // each unit by the thread that stores it
  const LinkLane view = *lane;
  const bool is_leader = threadIdx.x == 0;
  const bool is_clock = is_leader && blockIdx.x == 0;
  uint64_t sent = view.sent;
  uint64_t received = view.received;
  if (view.error != kLinkOk) return;
  const uint32_t num_units = num_bytes / sizeof(int4);
  const bool is_kept = gridDim.x == 1 && num_units <= kWarpThreads;
  if (is_kept && threadIdx.x < num_units) {
    kept[threadIdx.x] = reinterpret_cast<const int4*>(payload)[threadIdx.x];
  }
  if (is_clock) {
    cycles[num_rounds + 1] = globaltimer();
    cycles[0] = clock64_cycles();
  }
  for (int turn = starts ? 0 : 1; turn < 2 * num_rounds + (starts ? 0 : 1); ++turn) {
    if (turn % 2 == 0) {
      ++sent;
      if (!is_kept) {
        write_share(view.peer_slot, payload, num_bytes);
      } else if (threadIdx.x < num_units) {
        reinterpret_cast<int4*>(view.peer_slot)[threadIdx.x] = kept[threadIdx.x];
      }
      link_publish(lane, view.peer_flag, num_bytes, view.epoch_bits | sent);
    } else {
      ++received;
      if (is_leader) {
        wait_error = blockIdx.x == 0 ? watch(view, received, seen, turn) : follow(view, seen, turn);
      }
      __syncthreads();
      if (wait_error != kLinkOk) break;
      if (is_clock) cycles[turn / 2 + 1] = clock64_cycles();
    }
  }
  if (is_clock) {
    cycles[num_rounds + 2] = globaltimer();
    lane->sent = sent;
    lane->received = received;
    lane->error = wait_error;
  }
}
