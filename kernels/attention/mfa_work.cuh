// The split-KV schedule: which KV blocks of which sequences one CTA attends to.
// Written by sm90_i32_mfa_schedule, read by both decode kernels; never touches KV data.
//
// The KV blocks of all sequences, laid end to end, are cut into one contiguous range per CTA:
//
//   sequence        |---- 0 ----|- 1 -|--------- 2 ---------|-- 3 --|
//   CTA             |  0   |   1      |     2     |    3            |
//   parts of CTA 1         [ 0 ][  1  ]                              two parts, the first is split
//
// A sequence that lies in one CTA is "whole" and written straight to the output. A split sequence
// has one partial result per CTA that it touches; its CTAs are consecutive.
#pragma once

#include "common/ptx.cuh"
#include "common/types.cuh"

constexpr int kBlockTokens = 64;

// The CTAs that share a split sequence: `num_ctas` of them from `first_cta` on.
struct MfaSplit {
  int first_cta;
  int num_ctas;
};

// A range of blocks, [first_sequence:first_block, last_sequence:last_block). One that ends at the
// end of sequence r is stored as last_sequence = r + 1, last_block = 0.
struct MfaRange {
  int first_sequence;
  int first_block;
  int last_sequence;
  int last_block;

  __device__ __forceinline__ bool contains(int sequence) const {
    return sequence < last_sequence || (sequence == last_sequence && last_block > 0);
  }

  __device__ __forceinline__ int first_block_of(int sequence) const {
    return sequence == first_sequence ? first_block : 0;
  }
};

// One row of the schedule: the range of a CTA, and who shares the split sequences at its two ends.
struct alignas(16) MfaWork {
  MfaRange range;
  MfaSplit from_earlier;  // of first_sequence, if that began in an earlier CTA
  MfaSplit into_later;    // of a sequence that begins here and goes on in the next CTA
};

struct MfaPart {
  int sequence;
  int num_tokens;  // of the whole sequence
  int block_begin;
  int block_end;

  __device__ __forceinline__ int num_blocks() const { return block_end - block_begin; }
  __device__ __forceinline__ bool starts_here() const { return block_begin == 0; }
  __device__ __forceinline__ bool is_split() const {
    return !starts_here() || block_end * kBlockTokens < num_tokens;
  }
};

// The schedule kernel fences its rows before it exits, so a decode kernel that starts at that
// moment may read them without griddepcontrol.wait, past L1.
__device__ __forceinline__ MfaRange mfa_load_range(const MfaWork* schedule) {
  const int4 row = ld_global_cg(reinterpret_cast<const int4*>(schedule + blockIdx.x));
  return {row.x, row.y, row.z, row.w};
}

__device__ __forceinline__ MfaSplit mfa_load_split(const MfaWork* schedule, const MfaPart& part) {
  const int4 row = ld_global_cg(reinterpret_cast<const int4*>(schedule + blockIdx.x) + 1);
  return part.starts_here() ? MfaSplit{row.z, row.w} : MfaSplit{row.x, row.y};
}

__device__ __forceinline__ MfaPart mfa_part(const MfaRange& range, const int* seq_lens,
                                            int sequence) {
  const int num_tokens = ld_global_cg(seq_lens + sequence);
  const int num_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
  return {sequence, num_tokens, range.first_block_of(sequence),
          sequence == range.last_sequence ? range.last_block : num_blocks};
}

// Partial results live in two slots per CTA: a sequence that continues from an earlier CTA uses
// the even slot, one that begins here the odd one. A CTA can hold one of each.
__device__ __forceinline__ int mfa_partial_slot(int first_cta, int part) {
  return 2 * (first_cta + part) + (part == 0 ? 1 : 0);
}
