// MFA prefill attention: chunks of prompts over a paged BF16 KV cache, causal.
//
//   q            bf16[T, N, 256]            N <= 64 query heads, roped
//   kv_cache     bf16[B, 2, 64, 256]        blocks of 64 tokens: K then V, the chunks' own included
//   block_table  i32[S, stride]             of each sequence with a chunk
//   items        i32[W, 4]                  see PrefillItem; the dearest first
//   num_items    i32[1]                     on the device
//   out          bf16[T, N, 256]            softmax(q k^T * scale) v; rows of no item stay
//
// Tile            2 tokens x 64 heads x 64 tokens of context; a consumer warpgroup per token
// Threads         384: producer warpgroup (24 registers), two consumers (240); one CTA per SM
// Shared memory   230,400 B: two queries of 32 KiB, a ring of 5 x 32 KiB, barriers
// Roofline        tensor cores: 65.5 kFLOP per token and token of context; a block takes a pair 2,048
//                 cycles of an SM, in which its 64 KiB have to come from L2
// Reference       step3rt.ops.mfa_prefill.reference_mfa_prefill
// Slots past the end of a sequence may hold anything, NaN too: scores are masked, V rows zeroed.

#include "attention/bf16_block.cuh"
#include "attention/mfa_prefill.cuh"

using Shared = PrefillShared<kBufferBytes, kBufferBytes, 5>;
static_assert(sizeof(Shared) == 230400, "the launcher asks for this many bytes");

// The scores of block b + 1 are on their way while block b's values are accumulated, and its softmax
// runs beside that: a warpgroup's tensor-core work does not wait for its own exponentials.
__device__ __forceinline__ void consume(Shared& shared, const PrefillParams& params, int consumer) {
  const float scale[2] = {params.softmax_scale_log2, params.softmax_scale_log2};
  RingCursor<Shared::kStages> cursor;
  uint32_t query_parity = 0;
  for_each_item(params, [&](const PrefillItem& item) {
    const bool is_real = consumer < item.num_tokens;
    const int num_seen = item.num_seen + (is_real ? consumer : 0);
    const int num_in_use = item.num_seen + item.num_tokens - 1;
    const int num_blocks = item.num_blocks();
    MfaRows rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float rescale[2];
    float scores[kScoreRegs];
    float acc[kOutputRegs];
#pragma unroll
    for (int i = 0; i < kOutputRegs; ++i) acc[i] = 0.0f;

    mfa_acquire(&shared.query_full[consumer], query_parity);
    query_parity ^= 1;
    mfa_acquire(&shared.full[cursor.stage], cursor.parity);
    compute_scores(shared.query[consumer], shared.ring[cursor.stage], scores);
    wgmma_wait_group<0>(scores);
    mfa_release(&shared.empty[cursor.stage]);
    cursor.advance();
    mfa_softmax(scores, rows, scale, 0.0f, num_seen, rescale);  // nothing yet to rescale
    mfa_acquire(&shared.full[cursor.stage], cursor.parity);

    for (int b = 0; b < num_blocks - 1; ++b) {
      RingCursor<Shared::kStages> keys = cursor;
      keys.advance();
      float next[kScoreRegs];
      mfa_acquire(&shared.full[keys.stage], keys.parity);
      compute_scores(shared.query[consumer], shared.ring[keys.stage], next);
      accumulate_values(scores, shared.ring[cursor.stage], acc);

      wgmma_wait_group<1>(next);
      mfa_release(&shared.empty[keys.stage]);
      mfa_softmax(next, rows, scale, 0.0f, num_seen - (b + 1) * kBlockTokens, rescale);

      // The next values are waited for here: the compiler moves a wait for products above what
      // precedes it, the softmax, but not above a loop.
      RingCursor<Shared::kStages> values = keys;
      values.advance();
      mfa_acquire(&shared.full[values.stage], values.parity);
      wgmma_wait_group<0>(acc);
      mfa_release(&shared.empty[cursor.stage]);
      cursor = values;
#pragma unroll
      for (int i = 0; i < kOutputRegs; ++i) acc[i] *= rescale[i / 2 % 2];
#pragma unroll
      for (int i = 0; i < kScoreRegs; ++i) scores[i] = next[i];
    }
    mfa_release(&shared.query_empty[consumer]);

    uint8_t* values = shared.ring[cursor.stage];
    const int num_valid = num_in_use - (num_blocks - 1) * kBlockTokens;
    if (num_valid < kBlockTokens) {
      // Both consumers read this block's values: one of them cleans up for both.
      if (consumer == 0) zero_unused_values(values, num_valid);
      bar_sync<kBarrierConsumers, kConsumerThreads>();
    }
    accumulate_values(scores, values, acc);
    wgmma_wait_group<0>(acc);
    mfa_release(&shared.empty[cursor.stage]);
    cursor.advance();
    if (is_real) prefill_store(params, item.row + consumer, rows, acc);
  });
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sm90_bf16_mfa_prefill(const __grid_constant__ TensorMap query_map,
                          const __grid_constant__ TensorMap kv_map,
                          const __grid_constant__ PrefillParams params) {
  extern __shared__ uint8_t shared_base[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_base);
  if (shared_address(shared_base) % alignof(Shared) != 0) __trap();
  prefill_init_barriers(shared);
  const int warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);
  griddepcontrol_wait();  // the chunks' own K and V are the previous kernel's work
  if (warpgroup == 0) {
    setmaxnreg_dec<kProducerRegs>();
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpThreads, 0);
    if (warp == 0) {
      prefill_produce_kv(
          shared, params, [&](int block, int is_v, uint8_t* destination, uint64_t* barrier) {
            cp_async_bulk_tensor_4d(destination, &kv_map, barrier, 0, 0, 0, 2 * block + is_v);
          });
    } else if (warp == 1) {
      prefill_produce_query(shared, params, [&](int row, uint8_t* destination, uint64_t* barrier) {
        cp_async_bulk_tensor_4d(destination, &query_map, barrier, 0, 0, 0, row);
      });
    }
  } else {
    setmaxnreg_inc<kConsumerRegs>();
    griddepcontrol_launch_dependents();
    consume(shared, params, warpgroup - 1);
  }
}
