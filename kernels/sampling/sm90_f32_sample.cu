// Chooses a token per row of f32 logits: greedy, or penalties, temperature, top-k, top-p, min-p and
// reproducible noise; log-probabilities of the token and of the most likely ones.
//
//   params.logits        f32[R, V]      rows row_stride apart, aligned to 16 bytes
//   params.rows          SamplingRow[R]    48 bytes each
//   params.edits         LogitEdit[E]      16 bytes each; row r's from edit_offsets[r], by token
//   params.token_ids     i32[R]
//   params.is_corrupt    i32[R]            1: a logit is not finite; the token is then a largest one
//   params.logprobs      f32[R]            NaN: not asked for, or corrupt
//   params.top_ids       i32[R, max_top]   the first num_top of a row are written
//   params.top_logprobs  f32[R, max_top]
//
// Tile            one row a cluster of 8 CTAs, up to 16,376 tokens a CTA
// Threads         256, 3 CTAs per SM
// Shared memory   11 KiB and 4 bytes per token of a slice: 75.7 KB at 128,815 tokens
// Roofline        4 bytes per logit: 256 rows of 128,815 in 29 us at 4.5 TB/s; noise without a
//                 filter costs 10 rounds of Philox for every 4 tokens and is bound by integer units
// Reference       step3rt.ops.sampling.sample, token_logprobs

#include "sampling/sample_row.cuh"

extern "C" __global__ void __launch_bounds__(kSampleThreads, kSampleCtasPerSm)
    __cluster_dims__(kRowCtas, 1, 1) sm90_f32_sample(const __grid_constant__ SampleParams params) {
  extern __shared__ uint4 memory[];
  sample_row<F32Logits>(params, *reinterpret_cast<SampleShared*>(memory));
}
