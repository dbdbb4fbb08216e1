// The router: logits of up to 48 experts, softmax over all of them, and the 3 most probable.
//
//   params.hidden    bf16[T, 7168]   normed
//   params.gate      bf16[E, 7168]   older than the previous kernel; E from 3 to 48
//   params.topk_ids  i32[T, 3]       best first; of equal probabilities the lower id
//   params.topk_weights f32[T, 3]    probabilities, divided by their sum if is_normalised
//   params.logits    bf16[T, E]      null: not stored
//
// Tile            16 or 32 tokens a cluster of 8 CTAs along K; warp w of CTA r multiplies columns
//                 (7r + w) * 128 .. + 128 with tensor cores, the gate's part in 96 registers
//                 loaded once, before the previous kernel ends. Each CTA adds its 7 warps' sums
//                 and hands those of an eighth of the tokens to each of the CTAs, which add 8 of
//                 them in rank order: a token's logits do not depend on T or on its neighbours
// Threads         224
// Shared memory   27.5 or 30.5 KiB
// Roofline        0.7 MB of gate and 14 KiB per token: 1 us from HBM at 256 tokens; latency below
// Reference       step3rt.ops.router.route, of logits rounded to bf16 as the model's bf16 layer does

#include "common/dsmem.cuh"
#include "common/mma.cuh"
#include "common/ptx.cuh"
#include "common/types.cuh"

#ifndef STEP3RT_ROUTER_CTAS
#define STEP3RT_ROUTER_CTAS 8
#endif
#ifndef STEP3RT_ROUTER_WARPS
#define STEP3RT_ROUTER_WARPS 7
#endif
#ifndef STEP3RT_ROUTER_TILES
#define STEP3RT_ROUTER_TILES 1
#endif
#ifndef STEP3RT_ROUTER_CTAS_PER_SM
#define STEP3RT_ROUTER_CTAS_PER_SM 1
#endif

constexpr int kHidden = 7168;
constexpr int kExperts = 48;  // at most; the gate's last row stands for those that are missing
constexpr int kTopK = 3;
constexpr int kMmaTokens = 16;
constexpr int kTiles = STEP3RT_ROUTER_TILES;
constexpr int kTileTokens = kMmaTokens * kTiles;
constexpr int kCtas = STEP3RT_ROUTER_CTAS;
constexpr int kWarps = STEP3RT_ROUTER_WARPS;
constexpr int kThreads = kWarps * kWarpThreads;
constexpr int kChunk = 32;  // columns that a quad covers with one 16-byte load a lane: two mma
constexpr int kChunks = kHidden / (kChunk * kCtas * kWarps);
constexpr int kExpertTiles = kExperts / 8;
constexpr int kOwnTokens = kTileTokens / kCtas;
constexpr int kSumStride = 56;  // floats; 48 would put every second row into the same banks
constexpr int kQuads = kExperts / 4;
static_assert(kChunks * kChunk * kCtas * kWarps == kHidden, "warps share the columns evenly");
static_assert(kOwnTokens * kCtas == kTileTokens && kOwnTokens <= kWarps, "a warp per own token");

struct RouterParams {
  const uint16_t* hidden;
  const uint16_t* gate;
  int* topk_ids;
  float* topk_weights;
  uint16_t* logits;
  int num_tokens;
  int num_experts;  // E
  int is_normalised;
};

struct RouterShared {
  alignas(16) float warp_sums[kWarps][kMmaTokens][kSumStride];
  alignas(16) float rank_sums[kCtas][kOwnTokens][kExperts];  // found by each rank, of own tokens
  uint64_t arrived;                                          // completes when all of rank_sums has
};

// Columns may be summed in any order, so a lane's 16 bytes are its share of two mma: words 0, 1 of
// the first, 2, 3 of the second, for hidden and gate alike.
__device__ __forceinline__ uint4 load_chunk(const uint16_t* rows, int row, int column) {
  return *reinterpret_cast<const uint4*>(rows + static_cast<int64_t>(row) * kHidden + column);
}

__device__ __forceinline__ void multiply(const uint4 (&gate)[kChunks][kExpertTiles],
                                         const uint4 (&hidden)[kChunks][2],
                                         float (&sums)[kExpertTiles][4]) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint4 upper = hidden[c][0], lower = hidden[c][1];
#pragma unroll
    for (int n = 0; n < kExpertTiles; ++n) {
      mma_m16n8k16_bf16(sums[n], upper.x, lower.x, upper.y, lower.y, gate[c][n].x, gate[c][n].y);
    }
#pragma unroll
    for (int n = 0; n < kExpertTiles; ++n) {
      mma_m16n8k16_bf16(sums[n], upper.z, lower.z, upper.w, lower.w, gate[c][n].z, gate[c][n].w);
    }
  }
}

// Adds the warps' sums and hands each token's to the CTA that finishes it.
__device__ __forceinline__ void share_sums(RouterShared& shared, int rank, int tile) {
  for (int i = threadIdx.x; i < kMmaTokens * kQuads; i += kThreads) {
    const int token = i / kQuads, expert = i % kQuads * 4;
    float4 total = *reinterpret_cast<const float4*>(&shared.warp_sums[0][token][expert]);
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      const float4 part = *reinterpret_cast<const float4*>(&shared.warp_sums[w][token][expert]);
      total.x += part.x;
      total.y += part.y;
      total.z += part.z;
      total.w += part.w;
    }
    const int place = tile * kMmaTokens + token, owner = place / kOwnTokens;
    st_async_cluster(address_in_cta(&shared.rank_sums[rank][place % kOwnTokens][expert], owner),
                     make_uint4(__float_as_uint(total.x), __float_as_uint(total.y),
                                __float_as_uint(total.z), __float_as_uint(total.w)),
                     address_in_cta(&shared.arrived, owner));
  }
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = 1; step < kWarpThreads; step *= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, step));
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 1; step < kWarpThreads; step *= 2) {
    value += __shfl_xor_sync(kFullWarp, value, step);
  }
  return value;
}

// One warp finishes one token; lane l has expert l and, of the lower half, expert 32 + l.
__device__ __forceinline__ void choose(const RouterParams& params, const RouterShared& shared,
                                       int own, int token) {
  const int lane = threadIdx.x % kWarpThreads;
  const bool has_first = lane < params.num_experts;
  const bool has_second = kWarpThreads + lane < params.num_experts;
  float logits[2] = {0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < kCtas; ++r) {
    logits[0] += shared.rank_sums[r][own][lane];
    if (has_second) logits[1] += shared.rank_sums[r][own][kWarpThreads + lane];
  }
  const uint32_t rounded = cvt_bf16x2(logits[0], logits[1]);
  if (params.logits != nullptr) {
    uint16_t* row = params.logits + static_cast<int64_t>(token) * params.num_experts;
    if (has_first) row[lane] = static_cast<uint16_t>(rounded);
    if (has_second) row[kWarpThreads + lane] = static_cast<uint16_t>(rounded >> 16);
  }
  logits[0] = has_first ? bf16_low_to_float(rounded) : -INFINITY;
  logits[1] = has_second ? bf16_high_to_float(rounded) : -INFINITY;
  const float top = warp_max(fmaxf(logits[0], logits[1]));
  float probabilities[2] = {expf(logits[0] - top), expf(logits[1] - top)};
  const float inverse_sum = rcp_approx(warp_sum(probabilities[0] + probabilities[1]));
  // Positive floats are ordered as their bits are; a chosen expert drops to -1, an integer below.
  int keys[2] = {has_first ? __float_as_int(probabilities[0] * inverse_sum) : -1,
                 has_second ? __float_as_int(probabilities[1] * inverse_sum) : -1};
  int ids[kTopK];
  float weights[kTopK];
#pragma unroll
  for (int k = 0; k < kTopK; ++k) {
    const int best = __reduce_max_sync(kFullWarp, max(keys[0], keys[1]));
    const uint32_t low = __ballot_sync(kFullWarp, keys[0] == best);
    const uint32_t high = __ballot_sync(kFullWarp, keys[1] == best);
    ids[k] = low != 0 ? __ffs(low) - 1 : kWarpThreads + __ffs(high) - 1;
    weights[k] = __int_as_float(best);
    if (ids[k] == lane) keys[0] = -1;
    if (ids[k] == kWarpThreads + lane) keys[1] = -1;
  }
  if (params.is_normalised) {
    const float inverse_total = rcp_approx(weights[0] + weights[1] + weights[2]);
#pragma unroll
    for (int k = 0; k < kTopK; ++k) weights[k] *= inverse_total;
  }
  if (lane < kTopK) {
    const int place = token * kTopK + lane;
    params.topk_ids[place] = lane == 0 ? ids[0] : lane == 1 ? ids[1] : ids[2];
    params.topk_weights[place] = lane == 0 ? weights[0] : lane == 1 ? weights[1] : weights[2];
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, STEP3RT_ROUTER_CTAS_PER_SM)
    __cluster_dims__(kCtas, 1, 1)
        sm90_bf16_router_topk(const __grid_constant__ RouterParams params) {
  __shared__ RouterShared shared;
  const int rank = cluster_ctarank();
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.arrived, 1);
    fence_mbarrier_init();
  }
  __syncwarp();
  barrier_cluster_arrive_relaxed();  // waited for before the first store to another CTA
  const int warp = threadIdx.x / kWarpThreads;
  const int group = threadIdx.x % kWarpThreads / 4, quad_lane = threadIdx.x % 4;
  const int column = (rank * kWarps + warp) * kChunks * kChunk + quad_lane * 8;
  uint4 gate[kChunks][kExpertTiles];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int n = 0; n < kExpertTiles; ++n) {
      const int expert = min(8 * n + group, params.num_experts - 1);
      gate[c][n] = load_chunk(params.gate, expert, column + c * kChunk);
    }
  }
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int first = blockIdx.x / kCtas * kTileTokens;
  // Rows past the end repeat the last one; nobody reads their sums.
  uint4 hidden[kTiles][kChunks][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int row = first + t * kMmaTokens + group;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int last = params.num_tokens - 1;
      hidden[t][c][0] = load_chunk(params.hidden, min(row, last), column + c * kChunk);
      hidden[t][c][1] = load_chunk(params.hidden, min(row + 8, last), column + c * kChunk);
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    float sums[kExpertTiles][4] = {};
    multiply(gate, hidden[t], sums);
    if (t > 0) __syncthreads();  // the sums of the tile before have been read
#pragma unroll
    for (int n = 0; n < kExpertTiles; ++n) {
      const int expert = 8 * n + 2 * quad_lane;
      *reinterpret_cast<float2*>(&shared.warp_sums[warp][group][expert]) =
          make_float2(sums[n][0], sums[n][1]);
      *reinterpret_cast<float2*>(&shared.warp_sums[warp][group + 8][expert]) =
          make_float2(sums[n][2], sums[n][3]);
    }
    if (t == 0) barrier_cluster_wait();
    __syncthreads();
    // What arrives before this is counted all the same.
    if (t == 0 && threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(&shared.arrived, sizeof(shared.rank_sums));
    }
    share_sums(shared, rank, t);
  }
  if (warp < kOwnTokens) {
    // Also of tokens past the end: a CTA must not be gone before what is sent to it has arrived.
    mbarrier_wait(&shared.arrived, 0);
    const int token = first + rank * kOwnTokens + warp;
    if (token < params.num_tokens) choose(params, shared, warp, token);
  }
}
