// The largest logit of every row and its first token: sm90_f32_sample for rows that are all greedy,
// without edits and log-probabilities. Fewer registers and no copy in shared memory keep more loads
// in flight.
//
//   params           as in sm90_f32_sample; rows, edits and listed tokens are not used
//
// Tile            one row a cluster of kRowCtas CTAs
// Threads         STEP3RT_SAMPLE_THREADS
// Shared memory   11 KiB, static
// Roofline        4 bytes per logit: 256 rows of 128,815 in 29 us at 4.5 TB/s
// Reference       step3rt.ops.sampling.sample

#include "sampling/greedy_row.cuh"

extern "C" __global__ void __launch_bounds__(kSampleThreads, kSampleCtasPerSm)
    __cluster_dims__(kRowCtas, 1, 1)
        sm90_f32_sample_greedy(const __grid_constant__ SampleParams params) {
  __shared__ SampleShared shared;
  greedy_row<F32Logits>(params, shared);
}
