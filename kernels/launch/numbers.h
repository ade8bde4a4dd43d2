// Number formats and elementary functions that CUDA and native CPU code share.
#pragma once

#ifdef __CUDACC__
#define SEAL_FN __device__ __forceinline__
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define SEAL_FN static inline
#endif

// Storage of 16-bit numbers; arithmetic on them is in float.
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

SEAL_FN uint32_t bits_of(float value) {
#ifdef __CUDACC__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

SEAL_FN float from_bits(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

SEAL_FN float load(float value) { return value; }
SEAL_FN double load(double value) { return value; }
SEAL_FN float load(bfloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

SEAL_FN float load(float16 value) {
  // Shifted to float's place, an exponent is 112 too small; multiplying by 2^112 mends it, and subnormals with it.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t finite = bits_of(from_bits(rest) * 0x1p112f);
  return from_bits(sign | ((value.bits & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : finite));
}

// Rounding to the nearest, ties to even.
SEAL_FN void store(float& out, float value) { out = value; }
SEAL_FN void store(double& out, double value) { out = value; }

SEAL_FN void store(bfloat16& out, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

SEAL_FN void store(float16& out, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent by -112 and round off 13 bits.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Results below 2^-14: adding 0.5 moves the bits to their place, and the addition rounds.
  const uint32_t subnormal = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87.3.
SEAL_FN float exp_negative(float x) {
#ifdef __CUDACC__
  return expf(x);
#else
  // e^x = 2^k e^r with |r| <= ln(2)/2; ln(2) in two parts, so that r keeps its last bits; Taylor to r^7/7!.
  const float clamped = x < -87.3f ? -87.3f : x;
  const float k = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5·2^23 rounds to an integer
  const float r = (clamped - k * 0.693359375f) - k * -2.12194440e-4f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float scale = from_bits(static_cast<uint32_t>(static_cast<int32_t>(k) + 127) << 23);
  return x < -87.3f ? 0.0f : p * scale;
#endif
}

SEAL_FN double exp_negative(double x) { return exp(x); }
