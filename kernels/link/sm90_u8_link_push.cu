// Writes one frame into the peer GPU's slot and publishes it.
//
//   lane       LinkLane[1]               see link.cuh
//   payload    u8[num_rows * row_bytes]  this GPU's memory, 16-byte aligned
//   num_rows   i32[1]                    on the device: known when the kernel runs
//
// Threads         512 in each of 1..128 CTAs
// Shared memory   none
// Roofline        NVLink: 387 GB/s of peer copy one way; a small frame is one trip, about 1.3 us
// Reference       a copy of the payload, and the flag: tests/kernels/test_device_link.py
//
// The stores are this kernel's own: no copy engine, no CPU. A lane whose `error` is set sends
// nothing, so a step that lost a peer cannot publish what it computed from garbage.

#include "link/link.cuh"

extern "C" __global__ void __launch_bounds__(512)
    sm90_u8_link_push(LinkLane* lane, const uint8_t* payload, const int* num_rows,
                      uint32_t row_bytes) {
  uint8_t* peer_slot = lane->peer_slot;  // set when the link came up
  Word128* peer_flag = lane->peer_flag;
  const uint64_t epoch_bits = lane->epoch_bits;
  const uint32_t slot_bytes = lane->slot_bytes;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  if (load_error(lane) != kLinkOk) return;
  const uint64_t sequence = load_progress(lane).sent + 1;
  const uint64_t num_bytes = static_cast<uint64_t>(ld_global_cg(num_rows)) * row_bytes;
  if (num_bytes > slot_bytes) {
    if (blockIdx.x == 0 && threadIdx.x == 0) lane->error = kLinkWrongLength;
    return;
  }
  const bool has_published = link_push(lane, peer_slot, peer_flag, payload,
                                       static_cast<uint32_t>(num_bytes), epoch_bits | sequence);
  if (has_published) lane->sent = sequence;
}
