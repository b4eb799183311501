// Floats of 4, 6 and 8 bits without infinities in use: a sign, an exponent, a fraction (OCP Microscaling Formats 1.0, OCP 8-bit Floating Point 1.0).
#pragma once

#include "common.cuh"

namespace small {

DEVICE float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// A table of small floats: `fraction` bits of it, the exponent's bias, the greatest value.
struct Small {
  int fraction, bias;
  float most;

  DEVICE float normal() const { return from_bits(uint32_t(128 - bias) << 23); }
  DEVICE float step() const { return from_bits(uint32_t(128 - bias - fraction) << 23); }

  // To the nearest value, ties to the even code; beyond the greatest it is that.
  DEVICE float round(float x) const {
    x = clamped(x, -most, most);
    int lost = 23 - fraction;
    uint32_t bits = to_bits(x), sign = bits & 0x80000000u;
    // Added to 1.5 * 2^23 steps and taken away again, a number is a multiple of the step.
    float shift = 12582912.0f * step();
    if (fabsf(x) < normal()) return from_bits(to_bits(fabsf(x) + shift - shift) | sign);
    return from_bits((bits + ((1u << (lost - 1)) - 1) + ((bits >> lost) & 1)) & ~((1u << lost) - 1));
  }

  // The bits of one of the values, of which there are `bits`.
  DEVICE int code(float value, int bits) const {
    uint32_t size = to_bits(fabsf(value)), sign = (to_bits(value) >> 31) << (bits - 1);
    if (fabsf(value) < normal()) return int(sign | uint32_t(fabsf(value) / step()));
    return int(sign | ((size >> (23 - fraction)) - (uint32_t(127 - bias) << fraction)));
  }
};

constexpr float E2M1_MOST = 6, E4M3_MOST = 448;
HOST_DEVICE Small e2m1() { return {1, 1, E2M1_MOST}; }
HOST_DEVICE Small e4m3() { return {3, 7, E4M3_MOST}; }

}  // namespace small
