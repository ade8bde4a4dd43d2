// Vectors of numbers for native CPU code: as wide as the instruction set this file is compiled for.
//
// A vector is a type of the compiler (GCC, Clang) on which arithmetic, comparisons and ?: work lane by lane, so that
// the scalar functions that CUDA uses take it as they stand. Other compilers get vectors of one lane.
#pragma once

#include <algorithm>
#include <type_traits>

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
  typedef std::conditional_t<sizeof(State) == 4, int32_t, int64_t> Index;
#if defined(__GNUC__)
  static constexpr int kLanes = SEAL_VECTOR_BYTES / sizeof(State);
  typedef State type __attribute__((vector_size(SEAL_VECTOR_BYTES)));
  typedef Index indices __attribute__((vector_size(SEAL_VECTOR_BYTES)));
#else
  static constexpr int kLanes = 1;
  typedef State type;
  typedef Index indices;
#endif
};

template <typename State>
using Vector = typename VectorOf<State>::type;

// Integers beside a Vector<State>, one for each lane.
template <typename State>
using Indices = typename VectorOf<State>::indices;

// a / b within 2^-14 of it.
template <typename Float>
SEAL_FN Float divide_roughly(Float a, Float b) { return a / b; }

#if defined(__GNUC__)

typedef uint32_t WideBits __attribute__((vector_size(SEAL_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(SEAL_VECTOR_BYTES / 2)));

template <>
struct BitsOf<Vector<float>> { typedef WideBits type; };
template <>
struct FloatOf<WideBits> { typedef Vector<float> type; };

typedef uint64_t LongBits __attribute__((vector_size(SEAL_VECTOR_BYTES)));

template <>
struct BitsOf<Vector<double>> { typedef LongBits type; };
template <>
struct FloatOf<LongBits> { typedef Vector<double> type; };

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

SEAL_FN Vector<float> divide_roughly(Vector<float> a, Vector<float> b) {
  return a * (Vector<float>)_mm512_rcp14_ps((__m512)b);
}
#endif

// Right but for 0.8 units in the last place; 0 takes the place of what is less than e^-707.
SEAL_FN Vector<double> exp_negative(Vector<double> magnitude, double rate) {
  const Vector<double> zero = {}, least = zero - 707.0, x = magnitude * -rate, clamped = x < least ? least : x;
  // x = n ln 2 + r. Adding 1.5·2^52 rounds to n, and leaves it in the lowest bits; ln 2 has two parts, so that
  // n times the first is exact.
  const Vector<double> shifted = clamped * 1.4426950408889634 + 6755399441055744.0, n = shifted - 6755399441055744.0;
  const Vector<double> r = (clamped - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  // The series of e^r up to r^13, which leaves 5e-18.
  Vector<double> power = zero + 1.0;
  for (int i = 13; i >= 1; --i) power = power * r * (1.0 / i) + 1.0;
  const Vector<double> scaled = from_bits(bits_of(power) + (bits_of(shifted) << 52));
  return x < least ? zero : scaled + (clamped - clamped);  // NaN stays NaN
}

// Right but for 2 units in the last place. NaN and infinities give NaN.
SEAL_FN Vector<double> log_positive(Vector<double> x) {
  // x = 2^k (1 + f), with 1 + f from √½ to √2.
  const auto exponent = (bits_of(x) - 0x3fe6a09e667f3bcdu) & 0xfff0000000000000u;
  const Vector<double> f = from_bits(bits_of(x) - exponent) - 1.0;
  // k + 1023 in the lowest bits of 2^52 is a double, as k + 1023 is not negative.
  const Vector<double> k = from_bits((exponent + 0x3ff0000000000000u) >> 52 | 0x4330000000000000u) - 4503599627371519.0;
  // ln(1 + f) is 2 artanh(r), r = f / (2 + f); its series up to r^19 leaves 2e-17 of it.
  const Vector<double> r = f / (2.0 + f), square = r * r;
  Vector<double> series = Vector<double>{} + 2.0 / 19;
  for (int power = 17; power >= 1; power -= 2) series = series * square + 2.0 / power;
  return k * 0.6931471805599453 + r * series + (x - x);
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

// As load_vector and store_vector, of less than a vector's numbers, with zeros behind them. AVX-512 neither reads nor
// writes what a mask leaves out.
template <typename Number>
SEAL_FN auto load_part(const Number* from, int64_t count) {
  constexpr int kLanes = VectorOf<decltype(load(*from))>::kLanes;
  Number lanes[kLanes] = {};
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_maskz_loadu_epi8((uint64_t(1) << count * sizeof(Number)) - 1, from);
  std::memcpy(lanes, &bytes, sizeof lanes);
#else
  for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
#endif
  return load_vector(static_cast<const Number*>(lanes));
}

template <typename Number, typename V>
SEAL_FN void store_part(Number* to, int64_t count, V value) {
#if defined(__AVX512F__)
  __m512i bytes = _mm512_setzero_si512();
  store_vector(reinterpret_cast<Number*>(&bytes), value);
  _mm512_mask_storeu_epi8(to, (uint64_t(1) << count * sizeof(Number)) - 1, bytes);
#else
  Number lanes[VectorOf<decltype(load(*to))>::kLanes];
  store_vector(lanes, value);
  std::memcpy(to, lanes, count * sizeof(Number));
#endif
}

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

// Adds the lanes of each of N vectors to a sum.
template <typename State, int N, typename Sums>
SEAL_FN void add_lanes(const Vector<State> (&parts)[N], Sums& sums) {
#if defined(__AVX512F__)
  // Four at once take 15 instructions; one by one, each takes eight.
  if constexpr (sizeof(State) == 4 && N > 1) {
    const auto halved = [](__m512 left, __m512 right) {
      return _mm512_shuffle_f32x4(left, right, 0x88) + _mm512_shuffle_f32x4(left, right, 0xdd);
    };
    const auto part = [&](int n) { return (__m512)parts[n < N ? n : N - 1]; };
    for (int n = 0; n < N; n += 4) {
      __m512 four = halved(halved(part(n), part(n + 1)), halved(part(n + 2), part(n + 3)));
      four += _mm512_shuffle_ps(four, four, 0x4e);
      four += _mm512_shuffle_ps(four, four, 0xb1);
      float lanes[16];
      std::memcpy(lanes, &four, sizeof lanes);
      for (int m = 0; m < 4 && n + m < N; ++m) sums[n + m] += lanes[4 * m];
    }
    return;
  }
#endif
  for (int n = 0; n < N; ++n) sums[n] += sum_of_lanes<State>(parts[n]);
}

template <typename State>
SEAL_FN State max_of_lanes(Vector<State> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(State) == 4) return _mm512_reduce_max_ps((__m512)value);
  else return _mm512_reduce_max_pd((__m512d)value);
#endif
  State lanes[VectorOf<State>::kLanes];
  std::memcpy(lanes, &value, sizeof lanes);
  State most = lanes[0];
  for (State lane : lanes) most = lane > most ? lane : most;
  return most;
}

template <typename State>
SEAL_FN int64_t min_of_lanes(Indices<State> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(State) == 4) return _mm512_reduce_min_epi32((__m512i)value);
  else return _mm512_reduce_min_epi64((__m512i)value);
#else
  typename VectorOf<State>::Index lanes[VectorOf<State>::kLanes];
  std::memcpy(lanes, &value, sizeof lanes);
  return *std::min_element(lanes, lanes + VectorOf<State>::kLanes);
#endif
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
