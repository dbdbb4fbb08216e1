// Publishes a frame whose payload a copy engine has put into the peer's slot.
//
//   lane       LinkLane[1]   see link.cuh
//   num_rows   i32[1]        rows of `row_bytes` that were copied
//
// Threads         32 in one CTA
// Shared memory   none
// Roofline        latency: one store over NVLink, about 1.3 us
// Reference       tests/kernels/test_device_link.py
//
// A copy node of a CUDA graph copies a fixed number of bytes, so this path suits slots that are full.
// It starts after the copy has ended, with all of it visible: the stream's order gives that.

#include "link/link.cuh"

extern "C" __global__ void __launch_bounds__(32)
    sm90_u64_link_publish(LinkLane* lane, const int* num_rows, uint32_t row_bytes) {
  if (threadIdx.x != 0 || load_error(lane) != kLinkOk) return;
  const uint64_t sequence = load_progress(lane).sent + 1;
  const uint64_t num_bytes = static_cast<uint64_t>(ld_global_cg(num_rows)) * row_bytes;
  if (num_bytes > lane->slot_bytes) {
    lane->error = kLinkWrongLength;
    return;
  }
  st_release_sys(lane->peer_flag, {lane->epoch_bits | sequence, num_bytes});
  lane->sent = sequence;
}
