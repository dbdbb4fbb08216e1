// Thread-block clusters: ranks, the cluster barrier, the shared memory of other CTAs, and copies that
// land in several CTAs at once. Never decides who waits for what.
#pragma once

#include "common/barrier.cuh"
#include "common/types.cuh"

// Kept in L2 as long as it has room: read by many SMs. createpolicy.fractional.L2::evict_last, 1.
constexpr uint64_t kEvictLast = 0x14f0000000000000ull;
// createpolicy.fractional.L2::evict_unchanged: the usual replacement.
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;

__device__ __forceinline__ int cluster_ctarank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Orders nothing but the arrival itself; a release, here as at an mbarrier of another CTA, would be a
// fence of the whole GPU. Each thread arrives, then waits.
__device__ __forceinline__ void barrier_cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// All threads of all CTAs of the cluster meet, whole warps or not. Orders nothing in memory: a
// release to the cluster is a fence of the whole GPU.
__device__ __forceinline__ void barrier_cluster_relaxed() {
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait;\n" ::
          : "memory");
}

// The address of the same variable in the CTA of rank `rank`.
__device__ __forceinline__ uint32_t mapa_shared_cluster(uint32_t address, int rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Stores into the shared memory of a CTA of the cluster and completes 16 bytes on a barrier there.
__device__ __forceinline__ void st_async(uint32_t address, float4 v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4},"
      " [%5];" ::"r"(address),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
      : "memory");
}

// Arrives at the barrier with this one's address in the CTA of rank `rank`. Says that this thread's
// reads are done; its writes are not released.
__device__ __forceinline__ void mbarrier_arrive_relaxed_cluster(uint64_t* barrier, int rank) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   mapa_shared_cluster(shared_address(barrier), rank))
               : "memory");
}

// As cp_async_bulk, to the same place in every CTA whose rank's bit is set in `ctas`: each of them
// gets the bytes and the completion on its own barrier.
__device__ __forceinline__ void cp_async_bulk_multicast(void* destination, const void* source,
                                                        uint32_t bytes, uint64_t* barrier,
                                                        uint16_t ctas, uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1], %2, [%3], %4, %5;" ::"r"(shared_address(destination)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier)), "h"(ctas), "l"(l2_policy)
      : "memory");
}

// One box of a 2-D tensor map at column x, row y.
__device__ __forceinline__ void cp_async_bulk_tensor_2d(void* destination, const TensorMap* map,
                                                        uint64_t* barrier, int x, int y,
                                                        uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "l"(l2_policy)
      : "memory");
}

// The same into every CTA whose rank's bit is set in `ctas`, at the same offsets: each of them gets
// the bytes and the completion on its own barrier.
__device__ __forceinline__ void cp_async_bulk_tensor_2d_multicast(void* destination,
                                                                  const TensorMap* map,
                                                                  uint64_t* barrier, int x, int y,
                                                                  uint16_t ctas,
                                                                  uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(
          shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(ctas), "l"(l2_policy)
      : "memory");
}
