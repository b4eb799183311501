// Inputs to int8 or E4M3, one scale a token, as compressed-tensors does it: absmax / 127.5, halves to even, -128 to 127; or absmax / 448. A norm may go in
// front of it.
#pragma once

#include "small_floats.cuh"

namespace activations {

constexpr int THREADS = 512;
constexpr int EIGHTS = 2;  // eight numbers each, of a token, that a thread keeps in registers; of longer tokens it reads the rest again

struct Arguments {
  const void* input;  // [M, K] of input_type; K a multiple of 8
  uint8_t* codes;     // [M, K]: int8, or the bits of E4M3
  float* scales;      // [M]; no number where an input is none
  int m, k;
  int input_type;
  int fp8;            // 1 for E4M3
};

// What a norm in front of it has besides.
struct Norm {
  const void* weight;  // [K] of weight_type
  void* output;        // [M, K] of input_type: the normal numbers, which are what is rounded
  int weight_type;
  float epsilon;
};

// One number from each thread of a block: `combine` of all, in an order that the number of threads alone decides; `shared` has one float a warp.
template <class F>
DEVICE float over_block(float own, float* shared, F combine) {
  for (int mask = 16; mask > 0; mask /= 2) own = combine(own, exchange(own, mask));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  float all = shared[0];
  for (int i = 1; i < THREADS / 32; i++) all = combine(all, shared[i]);
  return all;
}

// A block's token. With a norm numbers are first x / sqrt(mean of squares + epsilon), times the weight, rounded to the input's type (RMSNorm as gpt-oss has
// it). The sum of squares: each thread adds those of columns 8 t + j, 8 (t + THREADS) + j and so on, ascending, by fused multiply-add; then lanes with
// their neighbours at a distance of 16, 8, 4, 2 and 1, then warps in order.
template <bool NORM>
DEVICE void round_token(const Arguments& p, const Norm& norm, float* shared) {
  const FloatType type = FloatType(p.input_type);
  const int64_t first = int64_t(blockIdx.x) * p.k;
  const int begin = int(threadIdx.x) * 8, next = THREADS * 8;
  float kept[EIGHTS][8], others[8];
#pragma unroll
  for (int i = 0; i < EIGHTS; i++)
    if (begin + i * next < p.k) read_eight(kept[i], p.input, first + begin + i * next, type);
  // Calls f with each eight numbers and their column; the kept ones first.
  auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < EIGHTS; i++)
      if (begin + i * next < p.k) f(kept[i], begin + i * next, true);
    for (int column = begin + EIGHTS * next; column < p.k; column += next) {
      read_eight(others, p.input, first + column, type);
      f(others, column, false);
    }
  };
  float inverse = 0;
  if (NORM) {
    float squares = 0;
    each([&](float(&numbers)[8], int, bool) {
#pragma unroll
      for (int j = 0; j < 8; j++) squares = fmaf(numbers[j], numbers[j], squares);
    });
    squares = over_block(squares, shared, [](float a, float b) { return a + b; });
    inverse = 1.0f / sqrtf(squares / float(p.k) + norm.epsilon);
    __syncthreads();  // what others still read of `shared`
  }
  auto normal = [&](float(&numbers)[8], int column) {
    if (!NORM) return;
    float weights[8];
    read_eight(weights, norm.weight, column, FloatType(norm.weight_type));
#pragma unroll
    for (int j = 0; j < 8; j++) numbers[j] = rounded(weights[j] * (numbers[j] * inverse), type);
  };
  float most = 0;
  each([&](float(&numbers)[8], int column, bool) {
    normal(numbers, column);
    if (NORM) write_eight(norm.output, first + column, numbers, type);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float size = fabsf(numbers[j]);
      // A maximum would pass over what is no number; infinity goes the same way.
      most = fmaxf(most, size <= 3.402823466e38f ? size : from_bits(0x7f800000u));
    }
  });
  most = over_block(most, shared, [](float a, float b) { return fmaxf(a, b); });
  float scale = most / (p.fp8 ? small::E4M3_MOST : 127.5f);
  if (scale == 0) scale = from_bits(0x34000000u);  // 2^-23
  each([&](float(&numbers)[8], int column, bool is_kept) {
    if (!is_kept) normal(numbers, column);
    uint64_t codes = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float quotient = numbers[j] / scale;
      int code = p.fp8 ? small::e4m3().code(small::e4m3().round(quotient), 8) : int(rintf(fminf(fmaxf(quotient, -128.0f), 127.0f)));
      codes |= uint64_t(uint8_t(code)) << (8 * j);
    }
    *reinterpret_cast<uint64_t*>(p.codes + first + column) = codes;
  });
  if (threadIdx.x == 0) p.scales[blockIdx.x] = most > 3.402823466e38f ? from_bits(0x7fc00000u) : scale;
}

}  // namespace activations
