// MFA decode attention over a paged FP8 (e4m3) KV cache, split over CTAs by a device-side schedule.
//
//   q            e4m3[S, N, 256]            N <= 64 query heads, one token per sequence, roped
//   q_scale      f32[S, N]                  > 0; the query is q * q_scale
//   kv_cache     u8[B, 32768]               blocks of 64 tokens in the layout of fp8_kv_block.cuh
//   block_table  i32[S, stride]             first ceil(seq_len / 64) entries of a row are used
//   seq_lens     i32[S]                     0 is allowed: the row of `out` is then 0
//   schedule     i32[num_ctas, 8]           from sm90_i32_mfa_schedule, same seq_lens
//   out          bf16[S, N, 256]            softmax(q k^T * scale) v
//
// Tile            64 heads x 64 tokens; two consumer warpgroups take alternate blocks, each with
//                 its own 64x256 fp32 accumulator, and merge once per sequence
// Threads         384: producer warpgroup (24 registers), two consumers (240); one CTA per SM
// Shared memory   231,424 B: Q or merge 32 KiB, two rings of 6 x 16 KiB, statistics, barriers
// Roofline        HBM: 512 B per token. At 4.5 TB/s an SM gets a block every 0.95 us; the two
//                 consumers together need 0.7 us for one (measured with the cache in L2)
// Accuracy        The FP8 tensor core keeps about 14 bits of its accumulator and truncates: a sum
//                 over a long sequence would drift by 3 % at 32K tokens. So P V of one block (2
//                 steps) goes into its own accumulator and is added to the running output in fp32
// Reference       step3rt.ops.mfa_decode.reference_mfa_decode on the dequantised cache
// Slots past the end of a sequence may hold anything, NaN too: scores are masked, V bytes zeroed.

#include "attention/fp8_kv_block.cuh"
#include "attention/mfa_decode.cuh"
#include "common/wgmma.cuh"

constexpr int kKeySliceBytes = 128;  // half the head dim
constexpr int kKeySliceTileBytes = kBlockTokens * kKeySliceBytes;
constexpr int kKeyRowGroupBytes = 8 * kKeySliceBytes;
constexpr int kValueRowBytes = kBlockTokens;  // V is transposed: a row is a dim
constexpr int kValueRowGroupBytes = 8 * kValueRowBytes;
constexpr int kStepBytes = 32;  // wgmma K is 32
constexpr int kScoreSteps = kHeadDim / kStepBytes;
constexpr int kValueSteps = kBlockTokens / kStepBytes;
constexpr int kQuarterDims = 64;  // output columns of one product
constexpr int kQuarterRegs = kHeads * kQuarterDims / kWarpgroupThreads;
constexpr int kQuarters = kHeadDim / kQuarterDims;

// e4m3 resolves down to 2^-9 of its unit and reaches 448: weights in [0, 1] are stored times 2^8.
// The row sums carry the same factor, so it cancels.
constexpr float kLog2WeightScale = 8.0f;

static_assert(kBlockTokens == kFp8BlockTokens && kHeadDim == kFp8HeadDim, "block layout");
using Shared = MfaShared<kHeads * kHeadDim, kFp8HalfBlockBytes, 6>;
static_assert(sizeof(Shared) == 231424, "the launcher asks for this many bytes");

__device__ __forceinline__ void compute_scores(const uint8_t* query, const uint8_t* keys,
                                               float (&scores)[kScoreRegs]) {
  const uint64_t q =
      matrix_descriptor(shared_address(query), 16, kKeyRowGroupBytes, Swizzle::k128B);
  const uint64_t k = matrix_descriptor(shared_address(keys), 16, kKeyRowGroupBytes, Swizzle::k128B);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kScoreSteps; ++step) {
    const uint32_t offset = step / 4 * kKeySliceTileBytes + step % 4 * kStepBytes;
    wgmma_m64n64k32_e4m3_ss(scores, advance_descriptor(q, offset), advance_descriptor(k, offset),
                            step > 0);
  }
  wgmma_commit_group();
}

// product = weights * V[:, 64 * quarter ...], of one block.
__device__ __forceinline__ void multiply_quarter(const uint32_t (&a)[kValueSteps][4],
                                                 uint64_t values, int quarter,
                                                 float (&product)[kQuarterRegs]) {
  const uint64_t v = advance_descriptor(values, quarter * kQuarterDims * kValueRowBytes);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kValueSteps; ++step) {
    wgmma_m64n64k32_e4m3_rs(product, a[step], advance_descriptor(v, step * kStepBytes), step > 0);
  }
  wgmma_commit_group();
}

template <int kQuarter>
__device__ __forceinline__ void fold_quarter(const float (&product)[kQuarterRegs],
                                             const float (&rescale)[2], float (&acc)[kOutputRegs]) {
#pragma unroll
  for (int i = 0; i < kQuarterRegs; ++i) {
    float& out = acc[kQuarter * kQuarterRegs + i];
    out = fmaf(out, rescale[i / 2 % 2], product[i]);
  }
}

// acc = acc * rescale + weights * V, a quarter of the columns at a time, two in flight.
__device__ __forceinline__ void accumulate_values(const float (&weights)[kScoreRegs],
                                                  const float (&rescale)[2], const uint8_t* values,
                                                  float (&acc)[kOutputRegs]) {
  uint32_t a[kValueSteps][4];
#pragma unroll
  for (int step = 0; step < kValueSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Register i: row half i % 2, score column groups 4 * step + 2 * (i / 2) and the next.
      const int s = 16 * step + 8 * (i / 2) + 2 * (i % 2);
      a[step][i] = cvt_e4m3x4(weights[s], weights[s + 1], weights[s + 4], weights[s + 5]);
    }
  }
  const uint64_t v =
      matrix_descriptor(shared_address(values), 16, kValueRowGroupBytes, Swizzle::k64B);
  float even[kQuarterRegs];
  float odd[kQuarterRegs];
  multiply_quarter(a, v, 0, even);
  multiply_quarter(a, v, 1, odd);
  wgmma_wait_group<1>(even);
  fold_quarter<0>(even, rescale, acc);
  multiply_quarter(a, v, 2, even);
  wgmma_wait_group<1>(odd);
  fold_quarter<1>(odd, rescale, acc);
  multiply_quarter(a, v, 3, odd);
  wgmma_wait_group<1>(even);
  fold_quarter<2>(even, rescale, acc);
  wgmma_wait_group<0>(odd);
  fold_quarter<3>(odd, rescale, acc);
}
static_assert(kQuarters == 4, "accumulate_values is written out for four quarters");

// Weight 0 does not silence a NaN in an unused slot of the cache, so those V bytes become 0.
__device__ __forceinline__ void zero_unused_values(uint8_t* values, int num_valid, uint64_t* step) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  for (int dim = thread; dim < kHeadDim; dim += kWarpgroupThreads) {
    for (int chunk = 0; chunk < kValueRowBytes / 16; ++chunk) {
      uint32_t* words = reinterpret_cast<uint32_t*>(values + fp8_value_chunk_offset(chunk, dim));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int token = fp8_value_word_token(chunk, w);  // of byte 0; then + 1, + 8, + 9
        const uint32_t keep =
            (token < num_valid ? 0x000000ffu : 0u) | (token + 1 < num_valid ? 0x0000ff00u : 0u) |
            (token + 8 < num_valid ? 0x00ff0000u : 0u) | (token + 9 < num_valid ? 0xff000000u : 0u);
        words[w] &= keep;
      }
    }
  }
  fence_proxy_async_shared();
  mbarrier_sync(step);
}

__device__ __forceinline__ void consume(Shared& shared, const MfaParams& params,
                                        const float* query_scale, const MfaRange& range,
                                        int consumer) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int row = thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
  RingCursor<Shared::kStages> cursor;
  int skip = consumer;  // blocks before the next one of this consumer: they alternate

  for (int sequence = range.first_sequence; range.contains(sequence); ++sequence) {
    const MfaPart part = mfa_part(range, params.seq_lens, sequence);
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int head = row + 8 * r;  // a padded head has q = 0, any positive scale will do
      scale[r] = params.softmax_scale_log2 *
                 (head < params.num_heads ? query_scale[sequence * params.num_heads + head] : 1.0f);
    }
    MfaRows rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float acc[kOutputRegs];
#pragma unroll
    for (int i = 0; i < kOutputRegs; ++i) acc[i] = 0.0f;

    mbarrier_wait(&shared.query_full, (sequence - range.first_sequence) & 1);
    __syncwarp();
    for (int b = part.block_begin + skip; b < part.block_end; b += 2) {
      float scores[kScoreRegs];
      float rescale[2];

      mfa_acquire(&shared.full[consumer][cursor.stage], cursor.parity);
      compute_scores(shared.query, shared.ring[consumer][cursor.stage], scores);
      wgmma_wait_group<0>(scores);
      mfa_release(&shared.empty[consumer][cursor.stage]);
      cursor.advance();

      const int num_valid = part.num_tokens - b * kBlockTokens;
      mfa_softmax(scores, rows, scale, kLog2WeightScale, num_valid, rescale);

      uint8_t* values = shared.ring[consumer][cursor.stage];
      mfa_acquire(&shared.full[consumer][cursor.stage], cursor.parity);
      if (num_valid < kBlockTokens) {
        zero_unused_values(values, num_valid, &shared.consumer_step[consumer]);
      }
      accumulate_values(scores, rescale, values, acc);
      mfa_release(&shared.empty[consumer][cursor.stage]);
      cursor.advance();
    }
    skip ^= part.num_blocks() & 1;
    mfa_finish_part(shared, params, part, consumer, rows, acc);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sm90_fp8_mfa_decode(const __grid_constant__ TensorMap query_map, const uint8_t* kv_cache,
                        const float* query_scale, const __grid_constant__ MfaParams params) {
  extern __shared__ uint8_t shared_base[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_base);
  if (shared_address(shared_base) % alignof(Shared) != 0) __trap();
  const MfaRange range = mfa_load_range(params.schedule);  // in flight during the set-up
  mfa_init_barriers(shared);
  const int warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

  if (warpgroup == 0) {
    setmaxnreg_dec<kProducerRegs>();
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpThreads, 0);
    if (warp == 0) {
      mfa_produce_kv(
          shared, params, range, [&](int block, int is_v, uint8_t* destination, uint64_t* barrier) {
            const uint8_t* source =
                kv_cache + static_cast<int64_t>(block) * kFp8BlockBytes + is_v * kFp8HalfBlockBytes;
            cp_async_bulk(destination, source, kFp8HalfBlockBytes, barrier, kEvictFirst);
          });
    } else if (warp == 1) {
      mfa_produce_query(shared, range, [&](int sequence, uint8_t* destination, uint64_t* barrier) {
        cp_async_bulk_tensor_4d(destination, &query_map, barrier, 0, 0, 0, sequence);
      });
    }
  } else {
    setmaxnreg_inc<kConsumerRegs>();
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();  // after the wait: then the grid before is done, too
    consume(shared, params, query_scale, range, warpgroup - 1);
  }
}
