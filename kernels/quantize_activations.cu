// Inputs to int8 or E4M3, one scale a token, as compressed-tensors does it: absmax / 127.5, halves to even, -128 to 127; or absmax / 448.
#include "small_floats.cuh"

namespace activations {

constexpr int THREADS = 256;

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
KERNEL(activations::THREADS) quantize_activations(activations::Arguments p) {
  SHARED_MEMORY(shared);
  inputs_ready();
  start_dependents();
  FloatType type = FloatType(p.input_type);
  int64_t first = int64_t(blockIdx.x) * p.k;
  float most = 0, numbers[8];
  for (int i = threadIdx.x * 8; i < p.k; i += activations::THREADS * 8) {
    read_eight(numbers, p.input, first + i, type);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float size = fabsf(numbers[j]);
      // A maximum would pass over what is no number; infinity goes the same way.
      most = fmaxf(most, size <= 3.402823466e38f ? size : from_bits(0x7f800000u));
    }
  }
  most = activations::block_max(most, reinterpret_cast<float*>(shared));
  float scale = most / (p.fp8 ? small::E4M3_MOST : 127.5f);
  if (scale == 0) scale = from_bits(0x34000000u);  // 2^-23
  for (int i = threadIdx.x * 8; i < p.k; i += activations::THREADS * 8) {
    read_eight(numbers, p.input, first + i, type);
    uint64_t codes = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float quotient = numbers[j] / scale;
      int code = p.fp8 ? small::e4m3().code(small::e4m3().round(quotient), 8) : int(rintf(fminf(fmaxf(quotient, -128.0f), 127.0f)));
      codes |= uint64_t(uint8_t(code)) << (8 * j);
    }
    *reinterpret_cast<uint64_t*>(p.codes + first + i) = codes;
  }
  if (threadIdx.x == 0) p.scales[blockIdx.x] = most > 3.402823466e38f ? from_bits(0x7fc00000u) : scale;
}
