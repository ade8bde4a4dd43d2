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
#else
#define SEAL_INLINE inline
#endif
#define SEAL_FN static SEAL_INLINE
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
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x0040u : rounded;  // NaN stays NaN
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

// e^x for x <= 0.
#ifdef __CUDACC__
SEAL_FN float exp_negative(float x) { return expf(x); }
#else
// a b + c, in one rounding where the instruction set has it: for gradients, never where spikes are decided.
template <typename Float>
struct Fused {
  static SEAL_INLINE Float multiply_add(Float a, Float b, Float c) { return a * b + c; }
};

// Relative error 2e-7, and without fused multiply-add 6e-8 |x| more; 2^-125 takes the place of what is less.
template <typename Float>
SEAL_FN Float exp_negative(Float x) {
  typedef Fused<Float> F;
  const Float zero = {}, log2_e = zero + 1.44269504f, least = zero - 125.0f;
  const Float product = x * log2_e, clamped = product < least ? least : product;
  // e^x = 2^k 2^f, |f| <= 1/2: adding 1.5·2^23 rounds to the integer k and leaves it in the lowest bits.
  const Float shifted = clamped + 12582912.0f, k = shifted - 12582912.0f;
  const Float f = product < least ? zero : F::multiply_add(x, log2_e, -k);
  // The polynomial of degree 5 with the least relative error on [-1/2, 1/2], 7.5e-8.
  Float p = F::multiply_add(zero + 0.00132764725f, f, zero + 0.00967554189f);
  p = F::multiply_add(p, f, zero + 0.0555071309f);
  p = F::multiply_add(p, f, zero + 0.240221202f);
  p = F::multiply_add(p, f, zero + 0.693146944f);
  p = F::multiply_add(p, f, zero + 1.00000012f);
  return from_bits(bits_of(p) + (bits_of(shifted) << 23));
}
#endif
SEAL_FN double exp_negative(double x) { return exp(x); }
