// Products of weights of few bits with int8 or bf16 inputs on tensor cores.
//
//   output[m, n] = input_scale[m] * step * sum over groups g of weight_scale[n, g] * (sum of code[n, k] * input[m, k] over g) + bias[n]
//
// M tokens, N outputs, K columns, a multiple of 32. With int8 inputs the sums of a group are exact; with bf16 ones (no input_scale there)
// codes are exact in bf16, and tensor cores add the exact products of a group in f32, in an order of their own. A split of K is one chain of
// fused multiply-adds over its groups, ascending, and splits are added ascending: the order that the plain loops of host/check.cpp have.
//
// Weights are the rows of the tensor cores' left operand (16 of them), tokens the columns of the right one (8), so that a single token
// wastes little. A block has 64 rows of the weight, 16 a warp, and TOKENS tokens; four groups of 32 columns are a stage of the pipeline.
// Nothing is repacked: within a group each lane takes the eight columns that lie side by side in the checkpoint, of weights and tokens alike,
// and which columns meet in which step of a tensor core does not matter to their sum.
#pragma once

#include "common.cuh"

namespace gemm {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 16 * WARPS;   // of the weight, a block
constexpr int GROUP = 32;          // columns that a warp multiplies in one go
constexpr int GROUPS = 4;          // of a stage
constexpr int COLUMNS = GROUP * GROUPS;
constexpr int STAGES = 4;

// Plain data, the same on every side of a launch.
struct Arguments {
  const uint8_t* weight;      // [N, K] codes, two a byte, low bits first, where they have four
  const void* weight_scale;   // [N, K / group]
  const void* input;          // [M, K] int8 or bf16
  const float* input_scale;   // [M], for int8
  const void* bias;           // [N] of output_type, or null
  void* output;               // [M, N]
  float* partial;             // [splits, M, N] where splits > 1
  int* tickets;               // a 0 for each tile of the output, where splits > 1; they are 0 again afterwards
  int m, n, k;
  int group;                  // columns of a scale of the weight: a multiple of 32 that divides k, below 131072 so that sums fit
  int splits;                 // parts of K, each a multiple of group
  int scale_type;             // of weight_scale, where it is a float
  int output_type;
};

// What a launch over the experts of a layer has beside that; group_rows.cu makes the first three. Weights, scales and biases of the experts
// lie one behind the other; m is the number of rows, a row being a token at one of its experts.
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

// And for rows of 256 bytes, of which two are read at once, sixteen bytes a lane.
HOST_DEVICE int chunk_of_256(int row, int chunk) { return row * 16 + (chunk ^ ((row & 1) << 2)); }

// Columns that a split has, the last one the rest.
HOST_DEVICE int split_columns(int k, int group, int splits) { return ceil_div(k / group, splits) * group; }

// From a row's scales to the next one's, in scales.
HOST_DEVICE int scale_stride(int k, int group, int splits) { return (split_columns(k, group, splits) / group) | 1; }

HOST_DEVICE int float_bytes(int type) { return type == F32 ? 4 : 2; }

// Eight codes of a row, as int8 or as bf16, in the order of the columns: a lane's share of a group, columns 8 (l % 4) to + 7.
struct Eight {
  uint32_t low, high;
};
struct Halves {
  uint32_t pairs[4];
};

// Eight bytes at a multiple of eight, in one load: of two, nvcc makes one by chance, and PTX has other bytes from time to time.
DEVICE Eight load_eight(const unsigned char* at) {
  uint64_t both = *reinterpret_cast<const uint64_t*>(at);
  return {uint32_t(both), uint32_t(both >> 32)};
}

// ---- codes ----

// Codes of 4 bits: a word has eight columns, nibble i column i.
struct Nibbles {
  static constexpr int STAGE_BYTES = 64;

  DEVICE static uint32_t word(const unsigned char* tile, int row, int group, int quarter) {
    return reinterpret_cast<const uint32_t*>(tile + chunk_of_64(row, group) * 16)[quarter];
  }

  // Columns in order from pairs that are four apart: (0, 4), (1, 5), (2, 6), (3, 7).
  DEVICE static Halves sorted(const uint32_t (&apart)[4]) {
    return {{permute(apart[0], apart[1], 0x5410), permute(apart[2], apart[3], 0x5410), permute(apart[0], apart[1], 0x7632),
             permute(apart[2], apart[3], 0x7632)}};
  }
};

// E2M1, as gpt-oss is published.
struct E2m1 : Nibbles {
  static constexpr float INT8_STEP = 0.5f;
  static constexpr bool E8M0 = true;

  // Twice the values. Magnitudes and their negatives are looked up by three bits, the fourth chooses between them.
  DEVICE static Eight bytes(uint32_t word) {
    uint32_t index = word & 0x77777777u, choice = ((word >> 1) & 0x44444444u) | 0x32103210u;
    Eight codes;
    codes.low = permute(permute(0x03020100u, 0x0c080604u, index), permute(0xfdfeff00u, 0xf4f8fafcu, index), choice);
    index >>= 16;
    choice >>= 16;
    codes.high = permute(permute(0x03020100u, 0x0c080604u, index), permute(0xfdfeff00u, 0xf4f8fafcu, index), choice);
    return codes;
  }

  // The values. Three bits at the right place of a bf16 are 2^-126 times the magnitude, the one below 1 among the subnormal numbers.
  DEVICE static Halves halves(uint32_t word) {
    uint32_t apart[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t bits = word >> (4 * i);
      apart[i] = fma_bf16x2((bits << 12 & 0x80008000u) | (bits << 6 & 0x01c001c0u), 0x7e807e80u, 0x80008000u);
    }
    return sorted(apart);
  }

  DEVICE static Eight load_bytes(const unsigned char* tile, int row, int group, int quarter) {
    return bytes(word(tile, row, group, quarter));
  }
};

// Integers of 4 bits stored with 8 added.
struct Int4 : Nibbles {
  static constexpr float INT8_STEP = 1.0f / 16;
  static constexpr bool E8M0 = false;

  // Sixteen times the values: without the 8 a nibble in the upper half of a byte is that, sign and all.
  DEVICE static Eight bytes(uint32_t word) {
    uint32_t odd = (word ^ 0x88888888u) & 0xf0f0f0f0u, even = ((word << 4) ^ 0x80808080u) & 0xf0f0f0f0u;
    return {permute(even, odd, 0x5140), permute(even, odd, 0x7362)};
  }

  // The values. A nibble in the last bits of the bf16 128 is added to it; 136 are taken away.
  DEVICE static Halves halves(uint32_t word) {
    uint32_t apart[4];
#pragma unroll
    for (int i = 0; i < 4; i++) apart[i] = fma_bf16x2((word >> (4 * i) & 0x000f000fu) | 0x43004300u, 0x3f803f80u, 0xc308c308u);
    return sorted(apart);
  }

  DEVICE static Eight load_bytes(const unsigned char* tile, int row, int group, int quarter) {
    return bytes(word(tile, row, group, quarter));
  }
};

// Integers of 8 bits with their sign.
struct Int8 {
  static constexpr int STAGE_BYTES = 128;
  static constexpr float INT8_STEP = 1;
  static constexpr bool E8M0 = false;

  DEVICE static Eight load_bytes(const unsigned char* tile, int row, int group, int quarter) {
    return load_eight(tile + chunk_of_128(row, 2 * group + quarter / 2) * 16 + quarter % 2 * 8);
  }
};

// ---- inputs ----

struct Int8Inputs {
  using Sum = int;
  static constexpr int BYTES = 1;
  static constexpr bool SCALED = true;

  template <class Codes>
  HOST_DEVICE static constexpr float step() {
    return Codes::INT8_STEP;
  }

  HOST_DEVICE static int place(int token, int chunk) { return chunk_of_128(token, chunk); }

  // sums += codes of 16 rows from `row` on by all tokens, over one group.
  template <class Codes, int TILES>
  DEVICE static void multiply(const unsigned char* codes, const unsigned char* tokens, int row, int group, int (&sums)[TILES][4]) {
    const int own = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
    Eight upper = Codes::load_bytes(codes, row + own, group, quarter), lower = Codes::load_bytes(codes, row + own + 8, group, quarter);
    uint32_t a[4] = {upper.low, lower.low, upper.high, lower.high};
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      Eight x = Int8::load_bytes(tokens, t * 8 + own, group, quarter);
      uint32_t b[2] = {x.low, x.high};
      mma_s8(sums[t], a, b);
    }
  }

  // Where the sum of a group begins, and what it comes to. On top of the bits of 1.5 * 2^23 an integer of up to 2^22 is a float that is as
  // much larger, which costs an addition in place of a conversion, four times as dear; 256 products of int8 are no more.
  DEVICE static int zero(int group) { return group <= 256 ? 0x4b400000 : 0; }
  DEVICE static float value(int sum, int group) { return group <= 256 ? from_bits(uint32_t(sum)) - 12582912.0f : float(sum); }
};

struct Bf16Inputs {
  using Sum = float;
  static constexpr int BYTES = 2;
  static constexpr bool SCALED = false;

  template <class Codes>
  HOST_DEVICE static constexpr float step() {
    return 1;
  }

  HOST_DEVICE static int place(int token, int chunk) { return chunk_of_256(token, chunk); }

  template <class Codes, int TILES>
  DEVICE static void multiply(const unsigned char* codes, const unsigned char* tokens, int row, int group, float (&sums)[TILES][4]) {
    const int own = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
    Halves upper = Codes::halves(Codes::word(codes, row + own, group, quarter));
    Halves lower = Codes::halves(Codes::word(codes, row + own + 8, group, quarter));
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      uint32_t x[4];
      load_sixteen(x, tokens + chunk_of_256(t * 8 + own, 4 * group + quarter) * 16);
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        uint32_t a[4] = {upper.pairs[half], lower.pairs[half], upper.pairs[half + 1], lower.pairs[half + 1]};
        uint32_t b[2] = {x[half], x[half + 1]};
        mma_bf16(sums[t], a, b);
      }
    }
  }

  DEVICE static float zero(int) { return 0; }
  DEVICE static float value(float sum, int) { return sum; }
};

// ---- a block ----

// Bytes of a block's scales, a multiple of 16. They stay as they are stored.
template <class Codes>
HOST_DEVICE int scale_bytes(int k, int group, int splits, int type) {
  return ceil_div(ROWS * scale_stride(k, group, splits) * (Codes::E8M0 ? 1 : float_bytes(type)), 16) * 16;
}

// Bytes of a stage of the pipeline.
template <class Codes, class Inputs, int TOKENS>
HOST_DEVICE constexpr int stage_bytes() {
  return ROWS * Codes::STAGE_BYTES + TOKENS * COLUMNS * Inputs::BYTES;
}

// Bytes of shared memory that a block needs, dynamic all of them: above 48 KiB a launch has to ask for it
// (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES). The scales of a split are among them, so K has a limit, which more splits raise.
template <class Codes, class Inputs, int TOKENS>
HOST_DEVICE int shared_bytes(int k, int group, int splits, int scale_type) {
  return STAGES * stage_bytes<Codes, Inputs, TOKENS>() + scale_bytes<Codes>(k, group, splits, scale_type) + (TOKENS + 4) * 4;
}

// Asks for the codes of the stage that begins at `column`; zeros stand for rows and columns that are not there.
template <class Codes>
DEVICE void copy_codes(const Arguments& p, unsigned char* stage, int row, int column, int end) {
  constexpr int CHUNKS = Codes::STAGE_BYTES / 16, A_CHUNK = COLUMNS / CHUNKS;
  int64_t row_bytes = int64_t(p.k) * Codes::STAGE_BYTES / COLUMNS;
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    int r = i / CHUNKS, c = i % CHUNKS, at = column + c * A_CHUNK;
    bool there = row + r < p.n && at < end;
    const uint8_t* from = p.weight + (row + r) * row_bytes + int64_t(at) * Codes::STAGE_BYTES / COLUMNS;
    int place = CHUNKS == 4 ? chunk_of_64(r, c) : chunk_of_128(r, c);
    copy_async(stage + place * 16, there ? from : p.weight, there);
  }
}

// The same for its inputs. `sources` has the row of `input` of each token, -1 where there is none.
template <class Codes, class Inputs, int TOKENS>
DEVICE void copy_inputs(const Arguments& p, unsigned char* stage, const int* sources, int column, int end) {
  constexpr int CHUNKS = COLUMNS * Inputs::BYTES / 16, A_CHUNK = 16 / Inputs::BYTES;
  unsigned char* tokens = stage + ROWS * Codes::STAGE_BYTES;
  const unsigned char* input = static_cast<const unsigned char*>(p.input);
  for (int i = threadIdx.x; i < TOKENS * CHUNKS; i += THREADS) {
    int t = i / CHUNKS, c = i % CHUNKS, at = column + c * A_CHUNK;
    bool there = sources[t] >= 0 && at < end;
    const unsigned char* from = input + (int64_t(sources[t]) * p.k + at) * Inputs::BYTES;
    copy_async(tokens + Inputs::place(t, c) * 16, there ? from : input, there);
  }
}

// The block's scales of this split's groups, [ROWS, scale_stride], as they are stored.
template <class Codes>
DEVICE void load_scales(const Arguments& p, unsigned char* scales, int row, int first, int groups, int stride) {
  int a_row = p.k / p.group;
  for (int i = threadIdx.x; i < ROWS * groups; i += THREADS) {
    int r = i / groups, g = i % groups, to = r * stride + g;
    if (row + r >= p.n) continue;
    int64_t from = int64_t(row + r) * a_row + first + g;
    if (Codes::E8M0) {
      scales[to] = static_cast<const uint8_t*>(p.weight_scale)[from];
    } else if (p.scale_type == F32) {
      reinterpret_cast<float*>(scales)[to] = static_cast<const float*>(p.weight_scale)[from];
    } else {
      reinterpret_cast<uint16_t*>(scales)[to] = static_cast<const uint16_t*>(p.weight_scale)[from];
    }
  }
}

template <class Codes>
DEVICE float scale_at(const Arguments& p, const unsigned char* scales, int at) {
  return Codes::E8M0 ? e8m0_value(scales[at]) : read_float(scales, at, FloatType(p.scale_type));
}

// The output that a sum is, before it is rounded.
template <class Codes, class Inputs>
DEVICE float output_of(const Arguments& p, int source, int row, float sum) {
  float value = Inputs::SCALED ? sum * (p.input_scale[source] * Inputs::template step<Codes>()) : sum;
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
  p.weight += first * row_bytes;
  p.weight_scale = static_cast<const char*>(p.weight_scale) + first * scales * (Codes::E8M0 ? 1 : float_bytes(p.scale_type));
  if (p.bias) p.bias = static_cast<const char*>(p.bias) + first * float_bytes(p.output_type);
}

// Whether this block is the last of its tile's splits: it sees what the others wrote. Every thread gets the answer through `shared`.
DEVICE bool last_of_splits(const Arguments& p, int* shared) {
  publish();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* ticket = p.tickets + blockIdx.y * gridDim.x + blockIdx.x;
    int before = atomic_add(ticket, 1);
    if (before == p.splits - 1) *ticket = 0;
    *shared = before;
  }
  __syncthreads();
  publish();
  return *shared == p.splits - 1;
}

// grid: (ceil(M / TOKENS), ceil(N / 64), splits), or (tiles, ceil(N / 64), splits) where `experts` is not null.
template <class Codes, class Inputs, int TOKENS>
DEVICE void product(Arguments p, const Experts* experts, unsigned char* shared) {
  constexpr int STAGE = stage_bytes<Codes, Inputs, TOKENS>(), TILES = TOKENS / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row_of_lane = lane / 4, quarter = lane % 4;
  const int row = blockIdx.y * ROWS;
  int token = blockIdx.x * TOKENS, last = p.m;
  if (experts) {
    // Who takes which rows was just computed; otherwise the weights can be asked for at once.
    inputs_ready();
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
  unsigned char* scales = shared + STAGES * STAGE;
  int* sources = reinterpret_cast<int*>(scales + scale_bytes<Codes>(p.k, p.group, p.splits, p.scale_type));

  if (threadIdx.x < TOKENS) {
    int at = token + threadIdx.x;
    sources[threadIdx.x] = at >= last ? -1 : experts && experts->rows ? experts->rows[at] : at;
  }
  for (int s = 0; s < STAGES - 1 && s < stages; s++) copy_codes<Codes>(p, shared + s * STAGE, row, begin + s * COLUMNS, end);
  if (stages > 0) load_scales<Codes>(p, scales, row, begin / p.group, (end - begin) / p.group, stride);
  if (!experts) inputs_ready();
  __syncthreads();
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < stages) copy_inputs<Codes, Inputs, TOKENS>(p, shared + s * STAGE, sources, begin + s * COLUMNS, end);
    copy_commit();
  }

  typename Inputs::Sum sums[TILES][4];
  float chains[TILES][4] = {};
  const typename Inputs::Sum zero = Inputs::zero(p.group);
#pragma unroll
  for (int t = 0; t < TILES; t++) {
#pragma unroll
    for (int i = 0; i < 4; i++) sums[t][i] = zero;
  }
  for (int s = 0; s < stages; s++) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    // Every warp is done with the stage before, whose place the next one takes.
    int next = s + STAGES - 1;
    if (next < stages) {
      copy_codes<Codes>(p, shared + next % STAGES * STAGE, row, begin + next * COLUMNS, end);
      copy_inputs<Codes, Inputs, TOKENS>(p, shared + next % STAGES * STAGE, sources, begin + next * COLUMNS, end);
    }
    copy_commit();
    const unsigned char* codes = shared + s % STAGES * STAGE;
    const unsigned char* tokens = codes + ROWS * Codes::STAGE_BYTES;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      int column = begin + s * COLUMNS + g * GROUP;
      if (column >= end) break;
      Inputs::template multiply<Codes>(codes, tokens, warp * 16, g, sums);
      if ((column + GROUP) % p.group != 0) continue;
      int at = (warp * 16 + row_of_lane) * stride + (column - begin) / p.group;
      float own[2] = {scale_at<Codes>(p, scales, at), scale_at<Codes>(p, scales, at + 8 * stride)};
#pragma unroll
      for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          chains[t][i] = fmaf(Inputs::value(sums[t][i], p.group), own[i / 2], chains[t][i]);
          sums[t][i] = zero;
        }
      }
    }
  }
  start_dependents();
  // Where lane's chain i of tile t belongs.
  auto token_of = [&](int t, int i) { return t * 8 + 2 * quarter + i % 2; };
  auto output_row = [&](int i) { return row + warp * 16 + row_of_lane + i / 2 * 8; };
  if (p.splits > 1) {
    int64_t size = int64_t(p.m) * p.n;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int64_t at = int64_t(token + token_of(t, i)) * p.n + output_row(i);
        if (sources[token_of(t, i)] >= 0 && output_row(i) < p.n) p.partial[blockIdx.z * size + at] = chains[t][i];
      }
    }
    if (!last_of_splits(p, sources + TOKENS)) return;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int64_t at = int64_t(token + token_of(t, i)) * p.n + output_row(i);
        if (sources[token_of(t, i)] < 0 || output_row(i) >= p.n) continue;
        float sum = load_published(p.partial + at);
        for (int split = 1; split < p.splits; split++) sum += load_published(p.partial + split * size + at);
        chains[t][i] = sum;
      }
    }
  }
  FloatType type = FloatType(p.output_type);
#pragma unroll
  for (int t = 0; t < TILES; t++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int source = sources[token_of(t, i)], output = output_row(i), at = token + token_of(t, i);
      bool there = source >= 0 && output < p.n;
      float value = there ? output_of<Codes, Inputs>(p, source, output, chains[t][i]) : 0;
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

}  // namespace gemm

// The kernels of a kind of codes and inputs: for up to 8, 16, 32 and 64 tokens a block; the same over experts.
#define PRODUCT(name, Codes, Inputs, TOKENS)                                                                                   \
  KERNEL(gemm::THREADS) name##_##TOKENS(gemm::Arguments p) {                                                                   \
    SHARED_MEMORY(s);                                                                                                          \
    gemm::product<gemm::Codes, gemm::Inputs, TOKENS>(p, nullptr, s);                                                           \
  }                                                                                                                            \
  KERNEL(gemm::THREADS) name##_experts_##TOKENS(gemm::Arguments p, gemm::Experts experts) {                                    \
    SHARED_MEMORY(s);                                                                                                          \
    gemm::product<gemm::Codes, gemm::Inputs, TOKENS>(p, &experts, s);                                                          \
  }
#define PRODUCTS(name, Codes, Inputs)                                                                                          \
  PRODUCT(name, Codes, Inputs, 8)                                                                                              \
  PRODUCT(name, Codes, Inputs, 16)                                                                                             \
  PRODUCT(name, Codes, Inputs, 32)                                                                                             \
  PRODUCT(name, Codes, Inputs, 64)
