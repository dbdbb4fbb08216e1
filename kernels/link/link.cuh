// One lane of a link between two GPUs: a slot and a flag each way, in the receiver's memory.
// Never chooses peers, never allocates, and never waits without a limit.
//
//   sender's GPU                       receiver's GPU
//   LinkLane.peer_slot  --- NVLink --> payload, slot_bytes                        (LinkLane.slot)
//   LinkLane.peer_flag  --- NVLink --> { epoch << 40 | sequence, bytes }          (LinkLane.flag)
//
// The payload is written first, then the flag with a system-scope release; the receiver reads the
// flag, acquires, and then reads the payload. A frame's header is the flag itself, one store of 16
// bytes: who sees the number sees the length, without a second trip to memory. A reply on the other
// direction is the credit for the next push: the slot is not written again before it.
#pragma once

#include "common/ptx.cuh"
#include "common/system.cuh"
#include "common/types.cuh"

constexpr int kSequenceBits = 40;        // 28 years of 61 layers at 20 steps a second
constexpr int kSpinsBetweenChecks = 64;  // a look at the host's word is a trip over PCIe

enum LinkError : uint32_t {
  kLinkOk = 0,
  kLinkStopped = 1,        // the host gave up
  kLinkTimedOut = 2,       // nothing came within wait_limit_ns
  kLinkWrongSequence = 3,  // the flag names a frame that was not asked for, or a later epoch
  kLinkWrongLength = 4,    // more than the slot holds, or not as many as were asked for
  kLinkNotLinked = 5,      // a lane of a whole AFD layer has no link to one of its ranks
};

// 128 bytes in this GPU's memory. The host writes it when the link comes up, and reads `error` when
// a step is over; between, only the kernels of one stream change it.
struct LinkLane {
  uint8_t* peer_slot;
  Word128* peer_flag;
  const uint8_t* slot;
  const Word128* flag;
  const uint32_t* stop;  // host memory; not 0 ends every wait
  uint64_t epoch_bits;   // epoch << kSequenceBits
  uint64_t wait_limit_ns;
  uint32_t slot_bytes;  // payload capacity, a multiple of 16
  uint32_t error;       // LinkError; once set, nothing is sent or awaited
  uint64_t sent;        // sequence numbers of the last frames
  uint64_t received;
  uint32_t arrivals;  // CTAs of the push in progress that have written their share
  uint32_t reserved0;
  uint64_t reserved1[5];
};
static_assert(sizeof(LinkLane) == 128, "struct LINK_LANE of ops/device_link.py");

__device__ __forceinline__ uint64_t join_words(int low, int high) {
  return static_cast<uint32_t>(low) | (static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32);
}

// What earlier kernels of the stream left, through L2: this SM's L1 may hold the line from before
// they ended, if this kernel started early.
struct LinkProgress {
  uint64_t sent;
  uint64_t received;
};

__device__ __forceinline__ LinkProgress load_progress(const LinkLane* lane) {
  const int4 words = ld_global_cg(reinterpret_cast<const int4*>(&lane->sent));
  return {join_words(words.x, words.y), join_words(words.z, words.w)};
}

__device__ __forceinline__ LinkError load_error(const LinkLane* lane) {
  return static_cast<LinkError>(ld_global_cg(reinterpret_cast<const int*>(&lane->error)));
}

// Copies this CTA's share of `num_bytes` (a multiple of 16) into the peer's slot. Eight loads are in
// flight per thread: NVLink hides its latency behind them.
__device__ __forceinline__ void write_share(uint8_t* destination, const uint8_t* source,
                                            uint32_t num_bytes) {
  constexpr int kUnroll = 8;
  const uint32_t num_units = num_bytes / sizeof(int4);
  const uint32_t num_threads = gridDim.x * blockDim.x;
  const int4* from = reinterpret_cast<const int4*>(source);
  int4* to = reinterpret_cast<int4*>(destination);
  for (uint32_t unit = blockIdx.x * blockDim.x + threadIdx.x; unit < num_units;
       unit += kUnroll * num_threads) {
    int4 values[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const uint32_t at = unit + i * num_threads;
      if (at < num_units) values[i] = from[at];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const uint32_t at = unit + i * num_threads;
      if (at < num_units) to[at] = values[i];
    }
  }
}

// What follows the payload's stores of all CTAs: the last CTA to come publishes. True in the one
// thread that did.
__device__ __forceinline__ bool link_publish(LinkLane* lane, Word128* peer_flag, uint32_t num_bytes,
                                             uint64_t number) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  if (gridDim.x > 1) {
    // Each CTA's stores happen before its count, the last count before the flag: causality is
    // transitive, so the release of the last one speaks for all.
    const int before = atom_add_acq_rel_gpu(reinterpret_cast<int*>(&lane->arrivals), 1);
    if (before != static_cast<int>(gridDim.x) - 1) return false;
    lane->arrivals = 0;
  }
  st_release_sys(peer_flag, {number, num_bytes});
  return true;
}

// The whole grid pushes one frame. Every CTA calls it with all its threads; `number` is the frame's
// epoch and sequence. True in the one thread that published.
__device__ __forceinline__ bool link_push(LinkLane* lane, uint8_t* peer_slot, Word128* peer_flag,
                                          const uint8_t* payload, uint32_t num_bytes,
                                          uint64_t number) {
  write_share(peer_slot, payload, num_bytes);
  return link_publish(lane, peer_flag, num_bytes, number);
}

// One thread waits for frame `expected` and takes its length. Never hangs and never traps: says what
// went wrong instead.
__device__ __forceinline__ LinkError link_wait(const LinkLane& lane, uint64_t expected,
                                               uint32_t* num_bytes) {
  const uint64_t start = globaltimer();
  Word128 word;
  while (true) {
    for (int spin = 0; spin < kSpinsBetweenChecks; ++spin) {
      // Acquiring with every look is 0.5 us faster than a relaxed look and a fence after it.
      word = ld_acquire_sys(lane.flag);
      if (word.low == expected) {
        *num_bytes = static_cast<uint32_t>(word.high);
        return *num_bytes <= lane.slot_bytes ? kLinkOk : kLinkWrongLength;
      }
    }
    // An older epoch and an older sequence are what was there before; what is newer was not asked
    // for, since the reply to it has not been sent.
    if (word.low > expected) return kLinkWrongSequence;
    if (ld_relaxed_sys(lane.stop) != 0) return kLinkStopped;
    if (globaltimer() - start > lane.wait_limit_ns) return kLinkTimedOut;
  }
}
