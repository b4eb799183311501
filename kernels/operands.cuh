// Operands of the tensor cores: codes as they lie in shared memory, decoded in registers to int8 or bf16, and the inputs that meet them.
//
// Nothing is repacked: within a group of 32 columns each lane takes the eight that lie side by side in the checkpoint, of weights and tokens alike, and
// which columns meet in which step of a tensor core does not matter to their sum.
#pragma once

#include "gemm.cuh"
#include "warpgroup.cuh"

namespace gemm {

// Where 16-byte chunk `chunk` of row `row` lies in a tile whose rows are 64 bytes: no two of eight rows share a bank.
HOST_DEVICE int chunk_of_64(int row, int chunk) { return row * 4 + (chunk ^ ((row >> 1) & 3)); }

// The same for rows of 128 bytes, of which four are read at once, eight bytes a lane.
HOST_DEVICE int chunk_of_128(int row, int chunk) { return row * 8 + (chunk ^ ((row & 3) << 1)); }

// Eight codes of a row, as int8 or as bf16, in the order of the columns: a lane's share of a group, columns 8 (l % 4) to + 7.
struct Eight {
  uint32_t low, high;
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

  // The 8 of every nibble, and the upper halves of bytes. From registers both are one operation.
  struct Masks {
    uint32_t eights, upper;

    DEVICE Masks kept() const { return {in_register(eights), in_register(upper)}; }
  };
  HOST_DEVICE static constexpr Masks masks() { return {0x88888888u, 0xf0f0f0f0u}; }

  // Sixteen times the values: without the 8 a nibble in the upper half of a byte is that, sign and all.
  DEVICE static Eight bytes(const Masks& m, uint32_t word) {
    uint32_t odd = (word ^ m.eights) & m.upper, even = ((word << 4) ^ m.eights) & m.upper;
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

// Reads the codes of group `group` of 16 rows whose stage begins at `at`; every lane of the warp takes part. `place` is what Codes::place says.
DEVICE void read_codes(uint32_t (&codes)[2][Int8::WORDS], uint32_t at, int place, int group) {
#pragma unroll
  for (int row = 0; row < 2; row++) load_eight(codes[row], at + (place ^ (group * Int8::GROUP_BYTES)) + row * 8 * Int8::STAGE_BYTES);
}

// The same of groups `group`, which is even, and the next.
template <class Codes>
DEVICE void read_codes(Pair<Codes>& codes, uint32_t at, int place, int group) {
  if constexpr (Codes::WORDS == 1) {
    uint32_t all[4];
    load_matrices(all, at + (place ^ (group * Codes::GROUP_BYTES)));
#pragma unroll
    for (int i = 0; i < 4; i++) codes.words[i / 2][i % 2][0] = all[i];
  } else {
#pragma unroll
    for (int g = 0; g < 2; g++) read_codes(codes.words[g], at, place, group + g);
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

  // Where word `word` of 128 bytes of a token goes among them, so that the words which a lane's codes meet are where tensor cores look for them: of each
  // 32 bytes the even ones come first.
  HOST_DEVICE static int place(int word) { return word / 8 * 32 + word % 2 * 16 + word % 8 / 2 * 4; }

  // A lane's left operand of a group.
  template <class Codes>
  struct Left {
    // Two products, which cost less than the sums of the summands would.
    static constexpr bool TWICE = Codes::E8M0;
    uint32_t a[4], more[4];

    struct None {};
    DEVICE static auto tables() {
      if constexpr (TWICE) return Codes::summand_tables().kept();
      else if constexpr (Codes::WORDS == 1) return Codes::masks().kept();
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
        upper = Codes::bytes(tables, words[0][0]), lower = Codes::bytes(tables, words[1][0]);
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

#ifdef WARPGROUPS
    // The same of a warpgroup for 64 tokens, whose 32 bytes a token begin at `x` of shared memory; sums = what they are where `add`, + that.
    DEVICE void multiply(int (&sums)[32], uint32_t x, bool add) {
      hold(a);
      if (TWICE) hold(more);
      warpgroup_fence();
      warpgroup_multiply(sums, a, rows_of_128(x), add);
      if (TWICE) warpgroup_multiply(sums, more, rows_of_128(x), true);
    }
#endif
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

  // As with int8: of each 64 bytes the first of every four words, then the second ones, and so on.
  HOST_DEVICE static int place(int word) { return word / 16 * 64 + word % 4 * 16 + word % 16 / 4 * 4; }

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

#ifdef WARPGROUPS
    // The same of a warpgroup; 64 bytes a token.
    DEVICE void multiply(float (&sums)[32], uint32_t x, bool add) {
      hold(a[0]);
      hold(a[1]);
      warpgroup_fence();
      warpgroup_multiply(sums, a[0], rows_of_128(x), add);
      warpgroup_multiply(sums, a[1], rows_of_128(x + 32), true);
    }
#endif
  };

  static constexpr int FITS = 1 << 30;
  DEVICE static float zero(int) { return 0; }
  DEVICE static float value(float sum) { return sum; }
  DEVICE static uint32_t stored(float sum) { return to_bits(sum); }
  DEVICE static float restored(uint32_t word) { return from_bits(word); }
};

}  // namespace gemm
