// What the experts of each token give, weighted and added, experts ascending.
#include "common.cuh"

namespace combine {

constexpr int THREADS = 256;

struct Arguments {
  const void* input;     // [rows, K] of type
  const int* places;     // [tokens, top_k]: rows of input
  const float* weights;  // [tokens, top_k]
  void* output;          // [tokens, K] of type
  int k, top_k;
  int type;
};

}  // namespace combine

// grid: (tokens, ceil(K / THREADS)).
KERNEL(combine::THREADS) combine_experts(combine::Arguments p) {
  inputs_ready();
  int column = blockIdx.y * combine::THREADS + threadIdx.x, token = blockIdx.x;
  if (column >= p.k) return;
  float sum = 0;
  for (int i = 0; i < p.top_k; i++) {
    int at = token * p.top_k + i;
    sum = fmaf(p.weights[at], read_float(p.input, int64_t(p.places[at]) * p.k + column, FloatType(p.type)), sum);
  }
  write_float(p.output, int64_t(token) * p.k + column, FloatType(p.type), sum);
}
