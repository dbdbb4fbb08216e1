// One lane of the links of a whole AFD layer: slots and flags between sources and FFN ranks.
// Never chooses peers, never allocates; only the wait for a step's first rows has no limit.
//
// A source (attention instance) a sends each rank (FFN instance) f the rows that f computes; f sends
// their sums back. Slots and flags lie in the receiver's memory, mapped by the sender:
//
//   source a                                      rank f
//   afd_send        ---- rows of a -------------> hidden[a], scales[a], ids[a], weights[a]
//                   ---- {number, rows | mask} -> flags[a]                 afd_wait_tokens
//   afd_wait_sums   <--- {number, mask} --------- admission (rank 0, a step's first layer, F > 1)
//   sums[f]         <--- sums of a's rows ------- moe_combine_push
//   flags[f]        <--- {number, rows} ---------
//
// number = epoch << 40 | sequence. Sequences count the frames of a lane and peer from 1 under an
// epoch, the same in both directions: reply s answers frame s. mask: 0, or in the first layer of a
// step the sources that take part (towards rank 0, which is to decide that: the sender alone).
//
// WHO MAY TOUCH WHAT WHEN. Each lane's kernels run in one stream, on either side in this order:
//
//   source   ... send(s) wait(s) add(s) ... send(s+1)      add: add_sums_rmsnorm_quantize
//   rank     ... wait(s) dispatch gate_up down push(s) wait(s+1)
//
// 1. hidden[a], scales[a], ids[a], weights[a] at f are written by send(s+1) of a alone. It follows
//    wait(s) of a, which saw f's flag s, published by push(s) of f: after all reads of frame s by f,
//    ids and weights in wait(s), hidden and scales in dispatch. Reads have been performed when their
//    kernel has ended, and each kernel of the chain begins its work at griddepcontrol.wait, that is
//    after the one before has ended; so with programmatic launches, too, push(s) follows dispatch.
// 2. sums[f] at a is written by push(s+1) of f alone, after wait(s+1) of f saw a's flag s+1, published
//    by (or, the first of a step with F > 1, after) send(s+1) of a, which follows add(s).
// 3. A flag is overwritten with s+1 only by who has seen the answer to s, that is when its reader has
//    read s. The admission flag: when a has sent the first frame of its next step.
// 4. A source that is not in f's step may store frame s+1 at any time while that step runs: in f's
//    next step, or in this one if it ended here for f's peer. Nothing of f reads flags, ids and weights of a
//    then: wait copies those of the participants into memory of the lane's own and writes -1 for all
//    other rows, and the experts read the copies. They may load a hidden row without an id, to
//    throw it away.
// 5. The lane's own ids and weights are written by wait(s+1) only after griddepcontrol.wait: push(s),
//    which reads them last, has ended.
// 6. Payload is visible to who sees the flag: each CTA's stores happen before its add to `arrivals`
//    (acq_rel), the last add before the release at system scope, the acquire before griddepcontrol.wait
//    of the next kernel has returned there. Readers pass by L1, which other kernels filled before.
// 7. Nothing mutable of a lane is read before griddepcontrol.wait, but by push what is older than
//    its predecessor.
//
// WHO TAKES PART IN A STEP. The ranks of a step must agree: if rank 0 began with sources {0, 1} and
// rank 1, where source 1 came too late, with {0}, then in layer 1 rank 0 would await source 1, which
// awaits rank 1, which awaits source 0, which awaits rank 0. So rank 0 decides alone: it takes who
// has sent when its join window ends, and tells each of them whom it took (admission). Towards the
// other ranks a source has stored the rows but not the flag; its wait kernel publishes that with rank
// 0's mask, 3 us later, once per step. A rank above 0 takes the mask of the first flag it sees and
// waits for all in it. Two masks never compete: rank 0 begins another step only when all of this one
// have ended it, which takes every rank's replies, or were lost.
// A source that comes late keeps its frame where it is, and is in the next step.
//
// WHAT CAN GO WRONG. A source that is lost (its word `active` differs from its epoch, it does not come
// within wait_limit_ns of the first that does, or what comes is wrong) leaves the step at this rank: its rows become -1, it
// gets no sums, and the others go on. The clock starts with the first to come, because a source that died
// between two flags is awaited by one rank a layer earlier than by another: there the live sources have come,
// here they cannot before they have been answered there. If none comes the limit is twice as long. A
// source's own limit has to be longer than the ranks', or it gives up with the one it waits for. Losing it at one rank only needs no agreement: it gets no
// reply there, so it runs into its own limit and its host makes all its links anew. Frames with a
// mask are taken by first layers only and others by others only, so a source and a rank that
// disagree about the layer find out. A lane of a source needs all its ranks: the first error ends it.
// A lane with an error sends and awaits nothing, and on a rank its ids are -1, so that the experts
// compute nothing. Its kernels go through the motions, so a replay always ends. A frame that
// was stored in part or not published is overwritten under the next epoch; older flags are smaller
// numbers than any that are awaited then. The host makes a link anew only while no step is in
// progress: it sets `pause`, upon which the wait for a step's first rows returns with nothing.
// Memory of a peer that died stays mapped, and stores to it harmless, until then.
#pragma once

#include "common/ptx.cuh"
#include "common/system.cuh"
#include "common/types.cuh"
#include "link/link.cuh"

constexpr int kMaxPeers = 32;
constexpr int kMaskShift = 32;  // in the second word of a flag; below lie the rows

// 128 bytes in this GPU's memory: of one lane, towards one peer. Written by the host when the link
// comes up; then `sent` and what follows only by the lane's kernels.
struct AfdPeer {
  uint8_t* slots[4];  // at a rank: hidden, scales, ids, weights of this source; at a source: sums
  Word128* peer_flag;
  Word128* peer_admission;  // at a source
  const Word128* flag;
  uint64_t epoch_bits;  // 0: not linked
  uint64_t sent;        // sequence numbers of the last frames
  uint64_t received;
  uint32_t num_rows;  // of the frame in progress
  uint32_t error;     // LinkError; once set, the peer takes part in nothing
  uint64_t reserved[5];
};
static_assert(sizeof(AfdPeer) == 128, "AFD_PEER of ops/afd_slots.py");

// Times of the global timer, at an FFN rank "send" is the push of the sums and `num_rows` of all sources.
struct AfdTraceRow {
  uint64_t frame;
  uint64_t send_begin, send_end;
  uint64_t wait_begin, wait_end;
  uint64_t participants;
  uint64_t num_rows;
  uint64_t reserved;
};
static_assert(sizeof(AfdTraceRow) == 64, "AFD_TRACE_ROW of ops/afd_slots.py");

struct AfdLane {
  const uint32_t* stop;      // host memory; not 0 ends every wait
  const uint32_t* pause;     // host memory; not 0: no step begins. FFN ranks
  const uint32_t* active;    // host memory, [A]: the epoch under which a source may send, or 0
  uint32_t* report;          // host memory, [1 + 32]: errors of the lane and its peers, repeated
  const Word128* admission;  // of sources
  AfdTraceRow* trace;        // null: none
  uint64_t wait_limit_ns;
  uint64_t join_window_ns;
  uint32_t num_peers;
  uint32_t index;  // this source or rank
  uint32_t num_ranks;
  uint32_t max_tokens;    // T
  uint32_t error;         // LinkError; once set, nothing is sent or awaited
  uint32_t arrivals;      // CTAs of the send or push in progress that have written their share
  uint32_t participants;  // of the step in progress, a bit per source
  uint32_t joined;        // who began the last step
  uint32_t previous;      // who began the step before
  uint32_t trace_rows;
  uint64_t frames;  // layers awaited
  uint64_t steps;
  uint64_t idle_limit_ns;  // a step that nobody begins ends then; 0: never. FFN ranks
  AfdPeer peers[kMaxPeers];
};
static_assert(sizeof(AfdLane) == 128 * (1 + kMaxPeers), "AFD_LANE of ops/afd_slots.py");

// What earlier kernels of the stream left, through L2; see LinkProgress.
__device__ __forceinline__ uint32_t load_word(const uint32_t* address) {
  return static_cast<uint32_t>(ld_global_cg(reinterpret_cast<const int*>(address)));
}

__device__ __forceinline__ uint64_t load_long(const uint64_t* address) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(address);
  return load_word(words) | static_cast<uint64_t>(load_word(words + 1)) << 32;
}

__device__ __forceinline__ LinkProgress load_progress(const AfdPeer* peer) {
  const int4 words = ld_global_cg(reinterpret_cast<const int4*>(&peer->sent));
  return {join_words(words.x, words.y), join_words(words.z, words.w)};
}

__device__ __forceinline__ LinkError load_error(const AfdLane* lane) {
  return static_cast<LinkError>(load_word(&lane->error));
}

// One thread ends the lane.
__device__ __forceinline__ void fail_lane(AfdLane* lane, LinkError error) {
  lane->error = error;
  st_relaxed_sys(lane->report, error);
}

__device__ __forceinline__ void lose_peer(AfdLane* lane, int peer, LinkError error) {
  lane->peers[peer].error = error;
  st_relaxed_sys(lane->report + 1 + peer, error);
}

__device__ __forceinline__ AfdTraceRow* trace_row(const AfdLane* lane, uint64_t frame) {
  if (lane->trace == nullptr) return nullptr;
  AfdTraceRow* row = lane->trace + frame % lane->trace_rows;
  row->frame = frame;
  return row;
}

// All threads of a CTA call it when they have stored their share: true in every thread of warp 0 of
// the last CTA. The stores of all CTAs happen before what those threads release.
__device__ __forceinline__ bool is_last_to_arrive(AfdLane* lane) {
  __syncthreads();
  if (threadIdx.x >= kWarpThreads) return false;
  int before = 0;
  if (threadIdx.x == 0) {
    before = atom_add_acq_rel_gpu(reinterpret_cast<int*>(&lane->arrivals), 1);
  }
  const bool is_last = __shfl_sync(kFullWarp, before, 0) == static_cast<int>(gridDim.x) - 1;
  __syncwarp();  // hands on what thread 0 has acquired
  if (is_last && threadIdx.x == 0) lane->arrivals = 0;
  return is_last;
}
