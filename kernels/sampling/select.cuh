// Finds where a row's tokens, most likely first, reach a count or a probability, without sorting.
// Never changes a logit.
//
// The range of keys that holds the cut is divided into 512 bins, the cluster's histograms are added,
// and the bin in which the cut falls is the next range: at most four rounds for 32-bit keys. All
// sums are of integers, so the result depends on no order.
#pragma once

#include "sampling/cluster_row.cuh"

constexpr uint32_t kLowestFinite = 0x00800000u;  // ordered_key(-FLT_MAX)

// Probabilities in units of 2^-36 of the most likely token's. A slice has fewer than 2^14 tokens, so
// the sums of both 18-bit halves of its probabilities fit 32 bits.
constexpr int kMassHalfBits = 18;
constexpr float kMassHalf = 1 << kMassHalfBits;
constexpr float kMassUnits = kMassHalf * kMassHalf;
constexpr float kNoMass = -25.5f;  // exp of less is below half a unit

struct Mass {
  uint32_t high = 0;
  uint32_t low = 0;

  __device__ __forceinline__ uint64_t total() const {
    return (static_cast<uint64_t>(high) << kMassHalfBits) + low;
  }
};

__device__ __forceinline__ Mass token_mass(float logit, float top, float inverse_temperature) {
  const float scaled = (logit - top) * inverse_temperature;
  if (scaled < kNoMass) return {};
  const float share = expf(scaled) * kMassHalf;
  const float whole = truncf(share);
  return {__float2uint_rz(whole), __float2uint_rn((share - whole) * kMassHalf)};
}

// Tokens with a key above, and those with an equal one up to `last_token`, are kept.
struct Cut {
  uint32_t key = kLowestFinite;
  int last_token = kNoToken;

  __device__ __forceinline__ bool keeps(uint32_t other, int token) const {
    return other > key || (other == key && token <= last_token);
  }
};

// What to select by: each token counts 1, or its probability.
struct ByCount {
  static constexpr bool kIsMass = false;
  __device__ __forceinline__ Mass mass(uint32_t) const { return {}; }
};

struct ByMass {
  static constexpr bool kIsMass = true;
  float top;
  float inverse_temperature;
  __device__ __forceinline__ Mass mass(uint32_t key) const {
    return token_mass(key_value(key), top, inverse_temperature);
  }
};

// Where the weights reach the target: among `present` tokens with keys from `low` to `high`, when
// those before weigh `left` less than it. Nobody is present: all tokens are inside the cut. More
// than kMaxListed are only if their keys are all the same.
struct Crossing {
  uint32_t low;
  uint32_t high;
  uint32_t present;
  uint64_t left;
  uint64_t each;  // weight of one of them, if their keys are all the same
};

template <class Measure, class KeyOf>
__device__ void fill_histogram(ClusterRow& row, const Measure& measure, KeyOf key_of, uint32_t low,
                               uint32_t high, int shift) {
  SampleShared& shared = row.shared;
  __syncthreads();  // the previous crossing has been read
  for (int bin = threadIdx.x; bin < kBins; bin += kSampleThreads) {
    shared.counts[bin] = 0;
    if constexpr (Measure::kIsMass) shared.mass_high[bin] = shared.mass_low[bin] = 0;
  }
  if (threadIdx.x == 0) shared.crossing_bin = -1;
  __syncthreads();
  row.for_each([&](float logit, int place) {
    uint32_t key;
    if (!key_of(logit, place, key) || key < low || key > high) return;
    const uint32_t bin = (high - key) >> shift;
    atomicAdd(&shared.counts[bin], 1u);
    if constexpr (Measure::kIsMass) {
      const Mass mass = measure.mass(key);
      atomicAdd(&shared.mass_high[bin], mass.high);
      atomicAdd(&shared.mass_low[bin], mass.low);
    }
  });
}

// Adds the cluster's histograms and notes the bin in which the sum of weights reaches `target`.
template <class Measure>
__device__ void find_bin(ClusterRow& row, uint64_t target) {
  SampleShared& shared = row.shared;
  constexpr int kOwn = kBins > kSampleThreads ? kBins / kSampleThreads : 1;
  const int first = threadIdx.x * kOwn;
  uint32_t counts[kOwn] = {};
  uint64_t weights[kOwn] = {};
  uint64_t own = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (first + i >= kBins) break;
#pragma unroll
    for (int r = 0; r < kRowCtas; ++r) {
      counts[i] += ld_shared_cluster_u32(address_in_cta(&shared.counts[first + i], r));
      if constexpr (Measure::kIsMass) {
        const uint64_t high =
            ld_shared_cluster_u32(address_in_cta(&shared.mass_high[first + i], r));
        weights[i] += (high << kMassHalfBits) +
                      ld_shared_cluster_u32(address_in_cta(&shared.mass_low[first + i], r));
      }
    }
    if constexpr (!Measure::kIsMass) weights[i] = counts[i];
    own += weights[i];
  }
  uint64_t before = own;  // inclusive over the warp, then exclusive over the CTA
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
#pragma unroll
  for (int step = 1; step < kWarpThreads; step *= 2) {
    const uint64_t other = __shfl_up_sync(kFullWarp, before, step);
    if (lane >= step) before += other;
  }
  __syncthreads();
  if (lane == kWarpThreads - 1) shared.partial[warp] = before;
  __syncthreads();
  before -= own;
#pragma unroll
  for (int w = 0; w < kSampleWarps; ++w) {
    if (w < warp) before += shared.partial[w];
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (before < target && target <= before + weights[i]) {
      shared.crossing_bin = first + i;
      shared.crossing_before = before;
      shared.crossing_weight = weights[i];
      shared.crossing_count = counts[i];
    }
    before += weights[i];
  }
  barrier_cluster_sync();  // also: nobody reads this CTA's histogram any more
}

// Copies the lists of all CTAs, which hold kMaxListed tokens at most, to this one's, by rank. The
// lists are written, and the cluster has met.
__device__ __forceinline__ int gather_lists(ClusterRow& row) {
  SampleShared& shared = row.shared;
  int before = 0, slot = -1, rank = 0;
#pragma unroll
  for (int r = 0; r < kRowCtas; ++r) {
    const int count =
        static_cast<int>(ld_shared_cluster_u32(address_in_cta(&shared.num_listed, r)));
    if (slot < 0 && static_cast<int>(threadIdx.x) < before + count) {
      slot = static_cast<int>(threadIdx.x) - before;
      rank = r;
    }
    before += count;
  }
  if (slot >= 0) {
    const ListedToken* source = &shared.listed[slot];
    shared.gathered[threadIdx.x] = {
        ld_shared_cluster_u32(address_in_cta(&source->key, rank)),
        static_cast<int>(ld_shared_cluster_u32(address_in_cta(&source->token, rank)))};
  }
  __syncthreads();
  return before;
}

// `target` >= 1. Keys that key_of(logit, place, key) refuses, and those outside [low, high], do not
// count.
template <class Measure, class KeyOf>
__device__ Crossing find_crossing(ClusterRow& row, const Measure& measure, KeyOf key_of,
                                  uint32_t low, uint32_t high, uint64_t target) {
  const uint32_t lowest = low;
  while (true) {
    // 9 bits of the range's width choose the bin.
    const int shift = max(0, 32 - __clz(high - low) - 9);
    fill_histogram(row, measure, key_of, low, high, shift);
    barrier_cluster_sync();
    find_bin<Measure>(row, target);
    const SampleShared& shared = row.shared;
    const int bin = shared.crossing_bin;
    if (bin < 0) return {lowest, lowest, 0, 0, 0};
    target -= shared.crossing_before;
    const uint32_t present = shared.crossing_count;
    high -= static_cast<uint32_t>(bin) << shift;
    const uint32_t width = (1u << shift) - 1u;
    low = high - low < width ? low : high - width;
    if (present <= kMaxListed || shift == 0) {
      return {low, high, present, target, shared.crossing_weight / present};
    }
  }
}

// The cut among the tokens of a crossing, all of which are compared with each other. Every CTA of
// the cluster does the same and finds the same.
template <class Measure, class KeyOf>
__device__ Cut find_cut(ClusterRow& row, const Measure& measure, KeyOf key_of,
                        const Crossing& crossing) {
  SampleShared& shared = row.shared;
  if (threadIdx.x == 0) shared.num_listed = 0;
  __syncthreads();
  row.for_each([&](float logit, int place) {
    uint32_t key;
    if (!key_of(logit, place, key) || key < crossing.low || key > crossing.high) return;
    shared.listed[atomicAdd(&shared.num_listed, 1)] = {key, row.first + place};
  });
  barrier_cluster_sync();
  gather_lists(row);
  const int own = threadIdx.x, count = static_cast<int>(crossing.present);
  if constexpr (Measure::kIsMass) {  // nobody reads the histogram any more
    if (own < count) {
      const Mass mass = measure.mass(shared.gathered[own].key);
      shared.mass_high[own] = mass.high;
      shared.mass_low[own] = mass.low;
    }
    __syncthreads();
  }
  if (own < count) {
    const ListedToken mine = shared.gathered[own];
    Mass before;
    for (int i = 0; i < count; ++i) {
      const ListedToken other = shared.gathered[i];
      if (other.key > mine.key || (other.key == mine.key && other.token < mine.token)) {
        if constexpr (Measure::kIsMass) {
          before.high += shared.mass_high[i];
          before.low += shared.mass_low[i];
        } else {
          ++before.low;
        }
      }
    }
    uint64_t weight = 1;
    if constexpr (Measure::kIsMass)
      weight = Mass{shared.mass_high[own], shared.mass_low[own]}.total();
    if (before.total() < crossing.left && crossing.left <= before.total() + weight) {
      shared.cut = mine;
    }
  }
  __syncthreads();
  return {shared.cut.key, shared.cut.token};
}

// Keeps the most likely tokens of `previous` until their weights reach `target`; of equal ones
// those with the lower ids. No token below `low` may be inside.
template <class Measure>
__device__ Cut select(ClusterRow& row, const Measure& measure, Cut previous, uint32_t low,
                      uint32_t high, uint64_t target) {
  low = min(max(low, previous.key), high);
  const float least = key_value(low);
  const auto key_of = [&](float logit, int place, uint32_t& key) {
    if (logit < least) return false;
    key = ordered_key(logit);
    return previous.keeps(key, row.first + place);
  };
  const Crossing crossing = find_crossing(row, measure, key_of, low, high, target);
  if (crossing.present == 0) {
    return {crossing.low, crossing.low == previous.key ? previous.last_token : kNoToken};
  }
  if (crossing.present <= kMaxListed) return find_cut(row, measure, key_of, crossing);
  // Very many equal ones: the first by their ids, which, backwards, are keys too.
  const uint64_t wanted = (crossing.left + crossing.each - 1) / crossing.each;
  const uint32_t last = kRowCtas * static_cast<uint32_t>(row.length) - 1u;
  const auto id_of = [&](float logit, int place, uint32_t& key) {
    key = last - static_cast<uint32_t>(row.first + place);
    return ordered_key(logit) == crossing.high && previous.keeps(crossing.high, row.first + place);
  };
  const Crossing ids = find_crossing(row, ByCount{}, id_of, 0u, last, wanted);
  const Cut id = find_cut(row, ByCount{}, id_of, ids);
  return {crossing.high, static_cast<int>(last - id.key)};
}

// A logit that at least `count` tokens of the row reach, from the largest logit of every thread:
// in a warp 32 tokens reach the least of its 32. -inf if the threads are too few to tell.
__device__ __forceinline__ float find_floor(ClusterRow& row, float thread_largest, int count) {
  SampleShared& shared = row.shared;
#pragma unroll
  for (int step = 1; step < kWarpThreads; step *= 2) {
    thread_largest = fminf(thread_largest, __shfl_xor_sync(kFullWarp, thread_largest, step));
  }
  if (threadIdx.x % kWarpThreads == 0) {
    shared.warp_floors[threadIdx.x / kWarpThreads] = thread_largest;
  }
  if (threadIdx.x == 0) shared.floor = -INFINITY;
  barrier_cluster_sync();
  if (threadIdx.x < kFloors) {
    const float* floor = &shared.warp_floors[threadIdx.x % kSampleWarps];
    shared.floors[threadIdx.x] =
        __uint_as_float(ld_shared_cluster_u32(address_in_cta(floor, threadIdx.x / kSampleWarps)));
  }
  __syncthreads();
  const int needed = (count + kWarpThreads - 1) / kWarpThreads;
  if (threadIdx.x < kFloors) {
    const float own = shared.floors[threadIdx.x];
    int place = 0;
    for (int i = 0; i < kFloors; ++i) {
      const float other = shared.floors[i];
      place += other > own || (other == own && i < static_cast<int>(threadIdx.x));
    }
    if (place == needed - 1) shared.floor = own;
  }
  __syncthreads();
  return shared.floor;
}
