// MFA prefill attention: chunks of prompts over a paged FP8 (e4m3) KV cache, causal.
//
//   q            e4m3[T, N, 256]            N <= 64 query heads, roped
//   q_scale      f32[T, N]                  > 0; the query is q * q_scale
//   kv_cache     u8[B, 32768]               blocks in the layout of fp8_kv_block.cuh, the chunks' own
//                                           tokens included
//   block_table  i32[S, stride]             of each sequence with a chunk
//   items        i32[W, 4]                  see PrefillItem; the dearest first
//   num_items    i32[1]                     on the device
//   out          bf16[T, N, 256]            softmax(q k^T * scale) v; rows of no item stay
//
// Tile            2 tokens x 64 heads x 64 tokens of context; a consumer warpgroup per token
// Threads         384: producer warpgroup (24 registers), two consumers (240); one CTA per SM
// Shared memory   230,400 B: two queries of 16 KiB, a ring of 12 x 16 KiB, barriers
// Roofline        tensor cores: 65.5 kFLOP per token and token of context; a block takes a pair 1,024
//                 cycles of an SM, in which its 32 KiB have to come from L2; the softmax of the two
//                 warpgroups takes about as long and overlaps with the other's products
// Accuracy        P V of one block has its own accumulator, as in decode
// Reference       step3rt.ops.mfa_prefill.reference_mfa_prefill on the dequantised cache
// Slots past the end of a sequence may hold anything, NaN too: scores are masked, V bytes zeroed.

#include "attention/fp8_block.cuh"
#include "attention/mfa_prefill.cuh"

static_assert(kBlockTokens == kFp8BlockTokens && kHeadDim == kFp8HeadDim, "block layout");
using Shared = PrefillShared<kHeads * kHeadDim, kFp8HalfBlockBytes, 12>;
static_assert(sizeof(Shared) == 230400, "the launcher asks for this many bytes");

__device__ __forceinline__ void consume(Shared& shared, const PrefillParams& params,
                                        const float* query_scale, int consumer) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int first_head = thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
  RingCursor<Shared::kStages> cursor;
  uint32_t query_parity = 0;
  for_each_item(params, [&](const PrefillItem& item) {
    const bool is_real = consumer < item.num_tokens;
    const int num_seen = item.num_seen + (is_real ? consumer : 0);
    const int num_in_use = item.num_seen + item.num_tokens - 1;
    const int num_blocks = item.num_blocks();
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A padded head has q = 0, and a token that is not there does not count: any scale will do.
      const int head = first_head + 8 * r;
      const bool has_scale = is_real && head < params.num_heads;
      const int index = (item.row + consumer) * params.num_heads + head;
      scale[r] = params.softmax_scale_log2 * (has_scale ? query_scale[index] : 1.0f);
    }
    MfaRows rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float acc[kOutputRegs];
#pragma unroll
    for (int i = 0; i < kOutputRegs; ++i) acc[i] = 0.0f;

    mfa_acquire(&shared.query_full[consumer], query_parity);
    query_parity ^= 1;
    for (int b = 0; b < num_blocks; ++b) {
      float scores[kScoreRegs];
      float rescale[2];

      mfa_acquire(&shared.full[cursor.stage], cursor.parity);
      compute_scores(shared.query[consumer], shared.ring[cursor.stage], scores);
      wgmma_wait_group<0>(scores);
      mfa_release(&shared.empty[cursor.stage]);
      if (b == num_blocks - 1) mfa_release(&shared.query_empty[consumer]);
      cursor.advance();

      mfa_softmax(scores, rows, scale, kLog2WeightScale, num_seen - b * kBlockTokens, rescale);

      uint8_t* values = shared.ring[cursor.stage];
      mfa_acquire(&shared.full[cursor.stage], cursor.parity);
      if (num_in_use - b * kBlockTokens < kBlockTokens) {
        // Both consumers read this block's values: one of them cleans up for both.
        if (consumer == 0) zero_unused_values(values, num_in_use - b * kBlockTokens);
        bar_sync<kBarrierConsumers, kConsumerThreads>();
      }
      accumulate_values(scores, rescale, values, acc);
      mfa_release(&shared.empty[cursor.stage]);
      cursor.advance();
    }
    if (is_real) prefill_store(params, item.row + consumer, rows, acc);
  });
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sm90_fp8_mfa_prefill(const __grid_constant__ TensorMap query_map, const uint8_t* kv_cache,
                         const float* query_scale, const __grid_constant__ PrefillParams params) {
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
            const uint8_t* source =
                kv_cache + static_cast<int64_t>(block) * kFp8BlockBytes + is_v * kFp8HalfBlockBytes;
            cp_async_bulk(destination, source, kFp8HalfBlockBytes, barrier);
          });
    } else if (warp == 1) {
      prefill_produce_query(shared, params, [&](int row, uint8_t* destination, uint64_t* barrier) {
        cp_async_bulk_tensor_4d(destination, &query_map, barrier, 0, 0, 0, row);
      });
    }
  } else {
    setmaxnreg_inc<kConsumerRegs>();
    griddepcontrol_launch_dependents();
    consume(shared, params, query_scale, warpgroup - 1);
  }
}
