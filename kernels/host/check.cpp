// Runs the kernels on this processor (simt.hpp) and compares every output with plain loops: bit for bit, but for products of bf16 inputs, whose
// sums on tensor cores have no order that is said. What the formats of lib/src say (fake_quantize, mask_2_4, FP8 inputs) is compared there,
// through driver.cpp.
//
//     c++ -std=c++17 -O2 -I.. -o check check.cpp && ./check
#include <random>
#include <string>

#include "wgmma.cuh"

#include "../combine_experts.cu"
#include "../dequantize_mxfp4.cu"
#include "../group_rows.cu"
#include "../mxfp4_a16.cu"
#include "../mxfp4_a8.cu"
#include "../normalize_activations.cu"
#include "../quantize_activations.cu"
#include "../w4a16.cu"
#include "../w4a8.cu"
#include "../w8a8.cu"

namespace {

std::mt19937 draw(7);

int checks = 0;

template <class T>
void random_bytes(std::vector<T>& array) {
  unsigned char* bytes = reinterpret_cast<unsigned char*>(array.data());
  for (size_t i = 0; i < array.size() * sizeof(T); i++) bytes[i] = uint8_t(draw() >> 8);
}

// What kernels compute, as the formats say it: one output at a time.
namespace plain {

template <class Codes>
int code(const gemm::Arguments& p, int row, int column);

template <>
int code<gemm::E2m1>(const gemm::Arguments& p, int row, int column) {
  uint8_t byte = p.weight[int64_t(row) * (p.k / 2) + column / 2];
  static const double VALUES[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  int nibble = column % 2 ? byte >> 4 : byte & 15;
  return int((nibble & 8 ? -2 : 2) * VALUES[nibble & 7]);
}

template <>
int code<gemm::Int4>(const gemm::Arguments& p, int row, int column) {
  uint8_t byte = p.weight[int64_t(row) * (p.k / 2) + column / 2];
  return (column % 2 ? byte >> 4 : byte & 15) - 8;
}

template <>
int code<gemm::Int8>(const gemm::Arguments& p, int row, int column) {
  return int8_t(p.weight[int64_t(row) * p.k + column]);
}

// An input, and what a kernel's code is beside the true one: a power of two, which its step takes back.
template <class Inputs>
double input(const gemm::Arguments& p, int token, int column) {
  int64_t at = int64_t(token) * p.k + column;
  return Inputs::SCALED ? static_cast<const int8_t*>(p.input)[at] : bf16_value(static_cast<const uint16_t*>(p.input)[at]);
}

template <class Codes, class Inputs>
float multiple() {
  if (std::is_same<Codes, gemm::Int4>::value) return Inputs::SCALED ? 16 : 1;
  return Codes::E8M0 && !Inputs::SCALED ? 0.5f : 1;
}

struct Output {
  float stated;        // in the order that gemm.cuh states; of bf16 inputs the sum of a group is the exact one, rounded
  double exact, size;  // and in truth; the sum of the sizes of its parts
};

template <class Codes, class Inputs>
Output output(const gemm::Arguments& p, int token, int row) {
  const int groups = p.k / p.group;
  Output out = {0, 0, 0};
  // The exact sum of some columns.
  auto sum_of = [&](int from, int to, double& sizes) {
    double sum = 0;
    for (int k = from; k < to; k++) {
      double product = code<Codes>(p, row, k) * input<Inputs>(p, token, k);
      sum += product, sizes += fabs(product);
    }
    return sum;
  };
  float chain = 0, total = 0;
  for (int g = 0; g < groups; g++) {
    int64_t at = int64_t(row) * groups + g;
    float scale = Codes::E8M0 ? e8m0_value(static_cast<const uint8_t*>(p.weight_scale)[at])
                              : read_float(p.weight_scale, at, FloatType(p.scale_type));
    double sizes = 0, sum = sum_of(g * p.group, (g + 1) * p.group, sizes);
    float stated = float(sum * multiple<Codes, Inputs>());
    if (p.group >= gemm::LARGE && !Inputs::SCALED) {
      // Parts of a group are added in f32.
      double none = 0;
      for (int k = 0; k < p.group; k += p.parts.columns) {
        int to = k + p.parts.columns < p.group ? k + p.parts.columns : p.group;
        float part = float(sum_of(g * p.group + k, g * p.group + to, none) * multiple<Codes, Inputs>());
        stated = k == 0 ? part : stated + part;
      }
    }
    // A part of K begins anew.
    if (p.group < gemm::LARGE && g > 0 && g * p.group % p.parts.columns == 0) {
      total = g * p.group == p.parts.columns ? chain : total + chain;
      chain = 0;
    }
    chain = fmaf(stated, scale, chain);
    out.exact += sum * scale;
    out.size += fabs((Inputs::SCALED ? fabs(sum) : sizes) * scale);
  }
  out.stated = p.group >= gemm::LARGE || p.parts.count == 1 ? chain : total + chain;
  double step = (Inputs::SCALED ? p.input_scale[token] : 1.0) * (Codes::E8M0 ? 0.5 : 1);
  if (Inputs::SCALED) out.stated *= p.input_scale[token] * Inputs::template step<Codes>();
  out.exact *= step, out.size *= fabs(step);
  if (p.bias) {
    float bias = read_float(p.bias, row, FloatType(p.output_type));
    out.stated += bias, out.exact += bias, out.size += fabs(bias);
  }
  return out;
}

}  // namespace plain

// What may be between two numbers of a type, relatively.
double ulp(FloatType type) { return type == F32 ? 0 : type == BF16 ? 1.0 / 128 : 1.0 / 1024; }

// And absolutely: half of what lies between the smallest of them.
double smallest(FloatType type) { return ldexp(1, type == F32 ? -150 : type == BF16 ? -134 : -25); }

struct Shape {
  int m, n, k, group;
};

// The rows of the weight and the tokens that a block has.
struct Block {
  int rows, tokens;
};
const Block BLOCKS[] = {{16, 8}, {16, 16}, {32, 8}, {32, 16}, {64, 64}, {128, 64}};
constexpr int SIZES = sizeof BLOCKS / sizeof *BLOCKS;

// Shared memory that such a block needs.
template <class Codes, class Inputs>
size_t shared_bytes(int block, int k, int group, int scale_type) {
  const int bytes[] = {gemm::shared_bytes<Codes, 16, 8>(k, group, scale_type),
                       gemm::shared_bytes<Codes, 16, 16>(k, group, scale_type),
                       gemm::shared_bytes<Codes, 32, 8>(k, group, scale_type),
                       gemm::shared_bytes<Codes, 32, 16>(k, group, scale_type),
                       gemm::many_shared_bytes<Codes, Inputs, 64>(k, group, scale_type),
                       gemm::many_shared_bytes<Codes, Inputs, 128>(k, group, scale_type)};
  return size_t(bytes[block]);
}

// Threads of it.
int threads_of(int block, const gemm::Parts& parts) { return BLOCKS[block].tokens == gemm::MANY_TOKENS ? gemm::MANY_THREADS : 32 * parts.warps; }

// Whether a GPU has so much: those of 8.6 for blocks of few tokens, Hopper for the others.
bool fits(int block, size_t shared) { return shared <= size_t(BLOCKS[block].tokens == gemm::MANY_TOKENS ? 227 : 99) << 10; }

// Inputs as a kernel wants them: int8 with a lowest value more often than not, or bf16.
template <class Inputs>
std::vector<uint8_t> inputs(int count) {
  std::vector<uint8_t> bytes(size_t(count) * Inputs::BYTES);
  std::normal_distribution<float> normal(0, 1);
  for (int i = 0; i < count; i++) {
    if (Inputs::SCALED) bytes[i] = draw() % 5 == 0 ? 0x80 : uint8_t(draw() >> 8);
    else write_float(bytes.data(), i, BF16, normal(draw));
  }
  return bytes;
}

using Kernel = void (*)(gemm::Arguments);

template <class Codes, class Inputs>
void check(const char* name, const Kernel* kernels, Shape s, FloatType scale_type, FloatType output_type, bool with_bias) {
  gemm::Arguments p = {};
  p.m = s.m, p.n = s.n, p.k = s.k, p.group = s.group, p.parts = gemm::Parts::of(s.k, s.group);
  p.scale_type = scale_type, p.output_type = output_type;
  std::vector<uint8_t> weight(size_t(s.n) * s.k * Codes::STAGE_BYTES / gemm::COLUMNS);
  std::vector<uint32_t> scales(size_t(s.n) * (s.k / s.group));
  std::vector<uint8_t> input = inputs<Inputs>(s.m * s.k);
  std::vector<float> input_scale(s.m);
  std::vector<uint32_t> bias(s.n), output(size_t(s.m) * s.n + 1, 0xa5a5a5a5);
  random_bytes(weight);
  // The largest sums that there are.
  if (s.k == 256 && Inputs::SCALED) {
    std::fill(weight.begin(), weight.end(), Codes::STAGE_BYTES == 128 ? 0x80 : 0);
    std::fill(input.begin(), input.end(), 0x80);
  }
  std::uniform_real_distribution<float> unit(-1, 1);
  for (float& x : input_scale) x = unit(draw) * 0.01f;
  for (size_t i = 0; i < scales.size(); i++) {
    if (Codes::E8M0) {
      static const uint8_t EXPONENTS[] = {0, 1, 110, 120, 127, 130};
      reinterpret_cast<uint8_t*>(scales.data())[i] = EXPONENTS[draw() % 6];
    } else {
      write_float(scales.data(), i, scale_type, unit(draw));
    }
  }
  for (int i = 0; i < s.n; i++) write_float(bias.data(), i, output_type, unit(draw));
  p.weight = weight.data(), p.weight_scale = scales.data(), p.input = input.data();
  p.input_scale = Inputs::SCALED ? input_scale.data() : nullptr;
  p.bias = with_bias ? bias.data() : nullptr;
  p.output = output.data();
  simt::ranges.clear();
  simt::allow(weight);
  simt::allow(scales);
  simt::allow(input);

  for (int size = 0; size < SIZES; size++) {
    for (bool backwards : {false, true}) {
      std::fill(output.begin(), output.end(), 0xa5a5a5a5);
      Block block = BLOCKS[size];
      Dim3 grid = {ceil_div(s.m, block.tokens), ceil_div(s.n, block.rows), 1};
      size_t shared = shared_bytes<Codes, Inputs>(size, s.k, s.group, scale_type);
      if (!fits(size, shared)) continue;
      simt::launch(grid, threads_of(size, p.parts), shared, backwards, [&] { kernels[size](p); });
      for (int token = 0; token < s.m; token++) {
        for (int row = 0; row < s.n; row++) {
          int64_t at = int64_t(token) * s.n + row;
          plain::Output wanted = plain::output<Codes, Inputs>(p, token, row);
          uint32_t rounded = 0;
          write_float(&rounded, 0, output_type, wanted.stated);
          float have = read_float(output.data(), at, output_type), want = read_float(&rounded, 0, output_type);
          // What the sums in f32 may round, and the output's type; of int8 inputs every bit is known.
          double slack = 1e-6 * wanted.size + ulp(output_type) / 2 * fabs(want) + smallest(output_type);
          if ((Inputs::SCALED && to_bits(have) != to_bits(want)) || !(fabs(have - wanted.exact) <= slack)) {
            fprintf(stderr, "%s_%dx%d, M %d N %d K %d group %d: output [%d, %d] is %.9g, wanted %.9g, in truth %.9g\n", name, block.rows,
                    block.tokens, s.m, s.n, s.k, s.group, token, row, have, want, wanted.exact);
            exit(1);
          }
        }
      }
      const unsigned char* behind = reinterpret_cast<const unsigned char*>(output.data());
      size_t width = output_type == F32 ? 4 : 2;
      for (size_t i = size_t(s.m) * s.n * width; i < output.size() * sizeof(uint32_t); i++) {
        if (behind[i] != 0xa5) fprintf(stderr, "%s: something was written behind the output\n", name), exit(1);
      }
      checks++;
    }
  }
}

#define ALL(name) \
  { name##_16x8, name##_16x16, name##_32x8, name##_32x16, name##_64x64, name##_128x64 }

void check_products() {
  const Kernel mxfp4[] = ALL(mxfp4_a8), w4a8[] = ALL(w4a8), w8a8[] = ALL(w8a8), w4a16[] = ALL(w4a16), mxfp4_a16[] = ALL(mxfp4_a16);
  // A single product, odd numbers of tokens, rows that fill no block, a last stage that is not whole, parts that are not even, more parts
  // than a block has warps, groups that are larger than a part.
  const int shapes[][3] = {{1, 1, 32},    {1, 64, 128},   {3, 65, 160},  {2, 66, 256}, {8, 16, 288},
                           {17, 35, 576}, {33, 70, 1152}, {2, 34, 2880}, {3, 18, 5120}, {70, 20, 96}};
  using I8 = gemm::Int8Inputs;
  using B16 = gemm::Bf16Inputs;
  for (const int* s : shapes) {
    check<gemm::E2m1, I8>("mxfp4_a8", mxfp4, {s[0], s[1], s[2], 32}, F32, F32, true);
    check<gemm::E2m1, I8>("mxfp4_a8", mxfp4, {s[0], s[1], s[2], 32}, F32, BF16, false);
    check<gemm::E2m1, B16>("mxfp4_a16", mxfp4_a16, {s[0], s[1], s[2], 32}, F32, s[0] % 2 ? BF16 : F32, s[0] % 2);
    for (int group : {32, 64, 96, 128, 160, 256, 384, 1024, s[2] / 2, s[2]}) {
      if (group < 32 || group % 32 || s[2] % group) continue;
      check<gemm::Int4, I8>("w4a8", w4a8, {s[0], s[1], s[2], group}, BF16, BF16, true);
      check<gemm::Int8, I8>("w8a8", w8a8, {s[0], s[1], s[2], group}, F16, F16, false);
      check<gemm::Int4, B16>("w4a16", w4a16, {s[0], s[1], s[2], group}, s[0] % 2 ? F16 : BF16, F32, true);
    }
    check<gemm::Int4, I8>("w4a8", w4a8, {s[0], s[1], s[2], 32}, F32, F32, false);
    check<gemm::Int8, I8>("w8a8", w8a8, {s[0], s[1], s[2], s[2]}, F32, F32, true);
    check<gemm::Int4, B16>("w4a16", w4a16, {s[0], s[1], s[2], s[2]}, F32, BF16, false);
  }
}

// Parts cover K, each column once, none of them has a piece of a scale's columns more than its own, and no block more warps than it may.
void check_parts() {
  for (int k = 32; k <= 20480; k += 32)
    for (int group = 32; group <= k; group += 32) {
      if (k % group) continue;
      gemm::Parts parts = gemm::Parts::of(k, group);
      int next = 0;
      bool right = parts.warps >= 1 && parts.warps <= gemm::MOST_WARPS && (parts.count - 1) / parts.warps + 1 == parts.rounds;
      right = right && parts.warps * (parts.rounds - 1) < parts.count;
      for (int p = 0; p < parts.count; p++) {
        int begin = parts.begin(p, group), width = parts.width(p, k, group);
        bool whole = begin % group == 0 && (begin + width) % group == 0, within = begin / group == (begin + width - 1) / group;
        right = right && begin == next && width > 0 && width % 32 == 0 && width < 2048 && (group < gemm::LARGE ? whole : within);
        if (!parts.inside) right = right && width / group <= parts.part_scales && parts.stride >= (parts.part_scales + 3) / 4 * 4;
        next = begin + width;
      }
      if (!right || next != k) fprintf(stderr, "parts of %d by groups of %d\n", k, group), exit(1);
    }
}

// Numbers around 0, nothing but zeros, and tokens with something in them that is no number.
void check_activations() {
  for (FloatType type : {BF16, F16, F32})
    for (int k : {32, 96, 2880})
      for (int turn = 0; turn < 8; turn++) {
        int m = 3, kind = turn / 2;
        std::vector<uint32_t> input(m * k);
        std::vector<int8_t> codes(m * k + 1, 77);
        std::vector<float> scales(m + 1, 77);
        std::normal_distribution<float> normal(0, 1);
        for (int i = 0; i < m * k; i++) {
          float x = kind == 1 ? 0 : normal(draw);
          if (i == m * k - 5 && kind >= 2) x = kind == 2 ? NAN : INFINITY;
          write_float(input.data(), i, type, x);
        }
        activations::Arguments p = {input.data(), reinterpret_cast<uint8_t*>(codes.data()), scales.data(), m, k, type, 0};
        simt::launch({m, 1, 1}, activations::THREADS, activations::THREADS * 4, turn % 2, [&] { quantize_activations(p); });
        for (int t = 0; t < m; t++) {
          float most = 0;
          bool none = false;
          for (int i = t * k; i < (t + 1) * k; i++) {
            float x = read_float(input.data(), i, type);
            none = none || !isfinite(x);
            most = fmaxf(most, fabsf(x));
          }
          float scale = most == 0 ? ldexpf(1, -23) : most / 127.5f;
          if (none ? !isnan(scales[t]) : scales[t] != scale) fprintf(stderr, "scale %g, wanted %g\n", scales[t], scale), exit(1);
          for (int i = t * k; i < (t + 1) * k && !none; i++) {
            float x = read_float(input.data(), i, type), want = nearbyintf(fminf(fmaxf(x / scale, -128), 127));
            if (codes[i] != want) fprintf(stderr, "%g under %g is %d, wanted %g\n", x, scale, codes[i], want), exit(1);
          }
        }
        if (codes[m * k] != 77 || scales[m] != 77) fprintf(stderr, "something was written behind the codes\n"), exit(1);
        checks++;
      }
}

// RMSNorm beside a plain loop in f64, and its codes beside those of quantize_activations on the same numbers.
void check_norm() {
  for (FloatType type : {BF16, F16, F32})
    for (int k : {32, 96, 2880, 12288}) {
      const int m = 3;
      std::vector<uint32_t> input(m * k), weight(k), output(m * k + 4, 77), again(m * k);
      std::vector<uint8_t> codes(m * k + 1, 77), wanted(m * k);
      std::vector<float> scales(m + 1, 77), wanted_scales(m);
      std::normal_distribution<float> normal(0, 2);
      for (int i = 0; i < m * k; i++) write_float(input.data(), i, type, i / k == 1 ? 0 : normal(draw));
      for (int i = 0; i < k; i++) write_float(weight.data(), i, BF16, normal(draw));
      activations::Arguments p = {input.data(), codes.data(), scales.data(), m, k, type, 0};
      activations::Norm norm = {weight.data(), output.data(), BF16, 1e-5f};
      simt::launch({m, 1, 1}, activations::THREADS, activations::THREADS * 4, k == 96, [&] { normalize_activations(p, norm); });
      for (int t = 0; t < m; t++) {
        double squares = 0;
        for (int i = 0; i < k; i++) squares += pow(double(read_float(input.data(), t * k + i, type)), 2);
        for (int i = 0; i < k; i++) {
          double want = read_float(input.data(), t * k + i, type) / sqrt(squares / k + 1e-5) * read_float(weight.data(), i, BF16);
          double have = read_float(output.data(), t * k + i, type), half = type == BF16 ? 1.0 / 256 : type == F16 ? 1.0 / 2048 : 0;
          if (!(fabs(have - want) <= (half + 2e-6) * fabs(want) + 1e-7)) fprintf(stderr, "normal number %g, wanted %g\n", have, want), exit(1);
        }
      }
      activations::Arguments q = {output.data(), wanted.data(), wanted_scales.data(), m, k, type, 0};
      simt::launch({m, 1, 1}, activations::THREADS, activations::THREADS * 4, false, [&] { quantize_activations(q); });
      bool same = memcmp(codes.data(), wanted.data(), wanted.size()) == 0 && memcmp(scales.data(), wanted_scales.data(), 4 * m) == 0;
      if (!same || codes[m * k] != 77 || scales[m] != 77) fprintf(stderr, "codes of normal numbers\n"), exit(1);
      checks++;
    }
}

void check_dequantization() {
  for (FloatType type : {BF16, F16, F32})
    for (int n : {1, 65, 130})
      for (int k : {32, 96, 288}) {
        std::vector<uint8_t> codes(n * k / 2), scales(n * k / 32);
        random_bytes(codes);
        random_bytes(scales);
        scales[0] = 0, scales.back() = 255;
        std::vector<uint32_t> rows(n * k + 1, 0xa5a5a5a5), turned(n * k + 1, 0xa5a5a5a5);
        mxfp4::Arguments p = {codes.data(), scales.data(), rows.data(), n, k, type};
        simt::launch({ceil_div(n * k / 8, mxfp4::THREADS), 1, 1}, mxfp4::THREADS, 16, false, [&] { dequantize_mxfp4(p); });
        p.output = turned.data();
        Dim3 grid = {ceil_div(n, mxfp4::TILE), k / mxfp4::GROUP, 1};
        simt::launch(grid, mxfp4::THREADS, mxfp4::GROUP * (mxfp4::TILE + 1) * 4, true, [&] { dequantize_mxfp4_turned(p); });
        static const double VALUES[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
        for (int row = 0; row < n; row++)
          for (int c = 0; c < k; c++) {
            int byte = codes[row * (k / 2) + c / 2], nibble = c % 2 ? byte >> 4 : byte & 15, e = scales[row * (k / 32) + c / 32];
            double exact = ldexp((nibble & 8 ? -1 : 1) * VALUES[nibble & 7], e - 127);
            uint32_t want = 0;
            write_float(&want, 0, type, e == 255 ? NAN : float(exact));
            float a = read_float(rows.data(), row * k + c, type), b = read_float(turned.data(), c * n + row, type);
            float w = read_float(&want, 0, type);
            bool same = isnan(w) ? isnan(a) && isnan(b) : to_bits(a) == to_bits(w) && to_bits(b) == to_bits(w);
            // BF16 and F32 have every one of them.
            if (type != F16 && e != 255 && fabs(exact) < 3e38) same = same && a == exact;
            if (!same) fprintf(stderr, "row %d column %d: %g and %g, wanted %g\n", row, c, a, b, w), exit(1);
          }
        checks += 2;
      }
}

// Conversions of every 16-bit float there is, and of what lies halfway between two.
void check_floats() {
  for (uint32_t bits = 0; bits < 0x10000; bits++) {
    uint16_t half = uint16_t(bits);
    int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    double sign = bits & 0x8000 ? -1 : 1;
    double exact = exponent == 31 ? (fraction ? NAN : sign * INFINITY)
                                  : sign * (exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24));
    float value = f16_value(half);
    if (isnan(exact) ? !isnan(value) || !isnan(f16_value(to_f16(value))) : value != exact || to_f16(value) != half)
      fprintf(stderr, "F16 %04x is %g\n", bits, value), exit(1);
    if (isfinite(value) && isfinite(f16_value(half + 1))) {
      float between = (value + f16_value(half + 1)) / 2;
      if (to_f16(between) != (half & 1 ? half + 1 : half)) fprintf(stderr, "F16 between %04x and the next\n", bits), exit(1);
    }
    float wide = bf16_value(half);
    if (!isnan(wide) && to_bf16(wide) != half) fprintf(stderr, "BF16 %04x\n", bits), exit(1);
    float halfway = from_bits(bits << 16 | 0x8000);
    if (isfinite(halfway) && to_bf16(halfway) != (half & 1 ? half + 1 : half)) fprintf(stderr, "BF16 behind %04x\n", bits), exit(1);
  }
}

// A whole mixture of experts: rows grouped, inputs rounded, gate and up with SwiGLU, rounded, down, added. Experts without rows among them.
using ExpertsKernel = void (*)(gemm::Arguments, gemm::Experts);

template <class Codes, class Inputs>
void check_experts(const char* name, const ExpertsKernel* kernels, int tokens, int hidden, int inner, int count, int top_k, int group,
                   FloatType type) {
  const float ALPHA = 1.702f, LIMIT = 7.0f;
  FloatType scale_type = BF16;
  std::uniform_real_distribution<float> unit(-1, 1);
  struct Weight {
    std::vector<uint8_t> codes, scales;
    std::vector<uint32_t> bias;
  };
  auto weight = [&](int n, int k) {
    Weight w;
    w.codes.resize(size_t(count) * n * k * Codes::STAGE_BYTES / gemm::COLUMNS);
    random_bytes(w.codes);
    w.scales.resize(size_t(count) * n * (k / group) * (Codes::E8M0 ? 1 : 2));
    for (size_t i = 0; i < size_t(count) * n * (k / group); i++) {
      if (Codes::E8M0) w.scales[i] = uint8_t(119 + draw() % 3);
      else write_float(w.scales.data(), i, scale_type, unit(draw) * 0.01f);
    }
    w.bias.resize(count * n);
    for (int i = 0; i < count * n; i++) write_float(w.bias.data(), i, type, unit(draw));
    return w;
  };
  Weight gate_up = weight(2 * inner, hidden), down = weight(hidden, inner);
  std::vector<int> chosen;
  std::vector<float> weights;
  for (int t = 0; t < tokens; t++) {
    // Ascending, and never the second expert.
    std::vector<bool> in(count);
    for (int left = top_k; left > 0;) {
      int e = draw() % count;
      if (e != 1 && !in[e]) in[e] = true, left--;
    }
    for (int e = 0; e < count; e++)
      if (in[e]) chosen.push_back(e), weights.push_back(fabsf(unit(draw)));
  }
  std::vector<uint32_t> x(tokens * hidden);
  for (int i = 0; i < tokens * hidden; i++) write_float(x.data(), i, type, unit(draw));
  // A token that is none must not become one.
  if (tokens == 5) write_float(x.data(), 4 * hidden + 3, type, NAN);
  int rows_count = tokens * top_k;

  for (int turn = 0; turn < 2 * SIZES; turn++) {
    int size = turn / 2;
    bool backwards = turn % 2;
    Block block = BLOCKS[size];
    int tile = block.tokens, tiles_count = rows_count / tile + count;
    std::vector<int> rows(rows_count, -7), places(rows_count, -7);
    // Sixteen bytes are read at once.
    alignas(16) static int tiles[4 * 4096];
    std::fill(std::begin(tiles), std::end(tiles), -7);
    int used = -7;
    routes::Arguments r = {chosen.data(), &used, rows.data(), places.data(), tiles, tokens, top_k, count, tile, tiles_count};
    simt::launch({1, 1, 1}, routes::THREADS, routes::SHARED, backwards, [&] { group_rows(r); });
    // Tiles cover the rows, those of an expert after those of the one before; each row is its token's, tokens ascending.
    std::vector<int> expert_of(rows_count, -1);
    int covered = 0;
    for (int i = 0; i < used; i++) {
      const int *t = tiles + 4 * i, before = i == 0 ? -1 : t[-4];
      bool right = t[0] >= before && t[1] == covered && t[2] >= 1 && t[2] <= tile && t[3] == 0;
      // Only the last tile of an expert has room.
      right = right && (i == 0 || t[0] != before || t[-2] == tile);
      if (!right) fprintf(stderr, "tile %d: expert %d, row %d, %d rows\n", i, t[0], t[1], t[2]), exit(1);
      for (int row = t[1]; row < t[1] + t[2]; row++) expert_of[row] = t[0];
      covered += t[2];
    }
    if (covered != rows_count || used > tiles_count || tiles[4 * used] != -7) fprintf(stderr, "%d rows in %d tiles\n", covered, used), exit(1);
    for (int i = 0; i < rows_count; i++) {
      int e = chosen[i], at = places[i];
      bool rises = at == 0 || expert_of[at - 1] != e || rows[at] > rows[at - 1];
      if (expert_of[at] != e || rows[at] != i / top_k || !rises) fprintf(stderr, "row of entry %d\n", i), exit(1);
    }

    // Inputs of bf16 go in as they are.
    std::vector<uint8_t> codes(tokens * hidden * Inputs::BYTES), hidden_codes(rows_count * inner * Inputs::BYTES);
    std::vector<float> scales(tokens), hidden_scales(rows_count);
    std::vector<uint32_t> h(rows_count * inner, 0xa5a5a5a5), y(rows_count * hidden, 0xa5a5a5a5), out(tokens * hidden, 0xa5a5a5a5);
    auto round = [&](std::vector<uint32_t>& from, std::vector<uint8_t>& to, std::vector<float>& s, int m, int k) {
      if (!Inputs::SCALED) {
        memcpy(to.data(), from.data(), to.size());
        return;
      }
      activations::Arguments a = {from.data(), to.data(), s.data(), m, k, type, 0};
      simt::launch({m, 1, 1}, activations::THREADS, activations::THREADS * 4, backwards, [&] { quantize_activations(a); });
    };
    auto product = [&](const Weight& w, const std::vector<uint8_t>& in, const std::vector<float>& s, std::vector<uint32_t>& to, int n,
                       int k, bool gated) {
      gemm::Arguments p = {};
      p.weight = w.codes.data(), p.weight_scale = w.scales.data(), p.input = in.data(), p.input_scale = s.data();
      p.bias = w.bias.data(), p.output = to.data(), p.m = rows_count, p.n = n, p.k = k, p.group = group;
      p.parts = gemm::Parts::of(k, group), p.scale_type = scale_type, p.output_type = type;
      gemm::Experts e = {tiles, &used, gated ? rows.data() : nullptr, gated, ALPHA, LIMIT};
      simt::ranges.clear();
      simt::allow(w.codes);
      simt::allow(w.scales);
      simt::allow(in);
      Dim3 grid = {tiles_count, ceil_div(n, block.rows), 1};
      size_t shared = shared_bytes<Codes, Inputs>(size, k, group, scale_type);
      simt::launch(grid, threads_of(size, p.parts), shared, backwards, [&] { kernels[size](p, e); });
    };
    round(x, codes, scales, tokens, hidden);
    product(gate_up, codes, scales, h, 2 * inner, hidden, true);
    round(h, hidden_codes, hidden_scales, rows_count, inner);
    product(down, hidden_codes, hidden_scales, y, hidden, inner, false);
    combine::Arguments c = {y.data(), places.data(), weights.data(), out.data(), hidden, top_k, type};
    simt::launch({tokens, ceil_div(hidden, combine::THREADS), 1}, combine::THREADS, 16, backwards, [&] { combine_experts(c); });

    // The same, a token and an expert at a time. What was rounded to int8 is taken from the kernel that is checked above.
    auto expert = [&](const Weight& w, int e, const uint8_t* in, float scale, int row, int n, int k) {
      gemm::Arguments p = {};
      p.n = n, p.k = k, p.group = group, p.scale_type = scale_type, p.output_type = type, p.parts = gemm::Parts::of(k, group);
      p.weight = w.codes.data() + size_t(e) * n * k * Codes::STAGE_BYTES / gemm::COLUMNS;
      p.weight_scale = w.scales.data() + size_t(e) * n * (k / group) * (Codes::E8M0 ? 1 : 2);
      p.bias = reinterpret_cast<const char*>(w.bias.data()) + size_t(e) * n * (type == F32 ? 4 : 2);
      p.input = in, p.input_scale = &scale;
      return plain::output<Codes, Inputs>(p, 0, row);
    };
    // `slack` is what the sums of tensor cores in f32 may differ by; without it every bit is known.
    auto same = [&](const std::vector<uint32_t>& array, int64_t at, float want, double slack, const char* what) {
      uint32_t rounded = 0;
      write_float(&rounded, 0, type, want);
      float have = read_float(array.data(), at, type);
      want = read_float(&rounded, 0, type);
      bool near = slack > 0 && fabs(have - want) <= slack + ulp(type) * fabs(want);
      if (isnan(want) ? !isnan(have) : to_bits(have) != to_bits(want) && !near)
        fprintf(stderr, "%s, tiles of %d: %s %ld is %.9g, wanted %.9g\n", name, tile, what, long(at), have, want), exit(1);
    };
    auto slack = [](double size) { return Inputs::SCALED ? 0 : 2e-6 * size; };
    for (int t = 0; t < tokens; t++) {
      std::vector<float> sums(hidden, 0);
      for (int i = t * top_k; i < (t + 1) * top_k; i++) {
        int row = places[i], e = chosen[i];
        for (int j = 0; j < inner; j++) {
          const uint8_t* in = &codes[t * hidden * Inputs::BYTES];
          plain::Output first = expert(gate_up, e, in, scales[t], 2 * j, 2 * inner, hidden);
          plain::Output second = expert(gate_up, e, in, scales[t], 2 * j + 1, 2 * inner, hidden);
          float gate = first.stated > LIMIT ? LIMIT : first.stated;
          float up = second.stated > LIMIT ? LIMIT : second.stated < -LIMIT ? -LIMIT : second.stated;
          // Both factors are below 9, and the slope of the first is below 1.2.
          same(h, row * inner + j, (up + 1) * (gate / (1 + expf(-ALPHA * gate))), 10 * slack(first.size + second.size), "hidden value");
        }
        for (int j = 0; j < hidden; j++) {
          plain::Output wanted = expert(down, e, &hidden_codes[row * inner * Inputs::BYTES], hidden_scales[row], j, hidden, inner);
          same(y, row * hidden + j, wanted.stated, slack(wanted.size), "output of an expert");
          sums[j] = fmaf(weights[i], read_float(y.data(), row * hidden + j, type), sums[j]);
        }
      }
      for (int j = 0; j < hidden; j++) same(out, t * hidden + j, sums[j], 0, "output");
    }
    checks += 6;
  }
}

#define ALL_EXPERTS(name) \
  { name##_experts_16x8, name##_experts_16x16, name##_experts_32x8, name##_experts_32x16, name##_experts_64x64, name##_experts_128x64 }

void check_mixtures() {
  const ExpertsKernel mxfp4[] = ALL_EXPERTS(mxfp4_a8), w4a8[] = ALL_EXPERTS(w4a8), w8a8[] = ALL_EXPERTS(w8a8);
  const ExpertsKernel mxfp4_a16[] = ALL_EXPERTS(mxfp4_a16), w4a16[] = ALL_EXPERTS(w4a16);
  using I8 = gemm::Int8Inputs;
  using B16 = gemm::Bf16Inputs;
  // As many experts as there may be.
  check_experts<gemm::E2m1, I8>("mxfp4_a8", mxfp4, 3, 32, 32, routes::EXPERTS, 4, 32, F32);
  // Two experts with more rows than any tile.
  check_experts<gemm::E2m1, I8>("mxfp4_a8", mxfp4, 70, 64, 32, 3, 2, 32, BF16);
  check_experts<gemm::Int4, B16>("w4a16", w4a16, 70, 64, 64, 3, 2, 64, BF16);
  for (int tokens : {1, 5, 33}) {
    check_experts<gemm::E2m1, I8>("mxfp4_a8", mxfp4, tokens, 96, 64, 6, 2, 32, F32);
    check_experts<gemm::E2m1, I8>("mxfp4_a8", mxfp4, tokens, 64, 160, 4, 3, 32, BF16);
    check_experts<gemm::Int4, I8>("w4a8", w4a8, tokens, 128, 64, 6, 2, 64, BF16);
    check_experts<gemm::Int8, I8>("w8a8", w8a8, tokens, 64, 32, 5, 2, 32, F16);
    check_experts<gemm::E2m1, B16>("mxfp4_a16", mxfp4_a16, tokens, 64, 160, 4, 3, 32, BF16);
    check_experts<gemm::Int4, B16>("w4a16", w4a16, tokens, 128, 128, 6, 2, 64, BF16);
  }
}

// Every decoder over every byte, in every place of a word.
void check_decoders() {
  for (int low = 0; low < 256; low++) {
    for (int high = 0; high < 256; high++) {
      uint32_t word = uint32_t(low | high << 8) * 0x00010001u;
      gemm::Eight int4 = gemm::Int4::bytes(gemm::Int4::masks(), word);
      gemm::Halves e2m1_half = gemm::E2m1::halves(gemm::E2m1::half_tables(), word), int4_half = gemm::Int4::halves({}, word);
      gemm::Eight first, second;
      gemm::E2m1::summands(gemm::E2m1::summand_tables(), word, first, second);
      for (int i = 0; i < 8; i++) {
        int nibble = word >> (4 * i) & 15;
        auto byte = [i](gemm::Eight e) { return int8_t((i < 4 ? e.low : e.high) >> (8 * (i % 4))); };
        auto half = [i](gemm::Halves h) { return bf16_value(uint16_t(h.pairs[i / 2] >> (16 * (i % 2)))); };
        bool bytes = byte(first) + byte(second) == e2m1_doubled(nibble) && byte(int4) == (nibble - 8) * 16;
        bool halves = half(e2m1_half) == 0.5f * e2m1_doubled(nibble) && half(int4_half) == nibble - 8;
        if (!bytes || !halves) {
          fprintf(stderr, "word %08x, nibble %d: %d %d %d %g %g\n", word, i, byte(first), byte(second), byte(int4), half(e2m1_half), half(int4_half));
          exit(1);
        }
      }
    }
  }
}

// Chunks of a tile have places of their own, and what a warp reads at once has no two words in one bank.
void check_places() {
  struct Tile {
    int (*place)(int row, int chunk);
    int chunks, words;  // 16-byte chunks of a row; words that a lane reads at once
  };
  for (Tile tile : {Tile{gemm::chunk_of_64, 4, 1}, Tile{gemm::chunk_of_128, 8, 2}}) {
    std::vector<bool> taken(64 * tile.chunks);
    for (int row = 0; row < 64; row++)
      for (int c = 0; c < tile.chunks; c++) {
        int at = tile.place(row, c);
        if (at >= int(taken.size()) || taken[at]) fprintf(stderr, "chunk %d of row %d\n", c, row), exit(1);
        taken[at] = true;
      }
    // 32 words go at once: as many rows as have that, four lanes each.
    int rows = 8 / tile.words;
    for (int first = 0; first < 64; first += rows)
      for (int group = 0; group < 4; group++) {
        uint64_t banks = 0;
        for (int row = first; row < first + rows; row++)
          for (int word = 0; word < 4 * tile.words; word++) {
            int at = tile.place(row, group * tile.words + word / 4) * 4 + word % 4;
            if (banks >> at % 32 & 1) fprintf(stderr, "two words in bank %d\n", at % 32), exit(1);
            banks |= uint64_t(1) << at % 32;
          }
      }
  }
}

}  // namespace

int main() {
  simt::most_shared = 227 << 10;
  check_parts();
  check_places();
  check_floats();
  check_decoders();
  check_activations();
  check_norm();
  check_dequantization();
  check_products();
  check_mixtures();
  printf("%d launches gave what plain loops give\n", checks);
}
