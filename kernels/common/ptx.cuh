// One wrapper per scalar PTX instruction, named as the instruction. Holds no algorithm.
// PTX for barriers, TMA and wgmma lives in the neighbouring headers; nowhere else is there any.
#pragma once

#include "common/types.cuh"

// ---- roles ---------------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Programmatic dependent launch: the next grid of the stream may be scheduled from here on.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until every grid that this one depends on has finished and its writes are visible.
__device__ __forceinline__ void griddepcontrol_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// threadIdx.x, read again: what follows from it is not kept in registers since the kernel began.
__device__ __forceinline__ int tid_x() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int>(thread);
}

// Nanoseconds, in coarse ticks.
__device__ __forceinline__ uint64_t globaltimer() {
  uint64_t time_ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time_ns));
  return time_ns;
}

// ---- arithmetic ----------------------------------------------------------------------------

__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats to packed bf16; `lo` takes the lower half word, that is the lower address.
__device__ __forceinline__ uint32_t cvt_bf16x2(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

// Products of two packed bf16 pairs, each rounded once.
__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// The larger of each of two packed bf16 pairs; a number against NaN.
__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// Two floats to packed e4m3, saturating at 448; `lo` takes the lower byte.
__device__ __forceinline__ uint16_t cvt_e4m3x2(float lo, float hi) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(hi), "f"(lo));
  return packed;
}

__device__ __forceinline__ uint32_t cvt_e4m3x4(float b0, float b1, float b2, float b3) {
  return static_cast<uint32_t>(cvt_e4m3x2(b0, b1)) |
         (static_cast<uint32_t>(cvt_e4m3x2(b2, b3)) << 16);
}

__device__ __forceinline__ float bf16_low_to_float(uint32_t pair) {
  return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float bf16_high_to_float(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// ---- memory --------------------------------------------------------------------------------

// Loads through L2 only: the data may be younger than what L1 holds, as when another SM wrote it in
// this launch, or a kernel that this one overlaps with.
__device__ __forceinline__ int ld_global_cg(const int* address) {
  int v;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}

__device__ __forceinline__ float ld_global_cg(const float* address) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
  return v;
}

__device__ __forceinline__ int4 ld_global_cg(const int4* address) {
  int4 v;
  asm volatile("ld.global.cg.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ float4 ld_global_cg(const float4* address) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ float2 ld_global_cg(const float2* address) {
  float2 v;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "l"(address)
               : "memory");
  return v;
}

// Four 8x8 matrices of 16-bit values, or of rows of 16 bytes: lane l gives the shared-memory address of
// row l % 8 of matrix l / 8, and gets bytes 4 (l % 4) ... of row l / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t address, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

// Adds and returns the old value; releases this thread's writes and acquires those of the others.
__device__ __forceinline__ int atom_add_acq_rel_gpu(int* address, int value) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(address), "r"(value)
               : "memory");
  return old;
}

// Makes ordinary shared-memory stores of this thread visible to wgmma and the TMA unit.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
