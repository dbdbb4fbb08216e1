// Scalar access to the shared memory of the other CTAs of a cluster, and stores that complete there
// on an mbarrier: cheaper than a cluster barrier, whose release waits for all memory of the SM.
// Never decides who owns which rank's data; that is the kernel's layout.
#pragma once

#include "common/cluster.cuh"
#include "common/types.cuh"

// All threads of the cluster meet; what they wrote before is visible after.
__device__ __forceinline__ void barrier_cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// The address, in the cluster's window, of the same shared variable in CTA `rank`.
__device__ __forceinline__ uint32_t address_in_cta(const void* own, int rank) {
  return mapa_shared_cluster(shared_address(own), rank);
}

__device__ __forceinline__ uint32_t ld_shared_cluster_u32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// 16 bytes into another CTA, whose mbarrier counts them when they are visible there.
__device__ __forceinline__ void st_async_cluster(uint32_t address, uint4 value, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32"
      " [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
}
