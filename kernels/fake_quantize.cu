// Weights rounded to a number format and back: integers of 2 to 8 bits, E2M1, E2M3, E3M2, E4M3 and E5M2 under a scale of the weights' type or
// in MX blocks, NVFP4, ternary. Scales are fitted as compressed-tensors does it, every intermediate result rounded to the weights' type; the
// reference is lib/src/formats, bit for bit.
#include "small_floats.cuh"

namespace fake {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;

enum Kind : int { INT = 0, FLOAT = 1, MX = 2, NVFP4 = 3, TERNARY = 4 };

struct Arguments {
  const void* input;    // [rows, K] of type, finite
  void* output;         // [rows, K] of type, or null
  int8_t* codes;        // [rows, K]: integers, or the bits of a small float; or null
  float* scales;        // [rows, K / group], or null; read where `given`
  float* zero_points;   // the same
  int rows, k, group;
  int type;             // FloatType
  int kind, bits, symmetric;
  int fraction, bias;   // of a small float
  float most;           // its greatest value
  float global;         // of NVFP4
  int given;            // 1: scales and zero points are there; 0: they are fitted and written
};

// `x` as the weights' type has it.
DEVICE float rounded(float x, int type) {
  return type == F32 ? x : type == BF16 ? bf16_value(to_bf16(x)) : f16_value(to_f16(x));
}

// The distance from 1 to the next number of a type: what stands for a scale of 0.
DEVICE float epsilon(int type) { return from_bits(type == F32 ? 0x34000000u : type == BF16 ? 0x3c000000u : 0x3a800000u); }

DEVICE float positive(float scale, int type) {
  float x = rounded(scale, type);
  return x == 0 ? epsilon(type) : x;
}

struct Fit {
  float scale, zero_point;
};

// The scale and the zero point of weights between `low` and `high`, whose mean size is `mean`.
DEVICE Fit fit(const Arguments& p, float low, float high, float mean) {
  float size = fmaxf(fmaxf(high, -low), 0);
  switch (p.kind) {
    case INT: {
      float qmin = -float(1 << (p.bits - 1)), range = float((1 << p.bits) - 1);
      if (p.symmetric) return {positive(size / (range / 2), p.type), 0};
      low = fminf(low, 0), high = fmaxf(high, 0);
      float scale = rounded(rounded(high - low, p.type) / range, p.type);
      if (scale == 0) return {epsilon(p.type), 0};
      float zero = rounded(qmin - rounded(low / scale, p.type), p.type);
      return {scale, rintf(small::clamped(zero, qmin, qmin + range))};
    }
    case FLOAT:
      return {positive(size / p.most, p.type), 0};
    case MX: {
      // Rounded up to the next power of two where the table's greatest value would be passed by half a step.
      uint32_t half_step = p.fraction == 3 && p.bias == 1 ? 1u << 19 : 1u << 21;
      uint32_t exponent = (to_bits(size) + half_step) >> 23, greatest = (to_bits(p.most) >> 23) - 127;
      return {e8m0_value(uint8_t(exponent > greatest ? exponent - greatest : 0)), 0};
    }
    case NVFP4: {
      float stored = small::e4m3().round(p.global * rounded(size / small::E2M1_MOST, p.type));
      return {(stored == 0 ? 0.125f : stored) / p.global, 0};
    }
    default:
      return {positive(mean, p.type), 0};
  }
}

// The code of `w`, and the value of that code.
DEVICE int code_of(const Arguments& p, float w, Fit f, float& value) {
  if (p.kind == INT || p.kind == TERNARY) {
    float low = p.kind == TERNARY ? -1 : -float(1 << (p.bits - 1)), high = p.kind == TERNARY ? 1 : float((1 << (p.bits - 1)) - 1);
    float scaled = rounded(w / f.scale, p.type);
    if (p.kind == INT && !p.symmetric) scaled = rounded(scaled + f.zero_point, p.type);
    // An integer knows no -0.
    int code = int(rintf(small::clamped(scaled, low, high)));
    value = rounded((float(code) - f.zero_point) * f.scale, p.type);
    return code;
  }
  small::Small table = p.kind == NVFP4 ? small::e2m1() : small::Small{p.fraction, p.bias, p.most};
  float nearest = table.round(p.kind == FLOAT ? rounded(w / f.scale, p.type) : w / f.scale);
  value = nearest * f.scale;
  // A power of two rounds nothing.
  if (p.kind != MX) value = rounded(value, p.type);
  return table.code(nearest, p.bits);
}

}  // namespace fake

// grid: (ceil(rows * K / group / 4)). A warp a group.
KERNEL(fake::THREADS) fake_quantize(fake::Arguments p) {
  inputs_ready();
  const int lane = threadIdx.x % 32;
  int64_t group = int64_t(blockIdx.x) * fake::WARPS + threadIdx.x / 32, a_row = p.k / p.group;
  if (group >= p.rows * a_row) return;
  int64_t first = group / a_row * p.k + group % a_row * p.group;
  FloatType type = FloatType(p.type);
  fake::Fit f = {0, 0};
  if (p.given) {
    f = {p.scales[group], p.zero_points ? p.zero_points[group] : 0};
  } else {
    float low = INFINITY, high = -INFINITY, sum = 0;
    for (int i = lane; i < p.group; i += 32) {
      float w = read_float(p.input, first + i, type);
      low = fminf(low, w), high = fmaxf(high, w);
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      low = fminf(low, exchange(low, mask));
      high = fmaxf(high, exchange(high, mask));
    }
    // Eight sums, then their sum, in this order.
    if (p.kind == fake::TERNARY) {
      float own = 0;
      for (int i = lane % 8; i < p.group; i += 8) own += fabsf(read_float(p.input, first + i, type));
      for (int i = 0; i < 8; i++) sum += from_lane(own, i);
    }
    f = fake::fit(p, low, high, sum / float(p.group));
    if (lane == 0 && p.scales) p.scales[group] = f.scale;
    if (lane == 0 && p.zero_points) p.zero_points[group] = f.zero_point;
  }
  for (int i = lane; i < p.group; i += 32) {
    float value;
    int code = fake::code_of(p, read_float(p.input, first + i, type), f, value);
    if (p.codes) p.codes[first + i] = int8_t(code);
    if (p.output) write_float(p.output, first + i, type, value);
  }
}
