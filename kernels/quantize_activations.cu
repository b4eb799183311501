// Inputs to int8 or E4M3, one scale a token, as compressed-tensors does it: absmax / 127.5, halves to even, -128 to 127; or absmax / 448.
#include "small_floats.cuh"

namespace activations {

constexpr int THREADS = 512;
constexpr int EIGHTS = 2;  // eight numbers each, of a token, that a thread keeps in registers; of longer tokens it reads the rest twice

struct Arguments {
  const void* input;  // [M, K] of input_type; K a multiple of 8
  uint8_t* codes;     // [M, K]: int8, or the bits of E4M3
  float* scales;      // [M]; no number where an input is none
  int m, k;
  int input_type;
  int fp8;            // 1 for E4M3
};

// The largest of what the threads of a block have, for all of them; `shared` has one float a warp.
DEVICE float block_max(float own, float* shared) {
  for (int mask = 16; mask > 0; mask /= 2) own = fmaxf(own, exchange(own, mask));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  float most = shared[0];
  for (int i = 1; i < THREADS / 32; i++) most = fmaxf(most, shared[i]);
  return most;
}

}  // namespace activations

// grid: (M). The order of a maximum does not show in it.
KERNEL_OF(activations::THREADS, 2) quantize_activations(activations::Arguments p) {
  using activations::EIGHTS, activations::THREADS;
  SHARED_MEMORY(shared);
  start_dependents();
  inputs_ready();
  const FloatType type = FloatType(p.input_type);
  const int64_t first = int64_t(blockIdx.x) * p.k;
  float most = 0, kept[EIGHTS][8], others[8];
  auto see = [&](const float (&numbers)[8]) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float size = fabsf(numbers[j]);
      // A maximum would pass over what is no number; infinity goes the same way.
      most = fmaxf(most, size <= 3.402823466e38f ? size : from_bits(0x7f800000u));
    }
  };
#pragma unroll
  for (int i = 0; i < EIGHTS; i++) {
    int column = (i * THREADS + threadIdx.x) * 8;
    if (column < p.k) read_eight(kept[i], p.input, first + column, type);
  }
#pragma unroll
  for (int i = 0; i < EIGHTS; i++)
    if ((i * THREADS + int(threadIdx.x)) * 8 < p.k) see(kept[i]);
  for (int column = (EIGHTS * THREADS + threadIdx.x) * 8; column < p.k; column += THREADS * 8) {
    read_eight(others, p.input, first + column, type);
    see(others);
  }
  most = activations::block_max(most, reinterpret_cast<float*>(shared));
  float scale = most / (p.fp8 ? small::E4M3_MOST : 127.5f);
  if (scale == 0) scale = from_bits(0x34000000u);  // 2^-23
  auto write = [&](const float (&numbers)[8], int column) {
    uint64_t codes = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float quotient = numbers[j] / scale;
      int code = p.fp8 ? small::e4m3().code(small::e4m3().round(quotient), 8) : int(rintf(fminf(fmaxf(quotient, -128.0f), 127.0f)));
      codes |= uint64_t(uint8_t(code)) << (8 * j);
    }
    *reinterpret_cast<uint64_t*>(p.codes + first + column) = codes;
  };
#pragma unroll
  for (int i = 0; i < EIGHTS; i++) {
    int column = (i * THREADS + threadIdx.x) * 8;
    if (column < p.k) write(kept[i], column);
  }
  for (int column = (EIGHTS * THREADS + threadIdx.x) * 8; column < p.k; column += THREADS * 8) {
    read_eight(others, p.input, first + column, type);
    write(others, column);
  }
  if (threadIdx.x == 0) p.scales[blockIdx.x] = most > 3.402823466e38f ? from_bits(0x7fc00000u) : scale;
}
