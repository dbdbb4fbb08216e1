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

// One row of the schedule. [first_sequence:first_block, last_sequence:last_block); a range that
// ends at the end of sequence r is stored as last_sequence = r + 1, last_block = 0.
struct alignas(16) MfaWork {
  int first_sequence;
  int first_block;
  int last_sequence;
  int last_block;
  int first_split_cta;   // first CTA of first_sequence, if that began in an earlier CTA
  int first_split_parts; // and the number of its CTAs; 1 when not split
  int last_split_cta;    // the same for a sequence that begins here and goes on in the next CTA
  int last_split_parts;
};

struct MfaPart {
  int sequence;
  int num_tokens;   // of the whole sequence
  int block_begin;
  int block_end;
  int split_cta;    // first CTA of this sequence
  int split_parts;  // 1: the part is the whole sequence

  __device__ __forceinline__ int num_blocks() const { return block_end - block_begin; }
  __device__ __forceinline__ bool is_split() const { return split_parts > 1; }
};

// The schedule kernel fences its rows before it exits, so a decode kernel that starts at that moment
// may read them without griddepcontrol.wait, past L1.
__device__ __forceinline__ MfaWork mfa_load_work(const MfaWork* schedule) {
  const int4* row = reinterpret_cast<const int4*>(schedule + blockIdx.x);
  const int4 range = ld_global_cg(row);
  const int4 splits = ld_global_cg(row + 1);
  return {range.x, range.y, range.z, range.w, splits.x, splits.y, splits.z, splits.w};
}

__device__ __forceinline__ int mfa_first_block(const MfaWork& work, int sequence) {
  return sequence == work.first_sequence ? work.first_block : 0;
}

__device__ __forceinline__ bool mfa_has_part(const MfaWork& work, int sequence) {
  return sequence < work.last_sequence ||
         (sequence == work.last_sequence && work.last_block > 0);
}

__device__ __forceinline__ MfaPart mfa_part(const MfaWork& work, const int* seq_lens,
                                            int sequence) {
  MfaPart part;
  part.sequence = sequence;
  part.num_tokens = ld_global_cg(seq_lens + sequence);
  const int num_blocks = (part.num_tokens + kBlockTokens - 1) / kBlockTokens;
  part.block_begin = mfa_first_block(work, sequence);
  part.block_end = sequence == work.last_sequence ? work.last_block : num_blocks;
  const bool starts_before = part.block_begin > 0;
  const bool ends_after = part.block_end < num_blocks;
  part.split_cta = starts_before ? work.first_split_cta : work.last_split_cta;
  part.split_parts =
      starts_before ? work.first_split_parts : (ends_after ? work.last_split_parts : 1);
  return part;
}

// Partial results live in two slots per CTA: a sequence that continues from an earlier CTA uses
// the even slot, one that begins here the odd one. A CTA can hold one of each.
__device__ __forceinline__ int mfa_partial_slot(int first_cta, int part) {
  return 2 * (first_cta + part) + (part == 0 ? 1 : 0);
}
