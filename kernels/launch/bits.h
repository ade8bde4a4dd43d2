// Bits for native CPU code: in words of 64, and as vectors of zeros and ones.
#pragma once

#include "vector.h"

namespace {  // of each instruction set's own code

inline int bits_set(uint64_t word) {
#if defined(__GNUC__)
  return __builtin_popcountll(word);
#else
  int count = 0;
  for (; word; word &= word - 1) ++count;
  return count;
#endif
}

// The place of the lowest bit that is set; there has to be one.
inline int lowest_bit(uint64_t word) {
#if defined(__GNUC__)
  return __builtin_ctzll(word);
#else
  return bits_set((word & (0 - word)) - 1);
#endif
}

// `count` bits, 64 at most, from bit `first` on of `bytes` bytes; zeros are above them.
inline uint64_t bits_from(const uint8_t* from, int64_t bytes, int64_t first, int64_t count) {
  const int64_t byte = first / 8;
  const int shift = int(first % 8);
  uint64_t word = 0;
  std::memcpy(&word, from + byte, size_t(std::min<int64_t>(8, bytes - byte)));
  word >>= shift;
  if (shift && byte + 8 < bytes) word |= uint64_t(from[byte + 8]) << (64 - shift);
  return count < 64 ? word & ((uint64_t(1) << count) - 1) : word;
}

// A vector of ones where bits are set and zeros elsewhere, of the lanes from `first` on of a block's bits.
template <typename State>
SEAL_FN Vector<State> ones_of_bits(const uint8_t* bits, int first) {
  constexpr int kLanes = VectorOf<State>::kLanes;
  typedef typename VectorOf<State>::Index Index;
  Index set = bits[first / 8] >> (first % 8);
  if constexpr (kLanes > 8) set |= Index(bits[first / 8 + 1]) << 8;
  Index weights[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) weights[lane] = Index(1) << lane;
  Indices<State> lanes;
  std::memcpy(&lanes, weights, sizeof lanes);
  const Vector<State> zero = {}, one = zero + State(1);
  return (lanes & set) != 0 ? one : zero;
}

// Where transpose_spread expects word i: numbers that differ in their three lowest bits lie whole vectors apart.
constexpr int64_t spread(int64_t i) { return i % 8 * 8 + i / 8; }

// A step of transposing a matrix of bits: exchanges them between words DISTANCE apart and bits SHIFT apart.
template <int DISTANCE, int SHIFT>
SEAL_FN void exchange_bits(uint64_t (&words)[64], uint64_t mask) {
  for (int i = 0; i < 64; i += VectorOf<uint64_t>::kLanes) {
    if (i & DISTANCE) continue;
    Vector<uint64_t> low, high;
    std::memcpy(&low, words + i, sizeof low);
    std::memcpy(&high, words + i + DISTANCE, sizeof high);
    const Vector<uint64_t> moved = (low >> SHIFT ^ high) & mask;
    low ^= moved << SHIFT, high ^= moved;
    std::memcpy(words + i, &low, sizeof low);
    std::memcpy(words + i + DISTANCE, &high, sizeof high);
  }
}

// Bit j of from[spread(i)] becomes bit i of to[j]; overwrites `from`. By vectors it takes half the time of exchanging
// bits word by word, which would be a tenth of a convolution's weight gradient where there are 64 channels.
SEAL_FN void transpose_spread(uint64_t (&from)[64], uint64_t (&to)[64]) {
  exchange_bits<32, 4>(from, 0x0f0f0f0f0f0f0f0f);
  exchange_bits<16, 2>(from, 0x3333333333333333);
  exchange_bits<8, 1>(from, 0x5555555555555555);
  for (int i = 0; i < 64; ++i) to[i] = from[spread(i)];
  exchange_bits<32, 32>(to, 0x00000000ffffffff);
  exchange_bits<16, 16>(to, 0x0000ffff0000ffff);
  exchange_bits<8, 8>(to, 0x00ff00ff00ff00ff);
}

}  // namespace
