// Access of CUDA kernels to neighbouring numbers: 16 bytes at once, or less where there is less; and what arithmetic
// they have besides that of numbers.h.
#pragma once

#include "numbers.h"

// a b + c in one rounding where that is one instruction: for gradients and sums.
SEAL_FN float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SEAL_FN double multiply_add(double a, double b, double c) { return a * b + c; }

template <int BYTES>
struct WordOf { typedef uint4 type; };
template <>
struct WordOf<8> { typedef uint2 type; };
template <>
struct WordOf<4> { typedef uint32_t type; };
template <>
struct WordOf<2> { typedef uint16_t type; };

template <typename Number, int VECTOR>
struct Group { Number at[VECTOR]; };  // neighbouring numbers

template <bool ORDERED = false, typename Word>
SEAL_FN Word load_word(const Word* from) { return *from; }

#ifdef __CUDA_ARCH__
template <bool ORDERED>
SEAL_FN uint4 load_word(const uint4* from) {
  if (!ORDERED) return *from;
  uint4 word;
  asm volatile("ld.relaxed.cta.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w) : "l"(from));
  return word;
}
template <bool ORDERED>
SEAL_FN uint2 load_word(const uint2* from) {
  if (!ORDERED) return *from;
  uint2 word;
  asm volatile("ld.relaxed.cta.global.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "l"(from));
  return word;
}
template <bool ORDERED>
SEAL_FN uint32_t load_word(const uint32_t* from) {
  if (!ORDERED) return *from;
  uint32_t word;
  asm volatile("ld.relaxed.cta.global.u32 %0, [%1];" : "=r"(word) : "l"(from));
  return word;
}
template <bool ORDERED>
SEAL_FN uint16_t load_word(const uint16_t* from) {
  if (!ORDERED) return *from;
  uint16_t word;
  asm volatile("ld.relaxed.cta.global.u16 %0, [%1];" : "=h"(word) : "l"(from));
  return word;
}
#endif

// ORDERED, from global memory alone: the loads are issued in the order of the program. Others ptxas puts off until just
// before their use, to save registers, even where a thread waits for memory several times because of it. Whoever loads
// first what is used last, and last what is used first, has all loads in flight before the first wait. Only for memory
// that the kernel does not write: the compiler may move stores across these loads.
template <int VECTOR, bool ORDERED = false, typename Number>
SEAL_FN Group<Number, VECTOR> read(const Number* from) {
  typedef typename WordOf<sizeof(Group<Number, VECTOR>)>::type Word;
  constexpr int WORDS = sizeof(Group<Number, VECTOR>) / sizeof(Word);
  Word words[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = load_word<ORDERED>(reinterpret_cast<const Word*>(from) + i);
  Group<Number, VECTOR> group;
  memcpy(&group, words, sizeof group);
  return group;
}

// WHOLE, to global memory alone: __stwb is an ordinary store that the compiler does not take apart where it knows some
// of the numbers.
template <bool WHOLE = false, typename Number, int VECTOR>
SEAL_FN void write(Number* to, const Group<Number, VECTOR>& group) {
  typedef typename WordOf<sizeof(Group<Number, VECTOR>)>::type Word;
  constexpr int WORDS = sizeof(Group<Number, VECTOR>) / sizeof(Word);
  Word words[WORDS];
  memcpy(words, &group, sizeof group);
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    if (WHOLE) {
      __stwb(reinterpret_cast<Word*>(to) + i, words[i]);
    } else {
      reinterpret_cast<Word*>(to)[i] = words[i];
    }
  }
}

template <int VECTOR, typename Real>
SEAL_FN Group<Real, VECTOR> row_or(const Real* row, int64_t n, Real otherwise) {
  if (row) return read<VECTOR>(row + n);
  Group<Real, VECTOR> group;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) group.at[i] = otherwise;
  return group;
}

// Whole bytes of the warp's bits, VECTOR of which each of its threads has.
template <int VECTOR>
SEAL_FN void write_bits(uint8_t* row, uint32_t bits, int64_t n, bool inside) {
#pragma unroll
  for (int lanes = 1; lanes * VECTOR < 8; lanes *= 2) {
    bits |= __shfl_down_sync(0xffffffffu, bits, lanes) << (lanes * VECTOR);
  }
  if (inside && n % 8 == 0) row[n / 8] = static_cast<uint8_t>(bits);
}
