// The copy engine: tensor-map tiles and plain bulk copies from global to shared memory.
// Every copy completes on an mbarrier by bytes; nothing here waits.
#pragma once

#include "common/barrier.cuh"
#include "common/types.cuh"

// Read once, keep nothing: the KV stream must not push weights and activations out of L2.
// The value is createpolicy.fractional.L2::evict_first with fraction 1.
constexpr uint64_t kEvictFirst = 0x12f0000000000000ull;

__device__ __forceinline__ void prefetch_tensormap(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// One box of a 4-D tensor map at coordinates {x, y, z, w}, innermost first.
__device__ __forceinline__ void cp_async_bulk_tensor_4d(void* destination, const TensorMap* map,
                                                        uint64_t* barrier, int x, int y, int z,
                                                        int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_4d(void* destination, const TensorMap* map,
                                                        uint64_t* barrier, int x, int y, int z,
                                                        int w, uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w), "l"(l2_policy)
      : "memory");
}

// `bytes` contiguous bytes; both addresses and the count are multiples of 16.
__device__ __forceinline__ void cp_async_bulk(void* destination, const void* source, uint32_t bytes,
                                              uint64_t* barrier, uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(destination)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier)), "l"(l2_policy)
      : "memory");
}

__device__ __forceinline__ void cp_async_bulk(void* destination, const void* source, uint32_t bytes,
                                              uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(destination)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Brings `bytes` (a multiple of 16) to L2; nobody waits for it.
__device__ __forceinline__ void cp_async_bulk_prefetch_l2(const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}
