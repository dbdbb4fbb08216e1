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
constexpr int kGridSizes = 8;             // tried, from all CTAs downwards
constexpr int kMinGridToShrink = 64;      // so that at most a ninth of the CTAs gets nothing
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

// Where the cost units of a batch lie, and where an even cut of them falls.
struct Costs {
  const int* starts;  // [num_sequences + 1]
  int num_sequences;

  __device__ __forceinline__ int total() const { return starts[num_sequences]; }

  __device__ __forceinline__ int even_cut(int cta, int num_used) const {
    return static_cast<int>(static_cast<int64_t>(cta) * total() / num_used);
  }

  // The sequence boundary nearest to `cut`.
  __device__ __forceinline__ int nearest(int cut) const {
    const int sequence = find_sequence(starts, num_sequences, cut);
    const int before = starts[sequence];
    const int after = starts[sequence + 1];
    return cut - before <= after - cut ? before : after;
  }

  // Whether a cut moves to its nearest boundary: within a tenth of the mean.
  __device__ __forceinline__ bool snaps(int cut, int nearest, int num_used) const {
    const int distance = nearest > cut ? nearest - cut : cut - nearest;
    return static_cast<int64_t>(distance) * num_used * 10 <= total();
  }
};

extern "C" __global__ void __launch_bounds__(kMaxSequences, 1)
    sm90_i32_mfa_schedule(const int* seq_lens, int num_sequences, MfaWork* schedule, int num_ctas) {
  __shared__ int starts[kMaxSequences + 1];  // cost units before each sequence
  __shared__ int warp_sums[kWarps];
  __shared__ int cuts[kMaxCtas + 1];  // cost units before each CTA
  __shared__ Boundary boundaries[kMaxCtas + 1];
  __shared__ int max_cost;
  __shared__ int num_splits[kGridSizes];  // about, of a grid with so many CTAs less
  static_assert(kWarps == kWarpThreads, "one warp scans the warp sums");

  const int i = threadIdx.x;
  const int num_tokens = i < num_sequences ? seq_lens[i] : 0;
  const int num_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
  const int cost = i < num_sequences ? num_blocks + kSequenceCost : 0;
  if (i == 0) {
    starts[0] = 0;
    max_cost = 0;
  }
  if (i < kGridSizes) num_splits[i] = 0;
  const int end = inclusive_scan(cost, warp_sums);
  if (i < num_sequences) {
    starts[i + 1] = end;
    atomicMax(&max_cost, cost);
  }
  __syncthreads();

  const Costs costs = {starts, num_sequences};
  const int total = costs.total();
  const int longest_range = (max_cost + kMaxPartsPerSequence - 1) / kMaxPartsPerSequence;
  const int min_range = longest_range > kMinRangeCost ? longest_range : kMinRangeCost;
  int num_used = total / min_range;
  num_used = num_used < 1 ? 1 : (num_used > num_ctas ? num_ctas : num_used);

  const int num_sizes = num_used >= kMinGridToShrink ? kGridSizes : 1;
  for (int c = i; c < num_sizes * num_used; c += kMaxSequences) {
    const int less = c / num_used;
    const int cta = c % num_used;
    if (cta == 0 || cta >= num_used - less) continue;
    const int cut = costs.even_cut(cta, num_used - less);
    if (!costs.snaps(cut, costs.nearest(cut), num_used - less)) atomicAdd(&num_splits[less], 1);
  }
  __syncthreads();
  int fewest = 0;
  for (int less = 1; less < num_sizes; ++less) {
    const bool is_worth_it = num_splits[less] * 4 <= num_splits[0] * 3;
    if (is_worth_it && num_splits[less] < num_splits[fewest]) fewest = less;
  }
  num_used -= fewest;

  // The even cut of this thread's CTA and the sequence boundary nearest to it.
  int even = total;
  int nearest = total;
  if (i < num_used) {
    even = costs.even_cut(i, num_used);
    nearest = costs.nearest(even);
  }
  if (i <= num_ctas) cuts[i] = nearest;
  __syncthreads();
  const int snapped_cost = i < num_ctas ? cuts[i + 1] - cuts[i] : 0;
  const bool is_heavy =
      static_cast<int64_t>(snapped_cost) * num_used * 5 > static_cast<int64_t>(total) * 6;
  const bool snap_all = !__syncthreads_or(is_heavy);

  if (i <= num_ctas) {
    const int cut = snap_all || costs.snaps(even, nearest, num_used) ? nearest : even;
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
