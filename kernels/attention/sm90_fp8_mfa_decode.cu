// MFA decode attention over a paged FP8 (e4m3) KV cache, split over CTAs by a device-side schedule.
//
//   q            e4m3[S, N, 256]            N <= 64 query heads, one token per sequence, roped
//   q_scale      f32[S, N]                  > 0; the query is q * q_scale
//   kv_cache     u8[B, 32768]               blocks of 64 tokens in the layout of fp8_kv_block.cuh
//   block_table  i32[S, stride]             first ceil(seq_len / 64) entries of a row are used
//   seq_lens     i32[S]                     0 is allowed: the row of `out` is then 0
//   schedule     i32[num_ctas, 8]           from sm90_i32_mfa_schedule, same seq_lens
//   out          bf16[S, N, 256]            softmax(q k^T * scale) v; with STEP3RT_MFA_QUANTIZED=1
//                e4m3[S, N * 256]           the same, rounded to bf16 and quantised in groups of 128,
//                f32[S, N * 2]              and the groups' scales
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

#include "attention/fp8_block.cuh"
#include "attention/mfa_decode.cuh"
#include "attention/mfa_epilogue.cuh"

using Shared = MfaShared<kHeads * kHeadDim, kFp8HalfBlockBytes, 6>;
static_assert(sizeof(Shared) == 231424, "the launcher asks for this many bytes");

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
        zero_unused_values(values, num_valid);
        mbarrier_sync(&shared.consumer_step[consumer]);
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
