// Barriers: mbarrier objects in shared memory and the numbered hardware barriers.
// Never decides who waits for what; that is the kernel's layout struct.
#pragma once

#include "common/ptx.cuh"
#include "common/types.cuh"

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes freshly initialised barriers visible to the TMA unit.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// One arrival, and `bytes` more that the TMA unit has to deliver before the phase completes.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Waits until the phase of the given parity has completed. A kernel built with
// STEP3RT_WAIT_LIMIT_NS traps after that time, so that a protocol error ends the launch with an
// error instead of hanging the device.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef STEP3RT_WAIT_LIMIT_NS
  const uint64_t start = globaltimer();
  while (!mbarrier_try_wait(barrier, parity)) {
    if (globaltimer() - start > STEP3RT_WAIT_LIMIT_NS) __trap();
  }
#else
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#endif
}

// Meets the other threads that the barrier counts; their writes to shared memory are visible after.
__device__ __forceinline__ void mbarrier_sync(uint64_t* barrier) {
  uint64_t phase;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];"
               : "=l"(phase)
               : "r"(shared_address(barrier))
               : "memory");
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "l"(phase)
        : "memory");
  } while (done == 0);
}

// Arrivals of one warp at a barrier of its CTA, where lanes have read or written shared memory. One
// is enough: __syncwarp puts what all lanes did before it. compute-sanitizer's racecheck seems to
// follow only what the arriving thread did. For it alone a kernel can be built with
// STEP3RT_EVERY_LANE_ARRIVES: every lane then arrives where its warp does, once in each of its phases,
// so that a phase still begins and ends with the same reads and writes.
#ifdef STEP3RT_EVERY_LANE_ARRIVES
constexpr int kWarpArrivals = kWarpThreads;
#else
constexpr int kWarpArrivals = 1;
#endif

// Hardware barrier `kId` (0 is __syncthreads) among `kThreads` threads, whole warps.
template <int kId, int kThreads>
__device__ __forceinline__ void bar_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// A place in a ring of `kStages` buffers and the parity of its current phase.
template <int kStages>
struct RingCursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};
