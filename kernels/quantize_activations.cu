// Inputs to int8, one scale a token, as compressed-tensors does it: absmax / 127.5, halves to even, -128 to 127.
#include "common.cuh"

namespace activations {

constexpr int THREADS = 256;

struct Arguments {
  const void* input;  // [M, K] of input_type
  int8_t* codes;      // [M, K]
  float* scales;      // [M]; no number where an input is none
  int m, k;
  int input_type;
};

// The largest of what the threads of a block have, for all of them; `shared` has one float a thread.
DEVICE float block_max(float own, float* shared) {
  shared[threadIdx.x] = own;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared[threadIdx.x] = fmaxf(shared[threadIdx.x], shared[threadIdx.x + half]);
  }
  __syncthreads();
  return shared[0];
}

}  // namespace activations

// grid: (M). The order of a maximum does not show in it.
KERNEL(activations::THREADS) quantize_activations(activations::Arguments p) {
  SHARED_MEMORY(shared);
  FloatType type = FloatType(p.input_type);
  int64_t first = int64_t(blockIdx.x) * p.k;
  float most = 0;
  for (int i = threadIdx.x; i < p.k; i += activations::THREADS) {
    float size = fabsf(read_float(p.input, first + i, type));
    // A maximum would pass over what is no number; infinity goes the same way.
    most = fmaxf(most, size <= 3.402823466e38f ? size : from_bits(0x7f800000u));
  }
  most = activations::block_max(most, reinterpret_cast<float*>(shared));
  float scale = most / 127.5f;
  if (scale == 0) scale = from_bits(0x34000000u);  // 2^-23
  for (int i = threadIdx.x; i < p.k; i += activations::THREADS) {
    float quotient = read_float(p.input, first + i, type) / scale;
    p.codes[first + i] = int8_t(rintf(fminf(fmaxf(quotient, -128.0f), 127.0f)));
  }
  if (threadIdx.x == 0) p.scales[blockIdx.x] = most > 3.402823466e38f ? from_bits(0x7fc00000u) : scale;
}
