// mma.sync: the tensor core instruction of one warp, operands in registers.
// Lane 4g+t: a = rows g, g+8 x columns 2t,2t+1 and 2t+8,2t+9; b = the same columns of row g;
// d = rows g, g+8 x columns 2t,2t+1. Never loads: which k is in which register is the kernel's.
#pragma once

#include "common/types.cuh"

// d[16,8] += A[16,16] B[8,16]^T, bf16, sums in fp32. a = {(g,lo), (g+8,lo), (g,hi), (g+8,hi)}.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], uint32_t a0, uint32_t a1,
                                                  uint32_t a2, uint32_t a3, uint32_t b0,
                                                  uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
