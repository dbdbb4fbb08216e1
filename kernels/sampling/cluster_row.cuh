// A row of logits spread over a cluster of CTAs: parameters, shared memory, and what the CTAs tell
// each other. Never looks at a logit's meaning.
//
//   row of V logits   |  slice 0  |  slice 1  | ... |  slice 7  |
//   CTA of cluster          0           1                 7        each in its shared memory, fp32
#pragma once

#include "common/dsmem.cuh"
#include "common/ptx.cuh"
#include "common/types.cuh"

#ifndef STEP3RT_SAMPLE_THREADS
#define STEP3RT_SAMPLE_THREADS 256
#endif
#ifndef STEP3RT_ROW_CTAS
#define STEP3RT_ROW_CTAS 8
#endif
#ifndef STEP3RT_SAMPLE_CTAS_PER_SM
#define STEP3RT_SAMPLE_CTAS_PER_SM 3
#endif

constexpr int kSampleThreads = STEP3RT_SAMPLE_THREADS;
constexpr int kSampleWarps = kSampleThreads / kWarpThreads;
constexpr int kSampleCtasPerSm = STEP3RT_SAMPLE_CTAS_PER_SM;
constexpr int kRowCtas = STEP3RT_ROW_CTAS;
constexpr int kMaxListed = 256;  // tokens among which a cut is found by comparing them all
constexpr int kBins = 512;
constexpr int kFloors = kRowCtas * kSampleWarps;
constexpr int kNoToken = 0x7fffffff;
static_assert(kFloors <= kSampleThreads && kMaxListed <= kSampleThreads, "one thread each");
static_assert(kBins % kSampleThreads == 0 || kSampleThreads % kBins == 0, "bins are dealt evenly");

// How to choose a row's token; ops/sample.py fills it.
struct SamplingRow {
  float temperature;  // 0: greedy
  float top_p;        // 1: off
  float min_p;        // 0: off
  float presence, frequency, repetition;
  int top_k;    // 0: off
  int num_top;  // most likely tokens listed; -1: no log-probability at all
  uint64_t seed;
  uint64_t position;
};

// A token of one row whose logit is changed; sorted by token within the row.
struct LogitEdit {
  int token;
  int num_generated;
  float bias;
  int flags;
};

constexpr int kEditIsKnown = 1;   // in the prompt or generated: repetition applies
constexpr int kEditIsMasked = 2;  // cannot be chosen

struct SampleParams {
  const void* logits;
  const SamplingRow* rows;
  const int* edit_offsets;  // i32[R + 1]
  const LogitEdit* edits;
  int* token_ids;
  int* is_corrupt;
  float* logprobs;
  int* top_ids;         // i32[R, max_top]
  float* top_logprobs;  // f32[R, max_top]
  int64_t row_stride;   // logits
  int vocab_size;
  int slice_tokens;
  int max_top;
};

struct ListedToken {
  uint32_t key;
  int token;
};

struct SampleShared {
  uint4 slots[2][kRowCtas];  // the messages of two exchanges in turn
  uint64_t arrived[2];       // complete when all 8 of an exchange have
  uint32_t counts[kBins];
  uint32_t mass_high[kBins];
  uint32_t mass_low[kBins];
  uint64_t partial[kSampleWarps];
  float warp_floors[kSampleWarps];
  float floors[kFloors];
  float floor;
  int crossing_bin;
  uint64_t crossing_before;
  uint64_t crossing_weight;
  uint32_t crossing_count;
  int num_listed;
  ListedToken listed[kMaxListed];    // of this CTA
  ListedToken gathered[kMaxListed];  // of all, by rank
  ListedToken cut;
  float top_noise;
  uint64_t exact_key;
  int exact_token;
  alignas(16) float slice[1];  // slice_tokens; -inf past the row's end
};

constexpr int kFixedSharedBytes = 11264;
static_assert(sizeof(SampleShared) <= kFixedSharedBytes, "ops/sample.py adds the slice to it");

// Floats in the order of unsigned integers. Both zeros must be +0.
__device__ __forceinline__ uint32_t ordered_key(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (static_cast<uint32_t>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float key_value(uint32_t key) {
  return __uint_as_float(key ^ ((key >> 31) - 1u | 0x80000000u));
}

__device__ __forceinline__ uint64_t ordered_key(double value) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value));
  return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | (1ull << 63));
}

struct Largest {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

struct Sum {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

struct DoubleSum {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const {
    return static_cast<uint64_t>(
        __double_as_longlong(__longlong_as_double(static_cast<int64_t>(a)) +
                             __longlong_as_double(static_cast<int64_t>(b))));
  }
};

// What one CTA knows of the row, and the cluster's conversation about it.
struct ClusterRow {
  SampleShared& shared;
  int rank;
  int first;   // token of slice[0]
  int length;  // slots of the slice, a multiple of 8
  int num_exchanges = 0;

  // Before anything else. `meet` comes before the first exchange, and may come late.
  __device__ __forceinline__ void announce() {
    if (threadIdx.x == 0) {
      mbarrier_init(&shared.arrived[0], 1);
      mbarrier_init(&shared.arrived[1], 1);
      fence_mbarrier_init();
    }
    __syncwarp();
    barrier_cluster_arrive_relaxed();
  }

  __device__ __forceinline__ void meet() { barrier_cluster_wait(); }

  // Combines one value of every thread of the CTA; in the same order every time.
  template <class Combine>
  __device__ __forceinline__ uint64_t reduce(uint64_t value, Combine combine) {
#pragma unroll
    for (int step = 1; step < kWarpThreads; step *= 2) {
      value = combine(value, __shfl_xor_sync(kFullWarp, value, step));
    }
    __syncthreads();  // the previous reduction has been read
    if (threadIdx.x % kWarpThreads == 0) shared.partial[threadIdx.x / kWarpThreads] = value;
    __syncthreads();
    value = shared.partial[0];
#pragma unroll
    for (int w = 1; w < kSampleWarps; ++w) value = combine(value, shared.partial[w]);
    return value;
  }

  // Hands `message` of each CTA to all of them; returns the 8 of the row, by rank. A message of the
  // exchange after the next cannot come too early: its sender has to have those of the next one,
  // and this CTA sends its own when all its threads have read the present ones.
  __device__ __forceinline__ const uint4* exchange(uint4 message) {
    const int turn = num_exchanges % 2;
    const uint32_t phase = num_exchanges / 2 % 2;
    ++num_exchanges;
    uint4* slots = shared.slots[turn];
    uint64_t* arrived = &shared.arrived[turn];
    __syncthreads();
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(arrived, sizeof(shared.slots[turn]));
    if (threadIdx.x < kRowCtas) {
      st_async_cluster(address_in_cta(&slots[rank], threadIdx.x), message,
                       address_in_cta(arrived, threadIdx.x));
    }
    mbarrier_wait(arrived, phase);
    return slots;
  }

  // `reduce` over the whole row.
  template <class Combine>
  __device__ __forceinline__ uint64_t reduce_row(uint64_t value, Combine combine) {
    value = reduce(value, combine);
    const uint4* slots = exchange(
        make_uint4(static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32), 0, 0));
    value = slots[0].x | static_cast<uint64_t>(slots[0].y) << 32;
#pragma unroll
    for (int r = 1; r < kRowCtas; ++r) {
      value = combine(value, slots[r].x | static_cast<uint64_t>(slots[r].y) << 32);
    }
    return value;
  }

  // Calls visit(logits, place) for every four slots of this thread; place of the first.
  template <class Visit>
  __device__ __forceinline__ void for_each_four(Visit visit) const {
    for (int place = threadIdx.x * 4; place < length; place += kSampleThreads * 4) {
      visit(*reinterpret_cast<const float4*>(&shared.slice[place]), place);
    }
  }

  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for_each_four([&](float4 four, int place) {
      visit(four.x, place);
      visit(four.y, place + 1);
      visit(four.z, place + 2);
      visit(four.w, place + 3);
    });
  }
};

// The largest of (key, lower token first) as one integer.
__device__ __forceinline__ uint64_t pack_best(uint32_t key, int token) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~token);
}

__device__ __forceinline__ int best_token(uint64_t packed) {
  return static_cast<int>(~static_cast<uint32_t>(packed));
}

__device__ __forceinline__ uint32_t best_key(uint64_t packed) {
  return static_cast<uint32_t>(packed >> 32);
}
