// Vectors of numbers for native CPU code: as wide as the instruction set this file is compiled for.
//
// A vector is a type of the compiler (GCC, Clang) on which arithmetic, comparisons and ?: work lane by lane, so that
// the scalar functions that CUDA uses take it as they stand. Other compilers get vectors of one lane.
#pragma once

#include <algorithm>

#include "numbers.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SEAL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SEAL_VECTOR_BYTES 32
#else
#define SEAL_VECTOR_BYTES 16
#endif

template <typename State>
struct VectorOf {
#if defined(__GNUC__)
  static constexpr int kLanes = SEAL_VECTOR_BYTES / sizeof(State);
  typedef State type __attribute__((vector_size(SEAL_VECTOR_BYTES)));
#else
  static constexpr int kLanes = 1;
  typedef State type;
#endif
};

template <typename State>
using Vector = typename VectorOf<State>::type;

#if defined(__GNUC__)

typedef uint32_t WideBits __attribute__((vector_size(SEAL_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(SEAL_VECTOR_BYTES / 2)));

template <>
struct BitsOf<Vector<float>> { typedef WideBits type; };
template <>
struct FloatOf<WideBits> { typedef Vector<float> type; };

#if defined(__AVX512F__) || defined(__FMA__)
template <>
struct Fused<Vector<float>> {
  static SEAL_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
    return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  }
};
#endif

SEAL_FN Vector<double> exp_negative(Vector<double> x) {
  for (int lane = 0; lane < VectorOf<double>::kLanes; ++lane) x[lane] = exp_negative(x[lane]);
  return x;
}

template <typename State>
SEAL_FN Vector<State> load_vector(const State* from) {
  Vector<State> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

SEAL_FN Vector<float> load_vector(const bfloat16* from) {
  HalfBits bits;
  std::memcpy(&bits, from, sizeof bits);
  return float_of_bfloat16(__builtin_convertvector(bits, WideBits));
}

SEAL_FN Vector<float> load_vector(const float16* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  HalfBits bits;
  std::memcpy(&bits, from, sizeof bits);
  return float_of_float16(__builtin_convertvector(bits, WideBits));
#endif
}

template <typename State>
SEAL_FN void store_vector(State* to, Vector<State> value) { std::memcpy(to, &value, sizeof value); }

SEAL_FN void store_vector(bfloat16* to, Vector<float> value) {
  const HalfBits bits = __builtin_convertvector(bfloat16_of_float(value), HalfBits);
  std::memcpy(to, &bits, sizeof bits);
}

SEAL_FN void store_vector(float16* to, Vector<float> value) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
#else
  const HalfBits bits = __builtin_convertvector(float16_of_float(value), HalfBits);
  std::memcpy(to, &bits, sizeof bits);
#endif
}

#else

template <typename Number>
SEAL_FN auto load_vector(const Number* from) { return load(*from); }

template <typename Number, typename State>
SEAL_FN void store_vector(Number* to, State value) { store(*to, value); }

#endif

// What loops go through at a time: lanes enough for whole bytes of packed spikes and whole cache lines.
template <typename State>
struct Block {
  static constexpr int kLanes = VectorOf<State>::kLanes;
  static constexpr int kVectors = kLanes == 1 ? 8 : 4;
  static constexpr int kSize = kLanes * kVectors;
  Vector<State> part[kVectors];
};

#define SEAL_EACH_PART(i) for (int i = 0; i < Block<State>::kVectors; ++i)

template <typename State>
SEAL_FN Block<State> filled(State value) {
  Block<State> block;
  SEAL_EACH_PART(i) block.part[i] = Vector<State>{} + value;
  return block;
}

// The first `count` numbers of a row; zeros beyond them.
template <typename State, typename Number>
SEAL_FN Block<State> load_block(const Number* from, int64_t count) {
  Number padded[Block<State>::kSize];
  if (count < Block<State>::kSize) {
    std::memset(padded, 0, sizeof padded);
    from = static_cast<const Number*>(std::memcpy(padded, from, count * sizeof(Number)));
  }
  Block<State> block;
  SEAL_EACH_PART(i) block.part[i] = load_vector(from + i * Block<State>::kLanes);
  return block;
}

// Writes Bytes bytes straight to memory, where `to` is aligned to them.
template <int Bytes>
SEAL_FN void stream_bytes(void* to, const void* from) {
#if defined(__AVX512F__)
  if constexpr (Bytes == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#endif
#if defined(__AVX2__)
  if constexpr (Bytes == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }
#endif
#if defined(__SSE2__)
  if constexpr (Bytes == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
  }
#endif
  std::memcpy(to, from, Bytes);
}

// Makes what this thread streamed visible to others.
SEAL_FN void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// `stream` writes whole blocks past the cache, for rows so long that they would not stay there; `to` is aligned to 64
// bytes then.
template <typename State, typename Number>
SEAL_FN void store_block(Number* to, const Block<State>& block, int64_t count, bool stream) {
  constexpr int kLanes = Block<State>::kLanes;
  if (count < Block<State>::kSize) {
    Number buffer[Block<State>::kSize];
    SEAL_EACH_PART(i) store_vector(buffer + i * kLanes, block.part[i]);
    std::memcpy(to, buffer, count * sizeof(Number));
  } else if (stream) {
    SEAL_EACH_PART(i) {
      Number buffer[kLanes];
      store_vector(buffer, block.part[i]);
      stream_bytes<sizeof buffer>(to + i * kLanes, buffer);
    }
  } else {
    SEAL_EACH_PART(i) store_vector(to + i * kLanes, block.part[i]);
  }
}

// Bit i of byte j is whether number 8j + i is not 0; bits beyond `count` are 0.
template <typename State>
SEAL_FN void pack_block(uint8_t* to, const Block<State>& block, int64_t count) {
  State numbers[Block<State>::kSize];
  std::memcpy(numbers, &block, sizeof block);
  for (int64_t byte = 0; byte < (count + 7) / 8; ++byte) {
    uint8_t bits = 0;
    for (int64_t i = 0; i < std::min<int64_t>(8, count - 8 * byte); ++i) bits |= (numbers[8 * byte + i] != 0) << i;
    to[byte] = bits;
  }
}
