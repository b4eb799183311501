// 2:4 zeros: of every four numbers of a row that lie side by side the two whose |w| times the norm of their inputs is least become zero (Wanda,
// Sun et al. 2023, arXiv 2306.11695); without norms it goes by |w|. Of equal ones the first is less.
#include "common.cuh"

namespace mask {

constexpr int THREADS = 256;
constexpr int OF = 4;

struct Arguments {
  const void* input;     // [rows, K] of type
  void* output;          // the same with zeros, or null; it may be the input
  uint8_t* zeros;        // [rows, K]: 1 for a zero; or null
  const float* squares;  // [K]: sums of squared inputs, or null
  int rows, k;           // K a multiple of 4
  int type;
};

}  // namespace mask

// grid: (ceil(rows * K / 4 / THREADS)). A thread has four numbers.
KERNEL(mask::THREADS) mask_2_4(mask::Arguments p) {
  inputs_ready();
  int64_t first = (int64_t(blockIdx.x) * mask::THREADS + threadIdx.x) * mask::OF;
  if (first >= int64_t(p.rows) * p.k) return;
  FloatType type = FloatType(p.type);
  float numbers[mask::OF], scores[mask::OF];
#pragma unroll
  for (int i = 0; i < mask::OF; i++) {
    numbers[i] = read_float(p.input, first + i, type);
    float norm = p.squares ? sqrtf(p.squares[(first + i) % p.k]) : 1;
    scores[i] = fabsf(numbers[i]) * norm;
  }
#pragma unroll
  for (int i = 0; i < mask::OF; i++) {
    int less = 0;
#pragma unroll
    for (int j = 0; j < mask::OF; j++) less += scores[j] < scores[i] || (scores[j] == scores[i] && j < i);
    bool zero = less < 2;
    if (p.zeros) p.zeros[first + i] = zero;
    if (p.output) write_float(p.output, first + i, type, zero ? 0 : numbers[i]);
  }
}
