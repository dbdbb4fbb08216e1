// Fixed-width integers and the opaque types of kernel parameters. Owns no behaviour.
// NVRTC compiles these kernels without any CUDA or C++ header, so the names are declared here.
#pragma once

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int64_t = long long;

#define INFINITY __int_as_float(0x7f800000)

static_assert(sizeof(uint64_t) == 8 && sizeof(void*) == 8,
              "the kernels assume a 64-bit device ABI");

// CUtensorMap, encoded by the host. Only the TMA unit reads it.
struct alignas(64) TensorMap {
  uint8_t opaque[128];
};

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr uint32_t kFullWarp = 0xffffffffu;
