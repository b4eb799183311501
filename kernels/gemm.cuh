// Products of weights of few bits with int8 or bf16 inputs on tensor cores: what all of them share. Those for few tokens are in mma.cuh, those for many
// in wgmma.cuh.
//
//   output[m, n] = input_scale[m] * step * sum over groups g of weight_scale[n, g] * (sum of code[n, k] * input[m, k] over g) + bias[n]
//
// M tokens, N outputs, K columns, a multiple of 32.
//
// The order of the sums is fixed by K and by the group, never by the GPU or the number of tokens. K is cut into parts (`Parts`):
//
// - groups of less than 1024 columns: a part has whole groups, about 512 columns. The sum of a group is exact with int8 inputs. A part is
//   one chain of fused multiply-adds over its groups in f32, ascending, from 0 on; the parts are added in f32, ascending.
// - larger groups: a part lies within one group. With int8 inputs the sum of a group is exact; with bf16 inputs its parts are added in f32,
//   ascending. Then one chain of fused multiply-adds over all groups, ascending.
//
// With bf16 inputs codes are exact in bf16, and the tensor cores add the exact products of a group, or of a part of it, in f32 in an order of
// their own. The plain loops of host/check.cpp follow the same order.
#pragma once

#include "common.cuh"

namespace gemm {

// What is known when a template is compiled.
struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

constexpr int GROUP = 32;       // columns that a warp multiplies in one go
constexpr int GROUPS = 4;       // of a stage
constexpr int COLUMNS = GROUP * GROUPS;
constexpr int MOST_WARPS = 8;   // of a block
constexpr int PART = 512;       // columns of a part, more or less
constexpr int LARGE = 1024;     // columns of a group from which on a part lies within it

// How K is cut.
struct Parts {
  int count;        // of all parts
  int columns;      // of a part; the last one of K, or of a group, may have fewer
  int inside;       // parts of a group, where groups are large; 0 where a part has whole groups
  int warps;        // of a block by mma.sync, where part p belongs to warp p % warps
  int rounds;       // parts that such a warp has at most
  int scales;       // of a row
  int part_scales;  // of a row in a part, 0 where a part lies within a group
  int stride;       // from a row's scales of a part to the next one's in shared memory: rows are four banks apart

  HOST_DEVICE static Parts of(int k, int group) {
    Parts p;
    p.scales = k / group;
    if (group < LARGE) {
      int most = k / PART < 1 ? 1 : k / PART;
      p.part_scales = ceil_div(p.scales, most < p.scales ? most : p.scales);
      p.columns = p.part_scales * group;
      p.count = ceil_div(k, p.columns);
      p.inside = 0;
      p.stride = ceil_div(p.part_scales + 4, 8) * 8 - 4;
    } else {
      p.part_scales = 0;
      p.columns = ceil_div(group / GROUP, group / PART) * GROUP;
      p.inside = ceil_div(group, p.columns);
      p.count = p.scales * p.inside;
      p.stride = 0;
    }
    p.rounds = ceil_div(p.count, MOST_WARPS);
    p.warps = ceil_div(p.count, p.rounds);
    return p;
  }

  // The first column of part `p`, and how many it has.
  HOST_DEVICE int begin(int p, int group) const { return inside ? p / inside * group + p % inside * columns : p * columns; }
  HOST_DEVICE int width(int p, int k, int group) const {
    int left = inside ? group - p % inside * columns : k - p * columns;
    return left < columns ? left : columns;
  }
};

// Plain data, the same on every side of a launch.
struct Arguments {
  const uint8_t* weight;      // [N, K] codes, two a byte, low bits first, where they have four
  const void* weight_scale;   // [N, K / group]
  const void* input;          // [M, K] int8 or bf16
  const float* input_scale;   // [M], for int8
  const void* bias;           // [N] of output_type, or null
  void* output;               // [M, N]
  int m, n, k;
  int group;                  // columns of a scale of the weight: a multiple of 32 that divides k, below 131072 so that sums fit
  int scale_type;             // of weight_scale, where it is a float
  int output_type;
  Parts parts;                // Parts::of(k, group)
};

// What a launch over the experts of a layer has beside that; group_rows.cu makes the first three. Weights, scales and biases of the experts
// lie one behind the other; m is the number of rows, a row being a token at one of its experts.
struct Experts {
  const int* tiles;    // [tiles, 4]: expert, first row and number of rows of each tile
  const int* used;     // [1]: how many tiles there are
  const int* rows;     // [M]: the row of `input` that each row takes, or null where it is its own
  int swiglu;          // 1: even outputs are gates, odd ones go up, and output is [M, N / 2]
  float alpha, limit;  // of SwiGLU
};

HOST_DEVICE int float_bytes(int type) { return type == F32 ? 4 : 2; }

// From a row's scales to the next one's in shared memory as they are stored, in bytes. Rows of whole chunks are moved apart, so that they do
// not begin in the same bank.
template <class Codes>
HOST_DEVICE int stored_stride(const Parts& parts, int scale_type) {
  int bytes = parts.scales * (Codes::E8M0 ? 1 : float_bytes(scale_type));
  return bytes % 16 ? bytes : bytes + 16;
}

// The rows of the weight and the tokens of a block.
struct Tile {
  int expert, row, token, tokens;

  // grid: (ceil(M / most), ceil(N / rows)), or (room for tiles, ceil(N / rows)) where `experts` is not null. False where there is none for this block.
  DEVICE bool take(const Arguments& p, const Experts* experts, int rows, int most) {
    expert = 0, row = int(blockIdx.y) * rows, token = int(blockIdx.x) * most, tokens = p.m - token;
    if (experts) {
      // Who takes which rows was just computed; otherwise the weights can be asked for at once.
      inputs_ready();
      uint32_t words[4];
      load_sixteen(words, experts->tiles + 4 * blockIdx.x);
      if (int(blockIdx.x) >= *experts->used) return false;
      expert = words[0], token = words[1], tokens = words[2];
    }
    if (tokens > most) tokens = most;
    return true;
  }

  // The row of the inputs that token `t` takes; where there is none, that of the first, and what comes of it is left out.
  DEVICE int source(const Experts* experts, int t) const {
    int at = token + (t < tokens ? t : 0);
    return experts && experts->rows ? experts->rows[at] : at;
  }
};

template <class Codes>
DEVICE float read_scale(const Arguments& p, const void* scales, int64_t at) {
  if (Codes::E8M0) return e8m0_value(static_cast<const uint8_t*>(scales)[at]);
  return read_float(scales, at, FloatType(p.scale_type));
}

// Asks for all scales of a block of so many threads as they are stored: they lie side by side.
template <class Codes, int ROWS>
DEVICE void ask_scales(const Arguments& p, const Tile& tile, unsigned char* to, int threads) {
  const int rows = p.n - tile.row < ROWS ? p.n - tile.row : ROWS;
  const int a_row = p.parts.scales * (Codes::E8M0 ? 1 : float_bytes(p.scale_type)), bytes = rows * a_row;
  const unsigned char* from = static_cast<const unsigned char*>(p.weight_scale) + (int64_t(tile.expert) * p.n + tile.row) * a_row;
  const int stride = stored_stride<Codes>(p.parts, p.scale_type);
  if (!is_aligned(from)) {
    for (int i = threadIdx.x; i < bytes; i += threads) to[i / a_row * stride + i % a_row] = from[i];
  } else if (stride == a_row) {
    for (int i = threadIdx.x * 16; i < bytes; i += threads * 16)
      copy_async(shared_address(to + i), from + i, bytes - i < 16 ? bytes - i : 16);
  } else {
    for (int i = threadIdx.x * 16; i < bytes; i += threads * 16) copy_async(shared_address(to + i / a_row * 16 + i), from + i, 16);
  }
}

// The scales of a part as f32, [ROWS, stride], from scale `first` of a row on, by THREADS threads of which this is `thread`: each has a row, or every
// second four scales of one. Behind the last scale lies what is not used.
template <class Codes, int ROWS, int THREADS>
DEVICE void convert_scales(const Arguments& p, float* scales, const unsigned char* stored, int first, int thread) {
  const int row = thread % ROWS;
  const int at = row * (stored_stride<Codes>(p.parts, p.scale_type) / (Codes::E8M0 ? 1 : float_bytes(p.scale_type))) + first;
#pragma unroll 1
  for (int g = thread / ROWS * 4; g < p.parts.part_scales; g += THREADS / ROWS * 4) {
    float four[4];
    if (Codes::E8M0) {
#pragma unroll
      for (int i = 0; i < 4; i++) four[i] = e8m0_value(stored[at + g + i]);
    } else {
      read_four(four, stored, at + g, FloatType(p.scale_type));
    }
    store_four(scales + row * p.parts.stride + g, four);
  }
}

// gpt-oss's gated unit: (up + 1) * gate * sigmoid(alpha * gate), gate at most limit, up within it.
DEVICE float swiglu(float gate, float up, float alpha, float limit) {
  // Comparisons, because a minimum would pass over what is no number.
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return (up + 1) * (gate / (1 + expf(-alpha * gate)));
}

// Writes outputs `row`, which is even, and the next one of a token of the tile.
DEVICE void write_outputs(const Arguments& p, const Experts* experts, int token, int row, const float (&values)[2]) {
  FloatType type = FloatType(p.output_type);
  if (experts && experts->swiglu) {
    float h = swiglu(values[0], values[1], experts->alpha, experts->limit);
    if (row < p.n) write_float(p.output, int64_t(token) * (p.n / 2) + row / 2, type, h);
  } else {
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (row + e < p.n) write_float(p.output, int64_t(token) * p.n + row + e, type, values[e]);
  }
}

}  // namespace gemm
