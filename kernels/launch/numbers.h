// Number formats and elementary functions that CUDA and native CPU code share.
//
// Functions of a template take a number or, in native code, a vector of them (vector.h).
#pragma once

#ifdef __CUDACC__
#define SEAL_INLINE __device__ __forceinline__
#define SEAL_FN SEAL_INLINE
#ifdef __CUDACC_RTC__  // has no <cstdint>
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
#else
#include <cstdint>
#endif
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __GNUC__
#define SEAL_INLINE inline __attribute__((always_inline))
#define SEAL_NOINLINE __attribute__((noinline))
#else
#define SEAL_INLINE inline
#define SEAL_NOINLINE
#endif
#define SEAL_FN static SEAL_INLINE
#endif

// An enumeration whose names launchers pass: launch/cupy.py reads them here, and export.h has native code tell them.
#ifndef SEAL_ENUM
#define SEAL_ENUM(name, ...) enum name { __VA_ARGS__ };
#endif

// Storage of 16-bit numbers; arithmetic on them is in float.
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

#ifdef __CUDACC__
SEAL_FN uint32_t bits_of(float value) { return __float_as_uint(value); }
SEAL_FN float from_bits(uint32_t bits) { return __uint_as_float(bits); }
#else
template <typename Float>
struct BitsOf;  // the integers of the same size
template <>
struct BitsOf<float> { typedef uint32_t type; };

template <typename Bits>
struct FloatOf;
template <>
struct FloatOf<uint32_t> { typedef float type; };

template <typename Float>
SEAL_FN typename BitsOf<Float>::type bits_of(Float value) {
  typename BitsOf<Float>::type bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <typename Bits>
SEAL_FN typename FloatOf<Bits>::type from_bits(Bits bits) {
  typename FloatOf<Bits>::type value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
#endif

// 16-bit numbers, in the low half of 32 bits, to float and back; rounding is to the nearest, ties to even.
template <typename Bits>
SEAL_FN auto float_of_bfloat16(Bits half) { return from_bits(half << 16); }

template <typename Bits>
SEAL_FN auto float_of_float16(Bits half) {
  // Shifted to float's place, an exponent is 112 too small; multiplying by 2^112 mends it, and subnormals with it.
  const Bits sign = (half & 0x8000u) << 16;
  const Bits rest = (half & 0x7fffu) << 13;
  const Bits finite = bits_of(from_bits(rest) * 0x1p112f);
  return from_bits(sign | ((half & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : finite));
}

template <typename Float>
SEAL_FN auto bfloat16_of_float(Float value) {
  const auto bits = bits_of(value);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? (bits >> 16) | 0x0040u : rounded;  // NaN stays NaN
}

template <typename Float>
SEAL_FN auto float16_of_float(Float value) {
  const auto bits = bits_of(value);
  const auto magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent by -112 and round off 13 bits.
  const auto normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Results below 2^-14: adding 0.5 moves the bits to their place, and the addition rounds.
  const auto subnormal = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const auto infinity = (magnitude & 0u) + 0x7c00u;
  auto half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? infinity : half;  // 65520 and above
  half = magnitude > 0x7f800000u ? infinity + 0x0200u : half;
  return half | ((bits >> 16) & 0x8000u);
}

SEAL_FN float load(float value) { return value; }
SEAL_FN double load(double value) { return value; }
SEAL_FN float load(bfloat16 value) { return float_of_bfloat16(static_cast<uint32_t>(value.bits)); }

SEAL_FN void store(float& out, float value) { out = value; }
SEAL_FN void store(double& out, double value) { out = value; }

// GPUs convert in one instruction, bfloat16 since compute capability 8.0; the rounding is the same.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
SEAL_FN void store(bfloat16& out, float value) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value)); }
#else
SEAL_FN void store(bfloat16& out, float value) { out.bits = static_cast<uint16_t>(bfloat16_of_float(value)); }
#endif
#ifdef __CUDACC__
SEAL_FN float load(float16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
SEAL_FN void store(float16& out, float value) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value)); }
#else
SEAL_FN float load(float16 value) { return float_of_float16(static_cast<uint32_t>(value.bits)); }
SEAL_FN void store(float16& out, float value) { out.bits = static_cast<uint16_t>(float16_of_float(value)); }
#endif

// a b + c, in one rounding where native code has the instruction: for gradients, and where a b is exact.
template <typename Float>
struct Fused {
  static SEAL_INLINE Float multiply_add(Float a, Float b, Float c) { return a * b + c; }
};

template <typename Float>
SEAL_FN Float fused(Float a, Float b, Float c) { return Fused<Float>::multiply_add(a, b, c); }

// |x|.
template <typename Float>
SEAL_FN Float magnitude_of(Float x) {
  const Float zero = {};
  return x < zero ? -x : x;
}

// Elementary functions for gradients, right but for a few units in the last place.

// e^(-rate·magnitude), both at least 0.
#ifdef __CUDACC__
SEAL_FN float exp_negative(float magnitude, float rate) {  // in two instructions; 0 takes the place of less than 2^-126
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(magnitude * (rate * -1.44269504f)));
  return power;
}
#else
// 2^f for 0 <= f <= 1: the polynomial of degree 5 with the least relative error, 7.5e-8.
template <typename Float>
SEAL_FN Float exp2_of_fraction(Float f) {
  const Float zero = {};
  Float p = fused(zero + 0.0018775682f, f, zero + 0.00898936111f);
  p = fused(p, f, zero + 0.0558262989f);
  p = fused(p, f, zero + 0.240153626f);
  p = fused(p, f, zero + 0.693153083f);
  return fused(p, f, zero + 0.99999994f);
}

// 2^x for x <= 0; 0 takes the place of what is less than 2^-125.
template <typename Float>
SEAL_FN Float exp2_negative(Float x) {
  const Float zero = {}, least = zero - 125.0f, clamped = x < least ? least : x;
  // Adding 1.5·2^23 rounds to an integer, and leaves it in the lowest bits.
  const Float shifted = (clamped - 0.5f) + 12582912.0f;
  const Float f = clamped - (shifted - 12582912.0f);
  const Float power = from_bits(bits_of(exp2_of_fraction(f)) + (bits_of(shifted) << 23));
  return x < least ? zero : power;
}

// ln x for normal numbers: relative error 2e-7.
template <typename Float>
SEAL_FN Float log_positive(Float x) {
  // x = 2^k (1 + f), with 1 + f from √½ to √2.
  const auto exponent = (bits_of(x) - 0x3f3504f3u) & 0xff800000u;
  const Float f = from_bits(bits_of(x) - exponent) - 1.0f;
  // k + 127 in the lowest bits of 2^23 is a float, as k + 127 is not negative.
  const Float k = from_bits((exponent + 0x3f800000u) >> 23 | 0x4b000000u) - 8388735.0f;
  // ln(1 + f)/f: the polynomial of degree 8 with the least relative error, 2.6e-8.
  Float p = fused(f, Float{} + 0.0872232541f, Float{} - 0.143663704f);
  p = fused(p, f, Float{} + 0.149520352f);
  p = fused(p, f, Float{} - 0.165624559f);
  p = fused(p, f, Float{} + 0.199568704f);
  p = fused(p, f, Float{} - 0.250020713f);
  p = fused(p, f, Float{} + 0.333341837f);
  p = fused(p, f, Float{} - 0.499999881f);
  p = fused(p, f, Float{} + 1.0f);
  return fused(k, Float{} + 0.693147181f, p * f);
}

template <typename Float>
SEAL_FN Float exp_negative(Float magnitude, float rate) {
  return exp2_negative(magnitude * (rate * -1.44269504f));
}
#endif
SEAL_FN double log_positive(double x) { return log(x); }
SEAL_FN double exp_negative(double magnitude, double rate) { return exp(magnitude * -rate); }

// a / b for 1 <= b <= 4.
template <typename Float>
SEAL_FN Float divide_by_moderate(Float a, Float b) { return a / b; }
#ifdef __CUDACC__
SEAL_FN float divide_by_moderate(float a, float b) {  // in two instructions; IEEE division takes ten
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
}
#endif
