// Products of weights of few bits with int8 or bf16 inputs on tensor cores, for few tokens.
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
//
// Weights are the rows of the tensor cores' left operand (16 of them), tokens the columns of the right one (8), so that a single token
// wastes little. A block has 16 or 32 rows of the weight and TOKENS tokens; each of its warps has its own parts of K and streams their codes
// through shared memory of its own, so that warps wait for each other only to add the parts. Tokens are read from the caches as they are
// needed. Nothing is repacked: within a group each lane takes the eight columns that lie side by side in the checkpoint, of weights and
// tokens alike, and which columns meet in which step of a tensor core does not matter to their sum.
#pragma once

#include "common.cuh"

namespace gemm {

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
  int warps;        // of a block; part p belongs to warp p % warps
  int rounds;       // parts that a warp has at most
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

// Where 16-byte chunk `chunk` of row `row` lies in a tile whose rows are 64 bytes: no two of eight rows share a bank.
HOST_DEVICE int chunk_of_64(int row, int chunk) { return row * 4 + (chunk ^ ((row >> 1) & 3)); }

// The same for rows of 128 bytes, of which four are read at once, eight bytes a lane.
HOST_DEVICE int chunk_of_128(int row, int chunk) { return row * 8 + (chunk ^ ((row & 3) << 1)); }


// Eight codes of a row, as int8 or as bf16, in the order of the columns: a lane's share of a group, columns 8 (l % 4) to + 7.
struct Eight {
  uint32_t low, high;
};
struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};
struct Halves {
  uint32_t pairs[4];
};

// ---- codes ----

// Codes of 4 bits: a word has eight columns, nibble i column i.
struct Nibbles {
  static constexpr int STAGE_BYTES = 64;
  static constexpr int WORDS = 1;         // that a lane has of a group
  static constexpr int GROUP_BYTES = 16;  // of a row

  // Where a lane begins to read in a stage. Four matrices of eight rows of 16 bytes, a group each, are read at once: upper rows, lower
  // rows, and the same of the next group. Of group g that place is turned by g * GROUP_BYTES.
  DEVICE static int place(int lane) { return chunk_of_64(lane % 16, lane / 16) * 16; }
};

// E2M1, as gpt-oss is published.
struct E2m1 : Nibbles {
  static constexpr float INT8_STEP = 0.5f;
  static constexpr bool E8M0 = true;

  // Tables of eight bytes each. A permutation whose index has its fourth bit set gives the sign of the byte that the rest names, in all
  // of its bits; so codes look up in the first table, and codes with that bit turned in the second.
  struct Tables {
    uint32_t first[2], second[2];

    DEVICE Tables kept() const { return {{in_register(first[0]), in_register(first[1])}, {in_register(second[0]), in_register(second[1])}}; }
  };

  // Twice the values as the sum of two numbers each: below 0 the first is 0 (it has no negatives) and the second the value; otherwise the
  // second is -1 (but for the value 0, where both are 0), and the first has one more than the value.
  HOST_DEVICE static constexpr Tables summand_tables() { return {{0x04030200u, 0x0d090705u}, {0xfdfeff00u, 0xf4f8fafcu}}; }
  DEVICE static void summands(const Tables& t, uint32_t word, Eight& first, Eight& second) {
    uint32_t turned = word ^ 0x88888888u;
    first = {permute(t.first[0], t.first[1], word), permute(t.first[0], t.first[1], word >> 16)};
    second = {permute(t.second[0], t.second[1], turned), permute(t.second[0], t.second[1], turned >> 16)};
  }

  // The values. Twice a value and 12 is the sum of two numbers of which one is 0; put behind the upper byte of the bf16 128 it is added to
  // that.
  HOST_DEVICE static constexpr Tables half_tables() { return {{0x0f0e0d0cu, 0x18141210u}, {0x090a0b0cu, 0x00040608u}}; }
  DEVICE static Halves halves(const Tables& t, uint32_t word) {
    Eight first, second;
    summands(t, word, first, second);
    uint32_t low = first.low | second.low, high = first.high | second.high;
    Halves values;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t pair = permute(i < 2 ? low : high, 0x43434343u, i % 2 ? 0x4342u : 0x4140u);
      values.pairs[i] = fma_bf16x2(pair, 0x3f003f00u, 0xc28cc28cu);  // half of it less 70
    }
    return values;
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

  struct Tables {
    DEVICE Tables kept() const { return {}; }
  };
  HOST_DEVICE static constexpr Tables half_tables() { return {}; }

  // The values. A nibble in the last bits of the bf16 128 is added to it; 136 are taken away. Pairs are four columns apart at first.
  DEVICE static Halves halves(const Tables&, uint32_t word) {
    uint32_t apart[4];
#pragma unroll
    for (int i = 0; i < 4; i++) apart[i] = fma_bf16x2((word >> (4 * i) & 0x000f000fu) | 0x43004300u, 0x3f803f80u, 0xc308c308u);
    return {{permute(apart[0], apart[1], 0x5410), permute(apart[2], apart[3], 0x5410), permute(apart[0], apart[1], 0x7632),
             permute(apart[2], apart[3], 0x7632)}};
  }
};

// Integers of 8 bits with their sign.
struct Int8 {
  static constexpr int STAGE_BYTES = 128;
  static constexpr int WORDS = 2;
  static constexpr int GROUP_BYTES = 32;

  // The same; a lane reads eight bytes of its row.
  DEVICE static int place(int lane) { return chunk_of_128(lane / 4, lane % 4 / 2) * 16 + lane % 2 * 8; }

  static constexpr float INT8_STEP = 1;
  static constexpr bool E8M0 = false;
};

// A lane's codes of two groups, of a row and of the one eight below: [group][row][word].
template <class Codes>
struct Pair {
  uint32_t words[2][2][Codes::WORDS];
};

// Reads the codes of groups `group`, which is even, and the next of 16 rows whose stage begins at `at`; every lane of the warp takes part.
// `place` is what Codes::place says.
template <class Codes>
DEVICE void read_codes(Pair<Codes>& codes, uint32_t at, int place, int group) {
  if constexpr (Codes::WORDS == 1) {
    uint32_t all[4];
    load_matrices(all, at + (place ^ (group * Codes::GROUP_BYTES)));
#pragma unroll
    for (int i = 0; i < 4; i++) codes.words[i / 2][i % 2][0] = all[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      load_eight(codes.words[i / 2][i % 2], at + (place ^ ((group + i / 2) * Codes::GROUP_BYTES)) + i % 2 * 8 * Codes::STAGE_BYTES);
  }
}

// ---- inputs ----

struct Int8Inputs {
  using Sum = int;
  static constexpr int BYTES = 1;
  static constexpr int WORDS = 2;  // that a lane has of a group
  static constexpr bool SCALED = true;

  template <class Codes>
  HOST_DEVICE static constexpr float step() {
    return Codes::INT8_STEP;
  }

  DEVICE static void read(uint32_t (&x)[WORDS], const unsigned char* at) { load_cached_eight(x, at); }

  // A lane's left operand of a group.
  template <class Codes>
  struct Left {
    // Two products, which cost less than the sums of the summands would.
    static constexpr bool TWICE = Codes::E8M0;
    uint32_t a[4], more[4];

    struct None {};
    DEVICE static auto tables() {
      if constexpr (TWICE) return Codes::summand_tables().kept();
      else return None();
    }

    template <class Tables>
    DEVICE Left(const Tables& tables, const uint32_t (&words)[2][Codes::WORDS]) {
      Eight upper, lower;
      if constexpr (TWICE) {
        Eight others[2];
        Codes::summands(tables, words[0][0], upper, others[0]);
        Codes::summands(tables, words[1][0], lower, others[1]);
        more[0] = others[0].low, more[1] = others[1].low, more[2] = others[0].high, more[3] = others[1].high;
      } else if constexpr (Codes::WORDS == 1) {
        upper = Codes::bytes(words[0][0]), lower = Codes::bytes(words[1][0]);
      } else {
        upper = {words[0][0], words[0][1]}, lower = {words[1][0], words[1][1]};
      }
      a[0] = upper.low, a[1] = lower.low, a[2] = upper.high, a[3] = lower.high;
    }

    // sums = what they are, or `zero` where `first`, + codes by the inputs of eight tokens.
    DEVICE void multiply(int (&sums)[4], const uint32_t (&x)[WORDS], bool first, const int (&zero)[4]) const {
      if (first) mma_s8_on(sums, a, x, zero);
      else mma_s8(sums, a, x);
      if (TWICE) mma_s8(sums, more, x);
    }
  };

  // Where the sum of a group begins, and what it comes to. On top of the bits of 1.5 * 2^23 an integer of up to 2^22 is a float that is as
  // much larger, which costs an addition in place of a conversion, four times as dear; 256 products of int8 are no more.
  static constexpr int FITS = 256;
  DEVICE static int zero(int group) { return group <= FITS ? 0x4b400000 : 0; }
  DEVICE static float value(int sum) { return from_bits(uint32_t(sum)) - 12582912.0f; }
  DEVICE static uint32_t stored(int sum) { return uint32_t(sum); }
  DEVICE static int restored(uint32_t word) { return int(word); }
};

struct Bf16Inputs {
  using Sum = float;
  static constexpr int BYTES = 2;
  static constexpr int WORDS = 4;
  static constexpr bool SCALED = false;

  template <class Codes>
  HOST_DEVICE static constexpr float step() {
    return 1;
  }

  DEVICE static void read(uint32_t (&x)[WORDS], const unsigned char* at) { load_cached_sixteen(x, at); }

  template <class Codes>
  struct Left {
    uint32_t a[2][4];

    DEVICE static auto tables() { return Codes::half_tables().kept(); }

    DEVICE Left(const typename Codes::Tables& tables, const uint32_t (&words)[2][Codes::WORDS]) {
      Halves upper = Codes::halves(tables, words[0][0]), lower = Codes::halves(tables, words[1][0]);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        a[half][0] = upper.pairs[2 * half], a[half][1] = lower.pairs[2 * half];
        a[half][2] = upper.pairs[2 * half + 1], a[half][3] = lower.pairs[2 * half + 1];
      }
    }

    DEVICE void multiply(float (&sums)[4], const uint32_t (&x)[WORDS], bool first, const float (&)[4]) const {
      const uint32_t b[2][2] = {{x[0], x[1]}, {x[2], x[3]}};
      if (first) mma_bf16_on(sums, a[0], b[0]);
      else mma_bf16(sums, a[0], b[0]);
      mma_bf16(sums, a[1], b[1]);
    }
  };

  static constexpr int FITS = 1 << 30;
  DEVICE static float zero(int) { return 0; }
  DEVICE static float value(float sum) { return sum; }
  DEVICE static uint32_t stored(float sum) { return to_bits(sum); }
  DEVICE static float restored(uint32_t word) { return from_bits(word); }
};

// ---- a block ----

// From a token's sums to the next one's in shared memory: what a warp writes at once shares no banks.
HOST_DEVICE constexpr int sum_stride(int rows) { return rows + 4; }

// Stages of codes that a warp has in shared memory. Blocks of few rows are for launches that do not fill the GPU: all of a part is on its way
// at once. Otherwise more blocks at a time are worth more.
HOST_DEVICE constexpr int stages_of(int rows) { return rows == 16 ? 5 : 3; }

// Where things lie in the shared memory of a block, from its begin on: of each warp the codes, and its scales, whose place its sums take in
// the end; the scales of the block as they are stored; what is added up over rounds.
template <class Codes, int ROWS, int TOKENS>
struct Layout {
  static constexpr int STAGE = ROWS * Codes::STAGE_BYTES;
  static constexpr int SUMS = TOKENS * sum_stride(ROWS);  // numbers of a warp
  int scales, a_warp, stored, kept, bytes;

  HOST_DEVICE Layout(const Parts& parts, int scale_type) {
    const int floats = ROWS * parts.stride;
    scales = stages_of(ROWS) * STAGE;
    a_warp = scales + (floats > SUMS ? floats : SUMS) * 4;
    stored = parts.warps * a_warp;
    // A few scales behind the last one are read, and not used.
    kept = stored + (parts.inside ? 0 : ceil_div(ROWS * stored_stride<Codes>(parts, scale_type), 16) * 16 + 16);
    // Sums of parts, and of groups that are not complete.
    bytes = kept + (parts.count <= parts.warps ? 0 : parts.inside ? 2 : 1) * SUMS * 4;
  }
};

// Bytes of shared memory that a block needs, dynamic all of them: above 48 KiB a launch has to ask for it
// (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).
template <class Codes, int ROWS, int TOKENS>
HOST_DEVICE int shared_bytes(int k, int group, int scale_type) {
  return Layout<Codes, ROWS, TOKENS>(Parts::of(k, group), scale_type).bytes;
}

// The rows of the weight and the tokens of a block.
struct Tile {
  int expert, row, token, tokens;
};

// A warp's way through the codes of a part: which 16 bytes each lane asks for next.
template <class Codes, int ROWS>
struct CodeStream {
  static constexpr int CHUNKS = Codes::STAGE_BYTES / 16, AT_ONCE = 32 / CHUNKS, COPIES = ROWS / AT_ONCE, STAGES = stages_of(ROWS);
  static constexpr int STAGE = ROWS * Codes::STAGE_BYTES;
  const uint8_t* from;
  int stride;   // bytes between the rows of two copies
  int rows;     // that there are from this lane's on
  int columns;  // that were not asked for yet, from this lane's on
  int place;    // in a stage

  // The part begins at `column` and has `columns`; its first stages are asked for.
  DEVICE CodeStream(const Arguments& p, const Tile& tile, uint32_t ring, int column, int columns) {
    const int lane = threadIdx.x % 32, own = lane / CHUNKS, chunk = lane % CHUNKS;
    const int row_bytes = p.k / COLUMNS * Codes::STAGE_BYTES + p.k % COLUMNS * Codes::STAGE_BYTES / COLUMNS;
    from = p.weight + (int64_t(tile.expert) * p.n + tile.row + own) * row_bytes + column / GROUP * (Codes::STAGE_BYTES / GROUPS) + chunk * 16;
    stride = AT_ONCE * row_bytes;
    place = (CHUNKS == 4 ? chunk_of_64(own, chunk) : chunk_of_128(own, chunk)) * 16;
    rows = int(in_register(p.n - tile.row - own));
    this->columns = columns - chunk * (COLUMNS / CHUNKS);
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; s++) next(ring + s * STAGE);
  }

  // Asks for the next stage; zeros stand for rows and columns that are not there. AT_ONCE rows are a multiple of the pattern of places.
  DEVICE void next(uint32_t to) {
    // A whole stage too many may be asked for, of which nothing is there.
    if (columns > -COLUMNS) {
#pragma unroll
      for (int i = 0; i < COPIES; i++)
        copy_async(to + place + i * AT_ONCE * Codes::STAGE_BYTES, from + int64_t(i) * stride, i * AT_ONCE < rows && columns > 0 ? 16 : 0);
      from += Codes::STAGE_BYTES;
      columns -= COLUMNS;
    }
    copy_commit();
  }
};

template <class Codes>
DEVICE float read_scale(const Arguments& p, const void* scales, int64_t at) {
  if (Codes::E8M0) return e8m0_value(static_cast<const uint8_t*>(scales)[at]);
  return read_float(scales, at, FloatType(p.scale_type));
}

// Asks for all scales of a block as they are stored: they lie side by side.
template <class Codes, int ROWS>
DEVICE void ask_scales(const Arguments& p, const Tile& tile, unsigned char* to) {
  const int threads = 32 * p.parts.warps, rows = p.n - tile.row < ROWS ? p.n - tile.row : ROWS;
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

// A warp's scales of a part as f32, [ROWS, stride], from scale `first` of a row on: a lane has a row, or every second four scales of one.
// Behind the last scale lies what is not used.
template <class Codes, int ROWS>
DEVICE void convert_scales(const Arguments& p, float* scales, const unsigned char* stored, int first) {
  const int lane = threadIdx.x % 32, row = lane % ROWS;
  const int at = row * (stored_stride<Codes>(p.parts, p.scale_type) / (Codes::E8M0 ? 1 : float_bytes(p.scale_type))) + first;
#pragma unroll 1
  for (int g = lane / ROWS * 4; g < p.parts.part_scales; g += 32 / ROWS * 4) {
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

// What a warp adds up of a part: 16 rows by 8 tokens in each tile, as tensor cores spread them over lanes.
template <class Codes, class Inputs, int ROWS, int TOKENS>
struct Sums {
  static constexpr int DOWN = ROWS / 16, TILES = TOKENS / 8, STAGES = stages_of(ROWS);
  // Groups whose inputs are read together, one step ahead of their use.
  static constexpr int STEP = 2 * TILES * Inputs::WORDS <= 8 ? 2 : 1;
  // Scales of a row that are read together.
  static constexpr int AT_ONCE = TILES == 1 ? GROUPS : 2;
  using Sum = typename Inputs::Sum;
  using Left = typename Inputs::template Left<Codes>;
  Sum sums[DOWN][TILES][4], zero[4];
  float chains[DOWN][TILES][4];

  // `inside` where all of the part is in one group.
  DEVICE Sums(bool inside, int group) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      zero[i] = inside ? Sum(0) : Inputs::zero(group);
      if (Codes::E8M0 && Inputs::SCALED) zero[i] = Sum(in_register(uint32_t(Inputs::zero(GROUP))));
    }
#pragma unroll
    for (int d = 0; d < DOWN; d++)
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[d][t][i] = zero[i], chains[d][t][i] = 0;
  }

  // A group is complete: its sums go into the chains. `scales` [ROWS, stride] are its own, from this lane's upper row on.
  template <bool FITS>
  DEVICE void take(const float* scales, int stride) {
#pragma unroll
    for (int d = 0; d < DOWN; d++) take<FITS>(d, scales[d * 16 * stride], scales[(d * 16 + 8) * stride]);
  }
  template <bool FITS>
  DEVICE void take(int d, float upper, float lower) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float sum = FITS ? Inputs::value(sums[d][t][i]) : float(sums[d][t][i]);
        chains[d][t][i] = fmaf(sum, i < 2 ? upper : lower, chains[d][t][i]);
        // The next product of E2M1 begins anew by itself.
        if (!Codes::E8M0) sums[d][t][i] = zero[i];
      }
  }

  // All of a part of `columns`, whose first stages were asked for. `sources` are the inputs of its first columns. A scale has PER groups of
  // 32 columns; 4 stands for a multiple of it as well, 0 for any number.
  template <int PER>
  DEVICE void add(const Arguments& p, int columns, int missing, CodeStream<Codes, ROWS>& stream, uint32_t ring, const float* scales,
                  int stride, const unsigned char* (&sources)[TILES]) {
    const int lane = threadIdx.x % 32, place = Codes::place(lane), a_scale = missing;
    const float* scale = scales + lane / 4 * stride;
    const bool fits = p.group <= Inputs::FITS;
    constexpr int STAGE = ROWS * Codes::STAGE_BYTES;
    const uint32_t end = ring + STAGES * STAGE;
    const auto tables = Left::tables();
    uint32_t codes = ring, x[2][STEP][TILES][Inputs::WORDS];
    // Reads the inputs of group `group` of the stage.
    auto read = [&](int group) {
#pragma unroll
      for (int t = 0; t < TILES; t++) Inputs::read(x[group / STEP % 2][group % STEP][t], sources[t] + group * GROUP * Inputs::BYTES);
    };
    // A stage of `here` groups, 4 where `full`; the next one has `ahead`.
    auto stage = [&](auto full, int here, int ahead) {
      constexpr bool FULL = decltype(full)::value;
      copy_wait<STAGES - 2>();
      sync_warp();
      // Every lane is done with the stage before, whose place the next one takes.
      stream.next(codes == ring ? end - STAGE : codes - STAGE);
      [[maybe_unused]] float upper[DOWN][AT_ONCE], lower[DOWN][AT_ONCE];
      Pair<Codes> pairs[DOWN];
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        if (!FULL && g >= here) break;
        if (g % STEP == 0) {
#pragma unroll
          for (int i = STEP; i < 2 * STEP; i++)
            if (g + i < GROUPS ? FULL || g + i < here : g + i - GROUPS < ahead) read(g + i);
        }
        if constexpr (Codes::E8M0) {
          if (g % AT_ONCE == 0) {
#pragma unroll
            for (int d = 0; d < DOWN; d++) {
              load_floats(upper[d], scale + d * 16 * stride);
              load_floats(lower[d], scale + (d * 16 + 8) * stride);
            }
            scale += AT_ONCE;
          }
        }
        if (g % 2 == 0) {
#pragma unroll
          for (int d = 0; d < DOWN; d++) read_codes<Codes>(pairs[d], codes + d * 16 * Codes::STAGE_BYTES, place, g);
        }
        const auto& own = x[g / STEP % 2][g % STEP];
#pragma unroll
        for (int d = 0; d < DOWN; d++) {
          Left left(tables, pairs[d].words[g % 2]);
#pragma unroll
          for (int t = 0; t < TILES; t++) left.multiply(sums[d][t], own[t], Codes::E8M0, zero);
        }
        if constexpr (Codes::E8M0) {
#pragma unroll
          for (int d = 0; d < DOWN; d++) take<true>(d, upper[d][g % AT_ONCE], lower[d][g % AT_ONCE]);
        } else if constexpr (PER == 1 || PER == 2) {
          if ((g + 1) % PER == 0) take<true>(scale++, stride);
        } else if (PER == 0 || g == GROUPS - 1) {
          missing -= PER == 0 ? 1 : GROUPS;
          if (missing == 0) {
            fits ? take<true>(scale, stride) : take<false>(scale, stride);
            scale++;
            missing = a_scale;
          }
        }
      }
      codes += STAGE;
      if (codes == end) codes = ring;
#pragma unroll
      for (int t = 0; t < TILES; t++) sources[t] += COLUMNS * Inputs::BYTES;
    };
#pragma unroll
    for (int i = 0; i < STEP; i++)
      if (i * GROUP < columns) read(i);
    const int rest = columns / GROUP % GROUPS;
    int left = int(in_register(columns / COLUMNS));
#pragma unroll 1
    for (; left > 0; left--) stage(True(), GROUPS, left > 1 ? GROUPS : rest);
    if (rest) stage(False(), rest, 0);
  }
};

// grid: (ceil(M / TOKENS), ceil(N / ROWS)), or (room for tiles, ceil(N / ROWS)) where `experts` is not null. Threads: 32 * Parts::warps.
template <class Codes, class Inputs, int ROWS, int TOKENS>
DEVICE void product(const Arguments& p, const Experts* experts, unsigned char* shared) {
  constexpr int DOWN = ROWS / 16, TILES = TOKENS / 8, STRIDE = sum_stride(ROWS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = lane / 4, quarter = lane % 4;
  const Parts& parts = p.parts;
  Tile tile = {0, int(blockIdx.y) * ROWS, int(blockIdx.x) * TOKENS, p.m - int(blockIdx.x) * TOKENS};
  if (experts) {
    // Who takes which rows was just computed; otherwise the weights can be asked for at once.
    inputs_ready();
    uint32_t words[4];
    load_sixteen(words, experts->tiles + 4 * blockIdx.x);
    if (int(blockIdx.x) >= *experts->used) return;
    tile.expert = words[0], tile.token = words[1], tile.tokens = words[2];
  }
  if (tile.tokens > TOKENS) tile.tokens = TOKENS;
  const Layout<Codes, ROWS, TOKENS> layout(parts, p.scale_type);
  const int stride = parts.stride;
  const uint32_t codes = shared_address(shared + warp * layout.a_warp);
  float* scales = reinterpret_cast<float*>(shared + warp * layout.a_warp + layout.scales);
  uint32_t* parted = reinterpret_cast<uint32_t*>(shared + layout.scales);  // [TOKENS][STRIDE], of a warp; the next is a_warp on
  uint32_t* kept = reinterpret_cast<uint32_t*>(shared + layout.kept);      // [TOKENS][STRIDE], of sums and of open groups
  const int a_warp = layout.a_warp / 4;

  if (!parts.inside) ask_scales<Codes, ROWS>(p, tile, shared + layout.stored);
  copy_commit();
  CodeStream<Codes, ROWS> stream(p, tile, codes, parts.begin(warp, p.group), parts.width(warp, p.k, p.group));
  // The row of the inputs that token `t` takes; where there is none, that of the first, and what comes of it is left out.
  auto source_of = [&](int t) {
    int at = tile.token + (t < tile.tokens ? t : 0);
    return experts && experts->rows ? experts->rows[at] : at;
  };
  // The inputs of this lane's token of each eight, from the part's first column on.
  const unsigned char* sources[TILES];
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    int64_t at = int64_t(source_of(t * 8 + own)) * p.k + quarter * 8 + parts.begin(warp, p.group);
    sources[t] = static_cast<const unsigned char*>(p.input) + at * Inputs::BYTES;
  }
  // Few of them are in the nearest cache by the time the codes are there.
  if (experts && TILES == 1) {
    const int bytes = parts.width(warp, p.k, p.group) * Inputs::BYTES;
#pragma unroll 1
    for (int i = quarter * 128; i < bytes; i += 512) prefetch(sources[0] + i);
  }
  if (!parts.inside) {
    copy_wait<stages_of(ROWS) - 1>();
    __syncthreads();
  }

  // In the end each thread has two rows, one behind the other, of some of the tokens: so a gate and what goes up meet.
  const int r = threadIdx.x % (ROWS / 2) * 2, first_token = threadIdx.x / (ROWS / 2), tokens_on = 32 * parts.warps / (ROWS / 2);
  const int rounds = parts.rounds;
#pragma unroll 1
  for (int round = 0; round < rounds; round++) {
    const int part = round * parts.warps + warp;
    if (part < parts.count) {
      const int columns = parts.width(part, p.k, p.group);
      if (!parts.inside) {
        convert_scales<Codes, ROWS>(p, scales, shared + layout.stored, part * parts.part_scales);
        sync_warp();
      }
      if (!experts && round == 0) inputs_ready();
      Sums<Codes, Inputs, ROWS, TOKENS> sums(parts.inside, p.group);
      const int per = parts.inside ? 1 << 24 : p.group / GROUP;
      if (Codes::E8M0 || per == 1) sums.template add<1>(p, columns, per, stream, codes, scales, stride, sources);
      else if (per == 2) sums.template add<2>(p, columns, per, stream, codes, scales, stride, sources);
      else if (per % GROUPS == 0) sums.template add<4>(p, columns, per, stream, codes, scales, stride, sources);
      else sums.template add<0>(p, columns, per, stream, codes, scales, stride, sources);
      if (round + 1 == rounds) start_dependents();
      // Every lane is done with the scales.
      sync_warp();
#pragma unroll
      for (int d = 0; d < DOWN; d++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            uint32_t word = parts.inside ? Inputs::stored(sums.sums[d][t][i]) : to_bits(sums.chains[d][t][i]);
            parted[warp * a_warp + (t * 8 + 2 * quarter + i % 2) * STRIDE + d * 16 + own + i / 2 * 8] = word;
          }
      const int next = part + parts.warps;
      if (next < parts.count) {
        const int on = parts.begin(next, p.group) - parts.begin(part, p.group) - ceil_div(columns, COLUMNS) * COLUMNS;
#pragma unroll
        for (int t = 0; t < TILES; t++) sources[t] += on * Inputs::BYTES;
        // Zeros that were asked for behind the part's end may be on their way yet.
        copy_wait<0>();
        sync_warp();
        stream = CodeStream<Codes, ROWS>(p, tile, codes, parts.begin(next, p.group), parts.width(next, p.k, p.group));
      }
    }
    const bool done = round + 1 == rounds;
    float bias[2] = {0, 0}, token_scale = 0;
    if (done) {
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (p.bias && tile.row + r + e < p.n)
          bias[e] = read_float(p.bias, int64_t(tile.expert) * p.n + tile.row + r + e, FloatType(p.output_type));
      if (Inputs::SCALED) token_scale = p.input_scale[source_of(first_token)];
    }
    __syncthreads();
    const int first = round * parts.warps, here = parts.count - first < parts.warps ? parts.count - first : parts.warps;
#pragma unroll 1
    for (int t = first_token; t < tile.tokens; t += tokens_on) {
      const int at = t * STRIDE + r;
      if (Inputs::SCALED && done && t != first_token) token_scale = p.input_scale[source_of(t)];
      float values[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        if (!parts.inside) {
          float sum = from_bits(round ? kept[at + e] : parted[at + e]);
#pragma unroll 1
          for (int w = round ? 0 : 1; w < here; w++) sum += from_bits(parted[w * a_warp + at + e]);
          values[e] = sum;
        } else {
          float chain = round ? from_bits(kept[at + e]) : 0;
          typename Inputs::Sum sum = round ? Inputs::restored(kept[TOKENS * STRIDE + at + e]) : 0;
#pragma unroll 1
          for (int w = 0; w < here; w++) {
            const int inside = (first + w) % parts.inside;
            typename Inputs::Sum one = Inputs::restored(parted[w * a_warp + at + e]);
            sum = inside == 0 ? one : sum + one;
            if (inside == parts.inside - 1 && tile.row + r + e < p.n) {
              int64_t scale = (int64_t(tile.expert) * p.n + tile.row + r + e) * parts.scales + (first + w) / parts.inside;
              chain = fmaf(float(sum), read_scale<Codes>(p, p.weight_scale, scale), chain);
            }
          }
          values[e] = chain;
          if (!done) kept[TOKENS * STRIDE + at + e] = Inputs::stored(sum);
        }
        if (!done) kept[at + e] = to_bits(values[e]);
        if (Inputs::SCALED) values[e] *= token_scale * Inputs::template step<Codes>();
        if (p.bias) values[e] += bias[e];
      }
      if (!done) continue;
      FloatType type = FloatType(p.output_type);
      const int row = tile.row + r;
      if (experts && experts->swiglu) {
        float h = swiglu(values[0], values[1], experts->alpha, experts->limit);
        if (row < p.n) write_float(p.output, int64_t(tile.token + t) * (p.n / 2) + row / 2, type, h);
      } else {
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (row + e < p.n) write_float(p.output, int64_t(tile.token + t) * p.n + row + e, type, values[e]);
      }
    }
    if (!done) __syncthreads();
  }
}

}  // namespace gemm

// The kernels of a kind of codes and inputs: for 16 or 32 rows of the weight and up to 8 or 16 tokens a block; the same over experts.
#define PRODUCT(name, Codes, Inputs, ROWS, TOKENS, REGISTERS)                                                                   \
  KERNEL_WITH(REGISTERS) name##_##ROWS##x##TOKENS(gemm::Arguments p) {                                       \
    SHARED_MEMORY(s);                                                                                                          \
    gemm::product<gemm::Codes, gemm::Inputs, ROWS, TOKENS>(p, nullptr, s);                                                     \
  }                                                                                                                            \
  KERNEL_WITH(REGISTERS) name##_experts_##ROWS##x##TOKENS(gemm::Arguments p, gemm::Experts experts) {        \
    SHARED_MEMORY(s);                                                                                                          \
    gemm::product<gemm::Codes, gemm::Inputs, ROWS, TOKENS>(p, &experts, s);                                                    \
  }
#define PRODUCTS(name, Codes, Inputs)    \
  PRODUCT(name, Codes, Inputs, 16, 8, 104)   \
  PRODUCT(name, Codes, Inputs, 16, 16, 144)  \
  PRODUCT(name, Codes, Inputs, 32, 8, 128)   \
  PRODUCT(name, Codes, Inputs, 32, 16, 200)
