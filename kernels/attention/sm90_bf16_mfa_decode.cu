// MFA decode attention over a paged BF16 KV cache, split over CTAs by a device-side schedule.
//
//   q            bf16[S, N, 256]            N <= 64 query heads, one token per sequence, roped
//   kv_cache     bf16[B, 2, 64, 256]        blocks of 64 tokens: K then V, one shared head, K roped
//   block_table  i32[S, stride]             first ceil(seq_len / 64) entries of a row are used
//   seq_lens     i32[S]                     0 is allowed: the row of `out` is then 0
//   schedule     i32[num_ctas, 8]           from sm90_i32_mfa_schedule, same seq_lens
//   out          bf16[S, N, 256]            softmax(q k^T * scale) v; with STEP3RT_MFA_QUANTIZED=1
//                e4m3[S, N * 256]           the same, rounded to bf16 and quantised in groups of 128,
//                f32[S, N * 2]              and the groups' scales
//
// Tile            64 heads x 64 tokens; two consumer warpgroups take alternate blocks, each with
//                 its own 64x256 fp32 accumulator, and merge once per sequence: no exchange in the
//                 loop
// Threads         384: producer warpgroup (24 registers), two consumers (240); one CTA per SM
// Shared memory   231,424 B: Q or merge 32 KiB, two rings of 3 x 32 KiB, statistics, barriers
// Roofline        HBM: 1,024 B per token. At 4.5 TB/s an SM gets a block every 1.9 us; the two
//                 consumers together need 1.0 us for one (measured with the cache in L2)
// Reference       step3rt.ops.mfa_decode.reference_mfa_decode
// Slots past the end of a sequence may hold anything, NaN too: scores are masked, V rows zeroed.

#include "attention/bf16_block.cuh"
#include "attention/mfa_decode.cuh"
#include "attention/mfa_epilogue.cuh"

using Shared = MfaShared<kBufferBytes, kBufferBytes, 3>;
static_assert(sizeof(Shared) == 231424, "the launcher asks for this many bytes");

__device__ __forceinline__ void consume(Shared& shared, const MfaParams& params,
                                        const MfaRange& range, int consumer) {
  const float scale[2] = {params.softmax_scale_log2, params.softmax_scale_log2};
  RingCursor<Shared::kStages> cursor;
  int skip = consumer;  // blocks before the next one of this consumer: they alternate

  for (int sequence = range.first_sequence; range.contains(sequence); ++sequence) {
    const MfaPart part = mfa_part(range, params.seq_lens, sequence);
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
      mfa_softmax(scores, rows, scale, 0.0f, num_valid, rescale);
#pragma unroll
      for (int i = 0; i < kOutputRegs; ++i) acc[i] *= rescale[i / 2 % 2];

      uint8_t* values = shared.ring[consumer][cursor.stage];
      mfa_acquire(&shared.full[consumer][cursor.stage], cursor.parity);
      if (num_valid < kBlockTokens) {
        zero_unused_values(values, num_valid);
        mbarrier_sync(&shared.consumer_step[consumer]);
      }
      accumulate_values(scores, values, acc);
      wgmma_wait_group<0>(acc);
      mfa_release(&shared.empty[consumer][cursor.stage]);
      cursor.advance();
    }
    skip ^= part.num_blocks() & 1;
    mfa_finish_part(shared, params, part, consumer, rows, acc);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sm90_bf16_mfa_decode(const __grid_constant__ TensorMap query_map,
                         const __grid_constant__ TensorMap kv_map,
                         const __grid_constant__ MfaParams params) {
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
      mfa_produce_kv(shared, params, range,
                     [&](int block, int is_v, uint8_t* destination, uint64_t* barrier) {
                       cp_async_bulk_tensor_4d(destination, &kv_map, barrier, 0, 0, 0,
                                               2 * block + is_v, kEvictFirst);
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
    consume(shared, params, range, warpgroup - 1);
  }
}
