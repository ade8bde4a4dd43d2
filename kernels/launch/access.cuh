// Access of CUDA kernels to neighbouring numbers: 16 bytes at once, or less where there is less.
#pragma once

#include "numbers.h"

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

template <int VECTOR, typename Number>
SEAL_FN Group<Number, VECTOR> read(const Number* from) {
  typedef typename WordOf<sizeof(Group<Number, VECTOR>)>::type Word;
  constexpr int WORDS = sizeof(Group<Number, VECTOR>) / sizeof(Word);
  Word words[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = reinterpret_cast<const Word*>(from)[i];
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
