// Products of weights of few bits and int8 inputs on int8 tensor cores, exact within each group of columns.
//
//   output[m, n] = input_scale[m] * step * sum over groups g of weight_scale[n, g] * (sum of code[n, k] * input[m, k] over g) + bias[n]
//
// M tokens, N outputs, K columns, a multiple of 32. Integer sums of a group are exact. A split of K is one chain of fused multiply-adds over
// its groups, ascending, and splits are added ascending: the order that the plain loops of host/check.cpp have.
//
// Weights are the rows of the tensor cores' left operand (16 of them), tokens the columns of the right one (8), so that a single token
// wastes little. A block has 64 rows of the weight, 16 a warp, and TOKENS tokens; four groups of 32 columns are a stage of the pipeline.
// Nothing is repacked: within a group each lane takes the eight columns that lie side by side in the checkpoint, of weights and tokens alike,
// and the order of columns does not matter to an exact sum.
#pragma once

#include "common.cuh"

namespace gemm {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 16 * WARPS;   // of the weight, a block
constexpr int GROUP = 32;          // columns of one product of tensor cores
constexpr int GROUPS = 4;          // of a stage
constexpr int COLUMNS = GROUP * GROUPS;
constexpr int STAGES = 4;

// Plain data, the same on every side of a launch.
struct Arguments {
  const uint8_t* weight;      // [N, K] codes, two a byte, low bits first, where they have four
  const void* weight_scale;   // [N, K / group]
  const int8_t* input;        // [M, K]
  const float* input_scale;   // [M]
  const void* bias;           // [N] of output_type, or null
  void* output;               // [M, N]
  float* partial;             // [splits, M, N] where splits > 1
  int m, n, k;
  int group;                  // columns of a scale of the weight: a multiple of 32 that divides k, below 131072 so that sums fit
  int splits;                 // parts of K, each a multiple of group
  int scale_type;             // of weight_scale, where it is a float
  int output_type;
};

// What a launch over the experts of a layer has beside that; group_rows.cu makes the first three. Weights, scales and biases of the experts
// lie one behind the other; m is the number of rows, a row being a token at one of its experts; splits is 1.
struct Experts {
  const int* tiles;    // [tiles, 2]: expert and first row of each tile; the expert is -1 behind the last
  const int* offsets;  // [experts + 1]: where the rows of each expert begin
  const int* rows;     // [M]: the row of `input` that each row takes, or null where it is its own
  int swiglu;          // 1: even outputs are gates, odd ones go up, and output is [M, N / 2]
  float alpha, limit;  // of SwiGLU
};

// Where 16-byte chunk `chunk` of row `row` lies in a tile whose rows are 64 bytes: no two of eight rows share a bank.
HOST_DEVICE int chunk_of_64(int row, int chunk) { return row * 4 + (chunk ^ ((row >> 1) & 3)); }

// The same for rows of 128 bytes, of which four are read at once, eight bytes a lane.
HOST_DEVICE int chunk_of_128(int row, int chunk) { return row * 8 + (chunk ^ ((row & 3) << 1)); }

// Columns that a split has, the last one the rest.
HOST_DEVICE int split_columns(int k, int group, int splits) { return ceil_div(k / group, splits) * group; }

// Floats from a row's scales to the next one's.
HOST_DEVICE int scale_stride(int k, int group, int splits) { return (split_columns(k, group, splits) / group) | 1; }

// Bytes of shared memory that a block needs, dynamic all of them: above 48 KiB a launch has to ask for it
// (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES). The scales of a split are among them, so K in groups of 32 has a limit, which more splits
// raise: 99 KiB, what 8.6, 8.9 and 12.x have, are enough for K = 4096 and every kernel, 163 KiB (8.0) for K = 11520.
template <class Codes, int TOKENS>
HOST_DEVICE int shared_bytes(int k, int group, int splits) {
  return STAGES * (ROWS * Codes::STAGE_BYTES + TOKENS * COLUMNS) + ROWS * scale_stride(k, group, splits) * 4 + TOKENS * 4;
}

// A lane's eight codes of one row as two registers of int8: columns 8 (l % 4) to + 3, then + 4 to + 7.
struct Eight {
  uint32_t low, high;
};

// Eight bytes at a multiple of eight, in one load: of two, nvcc makes one by chance, and PTX has other bytes from time to time.
DEVICE Eight load_eight(const unsigned char* at) {
  uint64_t both = *reinterpret_cast<const uint64_t*>(at);
  return {uint32_t(both), uint32_t(both >> 32)};
}

// E2M1, as gpt-oss is published: twice the values.
struct E2m1 {
  static constexpr int STAGE_BYTES = 64;
  static constexpr float STEP = 0.5f;
  static constexpr bool E8M0 = true;

  // `word`: nibble i is column i. Magnitudes and their negatives are looked up by three bits, the fourth chooses between them.
  DEVICE static Eight decode(uint32_t word) {
    uint32_t index = word & 0x77777777u, choice = ((word >> 1) & 0x44444444u) | 0x32103210u;
    Eight codes;
    codes.low = permute(permute(0x03020100u, 0x0c080604u, index), permute(0xfdfeff00u, 0xf4f8fafcu, index), choice);
    index >>= 16;
    choice >>= 16;
    codes.high = permute(permute(0x03020100u, 0x0c080604u, index), permute(0xfdfeff00u, 0xf4f8fafcu, index), choice);
    return codes;
  }

  DEVICE static Eight load(const unsigned char* tile, int row, int group, int quarter) {
    const unsigned char* chunk = tile + chunk_of_64(row, group) * 16;
    return decode(reinterpret_cast<const uint32_t*>(chunk)[quarter]);
  }
};

// Integers of 4 bits stored with 8 added: sixteen times the values.
struct Int4 {
  static constexpr int STAGE_BYTES = 64;
  static constexpr float STEP = 1.0f / 16;
  static constexpr bool E8M0 = false;

  // Without the 8 a nibble in the upper half of a byte is sixteen times itself, sign and all.
  DEVICE static Eight decode(uint32_t word) {
    uint32_t odd = (word ^ 0x88888888u) & 0xf0f0f0f0u, even = ((word << 4) ^ 0x80808080u) & 0xf0f0f0f0u;
    return {permute(even, odd, 0x5140), permute(even, odd, 0x7362)};
  }

  DEVICE static Eight load(const unsigned char* tile, int row, int group, int quarter) {
    const unsigned char* chunk = tile + chunk_of_64(row, group) * 16;
    return decode(reinterpret_cast<const uint32_t*>(chunk)[quarter]);
  }
};

// Integers of 8 bits with their sign.
struct Int8 {
  static constexpr int STAGE_BYTES = 128;
  static constexpr float STEP = 1;
  static constexpr bool E8M0 = false;

  DEVICE static Eight load(const unsigned char* tile, int row, int group, int quarter) {
    return load_eight(tile + chunk_of_128(row, 2 * group + quarter / 2) * 16 + quarter % 2 * 8);
  }
};

// Asks for the codes and inputs of the stage that begins at `column`; zeros stand for rows, tokens and columns that are not there.
// `sources` has the row of `input` of each token, -1 where there is none.
template <class Codes, int TOKENS>
DEVICE void copy_stage(const Arguments& p, unsigned char* stage, int row, const int* sources, int column, int end) {
  constexpr int CHUNKS = Codes::STAGE_BYTES / 16, A_CHUNK = COLUMNS / CHUNKS;
  int64_t row_bytes = int64_t(p.k) * Codes::STAGE_BYTES / COLUMNS;
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    int r = i / CHUNKS, c = i % CHUNKS, at = column + c * A_CHUNK;
    bool there = row + r < p.n && at < end;
    const uint8_t* from = p.weight + (row + r) * row_bytes + int64_t(at) * Codes::STAGE_BYTES / COLUMNS;
    int place = CHUNKS == 4 ? chunk_of_64(r, c) : chunk_of_128(r, c);
    copy_async(stage + place * 16, there ? from : p.weight, there);
  }
  unsigned char* tokens = stage + ROWS * Codes::STAGE_BYTES;
  for (int i = threadIdx.x; i < TOKENS * 8; i += THREADS) {
    int t = i / 8, c = i % 8, at = column + c * 16;
    bool there = sources[t] >= 0 && at < end;
    const int8_t* from = p.input + int64_t(sources[t]) * p.k + at;
    copy_async(tokens + chunk_of_128(t, c) * 16, there ? from : p.input, there);
  }
  copy_commit();
}

// The block's scales of this split's groups, as floats [ROWS, scale_stride].
template <class Codes>
DEVICE void load_scales(const Arguments& p, float* scales, int row, int first, int groups, int stride) {
  int a_row = p.k / p.group;
  for (int i = threadIdx.x; i < ROWS * groups; i += THREADS) {
    int r = i / groups, g = i % groups;
    float scale = 0;
    if (row + r < p.n) {
      int64_t at = int64_t(row + r) * a_row + first + g;
      scale = Codes::E8M0 ? e8m0_value(static_cast<const uint8_t*>(p.weight_scale)[at])
                          : read_float(p.weight_scale, at, FloatType(p.scale_type));
    }
    scales[r * stride + g] = scale;
  }
}

// The output that a sum is, before it is rounded.
template <class Codes>
DEVICE float output_of(const Arguments& p, int source, int row, float sum) {
  float value = sum * (p.input_scale[source] * Codes::STEP);
  return p.bias ? value + read_float(p.bias, row, FloatType(p.output_type)) : value;
}

// gpt-oss's gated unit: (up + 1) * gate * sigmoid(alpha * gate), gate at most limit, up within it.
DEVICE float swiglu(float gate, float up, float alpha, float limit) {
  // Comparisons, because a minimum would pass over what is no number.
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return (up + 1) * (gate / (1 + expf(-alpha * gate)));
}

// Makes the arguments of all experts those of one.
template <class Codes>
DEVICE void take_expert(Arguments& p, int expert) {
  int64_t first = int64_t(expert) * p.n, row_bytes = int64_t(p.k) * Codes::STAGE_BYTES / COLUMNS, scales = p.k / p.group;
  int scale_bytes = Codes::E8M0 ? 1 : p.scale_type == F32 ? 4 : 2, bias_bytes = p.output_type == F32 ? 4 : 2;
  p.weight += first * row_bytes;
  p.weight_scale = static_cast<const char*>(p.weight_scale) + first * scales * scale_bytes;
  if (p.bias) p.bias = static_cast<const char*>(p.bias) + first * bias_bytes;
}

// grid: (ceil(M / TOKENS), ceil(N / 64), splits), or (tiles, ceil(N / 64), 1) where `experts` is not null.
template <class Codes, int TOKENS>
DEVICE void product(Arguments p, const Experts* experts, unsigned char* shared) {
  constexpr int STAGE = ROWS * Codes::STAGE_BYTES + TOKENS * COLUMNS, TILES = TOKENS / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row_of_lane = lane / 4, quarter = lane % 4;
  const int row = blockIdx.y * ROWS;
  int token = blockIdx.x * TOKENS, last = p.m;
  if (experts) {
    int expert = experts->tiles[2 * blockIdx.x];
    if (expert < 0) return;
    token = experts->tiles[2 * blockIdx.x + 1];
    last = experts->offsets[expert + 1];
    take_expert<Codes>(p, expert);
  }
  const int width = split_columns(p.k, p.group, p.splits), begin = blockIdx.z * width;
  const int end = begin + width < p.k ? begin + width : p.k;
  const int stages = begin < end ? ceil_div(end - begin, COLUMNS) : 0;
  const int stride = scale_stride(p.k, p.group, p.splits);
  float* scales = reinterpret_cast<float*>(shared + STAGES * STAGE);
  int* sources = reinterpret_cast<int*>(scales + ROWS * stride);

  if (threadIdx.x < TOKENS) {
    int at = token + threadIdx.x;
    sources[threadIdx.x] = at >= last ? -1 : experts && experts->rows ? experts->rows[at] : at;
  }
  __syncthreads();

  for (int s = 0; s < STAGES - 1; s++) {
    if (s < stages) {
      copy_stage<Codes, TOKENS>(p, shared + s * STAGE, row, sources, begin + s * COLUMNS, end);
    } else {
      copy_commit();
    }
  }
  if (stages > 0) load_scales<Codes>(p, scales, row, begin / p.group, (end - begin) / p.group, stride);

  int sums[TILES][4] = {};
  float chains[TILES][4] = {};
  for (int s = 0; s < stages; s++) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    // Every warp is done with the stage before, whose place the next one takes.
    if (s + STAGES - 1 < stages) {
      copy_stage<Codes, TOKENS>(p, shared + (s + STAGES - 1) % STAGES * STAGE, row, sources,
                                begin + (s + STAGES - 1) * COLUMNS, end);
    } else {
      copy_commit();
    }
    const unsigned char* codes = shared + s % STAGES * STAGE;
    const unsigned char* tokens = codes + ROWS * Codes::STAGE_BYTES;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      int column = begin + s * COLUMNS + g * GROUP;
      if (column >= end) break;
      Eight upper = Codes::load(codes, warp * 16 + row_of_lane, g, quarter);
      Eight lower = Codes::load(codes, warp * 16 + row_of_lane + 8, g, quarter);
      uint32_t a[4] = {upper.low, lower.low, upper.high, lower.high};
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        Eight x = Int8::load(tokens, t * 8 + row_of_lane, g, quarter);
        uint32_t b[2] = {x.low, x.high};
        mma_s8(sums[t], a, b);
      }
      if ((column + GROUP) % p.group != 0) continue;
      const float* scale = scales + (warp * 16 + row_of_lane) * stride + (column - begin) / p.group;
      float own[2] = {scale[0], scale[8 * stride]};
#pragma unroll
      for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          chains[t][i] = fmaf(float(sums[t][i]), own[i / 2], chains[t][i]);
          sums[t][i] = 0;
        }
      }
    }
  }
  FloatType type = FloatType(p.output_type);
#pragma unroll
  for (int t = 0; t < TILES; t++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int column = t * 8 + 2 * quarter + i % 2, output = row + warp * 16 + row_of_lane + i / 2 * 8, at = token + column;
      bool there = sources[column] >= 0 && output < p.n;
      if (p.splits > 1) {
        if (there) p.partial[(int64_t(blockIdx.z) * p.m + at) * p.n + output] = chains[t][i];
        continue;
      }
      float value = there ? output_of<Codes>(p, sources[column], output, chains[t][i]) : 0;
      if (experts && experts->swiglu) {
        // The other half of the pair is with the lane four on or back.
        float other = exchange(value, 4);
        if (there && output % 2 == 0) {
          float h = swiglu(value, other, experts->alpha, experts->limit);
          write_float(p.output, int64_t(at) * (p.n / 2) + output / 2, type, h);
        }
      } else if (there) {
        write_float(p.output, int64_t(at) * p.n + output, type, value);
      }
    }
  }
}

// The outputs of partial sums; one thread an output.
template <class Codes>
DEVICE void finish(const Arguments& p) {
  int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x, size = int64_t(p.m) * p.n;
  if (at >= size) return;
  float sum = p.partial[at];
  for (int s = 1; s < p.splits; s++) sum += p.partial[s * size + at];
  int token = int(at / p.n), row = int(at % p.n);
  write_float(p.output, at, FloatType(p.output_type), output_of<Codes>(p, token, row, sum));
}

}  // namespace gemm

// The kernels of a kind of codes: for up to 8, 16, 32 and 64 tokens a block, and the sum of splits; the same over experts.
#define INT8_PRODUCT(name, Codes, TOKENS)                                                                                      \
  KERNEL(gemm::THREADS) name##_##TOKENS(gemm::Arguments p) {                                                                   \
    SHARED_MEMORY(s);                                                                                                          \
    gemm::product<gemm::Codes, TOKENS>(p, nullptr, s);                                                                         \
  }                                                                                                                            \
  KERNEL(gemm::THREADS) name##_experts_##TOKENS(gemm::Arguments p, gemm::Experts experts) {                                    \
    SHARED_MEMORY(s);                                                                                                          \
    gemm::product<gemm::Codes, TOKENS>(p, &experts, s);                                                                        \
  }
#define INT8_KERNELS(name, Codes)                                                                                              \
  INT8_PRODUCT(name, Codes, 8)                                                                                                 \
  INT8_PRODUCT(name, Codes, 16)                                                                                                \
  INT8_PRODUCT(name, Codes, 32)                                                                                                \
  INT8_PRODUCT(name, Codes, 64)                                                                                                \
  KERNEL(gemm::THREADS) name##_finish(gemm::Arguments p) { gemm::finish<gemm::Codes>(p); }
