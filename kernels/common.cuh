// What all kernels share: types, asynchronous copies, tensor-core products, conversions.
//
// The same sources compile for a processor too (host/simt.hpp), where every thread of a block runs in turn and each primitive below does
// what the PTX manual says of it. So tests run the kernels themselves, index arithmetic and all, without a GPU.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define DEVICE __device__ __forceinline__
// So many blocks of a multiprocessor at once: registers allow three of 128 threads 168 registers each.
#define KERNEL(threads) KERNEL_OF(threads, 3)
#define KERNEL_OF(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// With so many registers a thread at most; of 10.0 and later the compiler wants more for the same.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define KERNEL_WITH(registers) extern "C" __global__ void __maxnreg__((registers) + 40)
#else
#define KERNEL_WITH(registers) extern "C" __global__ void __maxnreg__(registers)
#endif
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "host/simt.hpp"
#endif

// ---- numbers ----

// How 16-bit and 32-bit floats of an argument are stored.
enum FloatType : int { BF16 = 0, F16 = 1, F32 = 2 };

HOST_DEVICE float from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
#endif
}

HOST_DEVICE uint32_t to_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
#endif
}

HOST_DEVICE float bf16_value(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

// To the nearest, ties to even; a NaN stays one.
HOST_DEVICE uint16_t to_bf16(float value) {
  uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

HOST_DEVICE float f16_value(uint16_t h) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(h));
  return value;
#else
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);
  // 2^-24 times the fraction, exact.
  if (exponent == 0) return from_bits(to_bits(float(fraction) * from_bits(0x33800000u)) | sign);
  return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

// To the nearest, ties to even; a NaN stays one.
HOST_DEVICE uint16_t to_f16(float value) {
  uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and more
  if (size < 0x38800000u) {
    // Below 2^-14 numbers are 2^-24 apart, as floats are between 0.5 and 1.
    return uint16_t(sign | (to_bits(from_bits(size) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1)) >> 13));
}

// The number at `index` of an array of `type`.
HOST_DEVICE float read_float(const void* numbers, int64_t index, FloatType type) {
  if (type == F32) return static_cast<const float*>(numbers)[index];
  uint16_t bits = static_cast<const uint16_t*>(numbers)[index];
  return type == BF16 ? bf16_value(bits) : f16_value(bits);
}

HOST_DEVICE void write_float(void* numbers, int64_t index, FloatType type, float value) {
  if (type == F32) {
    static_cast<float*>(numbers)[index] = value;
  } else {
    static_cast<uint16_t*>(numbers)[index] = type == BF16 ? to_bf16(value) : to_f16(value);
  }
}

// 2^(e - 127); 255 is no number.
HOST_DEVICE float e8m0_value(uint8_t e) {
  uint32_t bits = uint32_t(e) << 23;
  return from_bits((bits > 0x00400000u ? bits : 0x00400000u) | (e == 255 ? 0x00400000u : 0));
}

// Twice the value of an E2M1 code is an exact integer: 0, 1, 2, 3, 4, 6, 8, 12, then the same below 0.
HOST_DEVICE int e2m1_doubled(int code) {
  int magnitude = code & 7;
  int value = magnitude < 2 ? magnitude : (2 | (magnitude & 1)) << ((magnitude >> 1) - 1);
  return code & 8 ? -value : value;
}

// What a number becomes where it is written as one of `type`.
HOST_DEVICE float rounded(float value, FloatType type) {
  return type == F32 ? value : type == BF16 ? bf16_value(to_bf16(value)) : f16_value(to_f16(value));
}

HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

#ifdef __CUDACC__

// ---- asynchronous copies ----

// The address of something in shared memory, as instructions for it want it.
DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// 16 bytes of global memory to shared memory, of which those from `bytes` on are zeros and are not read; `to` and `from` are multiples of
// 16. Rows are read 64 bytes at a time, so the L2 cache is told that the rest of their 128 follows.
DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Whether an asynchronous copy may begin there.
DEVICE bool is_aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// What was copied until now is a group.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `PENDING` groups are on their way.
template <int PENDING>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// ---- tensor cores ----

// c += a b for int8: a [16, 32] by rows, b [32, 8] by columns, c [16, 8] in int32. Lane l has of a four columns from 4 (l % 4) of
// row l / 4, then of row l / 4 + 8, then both 16 columns on; of b the same columns of row l / 4 of its transpose; of c columns
// 2 (l % 4) and the next of row l / 4, then of row l / 4 + 8 (PTX ISA, m16n8k32).
DEVICE void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c = a b + from.
DEVICE void mma_s8_on(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&from)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]));
}

// c += a b for bf16, in f32: a [16, 16] by rows, b [16, 8] by columns, c [16, 8]. Lane l has of a columns 2 (l % 4) and the next of row
// l / 4, then of row l / 4 + 8, then both 8 columns on; of b the same columns of row l / 4 of its transpose; of c the same as above (PTX ISA,
// m16n8k16).
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c = a b.
DEVICE void mma_bf16_on(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};\n"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}

// a b + c for two bf16 each, rounded once.
DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// ---- shared memory ----

// Sixteen bytes at a multiple of sixteen, in one load.
DEVICE void load_sixteen(uint32_t (&to)[4], const void* from) {
  uint4 words = *static_cast<const uint4*>(from);
  to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
}

DEVICE void store_sixteen(void* to, const uint32_t (&from)[4]) {
  *static_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
}

// Eight bytes at a multiple of eight.
DEVICE void load_eight(uint32_t (&to)[2], uint32_t from) {
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];\n" : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
}

// Two or four floats at a multiple of their size.
DEVICE void load_floats(float (&to)[2], const float* from) {
  float2 floats = *reinterpret_cast<const float2*>(from);
  to[0] = floats.x, to[1] = floats.y;
}
DEVICE void load_floats(float (&to)[4], const float* from) {
  float4 floats = *reinterpret_cast<const float4*>(from);
  to[0] = floats.x, to[1] = floats.y, to[2] = floats.z, to[3] = floats.w;
}
DEVICE void store_four(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

// Four matrices of eight rows of 16 bytes: lane l names row l % 8 of matrix l / 8, and gets four bytes from 4 (l % 4) on of row l / 4 of
// each (PTX ISA, ldmatrix).
DEVICE void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// ---- global memory ----

// What this kernel only reads, eight or sixteen bytes at a multiple of that; it stays in the caches.
DEVICE void load_cached_eight(uint32_t (&to)[2], const void* from) {
  asm volatile("ld.global.v2.b32 {%0,%1}, [%2];\n" : "=r"(to[0]), "=r"(to[1]) : "l"(from) : "memory");
}
DEVICE void load_cached_sixteen(uint32_t (&to)[4], const void* from) {
  asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];\n" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from) : "memory");
}

// Asks for a line of 128 bytes, into the nearest cache.
DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L1 [%0];\n" ::"l"(at)); }

// ---- between kernels ----

// Kernels of a stream may be launched to overlap (programmatic stream serialization, from 9.0 on). Before this, a kernel reads nothing that an
// earlier one writes: weights only.
DEVICE void inputs_ready() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin to start where there is room.
DEVICE void start_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A number that stays in a register: the compiler would make anew, before each use, what it knows how to make. Every lane takes part.
DEVICE uint32_t in_register(uint32_t number) { return __shfl_sync(0xffffffffu, number, threadIdx.x % 32); }

// ---- lanes of a warp ----

// Every lane is here, and sees what the others wrote to shared memory, asynchronous copies that they waited for included.
DEVICE void sync_warp() { __syncwarp(); }

// The value of the lane whose number differs in the bits of `mask`; every lane of the warp takes part.
DEVICE float exchange(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The lanes that have the same number, a bit each, this one's too.
DEVICE uint32_t lanes_alike(int number) { return __match_any_sync(0xffffffffu, number); }

// The value of lane `lane`.
DEVICE float from_lane(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// Bytes of the pair (b, a), by the four low bits of each nibble of `selector`: three choose a byte, the fourth asks for its sign in all of its bits.
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

#endif

// ---- on both sides ----

// A bit for each lane in front of this one.
DEVICE uint32_t lanes_below(int lane) { return (1u << lane) - 1; }

// Eight numbers at `index`, a multiple of eight, of an array that begins at a multiple of sixteen bytes.
DEVICE void read_eight(float (&to)[8], const void* numbers, int64_t index, FloatType type) {
  uint32_t words[4];
  if (type == F32) {
    const float* from = static_cast<const float*>(numbers) + index;
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
      load_sixteen(words, from + half);
#pragma unroll
      for (int i = 0; i < 4; i++) to[half + i] = from_bits(words[i]);
    }
    return;
  }
  load_sixteen(words, static_cast<const uint16_t*>(numbers) + index);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    uint16_t bits = uint16_t(words[i / 2] >> (16 * (i % 2)));
    to[i] = type == BF16 ? bf16_value(bits) : f16_value(bits);
  }
}

// Eight numbers to `index`, a multiple of eight, of an array that begins at a multiple of sixteen bytes.
DEVICE void write_eight(void* numbers, int64_t index, const float (&from)[8], FloatType type) {
  if (type == F32) {
    float* to = static_cast<float*>(numbers) + index;
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; i++) words[i] = to_bits(from[half + i]);
      store_sixteen(to + half, words);
    }
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    auto bits = [&](float value) { return uint32_t(type == BF16 ? to_bf16(value) : to_f16(value)); };
    words[i] = bits(from[2 * i]) | bits(from[2 * i + 1]) << 16;
  }
  store_sixteen(static_cast<uint16_t*>(numbers) + index, words);
}

// Four numbers at `index`.
DEVICE void read_four(float (&to)[4], const void* numbers, int index, FloatType type) {
  if (type == F32) {
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = static_cast<const float*>(numbers)[index + i];
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint16_t bits = static_cast<const uint16_t*>(numbers)[index + i];
    to[i] = type == BF16 ? bf16_value(bits) : f16_value(bits);
  }
}
