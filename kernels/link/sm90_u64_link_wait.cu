// Waits until the peer's next frame has arrived.
//
//   lane       LinkLane[1]   see link.cuh
//   num_rows   i32[1]        written: rows of `row_bytes` in the frame, 0 after an error
//
// Threads         32 in one CTA, of which one waits
// Shared memory   none
// Roofline        latency: a load from L2 that hits after one NVLink trip, about 1.3 us
// Reference       tests/kernels/test_device_link.py
//
// What the peer wrote is visible to every kernel after this one. It never hangs and never traps: a
// stop word of the host, a time limit, and a frame that was not asked for set the lane's `error`, and
// everything after it goes through the motions until the host looks, before the step counts.

#include "link/link.cuh"

extern "C" __global__ void __launch_bounds__(32)
    sm90_u64_link_wait(LinkLane* lane, int* num_rows, uint32_t row_bytes) {
  const LinkLane view = *lane;  // set when the link came up, but for what is loaded below
  griddepcontrol_wait();
  if (threadIdx.x == 0) {
    LinkError error = load_error(lane);
    uint32_t num_bytes = 0;
    const uint64_t sequence = load_progress(lane).received + 1;
    if (error == kLinkOk) error = link_wait(view, view.epoch_bits | sequence, &num_bytes);
    if (error == kLinkOk) {
      lane->received = sequence;
    } else {
      lane->error = error;
      num_bytes = 0;
    }
    *num_rows = num_bytes / row_bytes;
  }
  __syncwarp();
  griddepcontrol_launch_dependents();
}
