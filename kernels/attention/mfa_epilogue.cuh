// The epilogue of decode: merges the two warpgroups and the CTAs of a split sequence, and writes the
// output, in bf16 or quantised. Knows nothing of the KV format.
#pragma once

#include "attention/mfa_decode.cuh"
#include "common/barrier.cuh"
#include "common/ptx.cuh"
#include "fused/quantize.cuh"

// Whether this build writes e4m3 with a scale per 128 columns, or bf16. A build of its own: the
// output in the other format would cost registers and branches.
#ifndef STEP3RT_MFA_QUANTIZED
#define STEP3RT_MFA_QUANTIZED 0
#endif
constexpr bool kIsQuantized = STEP3RT_MFA_QUANTIZED;

constexpr int kKeptPairs = kOutputRegs / 2 / 4;  // of each of a thread's two rows, after the merge
constexpr int kGroupsPerHead = kHeadDim / kGroupSize;
static_assert(kGroupsPerHead == 2, "what a consumer keeps of a row is one group");

// 2^(maximum - reference), and 0 for a consumer that saw no block (its maximum is -inf).
__device__ __forceinline__ float mfa_weight(float maximum, float reference) {
  return maximum == -INFINITY ? 0.0f : ex2_approx(maximum - reference);
}

// Where a part goes: to the output of its sequence, which is bf16 or quantised, or to fp32.
struct MfaTarget {
  uint16_t* out;            // whole sequence: bf16[num_heads, 256]
  QuantizedRows quantized;  // or e4m3[num_heads, 256], f32[num_heads, 2]
  float* partial_out;       // split sequence: f32[64, 256]; null when whole
};

__device__ __forceinline__ MfaTarget mfa_target(const MfaParams& params, int sequence,
                                                float* partial_out) {
  const int64_t first_row = static_cast<int64_t>(sequence) * params.num_heads;
  const QuantizedRows quantized = {params.quantized.values + first_row * kHeadDim,
                                   params.quantized.scales + first_row * kGroupsPerHead};
  return {params.out + first_row * kHeadDim, quantized, partial_out};
}

// Word i of lane t of four lanes becomes word t of lane i.
__device__ __forceinline__ void transpose_in_quad(int lane, uint32_t (&words)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool is_upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      uint32_t& low = words[i];
      uint32_t& high = words[i + step];
      const uint32_t received = __shfl_xor_sync(kFullWarp, is_upper ? low : high, step);
      low = is_upper ? received : low;
      high = is_upper ? high : received;
    }
  }
}

// Quantises what a consumer kept of a whole sequence: 128 columns of every row, one group. Pair j
// of lane 4g + t is columns 8j + 2t and 8j + 2t + 1. A lane has two bytes of every eight; the four
// lanes of a row exchange them, so that each stores 16 bytes in a row.
__device__ __forceinline__ void mfa_store_quantized(const QuantizedRows& out, int num_heads,
                                                    int consumer,
                                                    const uint32_t (&kept)[2][kKeptPairs]) {
  const int thread = tid_x() % kWarpgroupThreads;
  const int row = thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
  uint32_t largest[2] = {0, 0};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int j = 0; j < kKeptPairs; ++j) {
      largest[r] = __vmaxu2(largest[r], kept[r][j] & kBf16PairMagnitude);
    }
    largest[r] = __vmaxu2(largest[r], __shfl_xor_sync(kFullWarp, largest[r], 1));
    largest[r] = __vmaxu2(largest[r], __shfl_xor_sync(kFullWarp, largest[r], 2));
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int head = row + 8 * r;
    const GroupScale group = group_scale(larger_half(largest[r]));
    if (head < num_heads && thread % 4 == 0) {
      out.scales[head * kGroupsPerHead + consumer] = group.scale;
    }
#pragma unroll
    for (int j = 0; j < kKeptPairs; j += 8) {
      // Word i: two bytes of columns [8j + 16i, + 8) and two of the eight columns after them.
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = quantize_4(kept[r][j + 2 * i], kept[r][j + 2 * i + 1], group);
      }
      transpose_in_quad(thread, words);  // to columns [8j + 16t, + 16), word i from lane i
      if (head < num_heads) {
        const int column = consumer * kGroupSize + 8 * j + thread % 4 * 16;
        *reinterpret_cast<uint4*>(out.values + head * kHeadDim + column) = make_uint4(
            __byte_perm(words[0], words[1], 0x5410), __byte_perm(words[2], words[3], 0x5410),
            __byte_perm(words[0], words[1], 0x7632), __byte_perm(words[2], words[3], 0x7632));
      }
    }
  }
}

// The two consumers saw every other block each. Consumer w keeps columns [128w, 128w + 128) of the
// merged output and gives away its accumulators of the others, 64 columns a round. Both hold the
// same (row, column) in the same register of the same thread, so the exchange needs no index
// arithmetic.
template <int kConsumer, class Shared>
__device__ __forceinline__ void mfa_give(Shared& shared, int round,
                                         const float (&acc)[kOutputRegs]) {
  const int thread = threadIdx.x % kWarpgroupThreads;
#pragma unroll
  for (int i = 0; i < kMergeRegs; i += 4) {
    const int give = (1 - kConsumer) * kOutputRegs / 2 + round * kMergeRegs + i;
    shared.merge[kConsumer][i / 4][thread] =
        make_float4(acc[give], acc[give + 1], acc[give + 2], acc[give + 3]);
  }
}

// `put(r, pair, x, y)` takes two merged columns of this thread's row r.
template <int kConsumer, class Shared, class Put>
__device__ __forceinline__ void mfa_merge_round(Shared& shared, int round, const float (&mine)[2],
                                                const float (&theirs)[2],
                                                const float (&acc)[kOutputRegs], Put put) {
  const int thread = tid_x() % kWarpgroupThreads;
#pragma unroll
  for (int i = 0; i < kMergeRegs; i += 4) {
    const int keep = kConsumer * kOutputRegs / 2 + round * kMergeRegs + i;
    const float4 other = shared.merge[1 - kConsumer][i / 4][thread];
    const int pair = (round * kMergeRegs + i) / 4;
    put(0, pair, fmaf(acc[keep], mine[0], other.x * theirs[0]),
        fmaf(acc[keep + 1], mine[0], other.y * theirs[0]));
    put(1, pair, fmaf(acc[keep + 2], mine[1], other.z * theirs[1]),
        fmaf(acc[keep + 3], mine[1], other.w * theirs[1]));
  }
}

// What a consumer merges goes to fp32 or bf16 at once; in `kept` it waits for its group's scale.
template <int kConsumer, class Shared>
__device__ __forceinline__ void mfa_keep(Shared& shared, const MfaTarget& target, int num_heads,
                                         int round, const float (&mine)[2],
                                         const float (&theirs)[2], const float (&acc)[kOutputRegs],
                                         uint32_t (&kept)[2][kKeptPairs]) {
  const int thread = tid_x() % kWarpgroupThreads;
  const int lane = thread % kWarpThreads;
  const int row = thread / kWarpThreads * 16 + lane / 4;
  // Register 4j of an accumulator is column 8j: so is pair j of the consumer's half of the columns.
  const int first = row * kHeadDim + kConsumer * kGroupSize + 2 * (lane % 4);
  if (target.partial_out != nullptr) {
    const auto store = [&](int r, int pair, float x, float y) {
      float* out = target.partial_out + first + 8 * r * kHeadDim + 8 * pair;
      *reinterpret_cast<float2*>(out) = make_float2(x, y);
    };
    mfa_merge_round<kConsumer>(shared, round, mine, theirs, acc, store);
  } else if constexpr (kIsQuantized) {
    const auto keep = [&](int r, int pair, float x, float y) { kept[r][pair] = cvt_bf16x2(x, y); };
    mfa_merge_round<kConsumer>(shared, round, mine, theirs, acc, keep);
  } else {
    const auto store = [&](int r, int pair, float x, float y) {
      uint16_t* out = target.out + first + 8 * r * kHeadDim + 8 * pair;
      if (row + 8 * r < num_heads) *reinterpret_cast<uint32_t*>(out) = cvt_bf16x2(x, y);
    };
    mfa_merge_round<kConsumer>(shared, round, mine, theirs, acc, store);
  }
}

template <class Shared>
__device__ __forceinline__ void mfa_merge_and_store(Shared& shared, const MfaTarget& target,
                                                    int num_heads, int consumer,
                                                    const MfaRows& rows, float output_scale,
                                                    const float (&acc)[kOutputRegs]) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int row = thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
  if (thread % 4 == 0) {
    shared.stats[consumer][row] = make_float2(rows.maximum[0], rows.sum[0]);
    shared.stats[consumer][row + 8] = make_float2(rows.maximum[1], rows.sum[1]);
  }
  bar_sync<kBarrierConsumers, kConsumerThreads>();  // nobody reads the query any more
  float mine[2];
  float theirs[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float2 other = shared.stats[1 - consumer][row + 8 * r];
    const float maximum = fmaxf(rows.maximum[r], other.x);
    mine[r] = mfa_weight(rows.maximum[r], maximum);
    theirs[r] = mfa_weight(other.x, maximum);
    if (target.partial_out == nullptr) {
      const float sum = fmaf(rows.sum[r], mine[r], other.y * theirs[r]);
      const float inverse = sum > 0.0f ? __fdividef(output_scale, sum) : 0.0f;  // no token: 0
      mine[r] *= inverse;
      theirs[r] *= inverse;
    }
  }
  // Of a whole sequence that is quantised. Set in any case: what is not would have to be taken for
  // live in the main loop, where there is no register to spare.
  uint32_t kept[2][kKeptPairs] = {};
  // The branches on `consumer` let each name its registers by constants.
#pragma unroll
  for (int round = 0; round < kOutputRegs / 2 / kMergeRegs; ++round) {
    if (round > 0) bar_sync<kBarrierConsumers, kConsumerThreads>();
    if (consumer == 0) {
      mfa_give<0>(shared, round, acc);
    } else {
      mfa_give<1>(shared, round, acc);
    }
    bar_sync<kBarrierConsumers, kConsumerThreads>();
    if (consumer == 0) {
      mfa_keep<0>(shared, target, num_heads, round, mine, theirs, acc, kept);
    } else {
      mfa_keep<1>(shared, target, num_heads, round, mine, theirs, acc, kept);
    }
  }
  fence_proxy_async_shared();  // the copy engine writes the next query where the merge was
  mfa_release(&shared.query_empty);
  if constexpr (kIsQuantized) {
    if (target.partial_out == nullptr) {
      mfa_store_quantized(target.quantized, num_heads, consumer, kept);
    }
  }
}

// Merges all partial results of a split sequence; run by the CTA that finished last. A thread owns
// 4 columns of every fourth head, a warp one group of each: all loads of one partial result are in
// flight together, since their latency, not their 64 KiB, is what costs here.
__device__ __forceinline__ void mfa_combine_parts(const MfaParams& params, const MfaSplit& split,
                                                  const MfaTarget& target) {
  constexpr int kThreadsPerHead = kHeadDim / 4;
  constexpr int kHeadStep = kConsumerThreads / kThreadsPerHead;
  constexpr int kHeadsPerThread = kHeads / kHeadStep;
  const int thread = threadIdx.x - kWarpgroupThreads;
  const int column = thread % kThreadsPerHead * 4;
  const int first_head = thread / kThreadsPerHead;
  float maximum[kHeadsPerThread];
  float sum[kHeadsPerThread];
  float4 acc[kHeadsPerThread];
#pragma unroll
  for (int i = 0; i < kHeadsPerThread; ++i) {
    maximum[i] = -INFINITY;
    sum[i] = 0.0f;
    acc[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  for (int p = 0; p < split.num_ctas; ++p) {
    const int row = mfa_partial_slot(split.first_cta, p) * kHeads + first_head;
    float2 stats[kHeadsPerThread];
    float4 value[kHeadsPerThread];
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      const int head_row = row + i * kHeadStep;
      stats[i] = ld_global_cg(params.partial_stats + head_row);
      value[i] = ld_global_cg(
          reinterpret_cast<const float4*>(params.partial_out + head_row * kHeadDim + column));
    }
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      const float top = fmaxf(maximum[i], stats[i].x);
      const float before = mfa_weight(maximum[i], top);
      const float weight = mfa_weight(stats[i].x, top);
      maximum[i] = top;
      sum[i] = fmaf(sum[i], before, stats[i].y * weight);
      acc[i].x = fmaf(acc[i].x, before, value[i].x * weight);
      acc[i].y = fmaf(acc[i].y, before, value[i].y * weight);
      acc[i].z = fmaf(acc[i].z, before, value[i].z * weight);
      acc[i].w = fmaf(acc[i].w, before, value[i].w * weight);
    }
  }
  uint2 merged[kHeadsPerThread];
#pragma unroll
  for (int i = 0; i < kHeadsPerThread; ++i) {
    const float inverse = __fdividef(params.output_scale, sum[i]);
    merged[i] = make_uint2(cvt_bf16x2(acc[i].x * inverse, acc[i].y * inverse),
                           cvt_bf16x2(acc[i].z * inverse, acc[i].w * inverse));
  }
  if constexpr (kIsQuantized) {
    uint32_t largest[kHeadsPerThread];
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      const uint32_t pair =
          __vmaxu2(merged[i].x & kBf16PairMagnitude, merged[i].y & kBf16PairMagnitude);
      largest[i] = __reduce_max_sync(kFullWarp, larger_half(pair));
    }
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      const int head = first_head + i * kHeadStep;
      const GroupScale group = group_scale(largest[i]);
      if (head >= params.num_heads) continue;
      *reinterpret_cast<uint32_t*>(target.quantized.values + head * kHeadDim + column) =
          quantize_4(merged[i].x, merged[i].y, group);
      if (column % kGroupSize == 0) {
        target.quantized.scales[head * kGroupsPerHead + column / kGroupSize] = group.scale;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      const int head = first_head + i * kHeadStep;
      if (head < params.num_heads) {
        *reinterpret_cast<uint2*>(target.out + head * kHeadDim + column) = merged[i];
      }
    }
  }
}

// Finishes a part: the two consumers merge; a whole sequence goes to the output, a split one to its
// partial slot, and the last CTA of the sequence to arrive there combines all parts. Nobody waits
// for another CTA, so the kernel makes progress however few of its CTAs are resident.
template <class Shared>
__device__ __forceinline__ void mfa_finish_part(Shared& shared, const MfaParams& params,
                                                const MfaPart& part, int consumer, MfaRows& rows,
                                                const float (&acc)[kOutputRegs]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.sum[r] += __shfl_xor_sync(kFullWarp, rows.sum[r], 1);
    rows.sum[r] += __shfl_xor_sync(kFullWarp, rows.sum[r], 2);
  }
  const int slot = 2 * blockIdx.x + (part.starts_here() ? 1 : 0);
  float* partial_out = part.is_split() ? params.partial_out + slot * kHeads * kHeadDim : nullptr;
  const MfaTarget target = mfa_target(params, part.sequence, partial_out);
  mfa_merge_and_store(shared, target, params.num_heads, consumer, rows, params.output_scale, acc);
  if (!part.is_split()) return;

  const MfaSplit split = mfa_load_split(params.schedule, part);
  const int thread = threadIdx.x - kWarpgroupThreads;
  if (thread < kHeads) {
    const float2 a = shared.stats[0][thread];
    const float2 b = shared.stats[1][thread];
    const float maximum = fmaxf(a.x, b.x);
    params.partial_stats[slot * kHeads + thread] =
        make_float2(maximum, fmaf(a.y, mfa_weight(a.x, maximum), b.y * mfa_weight(b.x, maximum)));
  }
  __threadfence();
  bar_sync<kBarrierConsumers, kConsumerThreads>();
  if (thread == 0) {
    int* arrivals = &params.arrivals[split.first_cta];
    const bool is_last = atom_add_acq_rel_gpu(arrivals, 1) == split.num_ctas - 1;
    if (is_last) *arrivals = 0;  // everyone has arrived: ready for the next launch
    shared.is_last_arrival = is_last;
  }
  bar_sync<kBarrierConsumers, kConsumerThreads>();
  if (shared.is_last_arrival) {
    __threadfence();
    mfa_combine_parts(params, split, target);
  }
}
