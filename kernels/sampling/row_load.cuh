// Reads a CTA's slice of a row of logits once: its largest logit, whether all are finite, and, if
// asked, a copy in shared memory as fp32. Never writes to global memory.
#pragma once

#include "sampling/cluster_row.cuh"

// How 16 bytes of logits are taken apart.
struct Bf16Logits {
  static constexpr int kWidth = 8;
  static constexpr uint32_t kFill = 0xff7fff7fu;  // the lowest finite number

  // Collects magnitudes; `is_finite` reads them.
  static __device__ __forceinline__ void collect(uint4 v, uint32_t& largest) {
    constexpr uint32_t kMagnitude = 0x7fff7fffu;
    largest = __vmaxu2(largest, __vmaxu2(__vmaxu2(v.x & kMagnitude, v.y & kMagnitude),
                                         __vmaxu2(v.z & kMagnitude, v.w & kMagnitude)));
  }
  static __device__ __forceinline__ bool is_finite(uint32_t largest) {
    return max(largest & 0xffffu, largest >> 16) < 0x7f80u;
  }
  static __device__ __forceinline__ void unpack(uint4 v, float (&values)[kWidth]) {
    const uint32_t words[] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      values[i] = bf16_low_to_float(words[i / 2]);
      values[i + 1] = bf16_high_to_float(words[i / 2]);
    }
  }
  static __device__ __forceinline__ float largest(uint4 v) {
    const uint32_t pair = max_bf16x2(max_bf16x2(v.x, v.y), max_bf16x2(v.z, v.w));
    return fmaxf(bf16_low_to_float(pair), bf16_high_to_float(pair));
  }
  static __device__ __forceinline__ float load_one(const void* row, int token) {
    return __uint_as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(row)[token]) << 16);
  }
  // Replaces the logits from `count` on.
  static __device__ __forceinline__ uint4 keep_first(uint4 v, int count) {
    uint32_t words[] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (count <= 2 * i) {
        words[i] = kFill;
      } else if (count == 2 * i + 1) {
        words[i] = (words[i] & 0xffffu) | (kFill & 0xffff0000u);
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

struct F32Logits {
  static constexpr int kWidth = 4;
  static constexpr uint32_t kFill = 0xff7fffffu;

  static __device__ __forceinline__ void collect(uint4 v, uint32_t& largest) {
    constexpr uint32_t kMagnitude = 0x7fffffffu;
    largest = max(largest, max(max(v.x & kMagnitude, v.y & kMagnitude),
                               max(v.z & kMagnitude, v.w & kMagnitude)));
  }
  static __device__ __forceinline__ bool is_finite(uint32_t largest) {
    return largest < 0x7f800000u;
  }
  static __device__ __forceinline__ void unpack(uint4 v, float (&values)[kWidth]) {
    values[0] = __uint_as_float(v.x);
    values[1] = __uint_as_float(v.y);
    values[2] = __uint_as_float(v.z);
    values[3] = __uint_as_float(v.w);
  }
  static __device__ __forceinline__ float largest(uint4 v) {
    return fmaxf(fmaxf(__uint_as_float(v.x), __uint_as_float(v.y)),
                 fmaxf(__uint_as_float(v.z), __uint_as_float(v.w)));
  }
  static __device__ __forceinline__ float load_one(const void* row, int token) {
    return static_cast<const float*>(row)[token];
  }
  static __device__ __forceinline__ uint4 keep_first(uint4 v, int count) {
    return make_uint4(count > 0 ? v.x : kFill, count > 1 ? v.y : kFill, count > 2 ? v.z : kFill,
                      count > 3 ? v.w : kFill);
  }
};

struct SliceSummary {
  uint64_t best;  // pack_best of the CTA's slice; 0 if it has no logit above -inf
  bool is_finite;
};

// The first of a vector's logits that equals `value`, which one of them does.
template <class Format>
__device__ __forceinline__ int find_in_vector(uint4 packed, float value) {
  float values[Format::kWidth];
  Format::unpack(packed, values);
  int place = Format::kWidth - 1;
#pragma unroll
  for (int i = Format::kWidth - 2; i >= 0; --i) {
    if (values[i] == value) place = i;
  }
  return place;
}

template <class Format>
__device__ __forceinline__ void keep_copy(SampleShared& shared,
                                          const float (&values)[Format::kWidth], int place,
                                          int count) {
#pragma unroll
  for (int i = 0; i < Format::kWidth; i += 4) {
    float four[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // + 0 turns -0 into +0: the two are equal, and so must their keys be.
      four[j] = place + i + j < count ? values[i + j] + 0.0f : -INFINITY;
    }
    *reinterpret_cast<float4*>(&shared.slice[place + i]) =
        make_float4(four[0], four[1], four[2], four[3]);
  }
}

// `count` tokens of the row lie in this slice. All threads of the CTA call it.
template <class Format, int kInFlight = 8>
__device__ SliceSummary load_slice(ClusterRow& row, const uint4* source, int count,
                                   bool keeps_copy) {
  constexpr int kWidth = Format::kWidth;
  const int num_vectors = row.length / kWidth;
  float largest = -INFINITY;
  int largest_vector = -1;
  uint32_t magnitude = 0;
  for (int base = threadIdx.x; base < num_vectors; base += kInFlight * kSampleThreads) {
    uint4 packed[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int vector = base + i * kSampleThreads;
      packed[i] = vector * kWidth < count
                      ? source[vector]
                      : make_uint4(Format::kFill, Format::kFill, Format::kFill, Format::kFill);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int vector = base + i * kSampleThreads;
      if (vector * kWidth < count && count < (vector + 1) * kWidth) {
        packed[i] = Format::keep_first(packed[i], count - vector * kWidth);
      }
      Format::collect(packed[i], magnitude);
      const float most = Format::largest(packed[i]);
      if (most > largest && vector * kWidth < count) {
        largest = most;
        largest_vector = vector;
      }
      if (keeps_copy && vector < num_vectors) {
        float values[kWidth];
        Format::unpack(packed[i], values);
        keep_copy<Format>(row.shared, values, vector * kWidth, count);
      }
    }
  }
  const bool is_finite = __syncthreads_and(Format::is_finite(magnitude));
  const uint64_t own =
      largest_vector < 0 ? 0 : pack_best(ordered_key(largest + 0.0f), largest_vector);
  const uint64_t best = row.reduce(own, Largest{});
  if (best == 0) return {0, is_finite};
  // The vector again, from L2: which of its logits it was.
  const int vector = best_token(best);
  const uint4 packed = Format::keep_first(source[vector], count - vector * kWidth);
  const int place = vector * kWidth + find_in_vector<Format>(packed, key_value(best_key(best)));
  return {pack_best(best_key(best), row.first + place), is_finite};
}
