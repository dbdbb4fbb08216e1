// wgmma m64nNk32 for e4m3 operands, both in shared memory: d[64, N] (+)= A[64, 32] B[N, 32]^T in fp32.
// One overload per N, chosen by the size of `d` = N / 2. Register layout and rules: wgmma.cuh.
#pragma once

#include "common/types.cuh"

#define STEP3RT_D8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define STEP3RT_D32(d, i) \
  STEP3RT_D8(d, i), STEP3RT_D8(d, i + 8), STEP3RT_D8(d, i + 16), STEP3RT_D8(d, i + 24)
#define STEP3RT_R0_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define STEP3RT_R8_15 "%8, %9, %10, %11, %12, %13, %14, %15"
#define STEP3RT_R16_23 "%16, %17, %18, %19, %20, %21, %22, %23"
#define STEP3RT_R0_31                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define STEP3RT_R32_39 "%32, %33, %34, %35, %36, %37, %38, %39"
#define STEP3RT_R40_47 "%40, %41, %42, %43, %44, %45, %46, %47"
#define STEP3RT_R48_55 "%48, %49, %50, %51, %52, %53, %54, %55"
#define STEP3RT_R56_63 "%56, %57, %58, %59, %60, %61, %62, %63"
#define STEP3RT_R64_79                                                          \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, " \
  "%79"

#define STEP3RT_R80_95 \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define STEP3RT_WGMMA(n, regs, count, a, b, p, ...)                                       \
  __device__ __forceinline__ void wgmma_e4m3_ss(float (&d)[count], uint64_t a_descriptor, \
                                                uint64_t b_descriptor, bool accumulate) { \
    asm volatile(                                                                         \
        "{\n.reg .pred p;\n"                                                              \
        "setp.ne.b32 p, " p                                                               \
        ", 0;\n"                                                                          \
        "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" regs "}, " a ", " b  \
        ", p, 1, 1;\n}\n"                                                                 \
        : __VA_ARGS__                                                                     \
        : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)));       \
  }

STEP3RT_WGMMA(16, STEP3RT_R0_7, 8, "%8", "%9", "%10", STEP3RT_D8(d, 0))
STEP3RT_WGMMA(32, STEP3RT_R0_7 ", " STEP3RT_R8_15, 16, "%16", "%17", "%18", STEP3RT_D8(d, 0),
              STEP3RT_D8(d, 8))
STEP3RT_WGMMA(48, STEP3RT_R0_7 ", " STEP3RT_R8_15 ", " STEP3RT_R16_23, 24, "%24", "%25", "%26",
              STEP3RT_D8(d, 0), STEP3RT_D8(d, 8), STEP3RT_D8(d, 16))
STEP3RT_WGMMA(64, STEP3RT_R0_31, 32, "%32", "%33", "%34", STEP3RT_D32(d, 0))
STEP3RT_WGMMA(80, STEP3RT_R0_31 ", " STEP3RT_R32_39, 40, "%40", "%41", "%42", STEP3RT_D32(d, 0),
              STEP3RT_D8(d, 32))
STEP3RT_WGMMA(96, STEP3RT_R0_31 ", " STEP3RT_R32_39 ", " STEP3RT_R40_47, 48, "%48", "%49", "%50",
              STEP3RT_D32(d, 0), STEP3RT_D8(d, 32), STEP3RT_D8(d, 40))
STEP3RT_WGMMA(112, STEP3RT_R0_31 ", " STEP3RT_R32_39 ", " STEP3RT_R40_47 ", " STEP3RT_R48_55, 56,
              "%56", "%57", "%58", STEP3RT_D32(d, 0), STEP3RT_D8(d, 32), STEP3RT_D8(d, 40),
              STEP3RT_D8(d, 48))
STEP3RT_WGMMA(128,
              STEP3RT_R0_31 ", " STEP3RT_R32_39 ", " STEP3RT_R40_47 ", " STEP3RT_R48_55
                            ", " STEP3RT_R56_63,
              64, "%64", "%65", "%66", STEP3RT_D32(d, 0), STEP3RT_D32(d, 32))
STEP3RT_WGMMA(160,
              STEP3RT_R0_31 ", " STEP3RT_R32_39 ", " STEP3RT_R40_47 ", " STEP3RT_R48_55
                            ", " STEP3RT_R56_63 ", " STEP3RT_R64_79,
              80, "%80", "%81", "%82", STEP3RT_D32(d, 0), STEP3RT_D32(d, 32), STEP3RT_D8(d, 64),
              STEP3RT_D8(d, 72))

STEP3RT_WGMMA(192,
              STEP3RT_R0_31 ", " STEP3RT_R32_39 ", " STEP3RT_R40_47 ", " STEP3RT_R48_55
                            ", " STEP3RT_R56_63 ", " STEP3RT_R64_79 ", " STEP3RT_R80_95,
              96, "%96", "%97", "%98", STEP3RT_D32(d, 0), STEP3RT_D32(d, 32), STEP3RT_D32(d, 64))

#undef STEP3RT_WGMMA
#undef STEP3RT_D8
#undef STEP3RT_D32
#undef STEP3RT_R0_7
#undef STEP3RT_R8_15
#undef STEP3RT_R16_23
#undef STEP3RT_R0_31
#undef STEP3RT_R32_39
#undef STEP3RT_R40_47
#undef STEP3RT_R48_55
#undef STEP3RT_R56_63
#undef STEP3RT_R64_79
#undef STEP3RT_R80_95
