// MXFP4 as gpt-oss is published to BF16, F16 or F32: row by row, or as transformers has fused experts, inputs before outputs.
#include "common.cuh"

namespace mxfp4 {

constexpr int THREADS = 256;
constexpr int GROUP = 32;
constexpr int TILE = 64;  // rows of a tile that is turned

struct Arguments {
  const uint8_t* codes;   // [N, K / 2], low bits first
  const uint8_t* scales;  // [N, K / 32]
  void* output;           // [N, K], or [K, N]
  int n, k;
  int output_type;
};

// The number at `column` of `row`: exact in F32 and BF16.
DEVICE float value(const Arguments& p, int row, int column) {
  uint8_t byte = p.codes[int64_t(row) * (p.k / 2) + column / 2];
  float scale = e8m0_value(p.scales[int64_t(row) * (p.k / GROUP) + column / GROUP]);
  int code = column % 2 ? byte >> 4 : byte & 15;
  // -0 keeps its sign.
  float size = float(e2m1_doubled(code & 7)) * 0.5f;
  return (code & 8 ? -size : size) * scale;
}

}  // namespace mxfp4

// grid: (ceil(N K / 8 / THREADS)). A thread has four bytes.
KERNEL(mxfp4::THREADS) dequantize_mxfp4(mxfp4::Arguments p) {
  inputs_ready();
  int64_t at = (int64_t(blockIdx.x) * mxfp4::THREADS + threadIdx.x) * 8;
  if (at >= int64_t(p.n) * p.k) return;
  int row = int(at / p.k), column = int(at % p.k);
  for (int i = 0; i < 8; i++) write_float(p.output, at + i, FloatType(p.output_type), mxfp4::value(p, row, column + i));
}

// grid: (ceil(N / 64), K / 32). A tile of 64 rows and one group of columns is read along its rows and written along its columns.
KERNEL(mxfp4::THREADS) dequantize_mxfp4_turned(mxfp4::Arguments p) {
  inputs_ready();
  SHARED_MEMORY(shared);
  constexpr int TILE = mxfp4::TILE, GROUP = mxfp4::GROUP;
  float* tile = reinterpret_cast<float*>(shared);  // [GROUP][TILE + 1]: a column's numbers in different banks
  int first = blockIdx.x * TILE, column = blockIdx.y * GROUP;
  for (int i = threadIdx.x; i < TILE * GROUP; i += mxfp4::THREADS) {
    int r = i / GROUP, c = i % GROUP;
    if (first + r < p.n) tile[c * (TILE + 1) + r] = mxfp4::value(p, first + r, column + c);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TILE * GROUP; i += mxfp4::THREADS) {
    int r = i % TILE, c = i / TILE;
    if (first + r < p.n) {
      write_float(p.output, int64_t(column + c) * p.n + first + r, FloatType(p.output_type), tile[c * (TILE + 1) + r]);
    }
  }
}
