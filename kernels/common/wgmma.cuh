// wgmma: shared-memory descriptors, ordering, and one wrapper per instruction shape used.
// A warpgroup calls every function here as a whole; accumulators are in the m64nN register layout:
//   thread (warp w, lane 4g+t): d[4j+0..1] = row 16w+g,   columns 8j+2t, 8j+2t+1
//                               d[4j+2..3] = row 16w+g+8, the same columns
#pragma once

#include "common/types.cuh"

// ---- shared-memory matrix descriptors ------------------------------------------------------

enum class Swizzle : uint64_t { k128B = 1, k64B = 2 };

// Offsets in bytes. K-major operands under a swizzle ignore `leading`; their `stride` is the
// distance of two 8-row groups. MN-major operands: `leading` is the distance of two swizzle-wide
// column groups, `stride` that of two groups of 8 along K.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading,
                                                      uint32_t stride, Swizzle swizzle) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) |
         (static_cast<uint64_t>(leading >> 4) << 16) | (static_cast<uint64_t>(stride >> 4) << 32) |
         (static_cast<uint64_t>(swizzle) << 62);
}

// The same matrix `bytes` further: the address field is the lowest and never carries out.
__device__ __forceinline__ uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// ---- ordering ------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` groups are in flight; `d` is what the finished ones wrote. Naming
// the registers keeps the compiler from moving their uses above the wait.
template <int kPending, int kCount>
__device__ __forceinline__ void wgmma_wait_group(float (&d)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// ---- instructions --------------------------------------------------------------------------

#define STEP3RT_ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define STEP3RT_ACC16(d, i) \
  STEP3RT_ACC4(d, i), STEP3RT_ACC4(d, i + 4), STEP3RT_ACC4(d, i + 8), STEP3RT_ACC4(d, i + 12)
#define STEP3RT_ACC32(d) STEP3RT_ACC16(d, 0), STEP3RT_ACC16(d, 16)
#define STEP3RT_ACC128(d)                                                                \
  STEP3RT_ACC16(d, 0), STEP3RT_ACC16(d, 16), STEP3RT_ACC16(d, 32), STEP3RT_ACC16(d, 48), \
      STEP3RT_ACC16(d, 64), STEP3RT_ACC16(d, 80), STEP3RT_ACC16(d, 96), STEP3RT_ACC16(d, 112)

// d[64,64] (+)= A[64,16] B[64,16]^T, bf16, both K-major in shared memory.
__device__ __forceinline__ void wgmma_m64n64k16_bf16_ss(float (&d)[32], uint64_t a_descriptor,
                                                        uint64_t b_descriptor, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n}\n"
      : STEP3RT_ACC32(d)
      : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)));
}

// d[64,256] (+)= A[64,16] B[16,256], bf16, A in registers, B MN-major in shared memory.
__device__ __forceinline__ void wgmma_m64n256k16_bf16_rs(float (&d)[128], const uint32_t (&a)[4],
                                                         uint64_t b_descriptor, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %133, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"
      " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"
      " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,"
      " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111,"
      " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127}, "
      "{%128, %129, %130, %131}, %132, p, 1, 1, 1;\n}\n"
      : STEP3RT_ACC128(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor),
        "r"(static_cast<int>(accumulate)));
}

// d[64,64] (+)= A[64,32] B[64,32]^T, e4m3, both K-major in shared memory.
__device__ __forceinline__ void wgmma_m64n64k32_e4m3_ss(float (&d)[32], uint64_t a_descriptor,
                                                        uint64_t b_descriptor, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1;\n}\n"
      : STEP3RT_ACC32(d)
      : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)));
}

// d[64,64] (+)= A[64,32] B[64,32]^T, e4m3, A in registers, B K-major in shared memory.
__device__ __forceinline__ void wgmma_m64n64k32_e4m3_rs(float (&d)[32], const uint32_t (&a)[4],
                                                        uint64_t b_descriptor, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1;\n}\n"
      : STEP3RT_ACC32(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor),
        "r"(static_cast<int>(accumulate)));
}

#undef STEP3RT_ACC4
#undef STEP3RT_ACC16
#undef STEP3RT_ACC32
#undef STEP3RT_ACC128
