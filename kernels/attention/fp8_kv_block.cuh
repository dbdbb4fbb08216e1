// Byte layout of one FP8 KV block: 64 tokens of K and V as e4m3, 32 KiB, in the cache exactly as
// wgmma reads it from shared memory, so that one contiguous copy fills a buffer. Owns the layout
// alone.
//
//   K, bytes [0, 16384):      [2 dim halves][64 tokens][128 B]; in a token's 128 B, the 16-byte
//                             chunk c lies at chunk c ^ (token % 8): 128-byte swizzle
//   V, bytes [16384, 32768):  transposed, [256 dims][64 B]; in a dim's 64 B, the 16-byte chunk c
//                             lies at chunk c ^ (dim / 2 % 4): 64-byte swizzle; and the tokens are
//                             permuted inside each group of 32:
//
//   token in group   0 1 | 8 9 | 2 3 | 10 11 | 4 5 | 12 13 | 6 7 | 14 15 | 16 17 | 24 25 | ...
//   position         0 1 | 2 3 | 4 5 |  6  7 | 8 9 | 10 11 | ...
//
// That permutation is the one between the accumulator of Q K^T and the A operand of P V: a thread
// holds score columns 8j + 2t + {0, 1} and has to supply weight columns 4t + {0..3} and 16 + 4t +
// {0..3}. Permuting V once, at the append, saves a shuffle of P for every block read.
#pragma once

#include "common/types.cuh"

constexpr int kFp8BlockTokens = 64;
constexpr int kFp8HeadDim = 256;
constexpr int kFp8HalfBlockBytes = kFp8BlockTokens * kFp8HeadDim;  // K or V: 16 KiB
constexpr int kFp8BlockBytes = 2 * kFp8HalfBlockBytes;

// Byte offset in a block of K[token][dim].
__device__ __forceinline__ int fp8_key_offset(int token, int dim) {
  const int chunk = dim % 128 / 16 ^ token % 8;
  return dim / 128 * (kFp8BlockTokens * 128) + token * 128 + chunk * 16 + dim % 16;
}

// Position of a token in the permuted order, within the block.
__device__ __forceinline__ int fp8_value_position(int token) {
  const int in_group = token % 32;
  const int column_group = in_group / 8;  // j of the accumulator layout, modulo 4
  return token / 32 * 32 + column_group / 2 * 16 + in_group % 8 / 2 * 4 + column_group % 2 * 2 +
         in_group % 2;
}

// Byte offset in the V half of 16 consecutive positions of a dim, `chunk` = position / 16.
__device__ __forceinline__ int fp8_value_chunk_offset(int chunk, int dim) {
  return dim * kFp8BlockTokens + (chunk ^ dim / 2 % 4) * 16;
}

// Byte offset in a block of V[token][dim].
__device__ __forceinline__ int fp8_value_offset(int token, int dim) {
  const int position = fp8_value_position(token);
  return kFp8HalfBlockBytes + fp8_value_chunk_offset(position / 16, dim) + position % 16;
}

// The inverse: token at the first byte of 4-byte word `word` of a chunk; bytes 1 to 3 hold the
// tokens 1, 8 and 9 further.
__device__ __forceinline__ int fp8_value_word_token(int chunk, int word) {
  return chunk / 2 * 32 + chunk % 2 * 16 + word * 2;
}
