// Loads and stores that order others, among SMs, GPUs and the host. One wrapper per instruction.
// Nothing here waits.
#pragma once

#include "common/types.cuh"

// 16 bytes that are read and written as one.
struct alignas(16) Word128 {
  uint64_t low;
  uint64_t high;
};

// Sees at least what was written before the value that it reads was released, by any processor.
__device__ __forceinline__ Word128 ld_acquire_sys(const Word128* address) {
  Word128 word;
  asm volatile(
      "{\n.reg .b128 w;\n"
      "ld.acquire.sys.global.b128 w, [%2];\n"
      "mov.b128 {%0, %1}, w;\n}\n"
      : "=l"(word.low), "=l"(word.high)
      : "l"(address)
      : "memory");
  return word;
}

// Releases what this thread has written or observed before, to any processor.
__device__ __forceinline__ void st_release_sys(Word128* address, Word128 word) {
  asm volatile(
      "{\n.reg .b128 w;\n"
      "mov.b128 w, {%1, %2};\n"
      "st.release.sys.global.b128 [%0], w;\n}\n" ::"l"(address),
      "l"(word.low), "l"(word.high)
      : "memory");
}

// A word that the host may change at any time.
__device__ __forceinline__ uint32_t ld_relaxed_sys(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// A word that the host may look at any time.
__device__ __forceinline__ void st_relaxed_sys(uint32_t* address, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// The same between the SMs of one GPU.
__device__ __forceinline__ uint32_t ld_acquire_gpu(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void st_release_gpu(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// SM clock cycles, for intervals measured on one SM.
__device__ __forceinline__ uint64_t clock64_cycles() {
  uint64_t cycles;
  asm volatile("mov.u64 %0, %clock64;" : "=l"(cycles)::"memory");
  return cycles;
}
