// Adds up what the experts of this instance made of each row, in a fixed order, straight into the
// memory of the attention instance that asked for it, and publishes a frame to each of them.
//
//   params.lane        AfdLane[1]         see link/afd.cuh
//   params.expert_out  bf16[S, R, H]      rows of the down projection, in S partial sums; H a multiple
//                                         of 8. Without token_rows: bf16[1, A * T, H], a row per row
//   params.token_rows  i32[A * T, C + 1]  row of each copy, -1: none; the last column is not read;
//                                         older than the previous kernel. Null: the row itself, once
//   params.ids         i32[A * T, C]      -1: nothing to compute; without token_rows only
//   params.weights     f32[A * T, C]      of the copies; with token_rows only
//
//   At source a, row r: sum over columns of weight * sum over slices of row a * T + r. Rows that the
//   source did not ask for are not written.
//
// Tile            a row per CTA at a time
// Threads         448 in each of 1..264 CTAs
// Shared memory   none
// Registers       72, 0 spills
// Roofline        NVLink: 2 * H bytes per row at 387 GB/s: 256 rows of 7168 9.5 us; L2, which holds
//                 expert_out: copies * S times that. Predicted 12 us for 256 rows, 3.5 us for few
// Reference       step3rt.ops.afd_reference.FfnHostLane.push, of step3rt.ops.moe_fp8.reference_expert

#include "link/afd.cuh"

constexpr int kThreads = 448;  // twice 16 bytes per thread for H = 7168
constexpr int kMaxColumns = 8;
constexpr int kVector = 8;  // bf16 values of a 16-byte access

struct MoePushParams {
  AfdLane* lane;
  const uint8_t* expert_out;
  const int* token_rows;
  const int* ids;
  const float* weights;
  int num_columns;  // C, at most 8
  int num_slices;
  int row_capacity;  // R
  int width;         // H
  int num_rows;      // A * T
};

__device__ __forceinline__ void add_scaled(float (&sum)[kVector], int4 packed, float weight) {
  const int words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    sum[2 * w] = fmaf(weight, __int_as_float(words[w] << 16), sum[2 * w]);
    sum[2 * w + 1] = fmaf(weight, __int_as_float(words[w] & 0xffff0000), sum[2 * w + 1]);
  }
}

// Where the copies of a row are.
struct Copies {
  int rows[kMaxColumns];
  float weights[kMaxColumns];
  bool has_any;

  __device__ __forceinline__ void load(const MoePushParams& params, int row) {
    has_any = false;
#pragma unroll
    for (int c = 0; c < kMaxColumns; ++c) {
      rows[c] = -1;
      weights[c] = 1.0f;
      if (c >= params.num_columns) continue;
      if (params.token_rows != nullptr) {
        rows[c] = ld_global_cg(params.token_rows + row * (params.num_columns + 1) + c);
        weights[c] = ld_global_cg(params.weights + row * params.num_columns + c);
        has_any = has_any || rows[c] >= 0;
      } else {
        has_any = has_any || ld_global_cg(params.ids + row * params.num_columns + c) >= 0;
      }
    }
    if (params.token_rows == nullptr && has_any) rows[0] = row;
  }
};

__device__ __forceinline__ void push_row(const MoePushParams& params, const Copies& copies,
                                         int4* out) {
  const int num_vectors = params.width / kVector;
  const int4* expert_out = reinterpret_cast<const int4*>(params.expert_out);
#pragma unroll 1
  for (int i = threadIdx.x; i < num_vectors; i += kThreads) {
    float sum[kVector] = {};
#pragma unroll
    for (int c = 0; c < kMaxColumns; ++c) {
      if (copies.rows[c] < 0) continue;
      for (int slice = 0; slice < params.num_slices; ++slice) {
        const int64_t row = static_cast<int64_t>(slice) * params.row_capacity + copies.rows[c];
        add_scaled(sum, ld_global_cg(expert_out + row * num_vectors + i), copies.weights[c]);
      }
    }
    out[i] = make_int4(cvt_bf16x2(sum[0], sum[1]), cvt_bf16x2(sum[2], sum[3]),
                       cvt_bf16x2(sum[4], sum[5]), cvt_bf16x2(sum[6], sum[7]));
  }
}

// One warp publishes to the participants.
__device__ __forceinline__ void publish(AfdLane* lane, uint32_t participants) {
  const int source = threadIdx.x;
  if ((participants >> source & 1) == 0) return;
  AfdPeer& peer = lane->peers[source];
  const uint64_t sequence = load_progress(&peer).sent + 1;
  st_release_sys(peer.peer_flag, {peer.epoch_bits | sequence, load_word(&peer.num_rows)});
  peer.sent = sequence;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    sm90_bf16_moe_combine_push(const __grid_constant__ MoePushParams params) {
  AfdLane* lane = params.lane;
  // Between the wait for the rows and this kernel are the experts' kernels; or there is none.
  if (params.token_rows == nullptr) griddepcontrol_wait();
  const uint32_t participants = load_error(lane) == kLinkOk ? load_word(&lane->participants) : 0;
  Copies copies;
  if (participants != 0) copies.load(params, blockIdx.x);
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  if (participants == 0) return;
  const uint64_t frame = load_long(&lane->frames) - 1;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (AfdTraceRow* row = trace_row(lane, frame)) row->send_begin = globaltimer();
  }
  const int max_tokens = lane->max_tokens;
  for (int row = blockIdx.x; row < params.num_rows; row += gridDim.x) {
    if (row != blockIdx.x) copies.load(params, row);
    const int source = row / max_tokens;
    if (!copies.has_any || (participants >> source & 1) == 0) continue;
    const int64_t place = static_cast<int64_t>(row - source * max_tokens) * params.width / kVector;
    push_row(params, copies, reinterpret_cast<int4*>(lane->peers[source].slots[0]) + place);
  }
  if (!is_last_to_arrive(lane)) return;
  publish(lane, participants);
  if (threadIdx.x == 0) {
    if (AfdTraceRow* row = trace_row(lane, frame)) row->send_end = globaltimer();
  }
}
