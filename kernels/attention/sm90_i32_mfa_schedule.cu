// Split-KV schedule for MFA decode: cuts the KV blocks of a batch into one range per CTA.
// Runs once per step; every layer's decode kernel reads the result.
//
//   seq_lens   i32[S]               1 <= S <= 1024, in tokens, 0 allowed
//   schedule   i32[num_ctas, 8]     MfaWork rows, see mfa_work.cuh; num_ctas <= 256
//
// Threads         1,024 in one CTA; thread i owns sequence i, then CTA boundary i
// Shared memory   about 8 KiB static
// Roofline        latency: one load, one scan, one binary search, one store: about 3 us
// Reference       step3rt.ops.mfa_schedule.reference_mfa_schedule, equal integer for integer
//
// A sequence costs its blocks plus kSequenceCost (query load, merge, store), all in blocks. Decode
// is bound by HBM, which stays busy while some SMs idle, but a split costs 64 KiB written and read
// per part. So cuts snap to the nearest sequence boundary when that leaves no CTA above 1.2 times
// the mean; otherwise only within a tenth of the mean, which balances better and splits more.

#include "attention/mfa_work.cuh"

constexpr int kMaxSequences = 1024;
constexpr int kMaxCtas = 256;
constexpr int kSequenceCost = 2;
constexpr int kMinRangeCost = 6;          // below, one more CTA costs more than it saves
constexpr int kMaxPartsPerSequence = 64;  // bounds the work of the CTA that combines them
constexpr int kWarps = kMaxSequences / kWarpThreads;

struct Boundary {
  int sequence;
  int block;
};

__device__ __forceinline__ int inclusive_scan(int value, int (&warp_sums)[kWarps]) {
  const int lane = threadIdx.x % kWarpThreads;
  const int warp = threadIdx.x / kWarpThreads;
#pragma unroll
  for (int step = 1; step < kWarpThreads; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, value, step);
    if (lane >= step) value += other;
  }
  if (lane == kWarpThreads - 1) warp_sums[warp] = value;
  __syncthreads();
  if (warp == 0) {
    int sum = warp_sums[lane];
#pragma unroll
    for (int step = 1; step < kWarpThreads; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, sum, step);
      if (lane >= step) sum += other;
    }
    warp_sums[lane] = sum;
  }
  __syncthreads();
  return warp == 0 ? value : value + warp_sums[warp - 1];
}

// Last sequence whose first cost unit is at or before `position`.
__device__ __forceinline__ int find_sequence(const int* starts, int num_sequences, int position) {
  int low = 0;
  int high = num_sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (starts[middle] <= position) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

extern "C" __global__ void __launch_bounds__(kMaxSequences, 1)
    sm90_i32_mfa_schedule(const int* seq_lens, int num_sequences, MfaWork* schedule, int num_ctas) {
  __shared__ int starts[kMaxSequences + 1];  // cost units before each sequence
  __shared__ int warp_sums[kWarps];
  __shared__ int cuts[kMaxCtas + 1];  // cost units before each CTA
  __shared__ Boundary boundaries[kMaxCtas + 1];
  __shared__ int max_cost;
  static_assert(kWarps == kWarpThreads, "one warp scans the warp sums");

  const int i = threadIdx.x;
  const int num_tokens = i < num_sequences ? seq_lens[i] : 0;
  const int num_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
  const int cost = i < num_sequences ? num_blocks + kSequenceCost : 0;
  if (i == 0) {
    starts[0] = 0;
    max_cost = 0;
  }
  const int end = inclusive_scan(cost, warp_sums);
  if (i < num_sequences) {
    starts[i + 1] = end;
    atomicMax(&max_cost, cost);
  }
  __syncthreads();

  const int total = starts[num_sequences];
  const int longest_range = (max_cost + kMaxPartsPerSequence - 1) / kMaxPartsPerSequence;
  const int min_range = longest_range > kMinRangeCost ? longest_range : kMinRangeCost;
  int num_used = total / min_range;
  num_used = num_used < 1 ? 1 : (num_used > num_ctas ? num_ctas : num_used);

  // The even cut of this thread's CTA and the sequence boundary nearest to it.
  int even = total;
  int nearest = total;
  if (i < num_used) {
    even = static_cast<int>(static_cast<int64_t>(i) * total / num_used);
    const int sequence = find_sequence(starts, num_sequences, even);
    const int before = starts[sequence];
    const int after = starts[sequence + 1];
    nearest = even - before <= after - even ? before : after;
  }
  if (i <= num_ctas) cuts[i] = nearest;
  __syncthreads();
  const int snapped_cost = i < num_ctas ? cuts[i + 1] - cuts[i] : 0;
  const bool is_heavy =
      static_cast<int64_t>(snapped_cost) * num_used * 5 > static_cast<int64_t>(total) * 6;
  const bool snap_all = !__syncthreads_or(is_heavy);

  if (i <= num_ctas) {
    const int distance = nearest > even ? nearest - even : even - nearest;
    const bool snaps = snap_all || static_cast<int64_t>(distance) * num_used * 10 <= total;
    const int cut = snaps ? nearest : even;
    Boundary boundary = {num_sequences, 0};
    if (cut < total) {
      const int sequence = find_sequence(starts, num_sequences, cut);
      const int block = cut - starts[sequence];
      const int blocks = starts[sequence + 1] - starts[sequence] - kSequenceCost;
      boundary.sequence = block < blocks ? sequence : sequence + (block > 0 ? 1 : 0);
      boundary.block = block < blocks ? block : 0;
    }
    boundaries[i] = boundary;
  }
  __syncthreads();

  if (i < num_ctas) {
    const Boundary first = boundaries[i];
    const Boundary last = boundaries[i + 1];
    MfaWork work = {{first.sequence, first.block, last.sequence, last.block}, {i, 1}, {i, 1}};
    if (first.block > 0) {  // walk both ways to the ends of the sequence
      int begin = i;
      while (boundaries[begin].sequence == first.sequence && boundaries[begin].block > 0) --begin;
      int stop = i + 1;
      while (boundaries[stop].sequence == first.sequence && boundaries[stop].block > 0) ++stop;
      work.from_earlier = {begin, stop - begin};
    }
    if (last.block > 0) {
      int stop = i + 1;
      while (boundaries[stop].sequence == last.sequence && boundaries[stop].block > 0) ++stop;
      work.into_later = {i, stop - i};
    }
    schedule[i] = work;
    __threadfence();  // see mfa_load_range
  }
}
