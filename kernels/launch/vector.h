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

SEAL_FN Vector<float> magnitude_of(Vector<float> x) { return from_bits(bits_of(x) & 0x7fffffffu); }

#if defined(__AVX512F__)
SEAL_FN Vector<float> exp_negative(Vector<float> magnitude, float rate) {
  const Vector<float> x = magnitude * (rate * -1.44269504f);
  const Vector<float> fraction = (Vector<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
  return (Vector<float>)_mm512_scalef_ps((__m512)exp2_of_fraction(fraction), (__m512)x);
}

// By the reciprocal to 14 bits, which all processors give alike, and a step of Newton's method.
SEAL_FN Vector<float> divide_by_moderate(Vector<float> a, Vector<float> b) {
  const Vector<float> reciprocal = (Vector<float>)_mm512_rcp14_ps((__m512)b), two = Vector<float>{} + 2.0f;
  return a * reciprocal * fused(-b, reciprocal, two);
}
#endif

SEAL_FN Vector<double> exp_negative(Vector<double> magnitude, double rate) {
  for (int lane = 0; lane < VectorOf<double>::kLanes; ++lane) magnitude[lane] = exp_negative(magnitude[lane], rate);
  return magnitude;
}

SEAL_FN Vector<double> log_positive(Vector<double> x) {
  for (int lane = 0; lane < VectorOf<double>::kLanes; ++lane) x[lane] = log_positive(x[lane]);
  return x;
}

template <typename State>
SEAL_FN Vector<State> load_vector(const State* from) {
  Vector<State> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// 16-bit numbers in the low halves of 32 bits, and back.
SEAL_FN WideBits load_halves(const void* from) {
#if defined(__AVX512F__)
  return (WideBits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (WideBits)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
  HalfBits bits;
  std::memcpy(&bits, from, sizeof bits);
  return __builtin_convertvector(bits, WideBits);
#endif
}

SEAL_FN void store_halves(void* to, WideBits wide) {
#if defined(__AVX512F__)
  const HalfBits bits = (HalfBits)_mm512_cvtepi32_epi16((__m512i)wide);
#else
  const HalfBits bits = __builtin_convertvector(wide, HalfBits);
#endif
  std::memcpy(to, &bits, sizeof bits);
}

SEAL_FN Vector<float> load_vector(const bfloat16* from) {
  return float_of_bfloat16(load_halves(from));
}

SEAL_FN Vector<float> load_vector(const float16* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return float_of_float16(load_halves(from));
#endif
}

template <typename State>
SEAL_FN void store_vector(State* to, Vector<State> value) { std::memcpy(to, &value, sizeof value); }

SEAL_FN void store_vector(bfloat16* to, Vector<float> value) {
  store_halves(to, bfloat16_of_float(value));
}

// As store_vector, of ones and zeros.
template <typename Number, typename V>
SEAL_FN void store_ones(Number* to, V value) { store_vector(to, value); }

SEAL_FN void store_ones(bfloat16* to, Vector<float> value) {
  store_halves(to, bits_of(value) >> 16);  // nothing to round
}

SEAL_FN void store_vector(float16* to, Vector<float> value) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
#else
  store_halves(to, float16_of_float(value));
#endif
}

#else

template <typename Number>
SEAL_FN auto load_vector(const Number* from) { return load(*from); }

template <typename Number, typename State>
SEAL_FN void store_vector(Number* to, State value) { store(*to, value); }

template <typename Number, typename State>
SEAL_FN void store_ones(Number* to, State value) { store(*to, value); }

#endif

// What loops go through at a time, a whole number of vectors and of bytes of packed spikes. Inner loops have always so
// many passes, each independent of the others; where fewer numbers are left, they go through a padded copy.
constexpr int kBlock = 512;

#define SEAL_EACH_VECTOR(State, i) for (int i = 0; i < kBlock; i += VectorOf<State>::kLanes)

template <typename State>
struct alignas(64) Block {
  State at[kBlock];

  SEAL_INLINE Vector<State> operator[](int i) const { return load_vector(at + i); }
  SEAL_INLINE void set(int i, Vector<State> value) { store_vector(at + i, value); }
  SEAL_INLINE void fill(State value) { SEAL_EACH_VECTOR(State, i) set(i, Vector<State>{} + value); }
};

// `count` numbers from memory as a block: in place where they are one, else in `padded`, with zeros behind them.
template <typename Number>
SEAL_FN const Number* whole_block(const Number* from, int64_t count, Number* padded) {
  if (count == kBlock) return from;
  std::memcpy(padded, from, count * sizeof(Number));
  std::memset(padded + count, 0, (kBlock - count) * sizeof(Number));
  return padded;
}

// Writes 64 bytes straight to memory, past the caches, where `to` is aligned to them.
SEAL_FN void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_load_si256(static_cast<const __m256i*>(from) + i));
  }
#elif defined(__SSE2__)
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_load_si128(static_cast<const __m128i*>(from) + i));
  }
#else
  std::memcpy(to, from, 64);
#endif
}

// Asks for memory that is read one block later, so that it is on its way while this block is computed.
template <typename Number>
SEAL_FN void fetch_ahead(const Number* from) {
#if defined(__GNUC__)
  __builtin_prefetch(from + kBlock, 0, 2);
#endif
}

// Makes what this thread streamed visible to others.
SEAL_FN void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Where a block of results is computed, and how it comes to its place: directly, or through a buffer where it is cut
// short by the end of the row, or where rows are so long that they would not stay in the caches anyway (`stream`; `to`
// is aligned to 64 bytes then).
template <typename Number>
class BlockWriter {
 public:
  BlockWriter(Number* to, int64_t count, bool stream) : to(to), count(count), direct(count == kBlock && !stream) {}

  SEAL_INLINE Number* block() { return direct ? to : buffer; }

  SEAL_INLINE void finish() {
    if (direct) return;
    if (count < kBlock) {
      std::memcpy(to, buffer, count * sizeof(Number));
      return;
    }
    constexpr int kLine = 64 / sizeof(Number);
    for (int i = 0; i < kBlock; i += kLine) stream_line(to + i, buffer + i);
  }

 private:
  alignas(64) Number buffer[kBlock];
  Number* const to;
  const int64_t count;
  const bool direct;
};

template <typename State>
SEAL_FN double sum_of_lanes(Vector<State> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(State) == 4) return _mm512_reduce_add_ps((__m512)value);
#endif
  State lanes[VectorOf<State>::kLanes];
  std::memcpy(lanes, &value, sizeof lanes);
  double sum = 0;
  for (State lane : lanes) sum += lane;
  return sum;
}

template <typename State>
SEAL_FN State max_of_lanes(Vector<State> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(State) == 4) return _mm512_reduce_max_ps((__m512)value);
#endif
  State lanes[VectorOf<State>::kLanes];
  std::memcpy(lanes, &value, sizeof lanes);
  State most = lanes[0];
  for (State lane : lanes) most = lane > most ? lane : most;
  return most;
}

// Which lanes of a vector of zeros and ones hold a one: bit i for lane i.
template <typename State>
SEAL_FN uint32_t lanes_set(Vector<State> ones) {
#if defined(__AVX512F__)
  if constexpr (sizeof(State) == 4) return _mm512_test_epi32_mask((__m512i)ones, (__m512i)ones);
#elif defined(__AVX2__)  // moves the highest bit of each lane; of those in a one, the third is set
  if constexpr (sizeof(State) == 4) return _mm256_movemask_ps((__m256)_mm256_slli_epi32((__m256i)ones, 2));
#elif defined(__SSE2__)
  if constexpr (sizeof(State) == 4) return _mm_movemask_ps((__m128)_mm_slli_epi32((__m128i)ones, 2));
#endif
  State numbers[VectorOf<State>::kLanes];
  std::memcpy(numbers, &ones, sizeof numbers);
  uint32_t bits = 0;
  for (int lane = 0; lane < VectorOf<State>::kLanes; ++lane) bits |= uint32_t(numbers[lane] != 0) << lane;
  return bits;
}
