// Products of four warps together (wgmma), which 9.0a alone has: primitives, and what the PTX manual says of them. WARPGROUPS is defined where they are.
#pragma once

#include "common.cuh"

#ifdef __CUDACC__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WARPGROUPS
// Tensor cores take tiles from multiples of 1024.
#define SHARED_TILES(name) extern __shared__ __align__(1024) unsigned char name##_tiles[]; unsigned char* name = name##_tiles

// Four bytes of global memory to shared memory; zeros where `bytes` is 0, and then nothing is read.
DEVICE void copy_async_four(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 4, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// What this thread wrote to shared memory, copies that it waited for included, is seen by tensor cores after the next barrier.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Barrier NUMBER of THREADS threads of the block; number 0 is that of all.
template <int NUMBER, int THREADS>
DEVICE void sync_some() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(NUMBER), "n"(THREADS) : "memory");
}

// Registers that a product reads or writes: no other use of them is moved past this by the compiler, to which a product is an instruction like any other.
DEVICE void hold(uint32_t& number) { asm volatile("" : "+r"(number)::"memory"); }
DEVICE void hold(int& number) { asm volatile("" : "+r"(number)::"memory"); }
DEVICE void hold(float& number) { asm volatile("" : "+f"(number)::"memory"); }
template <class T, int N>
DEVICE void hold(T (&numbers)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) hold(numbers[i]);
}

// Registers of operands are as they should be from here on: comes between their last change and a product.
DEVICE void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

// The products that were asked for since the last one are a group.
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most PENDING groups are not done. Before that their sums are undefined, and nobody may change their operands.
template <int PENDING>
DEVICE void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

#define SUMS_8(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define SUMS_32(c, d) SUMS_8(c, d, 0), SUMS_8(c, d, 8), SUMS_8(c, d, 16), SUMS_8(c, d, 24)
#define NAMES_32                                                                                                                       \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"

// d = a b, on top of what d is where `add`, for int8 in int32: a [64, 32] by rows in registers, b [32, 64] in shared memory. Lane l of warp w has of a and
// of d what mma_s8's has, of rows 16 w to + 15; of d those of the eight columns from 8 j on in d[4 j] to d[4 j + 3].
DEVICE void warpgroup_multiply(int (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
#define SUM(x) "+r"(x)
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " NAMES_32
               ", {%32,%33,%34,%35}, %36, p;\n}\n"
               : SUMS_32(SUM, d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
#undef SUM
}

// The same for bf16 in f32: a [64, 16], as mma_bf16's, and b [16, 64].
DEVICE void warpgroup_multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
#define SUM(x) "+f"(x)
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " NAMES_32
               ", {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}\n"
               : SUMS_32(SUM, d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
#undef SUM
}
#endif
#else
#include "host/warpgroup.hpp"
#endif

// Where 32 bytes of each of 64 rows lie that are b's columns: rows of 128 bytes, eight of them 1024 bytes, of which 16-byte chunk c of row r is in
// place c ^ (r % 8); `first` is a multiple of 32 in the first row, and the rows begin at a multiple of 1024 (PTX ISA, matrix descriptor).
HOST_DEVICE uint64_t rows_of_128(uint32_t first) { return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 | (first & 0x3ffff) >> 4; }
