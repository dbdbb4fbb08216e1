// The largest logit of one row, read once and kept in registers. Never draws and never edits.
#pragma once

#include "sampling/row_load.cuh"

#ifndef STEP3RT_GREEDY_IN_FLIGHT
#define STEP3RT_GREEDY_IN_FLIGHT 8
#endif

template <class Format>
__device__ __forceinline__ void greedy_row(const SampleParams& params, SampleShared& shared) {
  const int index = blockIdx.x / kRowCtas;
  ClusterRow row{shared, static_cast<int>(blockIdx.x % kRowCtas), 0, params.slice_tokens};
  if constexpr (kRowCtas > 1) row.announce();
  row.first = row.rank * row.length;
  const int count = min(max(params.vocab_size - row.first, 0), row.length);
  constexpr int kBytes = 16 / Format::kWidth;
  const char* slice =
      static_cast<const char*>(params.logits) + (index * params.row_stride + row.first) * kBytes;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const SliceSummary summary = load_slice<Format, STEP3RT_GREEDY_IN_FLIGHT>(
      row, reinterpret_cast<const uint4*>(slice), count, false);
  uint64_t best = summary.best;
  bool is_finite = summary.is_finite;
  if constexpr (kRowCtas > 1) {
    row.meet();
    const uint4* slots = row.exchange(make_uint4(
        static_cast<uint32_t>(best), static_cast<uint32_t>(best >> 32), summary.is_finite, 0));
#pragma unroll
    for (int r = 0; r < kRowCtas; ++r) {
      const uint64_t other = slots[r].x | static_cast<uint64_t>(slots[r].y) << 32;
      best = other > best ? other : best;
      is_finite = is_finite && slots[r].z != 0;
    }
  }
  if (row.rank == 0 && threadIdx.x == 0) {
    params.token_ids[index] = best == 0 ? 0 : best_token(best);
    params.is_corrupt[index] = !is_finite;
    params.logprobs[index] = __uint_as_float(0x7fc00000u);
  }
}
